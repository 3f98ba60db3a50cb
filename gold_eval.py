"""Scores models on tasks, while they train and afterwards: one code path, so one number.

    python gold_eval.py --model DIR --tasks countdown gsm8k            a table, for one or several models
    python gold_eval.py --model A B C --tasks countdown-gold --plot    and a bar chart of what went wrong
    python gold_eval.py --model DIR --tasks gsm8k=rows.jsonl           the same task on rows of your own
    python gold_eval.py --runs out/a out/b                             curves of training runs, over steps and tokens

A task of your own is a grader and an entry in TASKS, put below it (`row` is a gold_data.Row):

    def grade_shouting(text, row):
        return Grade("ok" if text.isupper() else "quiet")

    TASKS["shouting"] = Task("prompts.jsonl", grade_shouting, classes=("ok", "quiet"), needs=())

From top to bottom: graders, tasks, scores, the evaluator (a thread that supervises, a child process that works), tables
and plots, command line. This file knows nothing about the teacher, losses, lmbda, DDP or wandb.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import gold_buffer
import gold_data
from gold_buffer import append_jsonl, read_jsonl
from gold_data import Row, need

# ----------------------------------------------------------------------------------------------------------------------
# Countdown's grader: no eval, no ast, no floats


@dataclass(frozen=True)
class Grade:
    """What became of one answer. `also` holds verdicts by other rules; each is reported as accuracy_<name>."""

    reason: str  # "ok" is correct; anything else says what went wrong
    also: dict[str, bool] = field(default_factory=dict)


COUNTDOWN_CLASSES = (
    "ok", "missing_answer_tags", "lhs_parse_or_eval_error", "invalid_number_usage", "rhs_parse_or_eval_error",
    "equation_not_balanced", "wrong_value",
)  # fmt: skip
MAX_CHARACTERS, MAX_DEPTH = 300, 40  # of an expression: these and twelve digits keep a grade below ten milliseconds
INTEGER = re.compile(r"0|[1-9][0-9]{,11}")
OPERATORS = ({"+": operator.add, "-": operator.sub}, {"*": operator.mul, "/": operator.truediv})  # by precedence

SPELLINGS = {"*": "×✕✖⨯⋅·∙•∗＊", "/": "÷∕⁄／", "-": "−–—‐‑﹣－", "+": "＋", "=": "＝", "(": "（[{", ")": "）]}"}
ONE_SPELLING = str.maketrans({other: usual for usual, others in SPELLINGS.items() for other in others})
LATEX = (  # in this order; \frac and \boxed are opened from the inside
    (re.compile(r"\\(?:left|right|displaystyle|quad|[,;!\s])"), " "),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    *((re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),) * 3,
    (re.compile(r"\\boxed\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[()\[\]]|\$"), " "),
)


def last_answer(text: str) -> str | None:
    """What stands in the last complete <answer> </answer>, None without one. Linear in the length of the text."""
    for part in re.split("(?i)</answer>", text)[-2::-1]:
        for inside in re.split("(?i)<answer>", part, maxsplit=1)[1:]:
            return inside
    return None


def rewrite(text: str, rules: Iterable[tuple[re.Pattern, str]]) -> str:
    """The text after these substitutions, one after the other."""
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def calculate(text: str) -> tuple[Fraction, list[int]]:
    """(exact value, integers used) of an arithmetic expression.

    sum := product ([+-] product)*    product := signed ([*/] signed)*    signed := [+-] signed | integer | "(" sum ")"

    Raises ValueError for anything else or what is too long or too deep, ZeroDivisionError for a division by zero.
    """
    tokens, used = ["", *reversed(re.findall(r"[0-9]+|\S", text))], []  # taken from the back; "" is the end

    def take(level: int, depth: int) -> Fraction:
        """A sum (level 0), a product (1) or a signed number or parenthesis (2)."""
        if level < 2:
            value = take(level + 1, depth)
            while tokens[-1] in OPERATORS[level]:
                value = OPERATORS[level][tokens.pop()](value, take(level + 1, depth))
            return value
        token = tokens.pop()
        if token in OPERATORS[0]:
            return OPERATORS[0][token](0, take(2, depth))
        if token == "(" and depth < MAX_DEPTH:
            value = take(0, depth + 1)
            if tokens.pop() == ")":
                return value
        need(INTEGER.fullmatch(token), f"{token!r} is not expected")
        used.append(int(token))
        return Fraction(token)

    need(len(text) <= MAX_CHARACTERS, f"{len(text)} characters")
    value = take(0, 0)
    need(tokens == [""], f"{tokens[-1]!r} is not expected")
    return value, used


def classify(text: str, nums: Iterable[int], target: int, rule: Literal["exact", "at_most"] = "exact") -> str:
    """What is wrong first, in the order of the public verifier behind the published tables; or "ok". Never raises.

    The answer is the last complete pair of tags, cut at its last "="; numbers are counted on the left only. Rule
    "exact" wants every number once, "at_most" none of them more often than given. Spellings of + - * / ( ) in Unicode
    and LaTeX are read; x as times, 2(3), words and thousands commas are not.
    """
    answer, failure = (last_answer(text) or "").strip(), "lhs_parse_or_eval_error"
    if len(answer) > 4 * MAX_CHARACTERS:
        return failure
    answer = rewrite(answer, LATEX).translate(ONE_SPELLING).strip().rstrip(".").rstrip()
    if not answer:
        return "missing_answer_tags"
    left, _, right = answer.rpartition("=") if "=" in answer else (answer, "", "")
    try:
        value, used = calculate(left)
        extra, missing = Counter(used) - Counter(nums), Counter(nums) - Counter(used)
        if extra or (missing and rule == "exact"):
            return "invalid_number_usage"
        failure = "rhs_parse_or_eval_error"
        if right.strip() and calculate(right)[0] != value:
            return "equation_not_balanced"
    except (ValueError, ZeroDivisionError):
        return failure
    return "ok" if value == target else "wrong_value"


def grade_countdown(text: str, row: Row) -> Grade:
    """By the rule "exact", and also by "at_most"."""
    nums, target = [int(n) for n in row.meta["nums"]], int(row.meta["target"])
    return Grade(classify(text, nums, target), {"at_most": classify(text, nums, target, "at_most") == "ok"})


# ----------------------------------------------------------------------------------------------------------------------
# graders of mathematics: each reads the row's own answer first and raises ValueError if it cannot

MATH_CLASSES = ("ok", "no_answer", "wrong_value")
PLAIN = (  # how numbers are written, one spelling each, in this order
    (re.compile(r"[−﹣－]|–(?=[\d.$])"), "-"),
    (re.compile(r"(?<=\d)(?:\{,\}|,?\\[,;:!]|[ \u00a0\u2009\u202f_])(?=\d{3}(?!\d))"), ","),  # 1 000 is 1,000
    (re.compile(r"(^|[=:([{$#*]|\bis|\bequals)([^\S\n]*)-[^\S\n]+(?=[\d.$\\])"), r"\1\2-"),  # but not in 16 - 9
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"), r"\1\2/\3\4"),
)
DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
NUMBER = (  # -$1,234.5 or 2 1/2; the minus of 16-9 is no sign, and the 2 of cm^2, m2 and x^{2} no number
    rf"((?<![\w)}}\]])-)?\\?[$€£]?(?<![a-z^\d])(?<!\^\{{)(?:(\d+) (?=\d+ ?/ ?\d))?({DECIMAL})(?: ?/ ?({DECIMAL}))?"
)


def number(text: str, which: int = -1, mark: str = "") -> Fraction | None:
    """The last number of a text, or another one, of those behind a mark.

    None if there is none, or one over 0 or of absurd length (Python refuses 4300 digits).
    """
    found = list(re.finditer(mark + NUMBER, rewrite(text, PLAIN)))
    sign, whole, top, bottom = (x and x.replace(",", "") for x in found[which].groups()) if found else [None] * 4
    if top is None or len(found[which][0]) > 100 or Fraction(bottom or 1) == 0:
        return None
    return (-1 if sign else 1) * (Fraction(whole or 0) + Fraction(top) / Fraction(bottom or 1))


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}, None without one. Linear in the length of the text."""
    found, start, opened = None, -1, []
    for token in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if token[0] != "}":
            opened.append(token)
        elif opened and len((first := opened.pop())[0]) > 1 and first.end() > start:
            start = first.end()
            found = text[start : token.start()]
    return found


def final_number(text: str) -> Fraction | None:
    r"""The last number in the last \boxed{}, or without one there the last of the text."""
    in_box = number(boxed(text) or "")
    return number(text) if in_box is None else in_box


def reference(row: Row) -> Fraction:
    """The number that the row's answer is."""
    gold = final_number(str(row.answer))
    need(gold is not None, f"{row.answer!r} is no number")
    return gold


def verdict(found: object | None, gold: object) -> str:
    return "no_answer" if found is None else "ok" if found == gold else "wrong_value"


def grade_gsm8k(text: str, row: Row) -> Grade:
    """Right if the number after the first "####" is, or without one the final number; `strict` demands the "####".

    The two extractions of lm-eval, except that here the flexible one prefers the marked and the boxed number.
    """
    gold, marked = reference(row), number(text, 0, r"####\s*")
    reason = verdict(final_number(text) if marked is None else marked, gold)
    return Grade(reason, {"strict": reason == "ok" and marked is not None})


def grade_integer(text: str, row: Row) -> Grade:
    """AIME: right if the final number is the row's integer."""
    gold = reference(row)
    need(gold.denominator == 1, f"{row.answer!r} is no integer")
    return Grade(verdict(final_number(text), gold))


def grade_math(text: str, row: Row) -> Grade:
    r"""Compare the values with math-verify, at most five seconds a step; of several boxes the last one counts.

    The reference is the row's answer, or the \boxed{} of its completion.
    Raises RuntimeError outside the main thread: math-verify's time limit is a signal, and only that thread gets one.
    """
    from math_verify import parse, verify

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("mathematics is graded in the main thread only: use Evaluator, whose child has one")
    gold, box = str(row.completion if row.answer is None else row.answer), boxed(text)
    if row.answer is None or boxed(gold) is not None:
        gold = boxed(gold) or ""
    need(right := parse(f"\\boxed{{{gold}}}"), f"{gold!r} is no mathematics")
    # without a box the end: math-verify finds nothing in time in a text of many pages
    answer = parse(text[-3000:] if box is None else f"\\boxed{{{box}}}")
    return Grade(verdict(verify(right, answer) if answer else None, True))


# ----------------------------------------------------------------------------------------------------------------------
# tasks


@dataclass(frozen=True)
class Task:
    dataset: str  # built into gold_data, a local file or directory, or a Hub id
    grade: Callable[[str, Row], Grade] | None  # of the model's answer; None measures perplexity instead
    subset: str | None = None
    split: str = "test"
    classes: tuple[str, ...] = MATH_CLASSES  # the reasons that `grade` gives, as the table shows them
    also: tuple[str, ...] = ()  # its further verdicts
    needs: tuple[str, ...] = ("answer",)  # what every row must have: answer, completion or columns of the data set
    few_shot: int = 0  # solved examples before the question, as turns of the chat: the first rows of the split train
    instruction: str = ""  # put behind the question
    stop: tuple[str, ...] = ()  # the answer is cut where one of these begins
    max_new_tokens: int = 512
    name: str = ""


BOX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
COUNTDOWN = Task("countdown", grade_countdown, classes=COUNTDOWN_CLASSES, also=("at_most",), needs=("nums", "target"))
OPENR1 = Task("HuggingFaceTB/OpenR1-Math-220k-default-verified", grade_math, "all", needs=("completion",))
STOP = ("\nQuestion:", "\n\nUser:")
TASKS = {
    "countdown": COUNTDOWN,  # made on the spot, no network
    "countdown-mini": replace(COUNTDOWN, dataset="countdown-mini", max_new_tokens=64),
    "countdown-gold": replace(COUNTDOWN, dataset="HuggingFaceTB/Countdown-Task-GOLD", subset="test"),
    "gsm8k": Task("openai/gsm8k", grade_gsm8k, "main", also=("strict",), few_shot=5, stop=STOP),
    "math500": Task("HuggingFaceH4/MATH-500", grade_math, instruction=BOX, max_new_tokens=4096),
    "aime": Task("HuggingFaceH4/aime_2024", grade_integer, split="train", instruction=BOX, max_new_tokens=8192),
    "aime25": Task("yentinglin/aime_2025", grade_integer, split="train", instruction=BOX, max_new_tokens=8192),
    # the end of what people train on, which has no other split; gold_train drops what it asks from the training rows
    "openr1": replace(OPENR1, split="train[99%:]", max_new_tokens=4096),
    "openmathinstruct": Task("nvidia/OpenMathInstruct-2", grade_math, split="train_1M[99%:]", max_new_tokens=2048),
    "ppl": Task("openai/gsm8k", None, "main", needs=("completion",)),
}


def parse_tasks(tasks: Iterable[str]) -> list[Task]:
    """Tasks by name; "name=path" takes the rows of another file, directory or data set with the same columns.

    Raises ValueError that names the known tasks, or what is not installed.
    """
    found: dict[str, Task] = {}
    for text in tasks:
        name, _, dataset = text.partition("=")
        need(name in TASKS, f"there is no task {name!r}: the tasks are {', '.join(TASKS)}, each also as NAME=FILE")
        can = TASKS[name].grade is not grade_math or importlib.util.find_spec("math_verify")
        need(can, f"task {name} compares mathematics: pip install 'math-verify[antlr4_13_2]'")
        need(name not in found, f"task {name!r} is there twice: results are kept by task, so score one of them apart")
        found[name] = replace(TASKS[name], name=name)
        if dataset:  # all of the split: the slice was for the other data set
            whole = found[name].split.partition("[")[0]
            found[name] = replace(found[name], dataset=dataset, subset=None, split=whole)
    return list(found.values())


def few_shot_rows(task: Task) -> list[Row]:
    """The solved examples. Raises ValueError if there are fewer than the task wants."""
    rows = gold_data.iter_rows(task.dataset, task.subset, "train") if task.few_shot else ()
    found = list(itertools.islice((row for row in rows if row.completion), task.few_shot))
    why = f"not {task.few_shot}: give it more rows, or --few-shot {len(found)}"
    need(len(found) == task.few_shot, f"task {task.name}: {task.dataset} has {len(found)} solved examples, {why}")
    return found


def load_task_rows(task: str | Task, max_samples: int | None = None, seed: int = 0) -> list[Row]:
    """The rows a task asks, with their prompts as they are in the data set (for gold_data.without).

    The few-shot examples are not among them. `max_samples` rows are drawn by `seed`, the same ones for every model.
    Raises ValueError if a row lacks what the task needs or has an answer that cannot be graded, or no row is left.
    """
    task = parse_tasks([task])[0] if isinstance(task, str) else task
    endless = task.dataset in gold_data.BUILT_IN and max_samples is not None  # as many as one asks for
    split = f"{task.split}[:{max_samples}]" if endless else task.split
    rows = _text_rows(task) or gold_data.load_rows(task.dataset, task.subset, split)[0]
    rows, asked = gold_data.without(rows, few_shot_rows(task))[0], []
    why = f"besides the {task.few_shot} examples: give it more rows, or --few-shot 0"
    need(len(rows), f"task {task.name}: no question of {task.dataset} is left {why}")
    drawn = range(len(rows))
    if max_samples is not None and max_samples < len(rows):
        drawn = sorted(random.Random(f"{task.name} {seed}").sample(drawn, max_samples))
    for i in drawn:
        asked.append(row := rows[i])
        has = row.meta | {"answer": row.answer, "completion": row.completion}
        if lacks := [name for name in task.needs if has.get(name) is None]:
            where = f"row {rows.index['position'][i] + 1} of {task.dataset}"
            raise ValueError(f"task {task.name}: {where} has no {' and no '.join(lacks)}")
        try:
            if task.grade:
                task.grade("", row)
        except (ValueError, TypeError, LookupError, ArithmeticError) as e:
            where = f"row {row.prompt[-1]['content'][:80]!r} of {task.dataset}"
            raise ValueError(f"task {task.name}: the grader cannot read the answer of {where}: {e}") from e
    return asked


def _text_rows(task: Task) -> list[Row]:
    """For perplexity: rows of text alone, from a .txt file (one document) or a `text` column."""
    if task.grade is not None or task.dataset in gold_data.BUILT_IN:
        return []
    if Path(task.dataset).suffix == ".txt":
        return [Row((), Path(task.dataset).read_text())]
    raws = gold_data.raw_rows(task.dataset, task.subset, task.split)
    return [Row((), raw["text"]) for raw in raws if raw.get("text")]


def task_messages(task: Task, row: Row, examples: list[Row]) -> list[gold_data.Message]:
    """The chat that asks a row: solved examples, the row's own turns, the task's instruction."""
    shots = [m for e in examples for m in (*e.prompt, {"role": "assistant", "content": e.completion})]
    *before, last = row.prompt
    return [*shots, *before, {"role": last["role"], "content": last["content"] + task.instruction}]


# ----------------------------------------------------------------------------------------------------------------------
# scores


@dataclass(frozen=True)
class Options:
    """How models are scored; equal options and weights give equal numbers."""

    max_samples: int | None = None  # questions per task, drawn by the seed; None asks all
    num_samples: int = 1  # answers per question; with more than one, pass@k is reported too
    temperature: float = 0.0  # of the answers; 0 is greedy
    max_new_tokens: int | None = None  # per answer; None is the task's own limit
    max_length: int = 8192  # tokens of prompt and answer at most, and of perplexity's windows; the model's limit holds
    few_shot: int | None = None  # solved examples before each question; None is the benchmark's custom
    wrap: int = 512  # tokens per chunk of the wrapped perplexity
    batch_tokens: int = 2**17  # decoded or scored together: rows x longest stays below (engine hf)
    engine: Literal["hf", "vllm"] = "hf"  # what generates
    vllm_memory: float = 0.8  # share of the GPU's memory for vLLM
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: bfloat16 on a GPU
    seed: int = 0  # of the questions and the answers

    def __post_init__(self):
        several = self.num_samples > 1 and self.temperature > 0
        need(several or self.num_samples == 1, f"num_samples {self.num_samples}: 1, or more with a temperature above 0")
        need(self.max_samples is None or self.max_samples > 0, f"max_samples {self.max_samples}: nothing to ask")

    def torch_dtype(self, device: str) -> torch.dtype:
        auto = "float32" if device.startswith("cpu") else "bfloat16"
        return getattr(torch, auto if self.dtype == "auto" else self.dtype)


def open_model(name: str, revision: str | None, device: str, options: Options):
    """(sampler, tokenizer) of a model directory or Hub id."""
    tokenizer = gold_data.load_tokenizer(name, revision)
    dtype, limit = options.torch_dtype(device), options.max_length
    if options.engine == "vllm":
        limit = int(min(limit, gold_buffer.check_positions(name, revision, 0)))
        memory = 2**28 if device == "cpu" else options.vllm_memory  # there its share would be one of the machine's
        how = {"revision": revision, "deadline": math.inf, "load_format": "auto"}
        return gold_buffer.VLLMSampler(name, limit, str(dtype)[6:], memory, **how), tokenizer
    model = gold_buffer.load_model(name, revision, dtype, device)
    how = {"max_batch_tokens": options.batch_tokens, "limit": limit, "progress": True}
    return gold_buffer.HFSampler(model.eval(), own=True, **how), tokenizer


def evaluate(model, tokenizer, tasks: Iterable[str], save_to: str | Path | None = None, **options) -> dict[str, dict]:
    """{task: {"n", "accuracy", "se", "classes", ...}} of a model.

    Args:
        model: a causal LM of transformers, left as it was found; or one of gold_buffer's samplers or anything like
            them: generate(requests, sampling) -> rollouts; score(sequences) -> for each the natural log probability
            (float64) of every token but the first; limit: tokens of prompt and answer; window: tokens that score reads
            at a time; end_ids.
        save_to: gets one JSONL per task with every answer.
        options: fields of Options.
    Raises: ValueError for unknown tasks and unusable rows.
    """
    options, results = Options(**options), {}
    if isinstance(model, torch.nn.Module):
        model = gold_buffer.HFSampler(model, max_batch_tokens=options.batch_tokens, limit=options.max_length)
    for task in parse_tasks(tasks):
        if options.few_shot is not None and task.grade:
            task = replace(task, few_shot=options.few_shot)
        start = time.perf_counter()
        result, answers = (accuracy if task.grade else perplexity)(model, tokenizer, task, options)
        results[task.name] = result | {"seconds": round(time.perf_counter() - start, 3)}
        if save_to is not None:
            Path(save_to).mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(answer, ensure_ascii=False, default=str) + "\n" for answer in answers)
            (Path(save_to) / f"{task.name}.jsonl").write_text("".join(lines))
    return results


def accuracy(model, tokenizer, task: Task, options: Options) -> tuple[dict, list[dict]]:
    """(result, answers) of a task with a grader. Counts are over all answers; `se` is over questions."""
    rows, k = load_task_rows(task, options.max_samples, options.seed), options.num_samples
    examples, ends = few_shot_rows(task), gold_data.end_ids(tokenizer, model.end_ids)
    prompts = [gold_data.encode_prompt(tokenizer, task_messages(task, row, examples)) for row in rows]
    fits = [(i, j) for i, prompt in enumerate(prompts) if len(prompt) < model.limit for j in range(k)]
    seeds = [int(np.random.SeedSequence([options.seed, i, j]).generate_state(1)[0]) for i, j in fits]
    requests = [gold_buffer.Request(prompts[i], seed) for (i, _), seed in zip(fits, seeds)]
    sampling = gold_buffer.Sampling(options.max_new_tokens or task.max_new_tokens, options.temperature, end_ids=ends)
    written = {at: rollout.completion_ids for at, rollout in zip(fits, model.generate(requests, sampling))}
    answers, also = [], Counter()
    for i, j in itertools.product(range(len(rows)), range(k)):
        ids = written.get((i, j), [])  # no room, no answer
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        text = whole[: min((whole.find(s) for s in task.stop if s in whole), default=None)]
        grade = task.grade(text, rows[i])
        also.update(grade.also)
        answers.append({
            "prompt": tokenizer.decode(prompts[i]), "completion": text, "reason": grade.reason, "tokens": len(ids),
            "truncated": text == whole and (not ids or ids[-1] not in ends),
            "answer": rows[i].answer, "row": rows[i].meta,  # whose columns may have any name
        })  # fmt: skip
    right = np.array([answer["reason"] == "ok" for answer in answers]).reshape(len(rows), k)
    return {
        "n": len(rows), "samples": k, "correct": int(right.sum()), "accuracy": float(right.mean()),
        "se": float(right.mean(1).std() / math.sqrt(len(rows))),
        **{f"accuracy_{name}": count / len(answers) for name, count in also.items()},
        **{f"pass@{j}": pass_at(j, right) for j in powers(k)},
        "classes": dict.fromkeys(task.classes, 0) | Counter(answer["reason"] for answer in answers),
        "too_long": len(rows) - len(fits) // k,
        **{name: float(np.mean([answer[name] for answer in answers])) for name in ("truncated", "tokens")},
    }, answers  # fmt: skip


def powers(k: int) -> list[int]:
    """2, 4, 8, .. and k: the j of which pass@j is reported."""
    return sorted({*(2**i for i in range(1, k.bit_length())), k} - {1})


def pass_at(j: int, right: np.ndarray) -> float:
    """Chance that one of j answers is right, from k >= j answers per question; right is (n, k), arXiv 2107.03374."""
    k = right.shape[1]
    return float(np.mean([1 - math.comb(k - int(c), j) / math.comb(k, j) for c in right.sum(1)]))


def windows(ids: list[int], prefix: int, length: int) -> Iterator[tuple[list[int], int]]:
    """(sequence, count): count tokens at the end of each sequence are scored, every id once, as lm-eval does it.

    The model reads all but the last token of a sequence, at most `length`; the first id is predicted from `prefix`.
    On a text of 120,317 bytes the bits per byte were those of lm-eval 0.4.13 to 7e-9 (float32, two tokenizers).
    """
    ids = [prefix, *ids]
    for start in range(1, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[max(0, end - length - 1) : end], end - start


def perplexity(model, tokenizer, task: Task, options: Options) -> tuple[dict, list[dict]]:
    """(result, per-row numbers). Only bits per byte compare between tokenizers; `se` is theirs, over rows.

    A question with its answer is read as "Question: ...\\nAnswer: ...", each row by itself, without an end token:
    `perplexity` and `bits_per_byte` are of all of it, `answer_*` of the part after "Answer:". `wrapped_perplexity` is
    of the rows joined by end tokens and cut into chunks of options.wrap, the remainder dropped.
    """
    eos = gold_data.end_ids(tokenizer)[-1] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    prefix = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    rows, totals, stream, parts = load_task_rows(task, options.max_samples, options.seed), [], [], []
    for row in rows:
        asked = "\n".join(m["content"] for m in row.prompt if m["role"] == "user")
        context, answer = (f"Question: {asked}\nAnswer:", f" {row.completion}") if row.prompt else ("", row.completion)
        ids, size = encode(context + answer), len(answer.encode())
        total = {"tokens": len(ids), "bytes": len(context.encode()) + size}
        totals.append(total | {"answer_tokens": len(ids) - len(encode(context)), "answer_bytes": size})
        stream += [*ids, eos]
        parts += windows(ids, prefix, model.window)
    need(parts, f"task {task.name}: {task.dataset} holds no text")
    scored = zip(parts, model.score([sequence for sequence, _ in parts]))
    logprobs = np.concatenate([found[len(found) - count :] for (_, count), found in scored])  # of every token, in order
    for total, end in zip(totals, itertools.accumulate(total["tokens"] for total in totals)):
        for name in ("", "answer_"):
            total[f"{name}nll"] = -float(logprobs[end - total[f"{name}tokens"] : end].sum())
    sums = {key: sum(total[key] for total in totals) for key in totals[0]}
    result = {"n": len(rows), "tokens": sums["tokens"], "bytes": sums["bytes"]}
    for name in ("", "answer_") if rows[0].prompt else ("",):
        result[f"{name}perplexity"] = math.exp(sums[f"{name}nll"] / sums[f"{name}tokens"])
        result[f"{name}bits_per_byte"] = sums[f"{name}nll"] / sums[f"{name}bytes"] / math.log(2)
    spread = [t["nll"] / math.log(2) - result["bits_per_byte"] * t["bytes"] for t in totals]
    result["se"] = math.hypot(*spread) / sums["bytes"]  # of a ratio of two sums
    body = min(options.wrap, model.window) - 2
    if chunks := [[prefix, *stream[i : i + body], eos] for i in range(0, len(stream) - body + 1, body)]:
        result["wrapped_perplexity"] = math.exp(-np.concatenate(model.score(chunks)).mean())
    return result, totals


MAIN = ("/accuracy", "/bits_per_byte")  # the number that stands for a task
SMALL = ("perplexity", "bits_per_byte")  # better if small
MEASURED = ("n", "tokens", "seconds", "se", "bytes", *SMALL, *(f"answer_{x}" for x in SMALL), "wrapped_perplexity")
GRADED = ("n", "tokens", "seconds", "se", "samples", "correct", "accuracy", "truncated", "too_long")


def metrics(tasks: Iterable[Task], num_samples: int = 1) -> list[str]:
    """The numbers that these tasks report, as flatten names them."""
    names = []
    for task in tasks:
        more = [*(f"accuracy_{name}" for name in task.also), *(f"classes/{name}" for name in task.classes)]
        more += [f"pass@{j}" for j in powers(num_samples)]
        names += [f"{task.name}/{name}" for name in ((*GRADED, *more) if task.grade else MEASURED)]
    return names


def headline(results: dict[str, dict], metric: str | None = None) -> tuple[str, float]:
    """(name, value) of the number to choose checkpoints by. Larger is better: what should be small comes back negated.

    `metric` is "countdown/accuracy" or just "countdown"; None is the first task. Raises ValueError that lists them all.
    """
    numbers, metric = flatten(results), metric or next(iter(results))
    for name in (metric + main for main in ("", *MAIN)):
        if name in numbers:
            return (f"-{name}", -numbers[name]) if name.endswith(SMALL) else (name, numbers[name])
    raise ValueError(f"there is no metric {metric!r} among the results: {', '.join(sorted(numbers))}")


def one_line(results: dict[str, dict]) -> str:
    """The results for a console."""
    text = ""
    for task, r in results.items():
        name = "accuracy" if "accuracy" in r else "bits_per_byte"
        more = f", truncated {r['truncated']:.0%}" if r.get("truncated") else ""
        text += f"; {task} {name} {r[name]:.4f} ± {r['se']:.4f} (n {r['n']}{more}, {r['seconds']:.0f} s)"
    return text[2:]


def flatten(nested: dict, prefix: str = "") -> dict[str, float]:
    """{"task/metric": number}, what a logger wants."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


# ----------------------------------------------------------------------------------------------------------------------
# the evaluator: a thread that supervises, a child process that works


class Evaluator:
    """Scores model directories, while training goes on, in a child process.

    A thread could not: Python work in it slows training up to a hundredfold (one interpreter lock), and it cannot be
    killed. So the thread here only waits; the child dies with its parent or at its time limit. They talk in lines of
    JSON: {"step", "model", "dir", ..} on the child's stdin, {"status", "results" or "error"} on its stdout. One child
    serves all steps of a model: only its weights are read again. What it prints goes to eval.log.

    Each submit is answered by exactly one record {"step", "model", "status", "seconds", "results", "error"}: status ok,
    error (an exception), crashed, timeout, dropped (a newer one took its place, or close came before its turn) or
    refused (after `max_failures` in a row, or after close). A failure is printed and counted; it raises nothing.

    `device` is "cpu", or "cuda:1" as the trainer counts GPUs; `timeout` is in seconds, for one evaluation with the
    start of the child; `echo`: nobody trains, and the child prints here. If a step is waiting already, policy
    "drop_oldest" replaces it and "wait" makes submit wait; step 0, the final step and other models are never dropped.
    Raises ValueError for an unknown task, policy or option (Options), or a GPU that is not there.
    """

    script = __file__  # what the child runs with --serve; it has to define the same TASKS

    def __init__(
        self, tasks: Iterable[str], out: str | Path, device: str = "cpu",
        policy: Literal["drop_oldest", "wait"] = "drop_oldest", timeout: float | None = 3600.0, max_failures: int = 3,
        echo: bool = False, **options,
    ):  # fmt: skip
        need(policy in ("drop_oldest", "wait"), f"policy {policy!r} is neither drop_oldest nor wait")
        need(parse_tasks(tasks := list(tasks)), f"no task to evaluate on: choose among {', '.join(TASKS)}")
        self.out, self.policy, self.timeout, self.max_failures = Path(out), policy, timeout, max_failures
        self.setup = {"parent": os.getpid(), "tasks": tasks, "out": str(out), "device": device.split(":")[0]}
        self.setup |= {"echo": echo, "options": asdict(Options(**options))}
        self.env, self.child, self.model = child_env(device), None, None  # the process, and whose weights it has
        self.waiting, self.records, self.counts = deque(), deque(), Counter()  # jobs; results; statuses
        self.changed, self.closed, self.cut_short, self.disabled = threading.Condition(), False, False, ""  # why
        self.out.mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self._supervise, name="evaluator", daemon=True)
        self.thread.start()

    def submit(
        self, step: int | None, folder: str | Path, final=False, model: str = "student", revision: str | None = None
    ) -> None:
        """Have a model directory scored, which has to stay until its record is there; other models have no step."""
        job = {"step": step, "model": model, "dir": str(folder), "revision": revision, "final": final or not step}
        older = lambda: [old for old in self.waiting if step and not old["final"]]
        with self.changed:
            self.changed.wait_for(lambda: self.policy != "wait" or not older() or self.disabled or self.closed)
            for old in older():
                self.waiting.remove(old)
                self._record(old, {"status": "dropped", "error": f"replaced by step {step}"})
            if self.disabled or self.closed:
                self._record(job, {"status": "refused", "error": self.disabled or "the evaluator is closed"})
            else:
                self.waiting.append(job)
            self.changed.notify_all()

    def poll(self) -> list[dict]:
        """The records that arrived since the last call."""
        return [self.records.popleft() for _ in range(len(self.records))]

    def close(self, timeout: float | None = None) -> bool:
        """Wait for what was submitted, at most `timeout` seconds, and stop the child. True if nothing was cut short."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join(timeout)
        while self.thread.is_alive():
            self.cut_short = True
            stop(self.child)
            self.thread.join(0.1)
        return not self.cut_short

    def summary(self) -> str:
        """One line for the end of a run."""
        counts = ", ".join(f"{n} {status}" for status, n in self.counts.items()) or "none"
        return f"evaluations: {counts}" + (f"; {self.disabled}" if self.disabled else "")

    @property
    def failures(self) -> int:
        return sum(self.counts[status] for status in ("error", "crashed", "timeout"))

    def _record(self, job: dict, answer: dict, seconds: float = 0.0) -> None:
        record = {"step": job["step"], "model": job["model"], "seconds": round(seconds, 3), "results": {}} | answer
        with self.changed:
            self.counts[record["status"]] += 1
            with contextlib.suppress(OSError):  # a full disk must not end the thread that owes further answers
                append_jsonl(self.out / "eval.jsonl", record)
            self.records.append(record)
        if record["status"] not in ("ok", "dropped"):
            print(f"eval: {job['model']} step {job['step']}: {answer['status']}: {answer['error']}", file=sys.stderr)

    def _supervise(self) -> None:
        in_a_row = 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if not self.waiting:
                    return stop(self.child)
                job = self.waiting.popleft()
                self.changed.notify_all()
            start = time.monotonic()
            try:
                answer = self._ask(job)
            except Exception:  # noqa: BLE001 - whatever went wrong here is this job's record, not the end of training
                answer = {"status": "error", "error": traceback.format_exc()}
            in_a_row = 0 if answer["status"] == "ok" else in_a_row + 1
            if in_a_row:
                stop(self.child)  # after an exception neither CUDA nor vLLM can be trusted
            if in_a_row == self.max_failures and not self.cut_short:
                self.disabled = f"given up after {in_a_row} failures in a row, the last: {answer['error'][-300:]}"
            self._record(job, answer, time.monotonic() - start)

    def _ask(self, job: dict) -> dict:
        """The child's answer, or what became of it."""
        if self.disabled or self.cut_short:
            why = self.disabled or "the evaluator was closed before its turn"
            return {"status": "refused" if self.disabled else "dropped", "error": why}
        if self.child is None or self.child.poll() is not None or self.model != job["model"]:
            stop(self.child)
            with open(self.out / "eval.log", "a") as log:
                self.child = subprocess.Popen(
                    [sys.executable, "-X", "faulthandler", self.script, "--serve", json.dumps(self.setup)], bufsize=0,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if self.setup["echo"] else log,
                    env=self.env, start_new_session=True,  # killed with what it starts; and Ctrl-C is ours to handle
                )  # fmt: skip
            self.model = job["model"]
        late = threading.Event()
        timer = threading.Timer(self.timeout, lambda: (late.set(), stop(self.child)))
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it died before it could read
                self.child.stdin.write(json.dumps(job).encode() + b"\n")
            lines = (x for x in self.child.stdout if x.startswith(b'{"status"') and x.endswith(b"\n"))
            answer = json.loads(next(lines, "null"))  # other lines were printed before serve took over
        finally:
            timer.cancel()
            timer.join()
        if answer is not None:
            return answer
        if late.is_set() or self.cut_short:
            return {"status": "timeout", "error": "no answer in time, child killed"}
        stop(self.child, grace=5.0)
        return {"status": "crashed", "error": f"exit code {self.child.returncode}, see {self.out}/eval.log"}


def stop(child: subprocess.Popen | None, grace: float = 0.0) -> None:
    """End a process, if it does not end by itself in `grace` seconds, and what it started."""
    if child is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def child_env(device: str) -> dict[str, str]:
    """The environment of the child: one GPU or none, and no trace of torchrun. Raises ValueError for a missing GPU."""
    torchrun = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)$")
    env = {name: value for name, value in os.environ.items() if not torchrun.match(name)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}  # spinning beside a busy process: 40 times slower
    if not device.startswith("cpu"):
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        index = torch.device(device).index or 0
        need(index < len(gpus) and gpus[index], f"the evaluation device {device} does not exist: GPUs are {gpus}")
        env["CUDA_VISIBLE_DEVICES"] = gpus[index]
    return env


def serve(setup: str) -> None:
    """The child's side: one answer per job, until the parent is gone or an exception was reported."""
    setup, answers = json.loads(setup), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed from here on, also by libraries, goes to eval.log
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent, even while hanging
    if os.getppid() != setup["parent"]:  # it died before that call
        return
    device, options, model = setup["device"], Options(**setup["options"]), None
    if device == "cpu" and not setup["echo"]:
        os.nice(10)  # training goes first, ...
        with contextlib.suppress(OSError):  # ... also where Linux shares the cores among sessions before processes
            Path("/proc/self/autogroup").write_text("10")
    for job in map(json.loads, sys.stdin):
        name = re.sub(r"[^\w.-]+", "_", job["model"]) if job["step"] is None else f"step-{job['step']:06d}"
        try:
            if model is None:
                model, tokenizer = open_model(job["dir"], job["revision"], device, options)
            else:
                weights = gold_buffer.load_model(job["dir"], job["revision"], options.torch_dtype(device), "cpu")
                model.load_weights(weights.state_dict(), job["step"] or 0)
            save_to = f"{setup['out']}/completions/{name}"
            results = evaluate(model, tokenizer, setup["tasks"], save_to, **setup["options"])
        except Exception:
            print(json.dumps({"status": "error", "error": traceback.format_exc()}), file=answers)
            raise
        print(json.dumps({"status": "ok", "results": results}), file=answers)


# ----------------------------------------------------------------------------------------------------------------------
# tables and plots


def table(results: dict[str, dict]) -> str:
    """Markdown table of one task from {model: result}, in the layout of the published Countdown tables."""
    found = list(dict.fromkeys(key for r in results.values() for key in r))
    if "accuracy" in found:
        classes = list(dict.fromkeys(c for r in results.values() for c in r["classes"] if c != "ok"))
        rates = ["truncated", *(key for key in found if key.startswith(("accuracy_", "pass@")))]
        heading = ["correct", "accuracy", *classes, *rates]
        score = lambda r: f"{100 * r['accuracy']:.2f} ± {100 * r['se']:.2f} %"
        shares = lambda r: (f"{100 * r[key]:.2f} %" if key in r else "-" for key in rates)
        cells = lambda r: [r["correct"], score(r), *(r["classes"].get(c, 0) for c in classes), *shares(r)]
    else:
        names = [name for name in found if name.endswith(SMALL)]
        heading = [*names, "rows", "tokens"]
        cells = lambda r: [*(f"{r[name]:.4f}" if name in r else "-" for name in names), r["n"], r["tokens"]]
    return markdown([["model", *heading], *([model, *cells(r)] for model, r in results.items())])


def markdown(rows: list[list]) -> str:
    """Rows of cells, the first being the heading, padded so that they read well as plain text."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def by_task(models: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """{model: {task: result}} as {task: {model: result}}."""
    tasks = dict.fromkeys(task for results in models.values() for task in results)
    return {task: {model: results[task] for model, results in models.items() if task in results} for task in tasks}


def report(models: dict[str, dict[str, dict]]) -> str:
    """Markdown with one table per task of {model: {task: result}}."""
    parts = []
    for task, found in by_task(models).items():
        some = next(iter(found.values()))
        more = f", {some['samples']} answers each" if some.get("samples", 1) > 1 else ""
        parts.append(f"### {task} (n = {some['n']}{more})\n\n{table(found)}\n")
    return "\n".join(parts)


def plot_classes(models: dict[str, dict[str, dict]], path: str | Path) -> None:
    """Bar chart (PNG) of what became of the answers, if any: a panel per task, a group per class, a bar per model."""
    from matplotlib.figure import Figure

    graded = {task: found for task, found in by_task(models).items() if "classes" in next(iter(found.values()))}
    if not graded:
        return
    figure = Figure(figsize=(11, 3.6 * len(graded)), layout="constrained")
    for axes, (task, found) in zip(np.atleast_1d(figure.subplots(len(graded))), graded.items()):
        names, width = list(dict.fromkeys(c for r in found.values() for c in r["classes"])), 0.8 / len(found)
        for i, (model, r) in enumerate(found.items()):
            shares = [100 * r["classes"].get(name, 0) / sum(r["classes"].values()) for name in names]
            bars = axes.bar(np.arange(len(names)) + (i - (len(found) - 1) / 2) * width, shares, width, label=model)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set_xticks(range(len(names)), [name.replace("_", "\n", 1) for name in names], fontsize=8)
        axes.set(title=task, ylabel="% of answers")
        axes.legend()
    figure.savefig(path, dpi=130)


def read_run(folder: str | Path) -> dict[str, dict[int, float]]:
    """{"tokens": {step: trained so far}, "loss": {step: ..}, "<task>/<metric>": {step: ..}} of a training run's folder.

    Raises FileNotFoundError if there are no metrics. Of a step that was repeated after a resume, the last counts.
    """
    metrics = read_jsonl(Path(folder) / "metrics.jsonl")
    if not metrics:
        raise FileNotFoundError(f"{folder} is not the folder of a training run: it has no metrics.jsonl with any line")
    run = {"tokens": {0: 0} | {row["step"]: row["num_tokens"] for row in metrics if "num_tokens" in row}}
    run["loss"] = {row["step"]: row["actor/loss"] for row in metrics if "actor/loss" in row}
    for record in read_jsonl(Path(folder) / "eval.jsonl"):
        if record["status"] == "ok" and record["step"] is not None:
            for name, value in flatten(record["results"]).items():
                run.setdefault(name, {})[record["step"]] = value
    return run


def plot_runs(folders: Iterable[str | Path], path: str | Path, metric: str | None = None) -> None:
    """Curves (PNG) of training runs: loss and `metric` ("task/name"; None: the first), over steps and trained tokens.

    Raises ValueError for a metric that no run has.
    """
    from matplotlib.figure import Figure

    runs = {str(folder): read_run(folder) for folder in folders}
    known = list(dict.fromkeys(name for run in runs.values() for name in run if "/" in name))
    found = ", ".join(known) or "no evaluation"
    need(metric in (None, *known), f"there is no metric {metric!r} in these runs, only: {found}")
    metric = metric or next((name for name in known if name.endswith(MAIN)), "accuracy")
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, over) in zip(figure.subplots(2, 2).flat, itertools.product(("loss", metric), ("steps", "tokens"))):
        for run_name, run in runs.items():
            at = run["tokens"] if over == "tokens" else {step: step for step in run.get(name, {})}
            points = [(at[step], value) for step, value in sorted(run.get(name, {}).items()) if step in at]
            axes.plot(*np.array(points).reshape(-1, 2).T, "-" if name == "loss" else "-o", ms=3, label=run_name)
        axes.set(xlabel=over, ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


# ----------------------------------------------------------------------------------------------------------------------
# the command line


@dataclass(frozen=True)
class Config:
    """Score models on tasks and print a table; draw the curves of training runs."""

    model: tuple[str, ...] = ()  # directories or Hub ids of the models to score, a line of the table each
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--task"])] = ("countdown",)  # names, or name=path of rows
    runs: tuple[str, ...] = ()  # folders of training runs whose curves to draw
    metric: str | None = None  # of the curves, such as countdown/accuracy; None: of the first task
    out: str = "out/eval"  # folder for the tables, the plots and every answer
    plot: bool = False  # also draw a bar chart of what became of the answers
    device: str = "auto"  # cpu, cuda:0, ...; auto is the first GPU if there is one
    timeout: float | None = None  # seconds per model; None waits for ever
    scoring: tyro.conf.OmitArgPrefixes[Options] = Options()  # equal options and weights give equal numbers


def main(config: Config) -> int:
    """Returns the exit code: 1 if a model could not be scored."""
    need(config.model or config.runs, "nothing to do: name a model with --model, or training runs with --runs")
    for model in config.model:  # a Hub id has at most one slash, in the middle
        if not Path(model).exists() and (model.count("/") > 1 or model[0] in "./~"):
            raise FileNotFoundError(f"there is no model directory {model}")
    out, options = Path(config.out), asdict(config.scoring)
    out.mkdir(parents=True, exist_ok=True)
    if config.runs:
        plot_runs(config.runs, out / "runs.png", config.metric)
        print(f"curves of {len(config.runs)} runs in {out / 'runs.png'}")
    if not config.model:
        return 0
    device = ("cuda:0" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    evaluator = Evaluator(config.tasks, out, device, timeout=config.timeout, echo=True, **options)
    short = [Path(model).name for model in config.model]
    for name, model in zip(short if len(set(short)) == len(short) else config.model, config.model):
        evaluator.submit(None, model, model=name)
    evaluator.close()
    models = {record["model"]: record["results"] for record in evaluator.poll() if record["status"] == "ok"}
    print(text := report(models))
    (out / "report.md").write_text(text)
    (out / "results.json").write_text(json.dumps({"options": options, "models": models}, indent=2) + "\n")
    if config.plot:
        plot_classes(models, out / "classes.png")
    return int(len(models) < len(config.model))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        try:
            sys.exit(main(tyro.cli(Config)))
        except (ValueError, FileNotFoundError) as e:
            sys.exit(f"error: {e}")
