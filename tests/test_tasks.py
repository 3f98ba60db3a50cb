"""Graders and tasks: what counts as a right answer, and which questions are asked.

pytest tests/test_tasks.py
"""

import ast
import itertools
import json
import random
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

import gold_data
import gold_eval
from gold_data import Row
from gold_eval import COUNTDOWN_CLASSES, Task, boxed, classify, last_answer

TAGS, LEFT, NUMBERS, RIGHT, BALANCE, VALUE = COUNTDOWN_CLASSES[1:]


def tagged(expression: str) -> str:
    return f"<think> hm </think>\n<answer> {expression} </answer>"


# ---- Countdown: (numbers, target, what stands between the tags, verdict)

CASES = [
    # right, however it is spelled
    ((2, 3, 7), 13, "2*3+7", "ok"),
    ((2, 3, 7), 13, "7 + 2 * 3", "ok"),
    ((2, 3, 7), 13, "(2*3)+7", "ok"),
    ((2, 3, 7), 13, "((2*((3))))+(7)", "ok"),
    ((2, 3, 7), 13, "2*3+7 = 13", "ok"),
    ((2, 3, 7), 13, "2*3+7 = 12+1", "ok"),
    ((2, 3, 7), 13, "2*3+7 = 26/2", "ok"),
    ((2, 3, 7), 13, "2*3+7 =", "ok"),
    ((2, 3, 7), 13, "2*3+7.", "ok"),
    ((2, 3, 7), 13, "2*3+7 = 13.", "ok"),
    ((2, 3, 7), 13, "\n2*3\n+7\n", "ok"),
    ((2, 3, 7), 13, "2\u00a0*\t3 + 7", "ok"),
    ((2, 3, 7), 13, "2 × 3 + 7", "ok"),
    ((2, 3, 7), 13, "2 · 3 ＋ 7 ＝ 13", "ok"),
    ((2, 3, 7), 13, "2 ∗ 3 + 7", "ok"),
    ((2, 3, 7), 13, "［2*3］+7".translate({0xFF3B: "[", 0xFF3D: "]"}), "ok"),
    ((2, 3, 7), 13, "（2*3）+7", "ok"),
    ((2, 3, 7), 13, "{2*3}+7", "ok"),
    ((2, 3, 7), 13, r"2 \times 3 + 7", "ok"),
    ((2, 3, 7), 13, r"\(2 \cdot 3 + 7\)", "ok"),
    ((2, 3, 7), 13, r"\[ 2 \ast 3 + 7 = 13 \]", "ok"),
    ((2, 3, 7), 13, "$2*3+7$", "ok"),
    ((2, 3, 7), 13, "$$2*3+7=13$$", "ok"),
    ((2, 3, 7), 13, r"\boxed{2*3+7}", "ok"),
    ((2, 3, 7), 13, r"\boxed{2 \times 3 + 7 = 13}", "ok"),
    ((2, 3, 7), 13, r"\left(2*3\right)+7", "ok"),
    ((8, 2, 9), 13, r"\frac{8}{2} + 9", "ok"),
    ((8, 2, 9), 13, r"\dfrac{8}{2} + 9", "ok"),
    ((8, 2, 4, 3), 4, r"\frac{\frac{8}{2}}{4} + 3", "ok"),
    ((8, 2, 9), 13, r"8 \div 2 + 9", "ok"),
    ((8, 2, 9), 13, "8 ÷ 2 + 9", "ok"),
    ((8, 2, 9), 13, "8 ∕ 2 + 9", "ok"),
    ((20, 7), 13, "20 − 7", "ok"),
    ((20, 7), 13, "20 – 7", "ok"),
    ((20, 7), 13, "20—7", "ok"),
    ((2, 3, 7), 13, "-(-7)+2*3", "ok"),
    ((2, 3, 7), 13, "+2*3++7", "ok"),
    ((2, 3, 7), 13, "7--2*3", "ok"),
    ((5, 2, 3), -10, "-5*2/(3-2-(3-3)-0)", NUMBERS),
    ((2, 3, 7), 8, "2-7*-1", NUMBERS),
    ((1, 2, 3), 1, "3/(1+2)", "ok"),
    ((1, 3, 4, 6), 24, "6/(1-3/4)", "ok"),  # fractions on the way are exact
    ((3, 3, 7, 7), 24, "7*(3+3/7)", "ok"),
    ((7, 5), 0, "7-7", NUMBERS),
    ((5, 5), 0, "5-5", "ok"),
    ((0, 4), 4, "0+4", "ok"),
    # no answer at all
    ((2, 3, 7), 13, "", TAGS),
    ((2, 3, 7), 13, "   \n ", TAGS),
    ((2, 3, 7), 13, "$$", TAGS),
    ((2, 3, 7), 13, ".", TAGS),
    # not an expression
    ((2, 3), 8, "2**3", LEFT),
    ((2, 3), 8, "2* *3", LEFT),
    ((2, 3), 8, "2^3", LEFT),
    ((7, 2), 3, "7//2", LEFT),
    ((7, 2), 1, "7%2", LEFT),
    ((1, 5, 2), 3, "1.5*2", LEFT),
    ((1, 0, 5), 5, "1.0*5", LEFT),
    ((7, 2, 3), 13, "7.0+2*3", LEFT),
    ((2, 3, 7), 13, "02*3+7", LEFT),
    ((2, 3, 7), 13, "2x3+7", LEFT),
    ((2, 3, 7), 13, "2(3)+7", LEFT),
    ((2, 3), 6, "(2)(3)", LEFT),
    ((2, 3), 6, "2 3", LEFT),
    ((13,), 13, "1 3", LEFT),
    ((13,), 13, "1_3", LEFT),
    ((16,), 16, "0x10", LEFT),
    ((100,), 100, "1e2", LEFT),
    ((1000,), 1000, "1,000", LEFT),
    ((2, 3, 7), 13, "２*３+７", LEFT),
    ((2, 3, 7), 13, "the answer is 2*3+7", LEFT),
    ((2, 3, 7), 13, "2*3+7 equals 13", LEFT),
    ((2, 3, 7), 13, "2*3+7 = 13 = 13", LEFT),  # cut at the last =
    ((2, 3, 7), 13, "= 13", LEFT),
    ((2, 3, 7), 13, "2*3+", LEFT),
    ((2, 3, 7), 13, "*2*3+7", LEFT),
    ((2, 3, 7), 13, "(2*3+7", LEFT),
    ((2, 3, 7), 13, "2*3+7)", LEFT),
    ((2, 3, 7), 13, "()", LEFT),
    ((2, 3, 7), 13, "2*3+7; import os", LEFT),
    ((2, 3, 7), 13, "__import__('os').system('true')", LEFT),
    ((7, 3), 0, "7/(3-3)", LEFT),
    ((7, 0), 0, "7/0", LEFT),
    ((2, 3, 7), 13, r"\sqrt{4}*3+7", LEFT),
    ((2, 3, 7), 13, "2\u200b*3+7", LEFT),
    ((2, 3, 7), 13, "²*3+7", LEFT),
    # the wrong numbers
    ((2, 3, 7), 13, "13", NUMBERS),
    ((2, 3, 7), 13, "13 = 2*3+7", NUMBERS),  # only the left side is counted
    ((2, 3, 7), 13, "2*3+7+0", NUMBERS),
    ((2, 3, 7), 13, "2*3+7*1", NUMBERS),
    ((2, 3, 7), 9, "2+7", NUMBERS),
    ((2, 3, 7), 13, "2+2+2+7", NUMBERS),
    ((2, 3, 7), 13, r"\frac{2*3}{1}+7", NUMBERS),
    ((2, 2, 3), 6, "2*3", NUMBERS),
    ((23, 7), 13, "2*3+7", NUMBERS),
    # a bad right side
    ((2, 3, 7), 13, "2*3+7 = ?", RIGHT),
    ((2, 3, 7), 13, "2*3+7 = thirteen", RIGHT),
    ((2, 3, 7), 13, "2*3+7 = 13.0", RIGHT),
    ((2, 3, 7), 13, "2*3+7 = 1/0", RIGHT),
    ((2, 3, 7), 13, "2*3+7 = 013", RIGHT),
    # does not balance, or the wrong value
    ((2, 3, 7), 13, "2*3+7 = 14", BALANCE),
    ((2, 3, 7), 14, "2*3+7 = 14", BALANCE),
    ((2, 3, 7), 14, "2*3+7", VALUE),
    ((2, 3, 7), 14, "2*3+7 = 13", VALUE),
    ((2, 3, 7), 13, "2/3+7", VALUE),
    ((10, 3, 3), 10, "10/3*3", "ok"),
    ((2, 3, 7), 13, "2*3+7" + " " * 2000 + "+1", LEFT),  # too long to be read is not the same as cut
    ((10, 3), 3, "10/3", VALUE),
]


@pytest.mark.parametrize("nums, target, expression, verdict", CASES)
def test_the_countdown_grader_says(nums, target, expression, verdict):
    assert classify(tagged(expression), nums, target) == verdict


def test_the_table_of_edge_cases_is_long_enough_and_uses_every_class():
    assert len(CASES) >= 60
    assert {verdict for *_, verdict in CASES} == set(COUNTDOWN_CLASSES)


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("2*3+7", TAGS),
        ("<answer>2*3+7", TAGS),
        ("2*3+7</answer>", TAGS),
        ("</answer>2*3+7<answer>", TAGS),
        ("< answer>2*3+7</ answer>", TAGS),
        ("<ANSWER>2*3+7</Answer>", "ok"),
        ("</answer><answer>2*3+7</answer>", "ok"),
        ("<answer>junk</answer> or <answer>2*3+7</answer>", "ok"),
        ("<answer>2*3+7</answer> or <answer>junk</answer>", LEFT),
        ("<answer>2*3+7</answer> or <answer> </answer>", TAGS),
        ("<answer>2*3+7</answer> or <answer>1+", "ok"),
        ("<answer>junk <answer>2*3+7</answer>", LEFT),  # the first opening tag counts, as in the reference's pattern
        ("<answer>2*3+7</answer></answer>", "ok"),
        ("the <answer> </answer> tags hold <answer>2*3+7</answer>. Done!", "ok"),
    ],
)
def test_the_last_complete_pair_of_tags_is_the_answer(text, verdict):
    assert classify(text, (2, 3, 7), 13) == verdict


def test_at_most_forgives_unused_numbers_and_nothing_else():
    for nums, target, expression, verdict in CASES:
        lenient = classify(tagged(expression), nums, target, "at_most")
        assert lenient == verdict or verdict == NUMBERS
    assert classify(tagged("2+7"), (2, 3, 7), 9, "at_most") == "ok"
    assert classify(tagged("2+2+7"), (2, 3, 7), 11, "at_most") == NUMBERS
    assert classify(tagged("5+4"), (2, 3, 7), 9, "at_most") == NUMBERS
    grade = gold_eval.grade_countdown(tagged("2+7"), Row((), meta={"nums": [2, 3, 7], "target": 9}))
    assert grade.reason == NUMBERS and grade.also == {"at_most": True}


def expressions(nums: tuple[int, ...]) -> dict[Fraction, str]:
    """Brute force: every value that all these numbers can make, with one expression for it."""
    if len(nums) == 1:
        return {Fraction(nums[0]): str(nums[0])}
    found = {}
    for size in range(1, len(nums)):
        for left in itertools.combinations(range(len(nums)), size):
            sides = [
                expressions(tuple(nums[i] for i in range(len(nums)) if (i in left) == mine)) for mine in (True, False)
            ]
            for (a, x), (b, y) in itertools.product(sides[0].items(), sides[1].items()):
                found[a + b] = f"({x} + {y})"
                found[a - b] = f"({x} - {y})"
                found[a * b] = f"({x} * {y})"
                if b:
                    found[a / b] = f"({x} / {y})"
    return found


def test_every_solution_of_a_brute_force_solver_is_right_and_no_changed_one_is():
    rng = random.Random(0)
    for nums in [(1, 2), (3, 8, 8), (2, 3, 7), (4, 9, 25), (1, 3, 4, 6)]:
        solutions = list(expressions(nums).items())
        for value, text in rng.sample(solutions, min(len(solutions), 150)):
            if value.denominator == 1:
                assert classify(tagged(f"{text} = {value}"), nums, int(value)) == "ok", text
                assert classify(tagged(text), nums, int(value) + 1) == VALUE
                assert classify(tagged(f"{text} = {value + 1}"), nums, int(value)) == BALANCE
                i = rng.randrange(len(nums))
                changed = (*nums[:i], nums[i] + 50, *nums[i + 1 :])
                assert classify(tagged(text), changed, int(value)) == NUMBERS
            else:
                assert classify(tagged(text), nums, int(value)) == VALUE


def test_every_built_in_puzzle_is_solved_by_its_own_completion():
    for mini in (False, True):
        for row in gold_data.make_countdown(100, mini=mini, test=True):
            assert classify(row["completion"], row["nums"], row["target"]) == "ok"


def test_no_text_makes_the_grader_raise_or_take_ten_milliseconds():
    rng = random.Random(1)
    pieces = list("0123456789+-*/()=. \n[]{}$\\,^%xX_eE") + ["\\frac", "\\boxed{", "\\times", "×", "÷", "½", "٣", "²"]
    pieces += ["<answer>", "</answer>", "\u200b", "\ud800", "999999999999", "**", "//", "((((", "))))", "\\frac{1}{"]
    slowest = 0.0
    for _ in range(4000):
        middle = "".join(rng.choice(pieces) for _ in range(rng.randrange(120)))
        text = tagged(middle) if rng.random() < 0.9 else middle
        start = time.thread_time()
        verdict = classify(text, (2, 3, 7), 13, rng.choice(("exact", "at_most")))
        slowest = max(slowest, time.thread_time() - start)
        assert verdict in COUNTDOWN_CLASSES
    assert slowest < 0.01, slowest


@pytest.mark.parametrize(
    "middle",
    [
        "9" * 100_000,
        "9*" * 50_000 + "9",
        "(" * 100_000,
        "(" * 150 + "1" + ")" * 149,
        "-" * 299 + "1",
        "999999999999*" * 22 + "1",
        "1/" * 149 + "1",
        "\\frac{" * 10_000,
        "\\frac{1}{2}" * 10_000,
        "\\boxed{" * 40 + "1" + "}" * 40,
        "<answer>" * 30_000,
        "9**9**9**9",
        " " * 100_000 + "2*3+7",
        "=" * 100_000,
    ],
    ids=range(14),
)
def test_huge_answers_take_less_than_ten_milliseconds(middle):
    start = time.thread_time()
    verdict = classify(tagged(middle), (2, 3, 7), 13)
    assert time.thread_time() - start < 0.01
    assert verdict in (LEFT, NUMBERS, "ok")


def test_a_thousand_unclosed_tags_are_linear():
    start = time.thread_time()
    assert last_answer("<answer>" * 50_000) is None
    assert last_answer("</answer>" * 50_000) is None
    assert time.thread_time() - start < 0.5


def test_the_grader_has_no_eval_and_no_ast():
    tree = ast.parse(Path(gold_eval.__file__).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"eval", "exec", "compile", "literal_eval"} and "ast" not in imported


REFERENCE = {  # the published table: correct and the six classes in order; each line sums to 10,000
    "Qwen2.5-7B-Instruct": (3336, 2186, 52, 2408, 2, 3, 2013),
    "Qwen2.5-1.5B-Instruct": (1264, 2295, 112, 3997, 8, 33, 2291),
    "checkpoint-500": (5394, 4329, 156, 91, 0, 17, 13),
}


def test_the_table_has_the_layout_of_the_reference_and_its_lines_sum_to_n():
    results = {}
    for model, counts in REFERENCE.items():
        p = counts[0] / sum(counts)
        results[model] = {
            "n": 10_000,
            "correct": counts[0],
            "accuracy": p,
            "se": (p * (1 - p) / 10_000) ** 0.5,
            "classes": dict(zip(COUNTDOWN_CLASSES, counts)),
            "truncated": 0.0,
        }
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in gold_eval.table(results).splitlines()]
    assert lines[0] == ["model", "correct", "accuracy", *COUNTDOWN_CLASSES[1:], "truncated"]
    assert lines[2][:3] == ["Qwen2.5-7B-Instruct", "3336", "33.36 ± 0.47 %"]
    assert all(int(line[1]) + sum(map(int, line[3:9])) == 10_000 for line in lines[2:])


# ---- mathematics


FORMS = [  # (how a number may be written at the end of an answer, its value; None: no number)
    ("72", 72),
    ("72.", 72),
    ("72.0", 72),
    ("072", 72),
    ("**72**", 72),
    ("72!", 72),
    ("(72)", 72),
    ("n=72", 72),
    # thousands
    ("1,234", 1234),
    ("1,234,567.5", 1234567.5),
    ("1{,}234", 1234),
    ("1{,}234{,}567", 1234567),
    ("1\\,234", 1234),
    ("1\\;234", 1234),
    ("1,\\!234", 1234),
    ("1 000 000", 1000000),
    ("1 000", 1000),
    ("1\u00a0000\u202f000", 1000000),
    ("1_000", 1000),
    # signs
    ("-18", -18),
    ("- 18", -18),
    ("\u221218", -18),
    ("\u2212 18", -18),
    ("\u201318", -18),
    ("\uff0d18", -18),
    ("\ufe6318", -18),
    ("+18", 18),
    ("= -18", -18),
    ("= - 18", -18),
    ("(-18)", -18),
    ("-$18", -18),
    ("$-18", -18),
    ("\\$-18", -18),
    ("-\\$18", -18),
    ("x-9", 9),
    ("twenty-9", 9),
    # fractions of one
    (".5", 0.5),
    ("-.5", -0.5),
    ("$.50", 0.5),
    ("0.50", 0.5),
    ("1.", 1),
    ("v.5", 5),
    ("\\frac{1}{2}", 0.5),
    ("\\dfrac{1}{2}", 0.5),
    ("\\tfrac{ 1 }{ 2 }", 0.5),
    ("\\frac12", 0.5),
    ("\\frac{1}2", 0.5),
    ("-\\frac{1}{2}", -0.5),
    ("- \\frac{1}{2}", -0.5),
    ("\\frac{-1}{2}", -0.5),
    ("\\frac{1,000}{2}", 500),
    ("2\\frac{1}{2}", 2.5),
    ("2 \\frac{1}{2}", 2.5),
    ("-2\\frac{1}{2}", -2.5),
    ("1/2", 0.5),
    ("1 / 2", 0.5),
    ("-1/2", -0.5),
    ("2 1/2", 2.5),
    # units and marks around it
    ("$72", 72),
    ("\\$72", 72),
    ("€72", 72),
    ("72€", 72),
    ("USD72", 72),
    ("72 dollars", 72),
    ("72%", 72),
    ("72\\%", 72),
    ("72cm", 72),
    ("72 cm^2", 72),
    ("72 cm^{2}", 72),
    ("72 cm²", 72),
    ("72 m2", 72),
    ("72\\text{ cm}^3", 72),
    ("72\\ \\text{m}^{2}", 72),
    ("72\\,\\mathrm{km}", 72),
    ("72^\\circ", 72),
    ("72^{\\circ}", 72),
    ("72°", 72),
    ("72 km/h", 72),
    ("\\text{72}", 72),
    ("\\mathbf{72}", 72),
    ("\\(72\\)", 72),
    ("\\[ 72 \\]", 72),
    ("$72$", 72),
    # none
    ("", None),
    ("seventy-two", None),
    ("²", None),
    ("x^2", None),
]


SEVERAL = [  # of several numbers the last one counts
    ("1,234, 5", 5),
    ("10, 20, 300", 300),
    ("12 34", 34),
    ("1 0000", 0),
    ("48/2 = 24", 24),
    ("16-9", 9),
    ("16 - 9", 9),
    ("16\u20139", 9),
    ("16 \u2212 9", 9),
    ("16 - \\frac{1}{2}", 0.5),
    ("(3+4)-9", 9),
    ("(3+4) - 9", 9),
    ("2 apples\n- 18 pears", 18),  # an item of a list
    ("7 and 1/0", None),  # no number, and 7 is not the answer either
    ("7 and \\frac{1}{0}", None),
    ("7 and " + "9" * 5000, None),  # Python refuses to read 4,300 digits
]


@pytest.mark.parametrize("text, value", [*FORMS, *SEVERAL])
def test_a_number_is_read_in_all_these_forms(text, value):
    expected = None if value is None else Fraction(value)
    assert gold_eval.number(text) == expected
    before = 17 if (text, None) in FORMS else expected
    assert gold_eval.number(f"17 were too few. So it is {text}") == before
    answer = Row((), answer=str(Fraction(72) if value is None else expected))
    contexts = ["It is \\boxed{%s}.", "It is \\boxed {%s}; 5 more than \\boxed{67}, no, \\boxed{ %s }, not 67!"]
    for context in contexts + ["#### %s"] * ((text, value) in FORMS):
        reason = gold_eval.grade_gsm8k(context.replace("%s", text), answer).reason
        assert (reason == "ok") == (value is not None), context


@pytest.mark.parametrize(
    "text, answer, reason, strict",
    [
        ("so 48 / 2 = 24 #### 72", "72", "ok", True),
        ("#### 72\n", "72", "ok", True),
        ("####72", "72", "ok", True),
        ("#### $1,072.00", "1072", "ok", True),
        ("#### -5", "-5", "ok", True),
        ("#### - 5", "-5", "ok", True),
        ("#### .5", "0.50", "ok", True),
        ("#### 72. Bye 3", "72", "ok", True),
        ("It is 72.", "72", "ok", False),
        ("It is \\boxed{72}", "72", "ok", False),
        ("It is \\boxed{72} as 70 + 2 = 72 and not 5", "72", "ok", False),
        ("\\boxed{5}, or rather \\boxed {72} of 100", "72", "ok", False),
        ("\\boxed{72} of 100, and \\boxed{5", "72", "ok", False),  # the last one was cut
        ("\\boxed{5} #### 72", "72", "ok", True),
        ("She pays $1,000", "1,000", "ok", False),
        ("16-9", "9", "ok", False),
        ("#### 71", "72", "wrong_value", False),
        ("71 or 73", "72", "wrong_value", False),
        ("no idea", "72", "no_answer", False),
        ("#### unclear, maybe 72", "72", "ok", False),
        ("\\boxed{x}, 72", "72", "ok", False),
    ],
)
def test_gsm8k_reads_the_marked_number_or_else_the_boxed_or_else_the_last(text, answer, reason, strict):
    grade = gold_eval.grade_gsm8k(text, Row((), answer=answer))
    assert (grade.reason, grade.also["strict"]) == (reason, strict)


@pytest.mark.parametrize(
    "text, answer, reason",
    [
        ("\\boxed{033}", 33, "ok"),
        ("\\boxed{33} and then 7", "033", "ok"),
        ("the answer is 33", "33", "ok"),
        ("\\boxed{n = 33}", "33", "ok"),
        ("\\boxed{34}", "33", "wrong_value"),
        ("\\boxed{7}, no: \\boxed {33}, which is 3 * 11", 33, "ok"),
        ("\\boxed{33}", "\\boxed{33}", "ok"),
        ("\\boxed{33.0}", "33.0", "ok"),
        ("\\boxed{33}", 33.0, "ok"),
        ("\\boxed{33}", "$33$.", "ok"),
        ("\\boxed{1{,}033}", "1,033", "ok"),
        ("\\boxed{33\\text{ cm}^2}", "33", "ok"),
        ("none", "33", "no_answer"),
    ],
)
def test_aime_compares_integers(text, answer, reason):
    assert gold_eval.grade_integer(text, Row((), answer=answer)).reason == reason


@pytest.mark.parametrize(
    "task, row",
    [
        ("aime", {"problem": "?", "answer": "unknown"}),
        ("aime", {"problem": "?", "answer": "2.5"}),
        ("aime", {"problem": "?", "answer": ""}),
        ("gsm8k", {"question": "?", "answer": "#### many"}),
        ("math500", {"problem": "?", "answer": "\\boxed{}"}),
        ("openr1", {"problem": "?", "solution": "there is no box"}),
        ("countdown", {"prompt": "?", "nums": [1, "b"], "target": 3}),
        ("countdown", {"prompt": "?", "nums": [1, 2], "target": "three"}),
        ("countdown", {"prompt": "?", "nums": 7, "target": 3}),
    ],
)
def test_an_answer_that_the_grader_cannot_read_is_found_before_anything_is_generated(task, row, tmp_path):
    pytest.importorskip("math_verify")
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=rf"task {task}: the grader cannot read the answer of row '\?' of {path}"):
        gold_eval.evaluate(None, None, [f"{task}={path}"], few_shot=0)


@pytest.mark.parametrize("grade", [gold_eval.grade_gsm8k, gold_eval.grade_integer, gold_eval.grade_math])
def test_no_text_makes_a_grader_of_mathematics_raise(grade):
    pytest.importorskip("math_verify")
    rng = random.Random(2)
    pieces = list("0123456789+-*/()=. \n{}$\\,^x%") + [
        "\\boxed{",
        "\\frac{",
        "#### ",
        "\\text{",
        "٣",
        "²",
        "1,000",
        "\ud800",
    ]
    texts = ["".join(rng.choice(pieces) for _ in range(rng.randrange(40))) for _ in range(60)]
    texts += ["9" * 5000, "#### " + "9" * 5000, "\\boxed{" + "9" * 5000 + "}", "\\boxed{\\frac{1}{0}}", "\\boxed{"]
    for text in texts:
        assert grade(text, Row((), answer="7")).reason in gold_eval.MATH_CLASSES


def test_the_last_box_is_read_with_balanced_braces():
    assert boxed("\\boxed{1} then \\boxed{\\frac{1}{2}} .") == "\\frac{1}{2}"
    assert boxed("none") is None and boxed("\\boxed{1") is None and boxed("\\boxed{}") == ""
    assert boxed("\\boxed{1} and \\boxed {2} and \\boxed{3") == "2" and boxed("\\boxed\n{ {4} }}}") == " {4} "
    assert boxed("\\boxed{\\boxed{5}}") == "5" and boxed("}{ \\boxed{6}") == "6"


MATHEMATICS = [
    ("\\boxed{\\frac{1}{2}}", "0.5", "ok"),
    ("\\boxed{\\dfrac{1}{2}}", "\\frac{1}{2}", "ok"),
    ("\\boxed{\\text{east}}", "east", "ok"),
    ("\\boxed{1,234}", "1234", "ok"),
    ("\\boxed{90^\\circ}", "90", "ok"),
    ("\\boxed{10\\%}", "10", "ok"),
    ("\\boxed{\\left( 3, 4 \\right)}", "(3,4)", "ok"),
    ("\\boxed{2}", "3", "wrong_value"),
    ("I do not know", "3", "no_answer"),
    ("\\boxed{5}, no, rather \\boxed{7}", "7", "ok"),
    ("\\boxed{7}, no, rather \\boxed{5}", "7", "wrong_value"),
    ("\\boxed{7} because $x = 5$ and 3", "7", "ok"),
    ("\\boxed {7}", "7", "ok"),
    ("\\boxed{7}, and then \\boxed{5", "7", "ok"),
    ("\\boxed{7}", "\\boxed{7}", "ok"),
    ("\\boxed{1{,}234}", "1234", "ok"),
    ("\\boxed{\u22125}", "-5", "ok"),
    ("\\boxed{- 5}", "-5", "ok"),
    ("\\boxed{.5}", "\\frac12", "ok"),
    ("\\boxed{12\\text{ cm}^2}", "12", "ok"),
]


def test_tasks_of_mathematics_are_refused_at_once_where_math_verify_is_not_installed(monkeypatch):
    found = gold_eval.importlib.util.find_spec
    monkeypatch.setattr(gold_eval.importlib.util, "find_spec", lambda name: name != "math_verify" and found(name))
    with pytest.raises(ValueError, match="math500 .* pip install"):
        gold_eval.parse_tasks(["gsm8k", "math500"])
    assert gold_eval.parse_tasks(["gsm8k", "aime"])


@pytest.mark.parametrize(
    "text, answer, reason",
    [
        *MATHEMATICS,
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "ok"),
        ("Thus $x^2+1$.", "1+x^2", "ok"),
        ("\\boxed{7}" + " indeed." * 2000, "7", "ok"),
    ],
)
def test_mathematics_with_math_verify_compares_values(text, answer, reason):
    pytest.importorskip("math_verify")
    assert gold_eval.grade_math(text, Row((), answer=answer)).reason == reason


def test_a_hopeless_power_tower_is_given_up_in_bounded_time():
    pytest.importorskip("math_verify")
    start = time.perf_counter()
    assert gold_eval.grade_math("\\boxed{9^{9^{9^{9}}}}", Row((), answer="10")).reason == "wrong_value"
    assert time.perf_counter() - start < 20


def test_mathematics_outside_the_main_thread_is_refused_because_nothing_would_bound_its_time():
    pytest.importorskip("math_verify")
    caught = []

    def grade():
        with pytest.raises(RuntimeError, match="main thread"):
            gold_eval.grade_math("\\boxed{1}", Row((), answer="1"))
        caught.append(True)

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert caught


def test_without_an_answer_column_the_box_of_the_solution_is_the_reference():
    row = Row((), completion="so it is \\boxed{42}")
    assert gold_eval.grade_math("\\boxed{42}", row).reason == "ok"


# ---- tasks


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="countdown, countdown-mini.*gsm8k"):
        gold_eval.parse_tasks(["countdwon"])
    with pytest.raises(ValueError, match="twice"):
        gold_eval.parse_tasks(["ppl=a.txt", "ppl=b.txt"])


def test_a_task_reads_a_local_file_of_the_same_schema(tmp_path):
    path = write(
        tmp_path / "g.jsonl", [{"question": f"{i} + 1?", "answer": f"<<{i}+1>>\n#### {i + 1}"} for i in range(9)]
    )
    task = gold_eval.parse_tasks([f"gsm8k={path}"])[0]
    rows = gold_eval.load_task_rows(task)
    assert (task.name, task.dataset) == ("gsm8k", path)
    assert [row.answer for row in rows] == ["6", "7", "8", "9"]  # the first five rows are the examples
    assert len(gold_eval.load_task_rows(replace(task, few_shot=0))) == 9
    with pytest.raises(ValueError, match="task gsm8k: no question of .* left besides the 9 examples: .*--few-shot 0"):
        gold_eval.load_task_rows(replace(task, few_shot=9))
    with pytest.raises(ValueError, match="has 9 solved examples, not 10: .*--few-shot 9"):
        gold_eval.load_task_rows(replace(task, few_shot=10))


def test_few_shot_examples_are_turns_before_the_question_and_never_the_question(tmp_path):
    path = write(tmp_path / "g.jsonl", [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(7)])
    task = gold_eval.parse_tasks([f"gsm8k={path}"])[0]
    examples, row = gold_eval.few_shot_rows(task), gold_eval.load_task_rows(task)[0]
    messages = gold_eval.task_messages(task, row, examples)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 5 + ["user"]
    assert messages[1]["content"] == "#### 1" and messages[-1]["content"] == "5 + 1?"


def test_the_instruction_stands_behind_the_question_but_not_in_the_rows_for_decontamination(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"problem": "1+1?", "solution": "\\boxed{2}", "answer": "2"}])
    task = gold_eval.parse_tasks([f"math500={path}"])[0]
    (row,) = gold_eval.load_task_rows(task)
    assert row.prompt[-1]["content"] == "1+1?"
    assert "\\boxed{}" in gold_eval.task_messages(task, row, [])[-1]["content"]


def test_the_same_seed_asks_the_same_questions_and_another_seed_others(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"problem": f"{i}?", "answer": i} for i in range(50)])
    keys = [[row.key for row in gold_eval.load_task_rows(f"aime={path}", 10, seed)] for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2] and len(set(keys[0])) == 10


def test_built_in_countdown_has_as_many_questions_as_asked_for():
    rows = gold_eval.load_task_rows("countdown-mini", 700)
    assert len({row.key for row in rows}) == 700
    assert [row.key for row in gold_eval.load_task_rows("countdown-mini", 5)] == [row.key for row in rows[:5]]


def test_rows_that_lack_what_the_task_needs_are_refused_with_the_name_of_the_column(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "make 3 of 1 and 2", "nums": [1, 2]}])
    with pytest.raises(ValueError, match="row 1 of .* has no target"):
        gold_eval.load_task_rows(f"countdown={path}")
    with pytest.raises(ValueError, match="has no answer"):
        gold_eval.load_task_rows(f"aime={path}")


def test_published_countdown_rows_keep_their_own_prompt(tmp_path):
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "Using the numbers [2, 3, 7], ..."}]
    path = write(tmp_path / "test.jsonl", [{"prompt": prompt, "target": 13, "nums": [2, 3, 7]}])
    (row,) = gold_eval.load_task_rows(f"countdown-gold={path}")
    assert list(row.prompt) == prompt
    assert gold_eval.grade_countdown(tagged("2*3+7"), row).reason == "ok"


def test_a_task_of_ones_own_is_a_function_and_an_entry(tmp_path, monkeypatch):
    path = write(tmp_path / "own.jsonl", [{"prompt": "shout!"}])
    grade = lambda text, row: gold_eval.Grade("ok" if text.isupper() else "quiet")
    monkeypatch.setitem(gold_eval.TASKS, "shouting", Task(path, grade, classes=("ok", "quiet"), needs=()))
    assert [row.prompt[0]["content"] for row in gold_eval.load_task_rows("shouting")] == ["shout!"]


def test_perplexity_reads_text_files_text_columns_and_questions_with_answers(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    column = write(tmp_path / "b.jsonl", [{"text": "one"}, {"text": "two"}])
    asked = write(tmp_path / "c.jsonl", [{"question": "q", "answer": "a #### 1"}])
    rows = [gold_eval.load_task_rows(f"ppl={path}") for path in (tmp_path / "a.txt", column, asked)]
    assert [[row.completion for row in part] for part in rows] == [["one\n\ntwo"], ["one", "two"], ["a #### 1"]]
    assert [len(part[0].prompt) for part in rows] == [0, 0, 1]


def test_importing_gold_eval_does_not_import_transformers_or_vllm():
    import subprocess

    code = "import sys, gold_eval; print({'transformers', 'vllm', 'datasets', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(gold_eval.__file__).parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr
