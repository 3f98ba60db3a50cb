"""Scores are right and the same everywhere; the evaluator answers every submit once, whatever happens to its child.

pytest tests/test_eval.py
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MULTILINGUAL, byte_level, metaspace, tiny_llama, tiny_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

import gold_buffer
import gold_data
import gold_eval
import gold_train
from gold_eval import Evaluator, Task

ROOT = Path(gold_eval.__file__).parent
RANKS = gold_train.Ranks(0, 0, 1, 1, torch.device("cpu"))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def student():
    model = tiny_qwen(len(byte_level()), hidden=64)  # 32 per head: vLLM has no smaller attention on the CPU
    model.generation_config.eos_token_id = byte_level().eos_token_id
    return model


def even(text, row):
    """A grader that even random weights pass now and then."""
    return gold_eval.Grade("ok" if len(text) % 2 == 0 else "odd", {"short": len(text) < 20})


@pytest.fixture
def guess(monkeypatch, tmp_path):
    """A task with a grader that random weights pass half of the time."""
    path = write(tmp_path / "guess.jsonl", [{"prompt": "Say " + "a" * (i % 7)} for i in range(24)])
    monkeypatch.setitem(gold_eval.TASKS, "guess", Task(path, even, classes=("ok", "odd"), needs=()))
    return "guess"


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", [{"text": text} for text in MULTILINGUAL])


# ---- scores


def test_an_accuracy_comes_with_n_an_error_and_classes_that_sum_to_n(guess, tmp_path):
    result = gold_eval.evaluate(student(), byte_level(), [guess], max_new_tokens=8, save_to=tmp_path / "answers")[guess]
    p = result["accuracy"]
    assert result["n"] == sum(result["classes"].values()) == 24
    assert 0 < p < 1 and p == result["correct"] / 24 == result["classes"]["ok"] / 24
    assert result["se"] == pytest.approx(math.sqrt(p * (1 - p) / 24))
    answers = [json.loads(line) for line in (tmp_path / "answers" / "guess.jsonl").read_text().splitlines()]
    assert sum(answer["reason"] == "ok" for answer in answers) == result["correct"]
    assert np.mean([answer["truncated"] for answer in answers]) == result["truncated"]
    assert np.mean([len(answer["completion"]) < 20 for answer in answers]) == result["accuracy_short"]


def test_countdown_classes_of_a_model_sum_to_n_whatever_it_writes():
    result = gold_eval.evaluate(student(), byte_level(), ["countdown-mini"], max_samples=30, max_new_tokens=12)
    assert list(result["countdown-mini"]["classes"]) == list(gold_eval.COUNTDOWN_CLASSES)
    assert sum(result["countdown-mini"]["classes"].values()) == 30


def test_greedy_answers_do_not_depend_on_the_batch_size(guess, tmp_path):
    answers = []
    for size in (1, 200, 2**17):
        gold_eval.evaluate(student(), byte_level(), [guess], tmp_path / str(size), max_new_tokens=8, batch_tokens=size)
        answers.append((tmp_path / str(size) / "guess.jsonl").read_text())
    assert answers[0] == answers[1] == answers[2]


def test_an_evaluations_samples_depend_on_neither_the_batch_nor_the_other_questions(guess, tmp_path):
    answers, options = [], dict(num_samples=3, temperature=1.0, max_new_tokens=8)
    for size in (1, 150, 2**17):
        gold_eval.evaluate(student(), byte_level(), [guess], tmp_path / str(size), batch_tokens=size, **options)
        answers.append([json.loads(line) for line in (tmp_path / str(size) / "guess.jsonl").read_text().splitlines()])
    assert answers[0] == answers[1] == answers[2]
    assert len({answer["completion"] for answer in answers[0][:3]}) > 1, "three answers to one question are three draws"
    rows = Path(gold_eval.TASKS[guess].dataset)
    rows.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:5]))
    gold_eval.evaluate(student(), byte_level(), [guess], tmp_path / "few", **options)
    few = [json.loads(line) for line in (tmp_path / "few" / "guess.jsonl").read_text().splitlines()]
    assert few == answers[0][:15]


def test_greedy_answers_of_an_evaluation_and_of_a_training_window_are_the_same_tokens(tmp_path):
    """Countdown's questions through the window buffer as training has it, and through the evaluation."""
    model, tokenizer = student(), byte_level()
    gold_eval.evaluate(model, tokenizer, ["countdown-mini"], tmp_path, max_samples=9, max_new_tokens=12)
    answers = [json.loads(line) for line in (tmp_path / "countdown-mini.jsonl").read_text().splitlines()]
    vocabulary = gold_data.Vocabulary(tokenizer, gold_data.end_ids(tokenizer), len(tokenizer))
    rows = gold_eval.load_task_rows("countdown-mini", 9)
    buffer = gold_buffer.WindowBuffer(
        gold_buffer.Schedule(0, 1.0, 9, 1),
        gold_buffer.RowStream(rows, 0),
        gold_buffer.Encoder(vocabulary, None, 12, False, False), gold_buffer.HFSampler(model),
        gold_buffer.Sampling(12, 0.0, end_ids=vocabulary.ends), model.state_dict, 1,
    )  # fmt: skip
    window = buffer.get(0)
    buffer.close()
    assert len(window.samples) == len(answers) == 9
    for sample in window.samples:
        (answer,) = (a for a in answers if a["prompt"] == tokenizer.decode(sample.prompt_ids))
        assert tokenizer.decode(sample.completion_ids, skip_special_tokens=True) == answer["completion"]
        assert len(sample.completion_ids) == answer["tokens"]


def test_samples_are_repeated_by_the_seed_and_leave_the_caller_as_it_was(guess, tmp_path):
    model, options = student().train(), dict(num_samples=4, temperature=1.0, max_new_tokens=8)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    config, texts = model.generation_config, []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        gold_eval.evaluate(model, byte_level(), [guess], tmp_path / name, seed=seed, **options)
        texts.append((tmp_path / name / "guess.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(4), expected)
    assert model.training and model.generation_config is config


def test_penalties_in_the_models_generation_config_do_not_change_answers(guess, tmp_path):
    model = student()
    for name in ("neutral", "penalised"):
        gold_eval.evaluate(model, byte_level(), [guess], tmp_path / name, max_new_tokens=8)
        model.generation_config.repetition_penalty = 5.0
        model.generation_config.bad_words_ids = [[i] for i in range(100, 400)]
        model.generation_config.min_length = 60
    assert (tmp_path / "neutral/guess.jsonl").read_text() == (tmp_path / "penalised/guess.jsonl").read_text()


def test_a_fork_evaluates_whatever_generates_and_scores(guess, texts):
    class Parrot:
        """Says the last token of the prompt three times and then the end; every token has probability 1/2."""

        limit, window, end_ids = 64, 16, [7]

        def generate(self, requests, sampling):
            assert set(sampling.end_ids) >= {7} and sampling.max_new_tokens == 4
            ids = [[r.prompt_ids[-1]] * 3 + [7] for r in requests]
            return [gold_buffer.Rollout(i, [0.0] * 4, True, 0) for i in ids]

        def score(self, sequences):
            return [np.full(len(sequence) - 1, -math.log(2)) for sequence in sequences]

    found = gold_eval.evaluate(Parrot(), byte_level(), [guess, f"ppl={texts}"], max_new_tokens=4)
    assert found[guess]["tokens"] == 4 and found[guess]["truncated"] == 0
    assert found["ppl"]["perplexity"] == pytest.approx(2)


def test_a_prompt_that_leaves_no_room_is_counted_and_not_an_error(tmp_path, guess):
    path = write(tmp_path / "long.jsonl", [{"prompt": "word " * 600}, {"prompt": "Hi"}])
    result = gold_eval.evaluate(student(), byte_level(), [f"{guess}={path}"], max_new_tokens=4)[guess]
    assert (result["n"], result["too_long"]) == (2, 1)


def test_answers_are_cut_at_the_stop_texts_of_the_task(tmp_path, monkeypatch, guess):
    gold_eval.evaluate(student(), byte_level(), [guess], tmp_path / "a", max_new_tokens=30, max_samples=1)
    text = json.loads((tmp_path / "a/guess.jsonl").read_text())["completion"]
    monkeypatch.setitem(gold_eval.TASKS, guess, Task(gold_eval.TASKS[guess].dataset, even, needs=(), stop=(text[7:9],)))
    gold_eval.evaluate(student(), byte_level(), [guess], tmp_path / "b", max_new_tokens=30, max_samples=1)
    assert json.loads((tmp_path / "b/guess.jsonl").read_text())["completion"] == text[: text.find(text[7:9])]


def test_columns_of_the_rows_named_like_a_records_own_fields_change_no_verdict(tmp_path, monkeypatch):
    row = dict.fromkeys(("reason", "truncated", "tokens", "completion", "classes", "accuracy", "also", "row"), "ok")
    path = write(tmp_path / "rows.jsonl", [row | {"prompt": f"Say {i}", "nums": [i], "target": 1} for i in range(4)])
    never = lambda text, row: gold_eval.Grade("wrong", {"strict": False})
    monkeypatch.setitem(gold_eval.TASKS, "never", Task(path, never, classes=("ok", "wrong"), needs=()))
    result = gold_eval.evaluate(student(), byte_level(), ["never"], tmp_path, max_new_tokens=5)["never"]
    assert result["accuracy"] == result["correct"] == 0 and result["classes"] == {"ok": 0, "wrong": 4}
    assert 1 <= result["tokens"] <= 5 and result["accuracy_strict"] == 0
    answers = [json.loads(line) for line in (tmp_path / "never.jsonl").read_text().splitlines()]
    assert {answer["reason"] for answer in answers} == {"wrong"} and {a["row"]["reason"] for a in answers} == {"ok"}


def test_pass_at_k_counts_questions_with_any_right_answer():
    right = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    assert gold_eval.pass_at(4, right) == pytest.approx(2 / 3)
    assert gold_eval.pass_at(1, right) == pytest.approx(right.mean())
    assert gold_eval.pass_at(2, right) == pytest.approx((0.5 + 0 + 1) / 3)


def test_several_answers_per_question_report_pass_at_k_and_errors_over_questions(guess):
    options = dict(num_samples=6, temperature=1.5, max_new_tokens=6, max_samples=10)
    result = gold_eval.evaluate(student(), byte_level(), [guess], **options)[guess]
    assert sum(result["classes"].values()) == 60
    assert result["accuracy"] <= result["pass@2"] <= result["pass@4"] <= result["pass@6"]
    with pytest.raises(ValueError, match="temperature above 0"):
        gold_eval.evaluate(student(), byte_level(), [guess], num_samples=2)


# ---- perplexity


def plain_perplexity(model, ids, prefix):
    """Token by token, one sequence, no batch, no padding, no window: NLL in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[prefix, *ids[:-1]]])).logits[0].double()
    return -logits.log_softmax(-1)[range(len(ids)), ids].sum().item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 100, 2**17])
def test_perplexity_does_not_depend_on_batch_size_or_padding_side(texts, size, side, monkeypatch):
    tokenizer, model = byte_level(), student()
    monkeypatch.setattr(tokenizer, "padding_side", side)
    result = gold_eval.evaluate(model, tokenizer, [f"ppl={texts}"], batch_tokens=size)["ppl"]
    encoded = [tokenizer(text)["input_ids"] for text in MULTILINGUAL]
    nll = sum(plain_perplexity(model, ids, tokenizer.eos_token_id) for ids in encoded)
    num_bytes = sum(len(text.encode()) for text in MULTILINGUAL)
    assert result["tokens"] == sum(map(len, encoded)) and result["bytes"] == num_bytes
    assert result["perplexity"] == pytest.approx(math.exp(nll / result["tokens"]), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-6)


def test_bits_per_byte_use_the_beginning_token_where_the_tokenizer_has_one(texts):
    tokenizer, model = metaspace(), tiny_llama(len(metaspace()))
    result = gold_eval.evaluate(model, tokenizer, [f"ppl={texts}"])["ppl"]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in MULTILINGUAL]
    nll = sum(plain_perplexity(model, ids, tokenizer.bos_token_id) for ids in encoded)
    assert result["perplexity"] == pytest.approx(math.exp(nll / result["tokens"]), rel=1e-5)


def test_examples_are_for_questions_and_change_no_perplexity(texts):
    plain, asked = (gold_eval.evaluate(student(), byte_level(), [f"ppl={texts}"], few_shot=n)["ppl"] for n in (None, 3))
    assert asked["bits_per_byte"] == plain["bits_per_byte"]


def test_windows_score_every_token_once_with_all_the_context_that_fits():
    for n in (1, 4, 5, 9, 10, 13):
        ids, scored = list(range(100, 100 + n)), []
        for sequence, count in gold_eval.windows(ids, 0, 5):
            assert len(sequence) - 1 <= 5 and (len(sequence) - 1 == 5 or n < 5)
            scored += sequence[len(sequence) - count :]
        assert scored == ids


def test_the_answers_perplexity_is_of_the_answers_tokens_alone(tmp_path):
    rows = [{"question": f"{i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(20, 28)]
    path, tokenizer, model = write(tmp_path / "qa.jsonl", rows), byte_level(), student()
    result = gold_eval.evaluate(model, tokenizer, [f"ppl={path}"])["ppl"]
    whole = answer = answer_tokens = 0.0
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:"
        ids = tokenizer(f"{context} {row['answer']}")["input_ids"]
        whole += plain_perplexity(model, ids, tokenizer.eos_token_id)
        before = len(tokenizer(context)["input_ids"])
        answer += plain_perplexity(model, ids, tokenizer.eos_token_id)
        answer -= plain_perplexity(model, ids[:before], tokenizer.eos_token_id)
        answer_tokens += len(ids) - before
    assert result["perplexity"] == pytest.approx(math.exp(whole / result["tokens"]), rel=1e-5)
    assert result["answer_perplexity"] == pytest.approx(math.exp(answer / answer_tokens), rel=1e-4)
    short = gold_eval.evaluate(model, tokenizer, [f"ppl={path}"], max_length=7)["ppl"]  # over several windows
    assert short["tokens"] == result["tokens"] and short["answer_perplexity"] != result["answer_perplexity"]


def test_wrapped_perplexity_joins_rows_and_drops_the_remainder(texts):
    tokenizer, model = byte_level(), student()
    result = gold_eval.evaluate(model, tokenizer, [f"ppl={texts}"], wrap=32)["ppl"]
    eos = tokenizer.eos_token_id
    stream = [i for text in MULTILINGUAL for i in [*tokenizer(text)["input_ids"], eos]]
    chunks = [stream[i : i + 30] + [eos] for i in range(0, len(stream) // 30 * 30, 30)]
    nll = sum(plain_perplexity(model, chunk, eos) for chunk in chunks)
    assert result["wrapped_perplexity"] == pytest.approx(math.exp(nll / sum(map(len, chunks))), rel=1e-5)


@pytest.mark.parametrize("max_length", [16, 512])
def test_perplexity_equals_lm_evals(texts, max_length):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = byte_level(), student()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=max_length)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(MULTILINGUAL)]
    nll, num_bytes = -sum(lm.loglikelihood_rolling(requests)), sum(len(text.encode()) for text in MULTILINGUAL)
    result = gold_eval.evaluate(model, tokenizer, [f"ppl={texts}"], max_length=max_length)["ppl"]
    theirs = nll / num_bytes / math.log(2)
    print(f"bits per byte: ours {result['bits_per_byte']:.8f}, lm-eval {theirs:.8f}")
    assert result["bits_per_byte"] == pytest.approx(theirs, abs=1e-4)


# ---- what the trainer does with results


RESULTS = {
    "countdown": {"n": 4, "accuracy": 0.5, "se": 0.25, "classes": {"ok": 2, "wrong_value": 2}, "seconds": 1.0},
    "ppl": {"n": 2, "perplexity": 8.0, "bits_per_byte": 1.5, "se": 0.1, "seconds": 1.0},
}


def test_the_headline_is_larger_when_the_model_is_better():
    assert gold_eval.headline(RESULTS) == ("countdown/accuracy", 0.5)
    assert gold_eval.headline(RESULTS, "ppl") == ("-ppl/bits_per_byte", -1.5)
    assert gold_eval.headline(RESULTS, "ppl/perplexity") == ("-ppl/perplexity", -8.0)
    assert gold_eval.headline(RESULTS, "countdown/classes/ok") == ("countdown/classes/ok", 2)
    with pytest.raises(ValueError, match="countdown/accuracy"):
        gold_eval.headline(RESULTS, "gsm8k/accuracy")


def test_results_flatten_to_numbers_and_print_on_one_line():
    assert gold_eval.flatten(RESULTS)["countdown/classes/wrong_value"] == 2
    assert gold_eval.one_line(RESULTS).startswith("countdown accuracy 0.5000 ± 0.2500 (n 4")


def test_a_task_knows_the_names_of_its_numbers(tmp_path, texts, monkeypatch):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    path, long = (
        write(tmp_path / "g.jsonl", rows),
        dict(max_new_tokens=3, max_samples=3, num_samples=3, temperature=1.0),
    )
    for task in ("countdown-mini", f"gsm8k={path}", f"ppl={path}", f"ppl={texts}"):
        found = gold_eval.flatten(gold_eval.evaluate(student(), byte_level(), [task], wrap=16, **long))
        known = gold_eval.metrics(gold_eval.parse_tasks([task]), 3)
        assert set(found) == set(known) - ({name for name in known if "answer_" in name} if texts in task else set())


@pytest.mark.parametrize("metric", ["gsm8k", "countdown/acuracy", "countdown/pass@4", "ppl/accuracy", "", "countdown/"])
def test_a_typo_in_the_metric_of_save_best_is_found_before_anything_is_loaded(metric, tmp_path):
    cfg = gold_train.Config(
        student_model="none", teacher_model="none", eval_tasks=("countdown", "ppl"), save_best=metric,
        output_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"save_best {metric} is not among the numbers .*countdown/accuracy"):
        gold_train.check(cfg, RANKS)
    for right in (
        None,
        "countdown",
        "ppl",
        "countdown/accuracy_at_most",
        "ppl/answer_perplexity",
        "countdown/classes/ok",
    ):
        gold_train.check(gold_train.replace(cfg, save_best=right), RANKS)


# ---- the evaluator, with a child that does what it is told


def write_child(path: Path, body: str) -> str:
    """A script that speaks the child's side of the protocol and executes `body` for every job."""
    head = """
        import json, os, shutil, signal, sys, time
        setup = json.loads(sys.argv[2])
        answers = os.fdopen(os.dup(1), "w", buffering=1)
        for line in sys.stdin:
            job = json.loads(line)
            step = job["step"]
            answer = lambda status, **more: print(json.dumps({"status": status, **more}), file=answers)
            done = lambda **results: answer("ok", results={"t": results})
    """
    path.write_text(textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body).strip(), "    "))
    return str(path)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Run an Evaluator whose child, for a job, executes `body`; its records after close are checked and returned."""
    made = []

    def start(body: str, **options) -> Evaluator:
        monkeypatch.setattr(Evaluator, "script", write_child(tmp_path / "child.py", body))
        made.append(Evaluator(["countdown-mini"], tmp_path / "out", **({"timeout": 30} | options)))
        return made[-1]

    yield start
    for evaluator in made:
        evaluator.close(0)
        assert not evaluator.thread.is_alive() and (evaluator.child is None or evaluator.child.returncode is not None)
        assert len(gold_eval.read_jsonl(tmp_path / "out" / "eval.jsonl")) == evaluator.counts.total()


def statuses(records: list[dict]) -> dict:
    """{step or model: status}; fails if something was answered twice."""
    keys = [r["model"] if r["step"] is None else r["step"] for r in records]
    assert len(keys) == len(set(keys)), keys
    return {key: r["status"] for key, r in zip(keys, records)}


def test_every_submit_is_answered_and_summed_up(child):
    evaluator = child("done(accuracy=0.5)")
    for step in (0, 10):
        evaluator.submit(step, "here", final=step == 10)
    evaluator.submit(None, "elsewhere", model="teacher")
    assert evaluator.close()
    records = evaluator.poll()
    assert statuses(records) == {0: "ok", 10: "ok", "teacher": "ok"}
    assert [r["model"] for r in records] == ["student", "student", "teacher"]
    assert all(r["results"] == {"t": {"accuracy": 0.5}} for r in records)
    assert records[0]["seconds"] > 0  # with the start of the child; the others took less than a millisecond
    assert evaluator.summary() == "evaluations: 3 ok" and evaluator.failures == 0 and evaluator.poll() == []


def test_the_child_is_told_in_one_line_what_to_score_and_another_model_gets_another_child(child):
    evaluator = child("done(pid=os.getpid(), job=job)", policy="wait")
    evaluator.submit(None, "t", model="teacher", revision="main")
    for step in (0, 5):
        evaluator.submit(step, f"candidates/{step}")
    assert evaluator.close()
    teacher, first, second = (r["results"]["t"] for r in evaluator.poll())
    assert teacher["job"] == {"step": None, "model": "teacher", "dir": "t", "revision": "main", "final": True}
    assert second["job"] == {"step": 5, "model": "student", "dir": "candidates/5", "revision": None, "final": False}
    assert teacher["pid"] != first["pid"] == second["pid"]


def test_submit_returns_at_once_while_an_evaluation_runs(child):
    evaluator = child("time.sleep(1); done()")
    slowest = 0.0
    for step in (0, 1, 2, 3):
        start = time.perf_counter()
        evaluator.submit(step, "here")
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.25  # microseconds on an idle machine


def test_a_slow_evaluation_with_five_pending_submits_drops_the_old_ones(child):
    evaluator = child("time.sleep(0.7); done()")
    evaluator.submit(0, "here")
    time.sleep(0.3)  # it is running now
    for step in (1, 2, 3, 4, 5):
        evaluator.submit(step, "here")
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "ok", 1: "dropped", 2: "dropped", 3: "dropped", 4: "dropped", 5: "ok"}


def test_with_the_policy_wait_nothing_is_dropped(child):
    evaluator = child("time.sleep(0.2); done()", policy="wait")
    for step in range(6):
        evaluator.submit(step, "here")
    assert evaluator.close()
    assert set(statuses(evaluator.poll()).values()) == {"ok"}


def test_the_baseline_the_teacher_and_the_final_one_are_never_dropped(child):
    evaluator = child("time.sleep(0.3); done()")
    evaluator.submit(None, "elsewhere", model="teacher")
    evaluator.submit(0, "here")
    for step in (1, 2, 3):
        evaluator.submit(step, "here", final=step == 3)
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {"teacher": "ok", 0: "ok", 1: "dropped", 2: "dropped", 3: "ok"}


def test_a_dead_child_is_a_record_and_the_next_job_gets_a_new_one(child, capsys):
    evaluator = child(
        "if step == 1: os.kill(os.getpid(), signal.SIGSEGV)\nif step == 2: os._exit(3)\ndone()", policy="wait"
    )
    for step in range(4):
        evaluator.submit(step, "here")
    assert evaluator.close()
    records = evaluator.poll()
    assert statuses(records) == {0: "ok", 1: "crashed", 2: "crashed", 3: "ok"}
    assert "exit code -11" in records[1]["error"] and "exit code 3" in records[2]["error"]
    assert evaluator.failures == 2 and "step 1: crashed" in capsys.readouterr().err


def test_a_child_that_dies_between_two_jobs_costs_nothing(child):
    evaluator = child("done(); os._exit(5)", policy="wait")
    for step in range(3):
        evaluator.submit(step, "here")
        while evaluator.counts.total() <= step or evaluator.child.poll() is None:
            time.sleep(0.01)
    assert evaluator.close()
    assert set(statuses(evaluator.poll()).values()) == {"ok"}


def test_a_child_that_hangs_up_but_does_not_end_is_killed(child):
    evaluator = child("answers.close(); os.close(1); time.sleep(1000)", timeout=60)
    start = time.perf_counter()
    evaluator.submit(0, "here")
    assert evaluator.close() and time.perf_counter() - start < 30
    assert statuses(evaluator.poll()) == {0: "crashed"}


def test_an_exception_is_a_record_with_its_traceback(child):
    evaluator = child("if step == 1: answer('error', error='Traceback: boom'); sys.exit(1)\ndone()", policy="wait")
    for step in range(3):
        evaluator.submit(step, "here")
    assert evaluator.close()
    records = evaluator.poll()
    assert statuses(records) == {0: "ok", 1: "error", 2: "ok"} and "boom" in records[1]["error"]


@pytest.mark.parametrize("line", ['{"status": "ok", "resu', '{"status": ]}'])
def test_an_answer_that_is_no_json_is_an_error_and_the_next_job_gets_a_new_child(child, line):
    evaluator = child(f"if step == 1: print({line!r}, file=answers); time.sleep(1000)\ndone()", policy="wait")
    for step in range(3):
        evaluator.submit(step, "here")
    assert evaluator.close()
    records = evaluator.poll()
    assert statuses(records) == {0: "ok", 1: "error", 2: "ok"} and "JSONDecodeError" in records[1]["error"]


def test_what_was_printed_before_the_child_took_over_is_no_answer(child):
    evaluator = child("print('hello from a library', file=answers)\nprint('{}', file=answers)\ndone()")
    evaluator.submit(0, "here")
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "ok"}


def test_a_hanging_child_is_killed_at_its_time_limit(child, tmp_path):
    evaluator = child(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)", timeout=1.5)
    evaluator.submit(0, "here")
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "timeout"}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_child_that_hangs_in_the_middle_of_its_answer_is_killed_too(child):
    evaluator = child("answers.write('{\"status\": '); answers.flush(); time.sleep(1000)", timeout=1.5)
    evaluator.submit(0, "here")
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "timeout"}


def test_three_failures_in_a_row_end_it_loudly_and_the_rest_is_refused(child):
    evaluator = child("os._exit(1)", policy="wait", max_failures=3)
    for step in range(6):
        evaluator.submit(step, "here")
    assert evaluator.close()
    assert list(statuses(evaluator.poll()).values()) == ["crashed"] * 3 + ["refused"] * 3
    assert "given up after 3 failures" in evaluator.summary()


def test_a_failure_between_successes_does_not_add_up(child):
    evaluator = child("if step % 2: os._exit(1)\ndone()", policy="wait", max_failures=2)
    for step in range(6):
        evaluator.submit(step, "here")
    assert evaluator.close()
    assert list(statuses(evaluator.poll()).values()) == ["ok", "crashed"] * 3


def test_close_with_a_deadline_cuts_short_and_still_answers_everything(child):
    evaluator = child("time.sleep(1000)")
    for step in (0, 1, 2):
        evaluator.submit(step, "here")
    start = time.perf_counter()
    assert not evaluator.close(timeout=1)
    assert time.perf_counter() - start < 10
    evaluator.submit(3, "here")
    assert statuses(evaluator.poll()) == {0: "timeout", 1: "dropped", 2: "dropped", 3: "refused"}


def test_a_submit_that_waits_is_answered_when_the_evaluator_gives_up(child):
    evaluator = child("time.sleep(0.3); os._exit(1)", policy="wait", max_failures=1)
    for step in range(4):
        evaluator.submit(step, "here")
    assert evaluator.close()
    assert list(statuses(evaluator.poll()).values()) == ["crashed", "refused", "refused", "refused"]


def test_submits_from_a_child_that_cannot_start_are_errors(child, tmp_path):
    evaluator = child("done()")
    Path(Evaluator.script).write_text("raise SystemExit(7)")
    evaluator.submit(0, "here")
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "crashed"}


def test_no_process_is_left(child, tmp_path):
    evaluator = child(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); done()")
    evaluator.submit(0, "here")
    assert evaluator.close() and evaluator.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_full_disk_costs_the_record_on_disk_and_nothing_else(child, tmp_path, monkeypatch):
    evaluator = child("done()", policy="wait")
    evaluator.submit(0, "here")
    while not evaluator.counts:
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(gold_eval, "append_jsonl", lambda *args: (_ for _ in ()).throw(OSError(28, "no space left")))
        evaluator.submit(1, "here")
        while evaluator.counts.total() < 2:
            time.sleep(0.01)
    assert statuses(evaluator.poll()) == {0: "ok", 1: "ok"}
    assert [r["step"] for r in gold_eval.read_jsonl(tmp_path / "out" / "eval.jsonl")] == [0]
    gold_eval.append_jsonl(tmp_path / "out" / "eval.jsonl", {})  # for the fixture, which counts lines


def test_a_torn_line_costs_no_other_line(tmp_path):
    path = tmp_path / "eval.jsonl"
    for torn in ("", '{"step": 3, "resul', '{"step": 4}', "\ufffd", '{"step": 5, "error": "\u2028'):
        path.write_text('{"step": 1}\n' + torn)
        assert gold_eval.read_jsonl(path)[:1] == [{"step": 1}]
        for step in (7, 8):
            gold_eval.append_jsonl(path, {"step": step})
        assert gold_eval.read_jsonl(path) == [
            {"step": 1},
            *([{"step": 4}] if "4" in torn else []),
            {"step": 7},
            {"step": 8},
        ]
    gold_eval.append_jsonl(tmp_path / "new.jsonl", {"a": "\u2028é"})
    assert gold_eval.read_jsonl(tmp_path / "new.jsonl") == [{"a": "\u2028é"}]
    assert gold_eval.read_jsonl(tmp_path / "none.jsonl") == []


def test_unknown_options_tasks_and_policies_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="there is no task"):
        Evaluator(["nope"], tmp_path)
    with pytest.raises(TypeError, match="max_sample"):
        Evaluator(["countdown"], tmp_path, max_sample=3)
    with pytest.raises(ValueError, match="drop_oldest nor wait"):
        Evaluator(["countdown"], tmp_path, policy="skip")
    with pytest.raises(ValueError, match="no task to evaluate"):
        Evaluator([], tmp_path)
    with pytest.raises(ValueError, match="max_samples 0"):
        Evaluator(["countdown"], tmp_path, max_samples=0)


def test_the_child_knows_nothing_of_torchrun_and_sees_one_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_NAME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("RANKING", "kept")
    env = gold_eval.child_env("cuda:2")
    assert env["CUDA_VISIBLE_DEVICES"] == "7" and env["RANKING"] == "kept"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_NAME"} & set(env)
    assert gold_eval.child_env("cpu")["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(ValueError, match="cuda:3 does not exist"):
        gold_eval.child_env("cuda:3")


# ---- the evaluator with its real child


def save(folder: Path, model) -> Path:
    gold_train.save_model(folder, model, byte_level())
    return folder


def other(seed: int):
    """As `student`, with other weights."""
    model = tiny_qwen(len(byte_level()), hidden=64, seed=seed)
    model.generation_config.eos_token_id = byte_level().eos_token_id
    return model


def numbers(results: dict) -> dict:
    return {k: v for k, v in gold_eval.flatten(results).items() if "seconds" not in k}


@pytest.mark.slow
def test_during_training_afterwards_and_in_process_the_numbers_are_the_same(tmp_path, texts):
    """Child that opens a directory == child that loads the next one == command line == evaluate(), answers included."""
    tasks, options = ["countdown-mini", f"ppl={texts}"], dict(max_samples=12, max_new_tokens=10, batch_tokens=500)
    options |= dict(num_samples=2, temperature=1.0)
    models = [other(9), student(), other(5)]
    tokenizer = AutoTokenizer.from_pretrained(save(tmp_path / "step-0", models[0]))
    evaluator = Evaluator(tasks, tmp_path / "out", policy="wait", **options)
    for step, model in enumerate(models):
        folder = tmp_path / f"step-{step}" if step == 0 else save(tmp_path / f"step-{step}", model)
        evaluator.submit(step, folder, final=step == 2)
    assert evaluator.close()
    expected = [
        gold_eval.evaluate(model, tokenizer, tasks, tmp_path / f"expected-{i}", **options)
        for i, model in enumerate(models)
    ]
    command = [sys.executable, "gold_eval.py", "--model", str(tmp_path / "step-1"), "--task", *tasks, "--device", "cpu"]
    command += [
        "--max-samples",
        "12",
        "--max-new-tokens",
        "10",
        "--batch-tokens",
        "500",
        "--out",
        str(tmp_path / "cli"),
    ]
    command += ["--num-samples", "2", "--temperature", "1", "--plot"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cli = json.loads((tmp_path / "cli" / "results.json").read_text())["models"]["step-1"]
    records = evaluator.poll()
    assert [numbers(r["results"]) for r in records] == [numbers(e) for e in expected]
    assert numbers(cli) == numbers(expected[1]) != numbers(expected[0])
    assert set(numbers(cli)) <= set(gold_eval.metrics(gold_eval.parse_tasks(tasks), 2))
    answers = [tmp_path / "out/completions/step-000001", tmp_path / "cli/completions/step-1", tmp_path / "expected-1"]
    texts = [(folder / "countdown-mini.jsonl").read_text() for folder in answers]
    assert texts[0] == texts[1] == texts[2]
    assert gold_eval.table({"step-1": cli["countdown-mini"]}) in done.stdout
    assert (tmp_path / "cli/report.md").read_text().count("### ") == 2
    assert (tmp_path / "cli/classes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_weights_that_do_not_fit_and_directories_that_are_not_there_are_errors_that_name_them(tmp_path):
    evaluator = Evaluator(["countdown-mini"], tmp_path / "out", policy="wait", max_samples=2, max_new_tokens=2)
    evaluator.submit(0, save(tmp_path / "small", student()))
    evaluator.submit(1, save(tmp_path / "large", tiny_qwen(len(byte_level()), hidden=96)))
    evaluator.submit(2, tmp_path / "gone")
    evaluator.close()
    first, second, third = evaluator.poll()
    assert first["status"] == "ok"
    assert second["status"] == "error" and "model.embed_tokens.weight" in second["error"]
    assert third["status"] == "error" and str(tmp_path / "gone") in third["error"]


@pytest.mark.slow
def test_what_libraries_print_goes_to_the_log_and_not_into_the_answer(tmp_path):
    """Python's print, a write to fd 1 as C libraries do it, and a child of the child."""
    code = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import gold_eval
        def loud(*args, **options):
            print("from Python")
            os.write(1, b'{{"status": "ok", "results": {{"from": "C"}}}}\\n')
            os.system("echo from a shell")
            return {{"t": {{"n": 1}}}}
        gold_eval.open_model, gold_eval.evaluate = (lambda *args: (None, None)), loud
        gold_eval.serve(sys.argv[2])
    """
    (tmp_path / "child.py").write_text(textwrap.dedent(code))
    evaluator = Evaluator(["countdown-mini"], tmp_path / "out")
    evaluator.script = str(tmp_path / "child.py")
    evaluator.submit(0, "here")
    assert evaluator.close()
    assert [r["results"] for r in evaluator.poll()] == [{"t": {"n": 1}}]
    log = (tmp_path / "out" / "eval.log").read_text()
    assert "from Python" in log and '"C"' in log and "from a shell" in log


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, "exception"])
def test_the_child_dies_with_a_parent_that_ends_in_any_way_even_while_it_hangs(tmp_path, end):
    """The child sleeps in C with the interpreter's lock held, so nothing in it could notice."""
    code = f"""
        import ctypes, os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import gold_eval
        def hang(*args, **options):
            open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
            ctypes.PyDLL(None).sleep(1000)
        gold_eval.open_model = hang
        gold_eval.Evaluator.script = __file__
        if sys.argv[1:]:
            gold_eval.serve(sys.argv[2])
        evaluator = gold_eval.Evaluator(["countdown-mini"], {str(tmp_path / "out")!r})
        evaluator.submit(0, "here")
        sys.stdin.read()
        raise RuntimeError("training failed")
    """
    (tmp_path / "parent.py").write_text(textwrap.dedent(code))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it lives
    parent.stdin.close() if end == "exception" else parent.send_signal(end)
    parent.wait(30)
    deadline = time.monotonic() + 10
    while running(pid):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_child_ends_when_nobody_is_left_to_ask(tmp_path):
    setup = {"parent": os.getpid(), "tasks": ["countdown-mini"], "out": str(tmp_path), "device": "cpu", "echo": True}
    setup |= {"options": {}}
    command = [sys.executable, "gold_eval.py", "--serve", json.dumps(setup)]
    done = subprocess.run(command, cwd=ROOT, input=b"", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"")


def running(pid: int) -> bool:
    """False for a process that is gone, or dead and waiting for whoever adopted it."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_gives_the_answers_and_perplexities_of_transformers_after_every_change_of_weights(tmp_path, texts):
    pytest.importorskip("vllm")
    tasks, options = ["countdown-mini", f"ppl={texts}"], dict(max_samples=8, max_new_tokens=8, max_length=256, wrap=64)
    models = [student(), other(5), other(6)]  # tied heads: what a partial reload leaves stale
    evaluator = Evaluator(tasks, tmp_path / "out", engine="vllm", timeout=300, policy="wait", **options)
    for step, model in enumerate(models):
        evaluator.submit(step, save(tmp_path / f"step-{step}", model), final=step == 2)
    assert evaluator.close()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "step-0")
    for step, (model, record) in enumerate(zip(models, evaluator.poll(), strict=True)):
        assert record["status"] == "ok", record["error"]
        expected = gold_eval.evaluate(model, tokenizer, tasks, tmp_path / str(step), **options)
        for key in ("perplexity", "bits_per_byte", "wrapped_perplexity"):
            assert record["results"]["ppl"][key] == pytest.approx(expected["ppl"][key], rel=1e-4)
        answers = [tmp_path / f"out/completions/step-{step:06d}", tmp_path / str(step)]
        ours, theirs = ((folder / "countdown-mini.jsonl").read_text() for folder in answers)
        assert ours == theirs


# ---- how the trainer hands weights over


RESULT = {"accuracy": 0.3, "se": 0.0, "n": 1, "seconds": 0.0}


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Start the records of a run of `student` whose evaluation child executes `body`."""
    save(tmp_path / "student", student())
    made = []

    def start(body: str, step: int = 0, model=None, **changes) -> gold_train.Records:
        head = f"done = lambda x=0.3: answer('ok', results={{'countdown-mini': {RESULT} | {{'accuracy': x}}}})\n"
        monkeypatch.setattr(Evaluator, "script", write_child(tmp_path / "child.py", head + body))
        cfg = gold_train.Config(
            student_model=str(tmp_path / "student"), eval_tasks=("countdown-mini",), output_dir=str(tmp_path / "out"),
            eval_policy="wait", save_best="countdown-mini", **changes,
        )  # fmt: skip
        made.append(gold_train.Records(cfg, RANKS, 9, step, model or student(), byte_level(), print))
        return made[-1]

    yield start
    for run in made:
        run.close()


def memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("gold-")}


def test_the_child_gets_the_weights_of_the_step_even_if_training_goes_on_and_nothing_is_left(records, tmp_path):
    before, model = memory(), student()
    run = records(f"shutil.copytree(job['dir'], {str(tmp_path)!r} + f'/seen-{{step}}'); done()", model=model)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    run.evaluate(5)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    run.close()
    seen = AutoModelForCausalLM.from_pretrained(tmp_path / "seen-5").state_dict()
    assert all(torch.equal(seen[name], value) for name, value in expected.items()) and len(seen) == len(expected)
    assert memory() == before and not (tmp_path / "out" / "candidates").exists()


def test_the_best_candidate_becomes_best_and_the_others_go(records, tmp_path):
    run = records("done({2: 0.2, 4: 0.7, 6: 0.5}.get(step, 0.9))")
    for step in (2, 4, 6):
        run.student.lm_head.weight.data.fill_(float(step))
        run.evaluate(step)
    run.close()
    assert json.loads((tmp_path / "out/best/metric.json").read_text()) == {"step": 4, "countdown-mini": 0.7}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/best")
    assert model.lm_head.weight.unique().tolist() == [4.0] and model.config.tie_word_embeddings
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if "best" in p.name) == ["best"]


def test_where_shared_memory_has_no_room_candidates_wait_in_the_run_folder(records, tmp_path, monkeypatch):
    monkeypatch.setattr(gold_train.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    run = records("open(os.path.realpath(job['dir']) + '.seen', 'w'); done()")
    run.evaluate(5)
    run.evaluator.close()
    assert (tmp_path / "out/candidates/step-000005.seen").exists()
    assert (tmp_path / "out/candidates/step-000005/model.safetensors").exists()
    run.poll()
    assert not (tmp_path / "out/candidates/step-000005").exists()


def test_weights_that_cannot_be_written_are_a_failed_evaluation_and_not_the_end_of_training(records, monkeypatch):
    run = records("done() if os.path.exists(job['dir']) else answer('error', error='nothing there')")
    full = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(gold_train, "save_model", full)
        run.evaluate(5)
    run.evaluate(6)
    run.evaluator.close()
    assert statuses(run.evaluator.poll()) == {0: "ok", 5: "error", 6: "ok"}


def test_a_resumed_run_clears_the_candidates_of_a_killed_one_and_keeps_what_had_just_become_best(records, tmp_path):
    before, candidates = memory(), tmp_path / "out" / "candidates"
    candidates.mkdir(parents=True)
    for step in (2, 4):
        (candidates / f"step-{step:06d}").symlink_to(f"/dev/shm/gold-test-{os.getpid()}-{step}")
        save((candidates / f"step-{step:06d}").resolve(), other(step))
    save(candidates / "step-000006", other(6))
    assert len(memory() - before) == 2
    known = {
        "step": 4,
        "model": "student",
        "status": "ok",
        "results": {"countdown-mini": RESULT},
    }  # written, but not yet seen by training
    gold_eval.append_jsonl(tmp_path / "out" / "eval.jsonl", known)
    run = records("done()", step=4)
    assert (tmp_path / "out/best/model.safetensors").exists()
    run.close()
    assert memory() == before and not candidates.exists()
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out/best").state_dict()
    assert all(torch.equal(weights[k], v) for k, v in other(4).state_dict().items())


def test_a_model_directory_in_another_dtype_is_read_as_it_is_with_its_tied_head(tmp_path):
    for name, model in (("tied", student()), ("untied", tiny_llama(len(byte_level()), hidden=64))):
        gold_train.save_model(tmp_path / name, model, byte_level(), torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in model.parameters()), "the model itself stays"
        read = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert {p.dtype for p in read.parameters()} == {torch.bfloat16}
        assert all(torch.equal(v, model.state_dict()[k].bfloat16()) for k, v in read.state_dict().items())
        size = sum(p.numel() for p in model.parameters()) * 2
        assert size < (tmp_path / name / "model.safetensors").stat().st_size < size + 10_000


# ---- reports


def test_runs_are_read_with_their_late_evaluations_and_drawn_over_steps_and_tokens(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(
            tmp_path / name / "metrics.jsonl",
            [{"step": i, "actor/loss": 1 / i, "num_tokens": 100 * i} for i in (1, 2, 3)],
        )
        ok = [{"step": s, "model": "student", "status": "ok", "results": RESULTS} for s in (0, 2)]
        teacher = {"step": None, "model": "teacher", "status": "ok", "results": RESULTS}
        dropped = {"step": 3, "model": "student", "status": "dropped", "results": {}}
        write(tmp_path / name / "eval.jsonl", [*ok, teacher, dropped])
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "actor/lo')  # a run that is still writing
    run = gold_eval.read_run(tmp_path / "a")
    assert run["loss"] == {1: 1.0, 2: 0.5, 3: 1 / 3} and run["tokens"] == {0: 0, 1: 100, 2: 200, 3: 300}
    assert run["countdown/accuracy"] == {0: 0.5, 2: 0.5}
    assert gold_eval.main(gold_eval.Config(runs=(str(tmp_path / "a"), str(tmp_path / "b")), out=str(tmp_path))) == 0
    assert (tmp_path / "runs.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no metric 'gsm8k/accuracy' .* countdown/accuracy"):
        gold_eval.plot_runs([tmp_path / "a"], tmp_path / "x.png", "gsm8k/accuracy")
    with pytest.raises(FileNotFoundError, match="not the folder of a training run"):
        gold_eval.read_run(tmp_path)


def test_a_report_has_a_table_per_task_and_a_line_per_model():
    text = gold_eval.report({"teacher": GRADED | RESULTS_PPL, "student": GRADED})
    assert text.count("### ") == 2 and text.count("| teacher") == 2 and text.count("| student") == 1
    assert "| pass@4" in text and "4 answers each" in text


GRADED = {
    "gsm8k": {
        "n": 10,
        "samples": 4,
        "correct": 20,
        "accuracy": 0.5,
        "se": 0.1,
        "accuracy_strict": 0.25,
        "pass@4": 0.8,
        "classes": {"ok": 20, "no_answer": 5, "wrong_value": 15},
        "truncated": 0.1,
    }
}
RESULTS_PPL = {"ppl": {"n": 2, "tokens": 9, "perplexity": 8.0, "bits_per_byte": 1.5, "se": 0.1}}


def test_the_command_answers_bad_input_in_one_line():
    command = [sys.executable, "gold_eval.py", "--model", "x", "--task", "nope"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no task 'nope'")
    with pytest.raises(ValueError, match="name a model"):
        gold_eval.main(gold_eval.Config())
    with pytest.raises(FileNotFoundError, match="/no/such/model"):
        gold_eval.main(gold_eval.Config(model=("/no/such/model",)))


def test_one_model_that_cannot_be_scored_fails_the_command_and_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    body = f"os._exit(1) if job['model'] == 'b' else answer('ok', results={GRADED!r})"
    monkeypatch.setattr(Evaluator, "script", write_child(tmp_path / "child.py", body))
    config = gold_eval.Config(
        model=("a", "b", "c"), tasks=("countdown-mini",), out=str(tmp_path), device="cpu", plot=True
    )
    assert gold_eval.main(config) == 1
    printed = capsys.readouterr()
    assert "| a " in printed.out and "| c " in printed.out and "b step None: crashed" in printed.err
    assert (tmp_path / "classes.png").exists()
    gold_eval.plot_classes({"a": RESULTS_PPL}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()  # nothing to draw
