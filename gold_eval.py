"""Scores models on tasks, while they train and afterwards: one code path, so one number.

    python gold_eval.py --model DIR --tasks countdown gsm8k            a table, for one or several models
    python gold_eval.py --model A B C --tasks countdown-gold --plot    and a bar chart of what went wrong
    python gold_eval.py --model DIR --tasks gsm8k=rows.jsonl           the same task on rows of your own
    python gold_eval.py --runs out/a out/b                             curves of training runs, over steps and tokens

A task of your own is a grader and an entry in TASKS (`row` is a gold_data.Row; put this below TASKS):

    def grade_shouting(text, row):
        return Grade("ok" if text.isupper() else "quiet")

    TASKS["shouting"] = Task("prompts.jsonl", grade_shouting, classes=("ok", "quiet"), needs=())

Every accuracy comes with the number of questions and a standard error. From top to bottom: the Countdown grader,
graders of mathematics, tasks, engines (HF, vLLM), scores, the evaluator (a thread that supervises and a child process
that works), tables and plots, the command line.

This file knows nothing about the teacher, losses, lmbda, DDP or wandb.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import importlib.util
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
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
from torch import Tensor

import gold_data
from gold_data import Row

# ----------------------------------------------------------------------------------------------------------------------
# Countdown's grader: no eval, no ast, no floats


@dataclass(frozen=True)
class Grade:
    """What became of one answer. `also` holds verdicts by other rules; each is reported as accuracy_<name>."""

    reason: str  # "ok" is correct; anything else says what went wrong
    also: dict[str, bool] = field(default_factory=dict)


COUNTDOWN_CLASSES = (
    "ok",
    "missing_answer_tags",
    "lhs_parse_or_eval_error",
    "invalid_number_usage",
    "rhs_parse_or_eval_error",
    "equation_not_balanced",
    "wrong_value",
)
MAX_CHARACTERS, MAX_DIGITS, MAX_DEPTH = 300, 12, 40  # of an expression: what keeps a grade below ten milliseconds

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
    *closed, _ = re.split("</answer>", text, flags=re.IGNORECASE)
    for part in reversed(closed):
        opened = re.split("<answer>", part, maxsplit=1, flags=re.IGNORECASE)
        if len(opened) == 2:
            return opened[1]
    return None


def plain_arithmetic(text: str) -> str:
    """Unicode and LaTeX spellings of + - * / ( ) as ASCII. Not read: x as times, 2(3), words, thousands commas."""
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return text.translate(ONE_SPELLING).strip().rstrip(".").rstrip()


class Expression:
    """The exact `value` of an arithmetic expression and the integers `used` in it.

    sum := product ([+-] product)*   product := signed ([*/] signed)*   signed := [+-]* atom   atom := integer | (sum)

    Raises ValueError for anything else, a division by zero, or more than MAX_CHARACTERS, MAX_DIGITS or MAX_DEPTH.
    """

    def __init__(self, text: str):
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(text)} characters")
        self.tokens = [*re.findall(r"[0-9]+|\S", text), ""]  # "" ends it
        self.position = self.depth = 0
        self.used: list[int] = []
        self.value = self._sum()
        if self.tokens[self.position]:
            raise ValueError(f"{self.tokens[self.position]!r} is not expected")

    def _next(self, among: str) -> str:
        """Take the next token if it is one of these characters."""
        token = self.tokens[self.position]
        if not token or token not in among:
            return ""
        self.position += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._next("+-"):
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while sign := self._next("*/"):
            other = self._signed()
            if sign == "/" and other == 0:
                raise ValueError("division by zero")
            value = value * other if sign == "*" else value / other
        return value

    def _signed(self) -> Fraction:
        negative = False
        while sign := self._next("+-"):
            negative ^= sign == "-"
        return -self._atom() if negative else self._atom()

    def _atom(self) -> Fraction:
        if self._next("("):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ValueError(f"parentheses deeper than {MAX_DEPTH}")
            value = self._sum()
            self.depth -= 1
            if not self._next(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        token = self.tokens[self.position]
        if not (token.isascii() and token.isdigit()) or len(token) > MAX_DIGITS or (token[0] == "0" and token != "0"):
            raise ValueError(f"{token!r} is not an integer of at most {MAX_DIGITS} digits")
        self.position += 1
        self.used.append(int(token))
        return Fraction(token)


def classify(text: str, nums: Iterable[int], target: int, rule: Literal["exact", "at_most"] = "exact") -> str:
    """The first of COUNTDOWN_CLASSES that applies, "ok" if none does. Never raises, whatever the text.

    The answer is the last complete pair of tags, cut at its last "="; numbers are counted on the left only. The order
    of the checks is that of the public verifier behind the published tables. Intermediate values may be negative or
    fractions.

    Args:
        rule: "exact" wants every number once, "at_most" none of them more often than given.
    """
    answer = (last_answer(text) or "").strip()
    if len(answer) > 4 * MAX_CHARACTERS:
        return "lhs_parse_or_eval_error"
    answer = plain_arithmetic(answer)
    if not answer:
        return "missing_answer_tags"
    left, _, right = answer.rpartition("=") if "=" in answer else (answer, "", "")
    failure = "lhs_parse_or_eval_error"
    try:
        expression = Expression(left)
        extra, missing = Counter(expression.used) - Counter(nums), Counter(nums) - Counter(expression.used)
        if extra or (missing and rule == "exact"):
            return "invalid_number_usage"
        failure = "rhs_parse_or_eval_error"
        if right.strip() and Expression(right).value != expression.value:
            return "equation_not_balanced"
    except ValueError:
        return failure
    return "ok" if expression.value == target else "wrong_value"


def grade_countdown(text: str, row: Row) -> Grade:
    nums, target = [int(n) for n in row.meta["nums"]], int(row.meta["target"])
    return Grade(classify(text, nums, target), {"at_most": classify(text, nums, target, "at_most") == "ok"})


# ----------------------------------------------------------------------------------------------------------------------
# graders of mathematics

MATH_CLASSES = ("ok", "no_answer", "wrong_value")
NUMBER = r"(?:(?<![\w)])-)?\$?\d+(?:,\d{3})*(?:\.\d+)?"  # 1,234.5; the minus of 16-9 is not a sign


def last_number(text: str) -> Fraction | None:
    """The last number of a text; None if there is none, or one of absurd length (Python refuses 4300 digits)."""
    found = re.findall(NUMBER, text)
    return Fraction(re.sub(r"[$,]", "", found[-1])) if found and len(found[-1]) < 100 else None


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces, None without one."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 7 : i]
    return None


def grade_gsm8k(text: str, row: Row) -> Grade:
    """Right if the number after the first "####" is, or without one the last number; `strict` demands the "####".

    The two extractions of lm-eval, except that here the flexible one prefers the marked number.
    """
    marked = re.search(rf"####\s*({NUMBER})", text)
    found = last_number(marked[1] if marked else text)
    if found is None:
        return Grade("no_answer", {"strict": False})
    right = found == last_number(str(row.answer))
    return Grade("ok" if right else "wrong_value", {"strict": right and marked is not None})


def grade_integer(text: str, row: Row) -> Grade:
    r"""AIME: the last number in the last \boxed{}, or without one the last of the text, is the integer `answer`."""
    found = last_number(boxed(text) or "")
    found = last_number(text) if found is None else found
    if found is None:
        return Grade("no_answer")
    return Grade("ok" if found == int(row.answer) else "wrong_value")


def math_grader() -> str:
    """Which of the two ways of comparing mathematics is in use; every result says so."""
    return "math-verify" if importlib.util.find_spec("math_verify") else "string"


def grade_math(text: str, row: Row) -> Grade:
    r"""Compare with math-verify, at most five seconds a step; without it, as normalised strings and numbers.

    The reference is the row's answer, or the \boxed{} of its completion. Strings miss equal answers that are written
    differently (2\sqrt{3} and \sqrt{12}), so the two ways are not to be mixed in one table.
    Raises RuntimeError outside the main thread: math-verify's time limit is a signal, and only that thread gets one.
    """
    gold = row.answer if row.answer is not None else boxed(row.completion or "")
    if math_grader() == "string":
        box, number = boxed(text), last_number(text)
        found = plain_mathematics(box) if box else number
        if found is None:
            return Grade("no_answer")
        return Grade("ok" if found == plain_mathematics(str(gold)) else "wrong_value")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("mathematics is graded in the main thread only: use Evaluator, whose child has one")
    from math_verify import parse, verify

    box, end = boxed(text), text[-3000:]  # math-verify finds nothing in time in a text of many pages
    answer = parse(f"\\boxed{{{box}}}" if box is not None and "\\boxed" not in end else end)
    if not answer:
        return Grade("no_answer")
    return Grade("ok" if verify(parse(f"\\boxed{{{gold}}}"), answer) else "wrong_value")


def plain_mathematics(text: str) -> str | Fraction:
    """An answer without spelling differences, as a number if it is one."""
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|[,;!%$ ])|\^\{?\\circ\}?|[\s$%]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".").removeprefix("x=")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    as_number = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text).replace(",", "")
    if re.fullmatch(r"-?\d+(\.\d+|/0*[1-9]\d*)?", as_number) and len(as_number) < 100:
        return Fraction(as_number)
    return text


# ----------------------------------------------------------------------------------------------------------------------
# tasks


@dataclass(frozen=True)
class Task:
    dataset: str  # built into gold_data, a local file or directory, or a Hub id
    grade: Callable[[str, Row], Grade] | None  # of the model's answer; None measures perplexity instead
    subset: str | None = None
    split: str = "test"
    classes: tuple[str, ...] = MATH_CLASSES  # the reasons that `grade` gives, as the table shows them
    needs: tuple[str, ...] = ("answer",)  # what every row must have: answer, completion or columns of the data set
    few_shot: int = 0  # solved examples before the question, as turns of the chat: the first rows of few_shot_split
    few_shot_split: str = "train"
    instruction: str = ""  # put behind the question
    stop: tuple[str, ...] = ()  # the answer is cut where one of these begins
    max_new_tokens: int = 512
    name: str = ""


BOX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
COUNTDOWN = Task("countdown", grade_countdown, classes=COUNTDOWN_CLASSES, needs=("nums", "target"))
TASKS = {
    "countdown": COUNTDOWN,  # made on the spot, no network
    "countdown-mini": replace(COUNTDOWN, dataset="countdown-mini", max_new_tokens=64),
    "countdown-gold": replace(COUNTDOWN, dataset="HuggingFaceTB/Countdown-Task-GOLD", subset="test"),
    "gsm8k": Task("openai/gsm8k", grade_gsm8k, "main", few_shot=5, stop=("\nQuestion:", "\n\nUser:")),
    "math500": Task("HuggingFaceH4/MATH-500", grade_math, instruction=BOX, max_new_tokens=4096),
    "aime": Task("HuggingFaceH4/aime_2024", grade_integer, split="train", instruction=BOX, max_new_tokens=8192),
    "aime25": Task("yentinglin/aime_2025", grade_integer, split="train", instruction=BOX, max_new_tokens=8192),
    # held out of what people train on, which has no other split: keep them out of training with gold_data.without
    "openr1": Task(
        "HuggingFaceTB/OpenR1-Math-220k-default-verified",
        grade_math,
        subset="all",
        split="train[99%:]",
        needs=("completion",),
        max_new_tokens=4096,
    ),
    "openmathinstruct": Task("nvidia/OpenMathInstruct-2", grade_math, split="train_1M[99%:]", max_new_tokens=2048),
    "ppl": Task("openai/gsm8k", None, "main", needs=("completion",)),
}


def parse_tasks(tasks: Iterable[str]) -> list[Task]:
    """Tasks by name; "name=path" takes the rows of another file, directory or data set with the same columns.

    Raises ValueError that names the known tasks.
    """
    found: list[Task] = []
    for text in tasks:
        name, _, dataset = text.partition("=")
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: the tasks are {', '.join(TASKS)}, each also as NAME=FILE")
        if any(task.name == name for task in found):
            raise ValueError(f"task {name!r} is there twice: results are kept by task, so score the second one apart")
        task = replace(TASKS[name], name=name)
        if dataset:  # all of the split: the slice was for the other data set
            task = replace(task, dataset=dataset, subset=None, split=task.split.partition("[")[0])
        found.append(task)
    return found


def few_shot_rows(task: Task) -> list[Row]:
    if not task.few_shot:
        return []
    rows = gold_data.iter_rows(task.dataset, task.subset, task.few_shot_split)
    return list(itertools.islice((row for row in rows if row.completion), task.few_shot))


def load_task_rows(task: str | Task, max_samples: int | None = None, seed: int = 0) -> list[Row]:
    """The rows a task asks, with their prompts as they are in the data set (for gold_data.without).

    The few-shot examples are not among them. `max_samples` rows are drawn by `seed`, the same ones for every model.
    Raises ValueError if a row lacks what the task needs.
    """
    task = parse_tasks([task])[0] if isinstance(task, str) else task
    split = task.split
    if task.dataset in gold_data.BUILT_IN and max_samples is not None:
        split = f"{split}[:{max_samples}]"  # as many as one asks for
    texts = _text_rows(task) if task.grade is None else []
    rows = texts or gold_data.load_rows(task.dataset, task.subset, split)[0]
    for number, row in enumerate(rows, 1):
        has = row.meta | {"answer": row.answer, "completion": row.completion}
        lacks = [name for name in task.needs if has.get(name) is None]
        if lacks:
            raise ValueError(f"task {task.name}: row {number} of {task.dataset} has no {' and no '.join(lacks)}")
    rows = gold_data.without(rows, few_shot_rows(task))[0]
    if max_samples is not None and max_samples < len(rows):
        rows = [rows[i] for i in sorted(random.Random(f"{task.name} {seed}").sample(range(len(rows)), max_samples))]
    return rows


def _text_rows(task: Task) -> list[Row]:
    """Rows of text alone, from a .txt file (one document) or a `text` column; none for question and answer."""
    if task.dataset in gold_data.BUILT_IN:
        return []
    if Path(task.dataset).suffix == ".txt":
        return [Row((), Path(task.dataset).read_text())]
    raws = gold_data.raw_rows(task.dataset, task.subset, task.split)
    return [Row((), raw["text"]) for raw in raws if raw["text"]] if "text" in next(iter(raws), {}) else []


def task_messages(task: Task, row: Row, examples: list[Row]) -> list[gold_data.Message]:
    shots = [m for e in examples for m in (*e.prompt, {"role": "assistant", "content": e.completion})]
    *before, last = row.prompt
    return [*shots, *before, {"role": last["role"], "content": last["content"] + task.instruction}]


# ----------------------------------------------------------------------------------------------------------------------
# engines: prompts -> completions, sequences -> log-probabilities


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
    batch_size: int = 32  # answers generated at a time (engine hf)
    engine: Literal["hf", "vllm"] = "hf"  # what generates
    vllm_memory: float = 0.8  # share of the GPU's memory for vLLM
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: bfloat16 on a GPU
    seed: int = 0  # of the questions and the answers

    def __post_init__(self):
        if self.num_samples < 1 or (self.num_samples > 1 and self.temperature <= 0):
            raise ValueError(
                f"num_samples {self.num_samples} at temperature {self.temperature}: greedy answers are all the same, "
                "so more than one needs a temperature above 0"
            )


@dataclass(frozen=True)
class Decoding:
    """How answers are written."""

    n: int  # answers per prompt
    temperature: float  # 0 is greedy
    max_new_tokens: int
    end_ids: tuple[int, ...]
    seed: int


def torch_dtype(dtype: str, device: str) -> torch.dtype:
    auto = "float32" if device.startswith("cpu") else "bfloat16"
    return getattr(torch, auto if dtype == "auto" else dtype)


def context_length(config, most: int) -> int:
    text = config.get_text_config()
    return min(text.max_position_embeddings, most) if hasattr(text, "max_position_embeddings") else most


class HFEngine:
    """transformers' own generate. The model's generation config supplies end ids, nothing else."""

    def __init__(self, model, batch_size: int, max_length: int):
        self.model, self.batch_size = model, batch_size
        self.limit = context_length(model.config, max_length)  # tokens of prompt and answer
        self.window = self.limit  # tokens the model reads at a time
        eos = model.generation_config.eos_token_id
        self.end_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]

    def load(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[torch.device]:
        """Evaluation mode, neutral generation defaults and a random state of its own; all put back afterwards."""
        from transformers import GenerationConfig

        model, device = self.model, self.model.device
        was_training, config = model.training, model.generation_config
        model.eval()
        model.generation_config = GenerationConfig()  # penalties in it would apply wherever ours is silent
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                yield device
        finally:
            model.train(was_training)
            model.generation_config = config

    def generate(self, prompts: list[list[int]], how: Decoding) -> list[list[list[int]]]:
        """how.n answers per prompt, as ids with the end id if the model wrote one; empty where a prompt leaves no room.

        Prompts of similar length are batched, the longest first; samples depend on the batches and the seed.
        """
        from transformers import GenerationConfig

        out: list[list[list[int]]] = [[[]] * how.n for _ in prompts]
        fits = sorted((i for i, p in enumerate(prompts) if len(p) < self.limit), key=lambda i: -len(prompts[i]))
        size = max(1, self.batch_size // how.n)
        for start in progress(range(0, len(fits), size)):
            batch = fits[start : start + size]
            width = len(prompts[batch[0]])
            config = GenerationConfig(
                **(dict(do_sample=True, temperature=how.temperature, top_k=0) if how.temperature else {}),
                num_return_sequences=how.n,
                max_new_tokens=min(how.max_new_tokens, self.limit - width),
                eos_token_id=list(how.end_ids),
                pad_token_id=how.end_ids[0],
                use_cache=True,
            )
            ids = torch.full((len(batch), width), how.end_ids[0])
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            with self._scoring() as device:
                torch.manual_seed(how.seed * 1_000_003 + start)
                answers = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
            for i, group in zip(batch, answers[:, width:].reshape(len(batch), how.n, -1).tolist()):
                out[i] = [until(answer, how.end_ids) for answer in group]
        return out

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Natural log-probability of every token but the first, float64 (len - 1,), whatever the batches are."""
        vocabulary = self.model.config.get_text_config().vocab_size
        out: dict[int, np.ndarray] = {}
        order = deque(sorted(range(len(sequences)), key=lambda i: -len(sequences[i])))
        while order:
            width = len(sequences[order[0]]) - 1
            rows = max(1, min(self.batch_size, 2**28 // (width * vocabulary)))  # at most a gigabyte of float32 logits
            batch = [order.popleft() for _ in range(min(rows, len(order)))]
            ids = torch.zeros(len(batch), width + 1, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[row, : len(sequences[i]) - 1] = 1
            with self._scoring() as device:
                ids = ids.to(device)
                logits = self.model(input_ids=ids[:, :-1], attention_mask=mask.to(device)).logits  # (B, T, V)
                nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
            for row, i in enumerate(batch):
                out[i] = -nll[row, : len(sequences[i]) - 1].double().cpu().numpy()
        return [out[i] for i in range(len(sequences))]


class VLLMEngine:
    """vLLM in this process: weights are handed over by reference, and no engine process can outlive us."""

    def __init__(self, model_dir: str, device: str, options: Options, empty: bool):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        from transformers import AutoConfig
        from vllm import LLM

        cpu = device.startswith("cpu")
        # on the CPU a share of "its" memory would be one of the machine's
        memory = {"kv_cache_memory_bytes": 2**28} if cpu else {"gpu_memory_utilization": options.vllm_memory}
        self.limit = context_length(AutoConfig.from_pretrained(model_dir), options.max_length)
        self.window = self.limit - 2  # vLLM reads the last token too, and insists on writing one more
        self.llm = LLM(
            model=model_dir,
            dtype=str(torch_dtype(options.dtype, device)).removeprefix("torch."),
            seed=options.seed,
            max_model_len=self.limit,
            load_format="dummy" if empty else "auto",
            enforce_eager=cpu,
            skip_tokenizer_init=True,
            generation_config="vllm",
            **memory,
        )
        eos = self.llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id", [])
        self.end_ids = eos if isinstance(eos, list) else [eos]

    def load(self, weights: dict[str, Tensor]) -> None:
        # one call with the whole state dict: the names of a tied head are all in it, and vLLM may keep its own copy
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        if not self.llm.reset_prefix_cache():  # else shared prompts would be read with the old weights
            raise RuntimeError("vLLM kept its prefix cache: a request is still running")

    def generate(self, prompts: list[list[int]], how: Decoding) -> list[list[list[int]]]:
        """As HFEngine.generate; a sample depends on its prompt's position and the seed, not on the batch."""
        from vllm import SamplingParams

        out: list[list[list[int]]] = [[[]] * how.n for _ in prompts]
        fits = [i for i, p in enumerate(prompts) if len(p) < self.limit]
        params = [
            SamplingParams(
                n=how.n,
                temperature=how.temperature,
                max_tokens=min(how.max_new_tokens, self.limit - len(prompts[i])),
                stop_token_ids=list(how.end_ids),
                detokenize=False,
                seed=how.seed * 1_000_003 + i,
            )
            for i in fits
        ]
        answers = self.llm.generate([{"prompt_token_ids": prompts[i]} for i in fits], params) if fits else []
        for i, answer in zip(fits, answers):
            out[i] = [list(one.token_ids) for one in answer.outputs]
        return out

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """As HFEngine.score."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        scored = self.llm.generate([{"prompt_token_ids": s} for s in sequences], params)
        return [
            np.array([found[token].logprob for token, found in zip(s[1:], answer.prompt_logprobs[1:])])
            for s, answer in zip(sequences, scored)
        ]


def open_engine(model_dir: str, device: str, options: Options, empty: bool = False):
    """(engine, tokenizer) of a model directory or Hub id; `empty` needs its config only and waits for weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if options.engine == "vllm":
        return VLLMEngine(model_dir, device, options, empty), tokenizer
    dtype = torch_dtype(options.dtype, device)
    if empty:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir), dtype=dtype)
        with contextlib.suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(model_dir)
    else:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    return HFEngine(model.to(device).eval(), options.batch_size, options.max_length), tokenizer


def until(ids: list[int], end_ids: tuple[int, ...]) -> list[int]:
    """The ids up to the first end id, with it."""
    return ids[: next((i for i, token in enumerate(ids, 1) if token in end_ids), len(ids))]


def progress(steps: range) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(steps, disable=None, leave=False)  # None: silent where nobody watches


# ----------------------------------------------------------------------------------------------------------------------
# scores


def evaluate(model, tokenizer, tasks: Iterable[str], save_to: str | Path | None = None, **options) -> dict[str, dict]:
    """Score a model: {task: {"n", "accuracy", "se", "classes", ...}}.

    Args:
        model: a transformers causal LM (left as it was found), or an engine.
        tasks: names in TASKS, or "name=path".
        save_to: a directory for one JSONL per task with every answer.
        options: fields of Options.
    Raises ValueError for unknown tasks and unusable rows.
    """
    options = Options(**options)
    engine = HFEngine(model, options.batch_size, options.max_length) if isinstance(model, torch.nn.Module) else model
    results = {}
    for task in parse_tasks(tasks):
        if options.few_shot is not None:
            task = replace(task, few_shot=options.few_shot)
        start = time.perf_counter()
        score = perplexity if task.grade is None else accuracy
        results[task.name], answers = score(engine, tokenizer, task, options)
        results[task.name]["seconds"] = round(time.perf_counter() - start, 3)
        if save_to is not None:
            Path(save_to).mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(answer, ensure_ascii=False, default=str) + "\n" for answer in answers)
            (Path(save_to) / f"{task.name}.jsonl").write_text("".join(lines))
    return results


def accuracy(engine, tokenizer, task: Task, options: Options) -> tuple[dict, list[dict]]:
    """(result, answers) of a task with a grader. Counts are over all answers; `se` is over questions."""
    rows, examples = load_task_rows(task, options.max_samples, options.seed), few_shot_rows(task)
    prompts = [gold_data.encode_prompt(tokenizer, task_messages(task, row, examples)) for row in rows]
    k, ends = options.num_samples, gold_data.end_ids(tokenizer, engine.end_ids)
    limit = task.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    completions = engine.generate(prompts, Decoding(k, options.temperature, limit, ends, options.seed))
    classes, also, answers = Counter(dict.fromkeys(task.classes, 0)), Counter(), []
    for row, prompt, group in zip(rows, prompts, completions):
        for ids in group:
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            text = whole[: min((whole.find(s) for s in task.stop if s in whole), default=None)]
            grade = task.grade(text, row)
            classes[grade.reason] += 1
            also.update(grade.also)
            answers.append(
                {
                    "prompt": tokenizer.decode(prompt),
                    "completion": text,
                    "reason": grade.reason,
                    "truncated": text == whole and (not ids or ids[-1] not in ends),
                    "tokens": len(ids),
                    "answer": row.answer,
                    **row.meta,
                }
            )
    right = np.array([answer["reason"] == "ok" for answer in answers]).reshape(len(rows), k)
    result = {
        "n": len(rows),
        "samples": k,
        "correct": int(right.sum()),
        "accuracy": float(right.mean()),
        "se": float(right.mean(1).std() / math.sqrt(len(rows))),
        **{f"accuracy_{name}": count / len(answers) for name, count in also.items()},
        **{f"pass@{j}": pass_at(j, right) for j in sorted({*(2**i for i in range(1, k.bit_length())), k} - {1})},
        "classes": dict(classes),
        "truncated": float(np.mean([answer["truncated"] for answer in answers])),
        "too_long": sum(len(prompt) >= engine.limit for prompt in prompts),
        "tokens": float(np.mean([answer["tokens"] for answer in answers])),
    }
    if task.grade is grade_math:
        result["grader"] = math_grader()
    return result, answers


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


def perplexity(engine, tokenizer, task: Task, options: Options) -> tuple[dict, list[dict]]:
    """(result, per-row numbers): sums of NLL and of tokens and bytes over the set, then one division.

    A question with its answer is read as "Question: ...\\nAnswer: ...", each row by itself, without an end token:
    `perplexity` and `bits_per_byte` are of all of it, `answer_*` of the part after "Answer:". `wrapped_perplexity` is
    of the same rows joined by end tokens and cut into chunks of options.wrap, the remainder dropped. Only bits per byte
    compare between tokenizers. `se` is that of bits_per_byte, over rows.
    """
    rows = load_task_rows(task, options.max_samples, options.seed)
    eos = gold_data.end_ids(tokenizer)[-1] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    prefix = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    totals, stream, sequences, owners = [], [], [], []
    for number, row in enumerate(rows):
        asked = "\n".join(m["content"] for m in row.prompt if m["role"] == "user")
        context = f"Question: {asked}\nAnswer:" if row.prompt else ""
        answer = f" {row.completion}" if row.prompt else row.completion
        ids, before = encode(context + answer), len(encode(context))
        totals.append({"tokens": len(ids), "bytes": len((context + answer).encode())})
        totals[-1] |= {"answer_tokens": len(ids) - before, "answer_bytes": len(answer.encode())}
        stream += [*ids, eos]
        for sequence, count in windows(ids, prefix, engine.window):
            sequences.append(sequence)
            owners.append((number, count))
    if not sequences:
        raise ValueError(f"task {task.name}: {task.dataset} holds no text")
    scored = [[np.zeros(0)] for _ in rows]
    for (number, count), logprobs in zip(owners, engine.score(sequences)):
        scored[number].append(logprobs[len(logprobs) - count :])
    for total, parts in zip(totals, scored):
        logprobs = np.concatenate(parts)  # of every token of the row
        total["nll"] = -float(logprobs.sum())
        total["answer_nll"] = -float(logprobs[len(logprobs) - total["answer_tokens"] :].sum())
    sums = {key: sum(total[key] for total in totals) for key in totals[0]}
    rate = sums["nll"] / sums["bytes"]  # nats per byte
    spread = math.sqrt(sum((total["nll"] - rate * total["bytes"]) ** 2 for total in totals))  # of a ratio of two sums
    result = {
        "n": len(rows),
        "tokens": sums["tokens"],
        "bytes": sums["bytes"],
        "perplexity": math.exp(sums["nll"] / sums["tokens"]),
        "bits_per_byte": rate / math.log(2),
        "se": spread / sums["bytes"] / math.log(2),
    }
    if rows[0].prompt:
        result["answer_perplexity"] = math.exp(sums["answer_nll"] / sums["answer_tokens"])
        result["answer_bits_per_byte"] = sums["answer_nll"] / sums["answer_bytes"] / math.log(2)
    body = min(options.wrap, engine.window) - 2
    chunks = [[prefix, *stream[i : i + body], eos] for i in range(0, len(stream) - body + 1, body)]
    if chunks:
        result["wrapped_perplexity"] = math.exp(-np.concatenate(engine.score(chunks)).mean())
    return result, totals


def headline(results: dict[str, dict], metric: str | None = None) -> tuple[str, float]:
    """(name, value) of the number to choose checkpoints by. Larger is better: what should be small comes back negated.

    Args:
        metric: "countdown/accuracy" or just "countdown"; None is the first task.
    Raises ValueError that lists what there is.
    """
    numbers = flatten(results)
    task, _, name = (metric or next(iter(results))).partition("/")
    name = name or ("accuracy" if f"{task}/accuracy" in numbers else "bits_per_byte")
    if f"{task}/{name}" not in numbers:
        raise ValueError(f"there is no metric {metric!r} among the results: {', '.join(sorted(numbers))}")
    value = numbers[f"{task}/{name}"]
    small = "perplexity" in name or "bits_per_byte" in name
    return (f"-{task}/{name}", -value) if small else (f"{task}/{name}", value)


def one_line(results: dict[str, dict]) -> str:
    """The results for a console."""
    parts = []
    for task, r in results.items():
        name = "accuracy" if "accuracy" in r else "bits_per_byte"
        more = f", truncated {r['truncated']:.0%}" if r.get("truncated") else ""
        parts.append(f"{task} {name} {r[name]:.4f} ± {r['se']:.4f} (n {r['n']}{more}, {r['seconds']:.0f} s)")
    return "; ".join(parts)


def flatten(results: dict[str, dict]) -> dict[str, float]:
    """{"task/metric": number}, what a logger wants."""
    flat = {}
    for task, result in results.items():
        for key, value in result.items():
            inner = {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            flat |= {f"{task}/{k}": v for k, v in inner.items() if isinstance(v, (int, float))}
    return flat


# ----------------------------------------------------------------------------------------------------------------------
# the evaluator: a thread that supervises, a child process that works


@dataclass
class Job:
    name: str  # of the model in the record
    step: int | None
    model_dir: str
    weights: dict[str, Tensor] | None  # None: those in model_dir
    keep: bool  # never dropped for a newer one


class Evaluator:
    """Scores snapshots of a model that trains on, in a child process.

    A thread of the trainer could not: Python work in it slows training up to a hundredfold (one interpreter lock), it
    would read weights in the middle of a step, and it cannot be killed. So the thread here only waits; the child does
    the work, and dies with its parent or at its time limit. Weights reach it through an anonymous file in memory, which
    has no name that could be left behind and does not count against the size of /dev/shm.

    Each submit is answered by exactly one record {"step", "model", "status", "seconds", "results", "error"}: status ok,
    error (an exception), crashed, timeout, dropped (a newer one took its place, or the evaluator was closed before its
    turn) or refused (after `max_failures` failures in a row, or after close). Records are appended to
    output_dir/eval.jsonl as they arrive and handed out by poll(). A failure is printed and counted; it raises nothing.

    Args:
        model_dir: config.json and tokenizer of the model that `submit` sends weights of.
        tasks: names in TASKS, or "name=path".
        output_dir: for eval.jsonl, eval.log (what the child prints) and completions/.
        device: "cpu", or "cuda:1" as the trainer counts GPUs.
        policy: when an evaluation is waiting already, "drop_oldest" replaces it, "wait" makes submit wait. The first
            (step 0), the final one and other models are never dropped.
        timeout: seconds for one evaluation with the start of the child, None for ever.
        max_failures: in a row, then no more is tried.
        echo: the child prints here instead of into eval.log.
        options: fields of Options.
    Raises ValueError for an unknown task, policy or option, or a GPU that is not there.
    """

    script = __file__  # what the child runs with --serve; it has to define the same TASKS

    def __init__(
        self,
        model_dir: str | Path,
        tasks: Iterable[str],
        output_dir: str | Path,
        device: str = "cpu",
        policy: Literal["drop_oldest", "wait"] = "drop_oldest",
        timeout: float | None = 3600.0,
        max_failures: int = 3,
        echo: bool = False,
        **options,
    ):
        unknown = options.keys() - {f.name for f in dataclasses.fields(Options)}
        if unknown:
            raise ValueError(f"unknown option {', '.join(sorted(unknown))} of the evaluator")
        if policy not in ("drop_oldest", "wait"):
            raise ValueError(f"policy {policy!r} is neither drop_oldest nor wait")
        self.model_dir, self.tasks, self.output_dir = str(model_dir), list(tasks), Path(output_dir)
        if not parse_tasks(self.tasks):
            raise ValueError(f"no task to evaluate on: choose among {', '.join(TASKS)}")
        self.device, self.options, self.policy, self.timeout = device, Options(**options), policy, timeout
        self.env, self.echo, self.max_failures = child_env(device, self.options.engine), echo, max_failures
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()  # of statuses
        self.waiting: deque[Job] = deque()
        self.records: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.changed = threading.Condition()
        self.closed, self.close_by, self.cut_short, self.disabled = False, math.inf, False, ""
        self.child: subprocess.Popen | None = None
        self.child_model = ""
        self.memory = os.memfd_create("gold_eval") if hasattr(os, "memfd_create") else None  # Linux has it
        self.weights_file = str(
            self.output_dir / ".weights.pt" if self.memory is None else f"/proc/self/fd/{self.memory}"
        )
        self.thread = threading.Thread(target=self._supervise, name="evaluator", daemon=True)
        self.thread.start()

    # ---- the trainer's side

    def submit(self, step: int, state_dict: dict[str, Tensor], final: bool = False) -> None:
        """Have these weights scored. They are copied here and now, so the caller may train on at once."""
        dtype = torch_dtype(self.options.dtype, self.device)
        weights = {} if self.disabled or self.closed else snapshot(state_dict, dtype)
        self._enqueue(Job("student", step, self.model_dir, weights, keep=final or step == 0))

    def submit_model(self, name: str, model_dir: str | Path) -> None:
        """Have another model scored, once."""
        self._enqueue(Job(name, None, str(model_dir), None, keep=True))

    def _enqueue(self, job: Job) -> None:
        with self.changed:
            if not job.keep or job.step:  # a newer snapshot
                while self.policy == "wait" and self._droppable() and not (self.disabled or self.closed):
                    self.changed.wait()
                for old in self._droppable():
                    self.waiting.remove(old)
                    self._record(old, "dropped", error=f"replaced by step {job.step}")
            if self.disabled or self.closed:
                self._record(job, "refused", error=self.disabled or "the evaluator is closed")
            else:
                self.waiting.append(job)
            self.changed.notify_all()

    def _droppable(self) -> list[Job]:
        return [job for job in self.waiting if not job.keep]

    def poll(self) -> list[dict]:
        """The records that arrived since the last call."""
        return [self.records.get() for _ in range(self.records.qsize())]

    def close(self, timeout: float | None = None) -> bool:
        """Wait for what was submitted, at most `timeout` seconds, and stop the child. True if nothing was cut short.

        Call it after the process group is gone: the other ranks would wait for this one.
        """
        with self.changed:
            self.closed = True
            self.close_by = math.inf if timeout is None else time.monotonic() + timeout
            self.changed.notify_all()
        self.thread.join()
        if self.memory is not None:
            os.close(self.memory)
            self.memory = None
        (self.output_dir / ".weights.pt").unlink(missing_ok=True)
        return not self.cut_short

    def summary(self) -> str:
        """One line for the end of a run."""
        counts = ", ".join(f"{n} {status}" for status, n in self.counts.items()) or "none"
        return f"evaluations: {counts}" + (f"; {self.disabled}" if self.disabled else "")

    @property
    def failures(self) -> int:
        return sum(self.counts[status] for status in ("error", "crashed", "timeout"))

    def _record(
        self, job: Job, status: str, seconds: float = 0.0, results: dict | None = None, error: str = ""
    ) -> None:
        record = {"step": job.step, "model": job.name, "status": status, "seconds": round(seconds, 3)}
        record |= {"results": results or {}} | ({"error": error} if error else {})
        with self.changed:
            self.counts[status] += 1
            self.records.put(record)
            with contextlib.suppress(OSError):  # a full disk must not end the thread that owes further answers
                with open(self.output_dir / "eval.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
        if status not in ("ok", "dropped"):
            print(f"eval: {job.name} step {job.step}: {status}: {error}", file=sys.stderr, flush=True)

    # ---- the supervisor's side

    def _supervise(self) -> None:
        in_a_row = 0
        while job := self._next():
            start = time.monotonic()
            try:
                answer = self._ask(job, start)
            except (EOFError, ConnectionError):  # the other end of the pipe is closed: the child is dead
                code = self.child.wait()
                answer = {"status": "crashed", "error": f"exit code {code}, see {self.output_dir}/eval.log"}
            except Exception:  # noqa: BLE001 - whatever went wrong here is this job's record, not the end of training
                answer = {"status": "error", "error": traceback.format_exc()}
            failed = answer["status"] != "ok"
            if failed:
                self._kill()  # the next job gets a fresh child: after an exception neither CUDA nor vLLM can be trusted
            in_a_row = in_a_row + 1 if failed else 0
            if in_a_row == self.max_failures:
                self.disabled = f"given up after {in_a_row} failures in a row, the last: {answer['error'][-300:]}"
            self._record(job, seconds=time.monotonic() - start, **answer)
        self._kill()

    def _next(self) -> Job | None:
        """The job that waits longest; None when there will be no more."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            while self.waiting and self.disabled:
                self._record(self.waiting.popleft(), "refused", error=self.disabled)
            while self.waiting and time.monotonic() > self.close_by:
                self._record(self.waiting.popleft(), "dropped", error="the evaluator was closed before its turn")
                self.cut_short = True
            self.changed.notify_all()
            return self.waiting.popleft() if self.waiting else None

    def _ask(self, job: Job, start: float) -> dict:
        """The child's answer, or a timeout. Raises EOFError or ConnectionError if the child dies."""
        empty = job.weights is not None  # the model directory holds no weights, or not these
        if self.child is None or self.child_model != job.model_dir:
            self._spawn(job.model_dir, empty)
        if empty:
            torch.save(job.weights, self.weights_file)  # a tied head is written once; no lock is held while it writes
            job.weights = None
        name = re.sub(r"[^\w.-]+", "_", job.name) if job.step is None else f"step-{job.step:06d}"
        self.connection.send({"save_to": str(self.output_dir / "completions" / name)})
        while not self.connection.poll(0.1):
            waited, now = time.monotonic() - start, time.monotonic()
            if now > self.close_by or (self.timeout is not None and waited > self.timeout):
                self.cut_short |= now > self.close_by
                return {"status": "timeout", "error": f"no answer in {waited:.0f} seconds, child killed"}
        answer = self.connection.recv()
        if empty:
            os.truncate(self.weights_file, 0)  # the memory is free until the next snapshot
        return answer

    def _spawn(self, model_dir: str, empty: bool) -> None:
        self._kill()
        self.connection, theirs = multiprocessing.Pipe()
        with open(self.output_dir / "eval.log", "a") as log:
            self.child = subprocess.Popen(
                [sys.executable, self.script, "--serve", str(theirs.fileno()), str(os.getpid())],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=None if self.echo else log,
                stderr=None if self.echo else log,
                pass_fds=[fd for fd in (theirs.fileno(), self.memory) if fd is not None],
                start_new_session=True,  # what it starts is killed with it, and Ctrl-C is ours to handle
            )
        theirs.close()  # so that its death closes the pipe
        self.child_model = model_dir
        setup = {"model_dir": model_dir, "weights": self.weights_file if empty else None, "tasks": self.tasks}
        self.connection.send(setup | {"device": self.device.split(":")[0], "options": asdict(self.options)})

    def _kill(self) -> None:
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
            self.connection.close()
        self.child = None


def snapshot(state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A copy on the CPU in the evaluation's dtype, without the prefixes of DDP and torch.compile, ties kept."""
    weights: dict[str, Tensor] = {}
    copies: dict[tuple, Tensor] = {}
    for name, value in state_dict.items():
        value = value.detach()
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in copies:
            kind = dtype if value.is_floating_point() else value.dtype
            copies[key] = torch.empty(value.shape, dtype=kind, pin_memory=value.is_cuda)  # pinned: full bus speed
            copies[key].copy_(value.to(kind), non_blocking=value.is_cuda)
        weights[name.replace("_orig_mod.", "").removeprefix("module.")] = copies[key]
    if any(copy.is_pinned() for copy in copies.values()):
        torch.cuda.synchronize()
    return weights


def child_env(device: str, engine: str) -> dict[str, str]:
    """The environment of the child: one GPU or none, and no trace of torchrun. Raises ValueError for a missing GPU."""
    torchrun = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)$")
    env = {name: value for name, value in os.environ.items() if not torchrun.match(name)}
    if device.startswith("cpu"):
        env["CUDA_VISIBLE_DEVICES"] = ""
        if engine == "vllm":  # idle OpenMP threads spin: 45 times slower next to a busy process
            env |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        return env
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    index = torch.device(device).index or 0
    if index >= len(gpus) or not gpus[index]:
        raise ValueError(f"the evaluation device {device} does not exist: the GPUs here are {gpus}")
    return env | {"CUDA_VISIBLE_DEVICES": gpus[index]}


def serve(pipe: int, parent: int) -> None:
    """The child's side: a setup, then one answer per job, until the parent is gone or an exception is reported."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent, even while hanging
    if os.getppid() != parent:  # it died before that call
        return
    faulthandler.enable()
    connection = multiprocessing.connection.Connection(pipe)
    setup = connection.recv()
    if setup["device"] == "cpu":
        os.nice(10)  # training goes first, ...
        with contextlib.suppress(OSError):  # ... also where Linux shares the cores among sessions before processes
            Path("/proc/self/autogroup").write_text("10")
    loaded, options = None, Options(**setup["options"])
    while True:
        job = connection.recv()  # EOFError ends this process, as the parent's end is closed
        try:
            loaded = loaded or open_engine(setup["model_dir"], setup["device"], options, empty=bool(setup["weights"]))
            if setup["weights"]:
                loaded[0].load(torch.load(setup["weights"], mmap=True))
            results = evaluate(*loaded, setup["tasks"], job["save_to"], **asdict(options))
        except Exception:
            connection.send({"status": "error", "error": traceback.format_exc()})
            raise
        connection.send({"status": "ok", "results": results})


# ----------------------------------------------------------------------------------------------------------------------
# tables and plots


def table(results: dict[str, dict]) -> str:
    """Markdown table of one task: a line per model, in the layout of the published Countdown tables.

    Args:
        results: {model: result of the task}.
    """
    some = next(iter(results.values()))
    if "accuracy" not in some:
        names = [key for key in some if "perplexity" in key or "bits_per_byte" in key]
        rows = [["model", *names, "rows", "tokens"]]
        for model, r in results.items():
            rows.append([model, *(f"{r[k]:.4f}" if k in r else "-" for k in names), str(r["n"]), str(r["tokens"])])
        return markdown(rows)
    classes = list(dict.fromkeys(c for r in results.values() for c in r["classes"] if c != "ok"))
    extra = list(dict.fromkeys(k for r in results.values() for k in r if k.startswith(("accuracy_", "pass@"))))
    rows = [["model", "correct", "accuracy", *classes, "truncated", *extra]]
    for model, r in results.items():
        counts = [str(r["classes"].get(c, 0)) for c in classes]
        rates = [f"{100 * r[k]:.2f} %" if k in r else "-" for k in ("truncated", *extra)]
        rows.append([model, str(r["correct"]), f"{100 * r['accuracy']:.2f} ± {100 * r['se']:.2f} %", *counts, *rates])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first being the heading, padded so that they read well as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def report(models: dict[str, dict[str, dict]]) -> str:
    """Markdown with one table per task of {model: {task: result}}."""
    parts = []
    for task in dict.fromkeys(task for results in models.values() for task in results):
        found = {model: results[task] for model, results in models.items() if task in results}
        some = next(iter(found.values()))
        notes = [f"n = {some['n']}", f"{some['samples']} answers each" if some.get("samples", 1) > 1 else ""]
        notes += [f"compared by {some['grader']}" if "grader" in some else ""]
        parts.append(f"### {task} ({', '.join(filter(None, notes))})\n\n{table(found)}\n")
    return "\n".join(parts)


def plot_classes(models: dict[str, dict[str, dict]], path: str | Path) -> None:
    """Bar chart (PNG) of what became of the answers: a panel per task, a group per class, a bar per model."""
    from matplotlib.figure import Figure

    graded = (task for results in models.values() for task, result in results.items() if "classes" in result)
    tasks = list(dict.fromkeys(graded))
    figure = Figure(figsize=(11, 3.6 * max(1, len(tasks))), layout="constrained")
    for axes, task in zip(np.atleast_1d(figure.subplots(max(1, len(tasks)))), tasks):
        found = {model: results[task]["classes"] for model, results in models.items() if task in results}
        names = list(dict.fromkeys(name for classes in found.values() for name in classes))
        width = 0.8 / len(found)
        for i, (model, classes) in enumerate(found.items()):
            shares = [100 * classes.get(name, 0) / sum(classes.values()) for name in names]
            bars = axes.bar(np.arange(len(names)) + (i - (len(found) - 1) / 2) * width, shares, width, label=model)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set_xticks(range(len(names)), [name.replace("_", "\n", 1) for name in names], fontsize=8)
        axes.set(title=task, ylabel="% of answers")
        axes.legend()
    figure.savefig(path, dpi=130)


def read_jsonl(path: Path) -> list[dict]:
    """Its complete lines (a run that is still going may be writing one); none if there is no such file."""
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]


def read_run(folder: str | Path) -> dict:
    """{"tokens": {step: trained so far}, "loss": {step: ..}, "<task>/<metric>": {step: ..}} of a training run's folder.

    Raises FileNotFoundError if there are no metrics. Of a step that was repeated after a resume, the last counts.
    """
    metrics = read_jsonl(Path(folder) / "metrics.jsonl")
    if not metrics:
        raise FileNotFoundError(f"{folder} is not the folder of a training run: it has no metrics.jsonl with any line")
    run: dict[str, dict[int, float]] = {"tokens": {0: 0}, "loss": {}}
    for row in metrics:
        run["tokens"] |= {row["step"]: row["num_tokens"]} if "num_tokens" in row else {}
        run["loss"] |= {row["step"]: row["actor/loss"]} if "actor/loss" in row else {}
    for record in read_jsonl(Path(folder) / "eval.jsonl"):
        if record["status"] == "ok" and record["step"] is not None:
            for name, value in flatten(record["results"]).items():
                run.setdefault(name, {})[record["step"]] = value
    return run


def plot_runs(folders: Iterable[str | Path], path: str | Path, metric: str | None = None) -> None:
    """Curves (PNG) of training runs: loss and `metric`, over steps and over trained tokens.

    Args:
        metric: "task/name"; None is the main one of the first task that was evaluated.
    """
    from matplotlib.figure import Figure

    runs = {str(folder): read_run(folder) for folder in folders}
    known = list(dict.fromkeys(k for run in runs.values() for k in run if k.endswith(("/accuracy", "/bits_per_byte"))))
    metric = metric or next(iter(known), "accuracy")
    figure = Figure(figsize=(11, 7), layout="constrained")
    for row, (key, name) in zip(figure.subplots(2, 2), (("loss", "loss"), (metric, metric))):
        for axes, over in zip(row, ("steps", "tokens")):
            for run_name, run in runs.items():
                points = sorted(run.get(key, {}).items())
                if over == "tokens":
                    points = [(run["tokens"][step], value) for step, value in points if step in run["tokens"]]
                xs, ys = zip(*points) if points else ((), ())
                axes.plot(xs, ys, marker="o" if key == metric else None, ms=3, label=run_name)
            axes.set(xlabel=over, ylabel=name)
            axes.grid(alpha=0.3)
            axes.legend()
    figure.savefig(path, dpi=130)


# ----------------------------------------------------------------------------------------------------------------------
# the command line


@dataclass(frozen=True)
class Config:
    """Score models on tasks and print a table, or draw the curves of training runs."""

    model: tuple[str, ...] = ()  # directories or Hub ids of the models to score, a line of the table each
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--task"])] = ("countdown",)  # names, or name=path of rows
    runs: tuple[str, ...] = ()  # folders of training runs whose curves to draw instead
    metric: str | None = None  # of the curves, such as countdown/accuracy; None: of the first task
    out: str = "out/eval"  # folder for the tables, the plots and every answer
    plot: bool = False  # also draw a bar chart of what became of the answers
    device: str = "auto"  # cpu, cuda:0, ...; auto is the first GPU if there is one
    timeout: float | None = None  # seconds per model; None waits for ever
    scoring: tyro.conf.OmitArgPrefixes[Options] = Options()  # equal options and weights give equal numbers


def main(config: Config) -> int:
    """Returns the exit code: 1 if a model could not be scored."""
    if not config.model and not config.runs:
        raise ValueError("nothing to do: name a model with --model, or training runs with --runs")
    for model in config.model:  # a Hub id has at most one slash, in the middle
        if not Path(model).exists() and (model.count("/") > 1 or model[0] in "./~"):
            raise FileNotFoundError(f"there is no model directory {model}")
    out = Path(config.out)
    if config.runs:
        out.mkdir(parents=True, exist_ok=True)
        plot_runs(config.runs, out / "runs.png", config.metric)
        print(f"curves of {len(config.runs)} runs in {out / 'runs.png'}")
        return 0
    device = ("cuda:0" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    options = asdict(config.scoring)
    evaluator = Evaluator("", config.tasks, out, device, timeout=config.timeout, echo=True, **options)
    short = [Path(model).name for model in config.model]
    names = short if len(set(short)) == len(short) else list(config.model)
    for name, model in zip(names, config.model):
        evaluator.submit_model(name, model)
    evaluator.close()
    records = evaluator.poll()
    models = {record["model"]: record["results"] for record in records if record["status"] == "ok"}
    text = report(models)
    print(text)
    (out / "report.md").write_text(text)
    (out / "results.json").write_text(json.dumps({"options": options, "models": models}, indent=2) + "\n")
    if config.plot and models:
        plot_classes(models, out / "classes.png")
    return 0 if len(models) == len(names) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*map(int, sys.argv[2:]))
    else:
        try:
            sys.exit(main(tyro.cli(Config)))
        except (ValueError, FileNotFoundError) as e:
            sys.exit(f"error: {e}")
