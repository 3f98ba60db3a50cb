"""Which losses have the truth as their minimum: a source whose exact law is known (known_optimum.py).

pytest tests/test_known_optimum.py
"""

import functools

import known_optimum
import pytest
from bench_coverage import LLAMA3, QWEN

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SETTINGS = list(known_optimum.SETTINGS)
BIASED = {  # nats per letter that training adds at least to a student that started at the truth
    "uld": 0.05,
    "hybrid": 0.1,
    "bins": 0.1,
    "alm": 0.02,
    "bins+alm": 0.03,
}
make, make_real = functools.cache(known_optimum.make), functools.cache(known_optimum.make_real)
CUT = {  # what a pre-tokenizer cuts, and how what follows changes that: (pattern, merges, letters)
    "spaces belong to words (GPT-2)": (GPT2, b"  |\n\n|..| a|aa|a.|.a", "a \n."),
    "contractions": (GPT2, b"'t|'r|'re|re|t'|e'", "tre' "),
    "digits by three (Llama-3)": (LLAMA3, b"12|23|123|11|111|22|31|  ", "123 "),
    "one digit, spaces behind words (Qwen)": (QWEN, b"  |.a|aa| .|.\n|\n\n|..", "a1. \n"),
    "groups of three from the right": (r"\d{1,3}(?=(\d{3})*\b)|\D+", b"12|23|123|11|111|22", "123a"),
    "letters of several bytes": (QWEN, b"a\xc3|\xc3\xa9|\xe6\x98|\x8e.|\xc2\xa0", "a\u00e9\u660e\u00a0"),
}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("setting", SETTINGS)
def test_prefix_stays_at_the_truth(setting, beta):
    assert make(setting, texts=64).train("prefix", "truth", beta, steps=25) < 1e-4


@pytest.mark.parametrize("setting", SETTINGS)
def test_prefix_finds_the_truth_from_anywhere(setting):
    assert make(setting, texts=64).train("prefix", "random", steps=120, lr=0.2) < 0.002


@pytest.mark.parametrize("sides", ["teacher", "student", "both"])
@pytest.mark.parametrize("setting", known_optimum.REAL)
def test_prefix_is_nothing_between_two_tokenizers_of_one_law_of_text(setting, sides):
    """Real tokenizers, on either side or both; the law of their tokens is counted, text by text."""
    problem = make_real(setting, sides, texts=64)
    assert len(problem.batch.offset_sample) > 0.7 * len(problem.batch.student_targets), "offsets are used"
    for beta in (0.0, 0.5, 1.0):
        value, gradient = problem.at_the_truth(beta)
        assert abs(value) < 1e-12 and gradient < 1e-10


@pytest.mark.parametrize("sides", ["teacher", "student"])
@pytest.mark.parametrize("what", CUT)
def test_prefix_is_nothing_whatever_the_pre_tokenizer_cuts(what, sides):
    pattern, merges, letters = CUT[what]
    tokenizer, source = known_optimum.byte_pairs(merges, pattern), known_optimum.AnyText(letters, 5)
    both = (tokenizer, None) if sides == "student" else (None, tokenizer)
    problem = known_optimum.Problem.of(source, *both, texts=96)
    assert len(problem.batch.offset_sample) > 0.5 * len(problem.batch.student_targets)
    for beta in (0.0, 1.0):
        value, gradient = problem.at_the_truth(beta)
        assert abs(value) < 1e-12 and gradient < 1e-10


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("setting", ["BPE of 8 merges", "BPE, with ends", "Unigram"])
def test_prefix_finds_the_truth_under_a_real_tokenizer(setting, beta):
    problem = make_real(setting, texts=256)
    assert problem.train("prefix", "truth", beta, steps=25) < 1e-4
    assert problem.train("prefix", "random", beta, steps=200, lr=0.2) < 0.002


@pytest.mark.parametrize("loss", BIASED)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_others_leave_the_truth(setting, loss):
    problem = make(setting)
    assert problem.train(loss, "truth", steps=0) < 1e-9
    assert problem.train(loss, "truth", steps=200) > BIASED[loss]


@pytest.mark.parametrize("setting", SETTINGS)
def test_their_order(setting):
    """prefix, then what learning from samples alone costs (ce), then the likelihood of spans, then the others."""
    problem = make(setting)
    end = {loss: problem.train(loss, "truth", steps=200) for loss in known_optimum.LOSSES if loss != "prefix"}
    exact = make(setting, texts=64).train("prefix", "truth", steps=25)
    assert exact * 100 < end["ce"] < end["alm"] < min(end["bins"], end["hybrid"])
