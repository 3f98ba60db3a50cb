"""Data sets, chat templates, tokens as bytes, and the byte-exact alignment of two tokenizers.

    python gold_data.py --student DIR --teacher DIR --text FILE      how well do two tokenizers align on this text?
    python gold_data.py --make countdown --n 10000 --out train.jsonl write Countdown puzzles

From top to bottom: rows (any data set -> prompt, completion, answer), Countdown, prompts (chat templates -> ids),
vocabularies (token id <-> bytes), alignment (spans, the queries of the prefix loss), batches, the report.

This file knows nothing about logits, models, lmbda, vLLM, or ranks.
"""

import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import random
import re
import sys
import unicodedata
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": str}

# ----------------------------------------------------------------------------------------------------------------------
# rows: they stay in the data set; memory holds an index of the usable ones


@dataclass(frozen=True)
class Row:
    """One example. `completion` is None for prompt-only rows; `answer` and `meta` are for whoever grades."""

    prompt: tuple[Message, ...]
    completion: str | None = None
    answer: Any = None
    meta: dict = field(default_factory=dict)
    thoughts: Message = field(default_factory=dict)  # reasoning_content beside the completion: see `prompts`
    columns: dict = field(default_factory=dict)  # as they are in the data set: see `privileged`

    @property
    def key(self) -> int:
        """Equal for rows that ask the same question."""
        return _hash([m["content"] for m in self.prompt if m["role"] == "user"])


def _hash(value) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)


class Unusable(ValueError):
    """This row cannot be used; the message is the reason that is counted."""


def need(ok: object, why: str, error: type[Exception] = ValueError) -> None:
    """Raises ValueError, or another error, unless `ok`: the one way in which bad input is refused."""
    if not ok:
        raise error(why)


_need = functools.partial(need, error=Unusable)


COLUMNS = ("messages", "conversations", "prompt", "problem", "question", "nums")
TEXTS = {*COLUMNS, "completion", "generations", "solution", "generated_solution"} - {"nums"}
ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("system", "developer", "user", "assistant", "tool")}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what chat templates call it


def _text(value, what: str) -> str:
    """A text as it is, a whole number in digits, the parts of a list joined if all of them are texts."""
    if isinstance(value, (list, tuple)):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        _need(all(isinstance(part, str) for part in parts), f"{what} with parts that are no text")
        return _text("".join(parts), what)
    _need(value is not None, f"no {what}")
    value = str(value) if type(value) is int else value
    _need(isinstance(value, str), f"{what} is no text ({type(value).__name__})")
    _need(value.isascii() or not re.search("[\ud800-\udfff]", value), f"{what} with half a character")
    return value


def _messages(value) -> list[Message]:
    """Role, content and thoughts of every message of a list, or of its JSON text, also under ShareGPT's names."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    _need(isinstance(value, (list, tuple)) and all(isinstance(m, dict) for m in value), "messages are no objects")
    out = []
    for m in value:
        role, content = m.get("role") or m.get("from"), m.get("value") if m.get("content") is None else m["content"]
        _need(role, "a message without a role")
        _need(isinstance(role, str) and role in ROLES, f"a message of the unknown role {role!r:.40}")
        _need(not m.get("tool_calls") and not m.get("function_call"), "a tool call")
        thoughts = {k: _text(m[k], k) for k in THOUGHTS if m.get(k)}
        out.append({"role": ROLES[role], "content": _text(content, "content")} | thoughts)
    return out


def to_row(raw: dict) -> Row:
    """Normalise one row of any supported schema, tried in this order:

    messages | conversations                    chat (a list, its JSON, ShareGPT); the last assistant turn completes
    prompt [completion]                         strings or message lists
    problem [generations | generated_solution | solution] [expected_answer | answer]     OpenR1, OpenMathInstruct-2
    question [answer]                           GSM8K
    nums target                                 Countdown

    `generations` with `correctness_math_verify` (OpenR1-Math-220k): the first generation that was verified.
    Raises Unusable with the reason for any other row.
    """
    ask = lambda question: [{"role": "user", "content": _text(question, "question")}]
    answer = raw.get("expected_answer") if raw.get("expected_answer") is not None else raw.get("answer")
    completion, thoughts = raw.get("completion"), {}
    _need(not raw.get("tools"), "tools")
    if chat := raw.get("messages") or raw.get("conversations"):
        prompt = _messages(chat)
        if prompt and prompt[-1]["role"] == "assistant":
            completion = [prompt.pop()]
    elif raw.get("prompt"):
        prompt = _messages(raw["prompt"]) if isinstance(raw["prompt"], (list, tuple)) else ask(raw["prompt"])
        _need(prompt[-1]["role"] != "assistant", "a prompt that ends with the assistant")
    elif raw.get("problem"):
        prompt, completion = ask(raw["problem"]), raw.get("generated_solution") or raw.get("solution")
    elif raw.get("question"):
        prompt, completion = ask(raw["question"]), raw.get("answer")
        _need(not raw.get("choices") and not raw.get("options"), "multiple choice")
        if completion is not None:
            completion = re.sub(r"<<[^>]*>>", "", _text(completion, "answer"))  # GSM8K's calculator annotations
            answer = completion.split("####")[-1].strip()
    else:
        _need(any(name in raw for name in COLUMNS), "columns of no known schema")
        nums, target = raw.get("nums"), raw.get("target")
        _need(nums is not None and target is not None, "empty prompt")
        whole = isinstance(nums, (list, tuple)) and {type(n) for n in [*nums, target]} == {int}
        _need(whole, "nums and target are no whole numbers")
        prompt = countdown_prompt(nums, target)
    if raw.get("generations") and raw.get("correctness_math_verify") is not None:
        done = raw.get("is_reasoning_complete") or [True] * len(raw["generations"])
        good = (text for text, *both in zip(raw["generations"], raw["correctness_math_verify"], done) if all(both))
        completion = next(good, None)
        _need(completion is not None, "no verified generation")
    if isinstance(completion, list) and any(isinstance(m, dict) and {"role", "from"} & {*m} for m in completion):
        turns = _messages(completion)
        _need([m["role"] for m in turns] == ["assistant"], "a completion that is not one message of the assistant")
        completion, thoughts = turns[0]["content"], {k: v for k, v in turns[0].items() if k in THOUGHTS}
    _need(any(m["role"] == "user" and m["content"].strip() for m in prompt), "empty prompt")
    completion = None if completion is None else _text(completion, "completion")
    _need(completion is None or completion.strip(), "empty completion")
    meta = {k: v for k, v in raw.items() if k not in TEXTS and not isinstance(v, (list, dict)) or k == "nums"}
    return Row(tuple(prompt), completion, answer, meta, thoughts, raw)


FILES = {".jsonl": "text", ".json": "text", ".parquet": "parquet", ".csv": "csv"}
JSON = {"a line of JSON": "line", "an item of JSON": "item"}  # the only column of files whose rows may differ in keys


def _open_file(path: Path):
    """All rows of a file: `datasets` writes them to its cache, which is memory-mapped. A .json list is read whole."""
    import datasets

    kind, options = FILES[path.suffix], {"data_files": glob.escape(str(path)), "split": "train"}
    if path.stat().st_size == 0:
        return datasets.Dataset.from_dict({})
    if kind == "text":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            if path.suffix == ".json" and file.read(1000).lstrip()[:1] == "[":
                items = _json(path.read_bytes(), str(path))
                return datasets.Dataset.from_dict({"an item of JSON": list(map(json.dumps, items))})
        # bytes that are no UTF-8 become escapes that JSON does not know: the line is named as broken
        options |= {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"}
        options["features"] = datasets.Features({"a line of JSON": datasets.Value("large_string")})
    try:
        return datasets.load_dataset(kind, **options)
    except datasets.exceptions.DatasetsError as e:
        raise ValueError(f"{path} cannot be read: {e.__cause__ or e}") from e


def _open_hub(dataset: str, subset: str | None, split: str):
    """A split of what has the layout of the Hub, there or in a directory."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(dataset)
        if subset is not None and subset not in configs:
            splits = datasets.get_dataset_split_names(dataset, configs[0])
            known = f"its subsets are {configs}, its splits {splits}"
            need(subset in splits and split == "train", f"it has no subset {subset!r}: {known}")
            print(f"data: {dataset} has no subset {subset!r} but a split of that name; using it")
            subset, split = configs[0], subset
        return datasets.load_dataset(dataset, subset, split=split)
    except Exception as e:  # the Hub client raises a different class for each way of not finding something
        why = f"{e} {e.__cause__ or ''}".strip()
        raise ValueError(f"data set {dataset!r} cannot be read (built in are {', '.join(BUILT_IN)}): {why}") from e


def open_dataset(dataset: str, subset: str | None = None, split: str = "train") -> tuple[Any, np.ndarray]:
    """(a whole split, memory-mapped; the positions its slice means): built in, a file, a directory, or from the Hub.

    Args:
        subset: a configuration of the data set. A name that is a split instead (OpenMathInstruct-2's train_1M) is used
            as the split and said so.
        split: a name with an optional slice, "train[:1024]" or "test[10%:20%]"; a single file is all of every split.
    Raises: FileNotFoundError, or ValueError that lists what exists.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path, name, endless = Path(dataset), re.split(r"[^\w.]", split)[0], 10**12
    try:
        wanted = datasets.ReadInstruction.from_spec(split)
        stop = wanted.to_absolute({name: endless})[-1].to
    except ValueError as e:
        raise ValueError(f"split {split!r} is not understood: write a name or a slice, like train[:1024] ({e})") from e
    # the library would read train.jsonl and train_1M.jsonl of a directory as one split "train"
    files, is_file = {f.stem: f for f in path.glob("*") if f.suffix in FILES}, path.suffix in FILES
    file = files.get(subset if subset in files and name == "train" else name)
    need(subset is None or not (dataset in BUILT_IN or is_file), f"{dataset} has no subsets, so no {subset!r}")
    need(path.exists() or not (is_file or path.is_absolute()), f"data set {dataset} does not exist", FileNotFoundError)
    if dataset in BUILT_IN:
        known = name in ("train", "test") and "%" not in split
        need(known, f"built-in {dataset} has splits like train, test, train[:1024]; got {split!r}")
        n = stop if stop < endless // 2 else {"train": 4096, "test": 512}[name]
        data = datasets.Dataset.from_list(make_countdown(n, mini=dataset != "countdown", test=name == "test"))
    elif is_file or file is not None and (subset is None or subset in files):
        data = _open_file(path if is_file else file)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(dataset)
        splits = saved if isinstance(saved, datasets.DatasetDict) else {name: saved}
        need(name in splits, f"{dataset} has no split {name!r}; it has {sorted(splits)}")
        data = splits[name]
    else:
        data = _open_hub(dataset, subset, name)
    return data, np.concatenate([np.arange(part.from_, part.to) for part in wanted.to_absolute({name: len(data)})])


def _json(text: str | bytes, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not valid JSON ({e}): {text[:80]!r}") from e


def _parse(raw: dict, position: int, source: str = "") -> tuple[str, dict | None]:
    """(where a row stands in its source, its columns); None for an empty line. Raises ValueError for a broken one."""
    (column, text), *_ = raw.items()
    where = f"{source} {JSON.get(column, 'row')} {position + 1}".lstrip()
    if column in JSON:
        raw = _json(text, where) if (full := text.strip()) else None
        need(isinstance(raw, dict) or not full, f"{where} is not an object: {text[:80]!r}")
    return where, raw


def raw_rows(dataset: str, subset: str | None = None, split: str = "train") -> Iterator[dict]:
    """Rows as dictionaries, one by one; arguments as in `open_dataset`."""
    data, positions = open_dataset(dataset, subset, split)
    return filter(None, (_parse(data[position], position, dataset)[1] for position in positions.tolist()))


def iter_rows(dataset: str, subset: str | None = None, split: str = "train") -> Iterator[Row]:
    """Usable rows one by one, without a look at those that come later."""
    for raw in raw_rows(dataset, subset, split):
        with contextlib.suppress(Unusable):
            yield to_row(raw)


INDEX = np.dtype([("position", "i8"), ("key", "i8"), ("digest", "i8"), ("answered", "?")])
SCHEMAS = "`messages`, `prompt` (+`completion`), `problem` (+`[generated_]solution`), `question` (+`answer`) or `nums`"
TOO_LONG = (  # for the student, for the teacher
    "prompt longer than max_length - max_completion_length (raise --max-length or lower --max-completion-length)",
    "prompt of the teacher that leaves no room for max_completion_length in its context (what it reads is too long)",
)
Dropped = dict[str, tuple[int, str]]  # reason -> (how many rows, where the first one stands and how it begins)


@dataclass(frozen=True)
class Rows(Sequence):
    """Usable rows of a data set that stays on disk: a row is made when it is asked for; slices and masks are Rows."""

    data: Any  # datasets.Dataset
    index: np.ndarray  # (n,) of INDEX

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i):
        if not isinstance(i, (int, np.integer)):
            return Rows(self.data, self.index[i])
        position = int(self.index["position"][i])
        return to_row(_parse(self.data[position], position)[1])

    @property
    def hash(self) -> str:
        """Of all prompts and completions in their order."""
        return hashlib.blake2b(self.index["digest"].tobytes(), digest_size=8).hexdigest()

    def drop(self, mask: np.ndarray, why: str, dropped: Dropped) -> "Rows":
        """Those outside the mask; the others are counted."""
        if mask.any():
            position = int(self.index["position"][mask][0])
            where, raw = _parse(self.data[position], position)
            dropped[why] = (int(mask.sum()), f"{where}: {json.dumps(raw, default=str)[:60]}")
        return self[~mask]


def in_words(dropped: Dropped) -> str:
    return "; ".join(f"{n} {why} ({first})" for why, (n, first) in dropped.items()) or "none"


def _examine(
    batch: dict, numbers: list[int], source: str, positions: np.ndarray, tokenizers, rooms, template: str | None
) -> dict:
    """Columns of a batch: why a row cannot be used (None: it can, "": there is none), and what INDEX holds of it."""
    found, texts = [], {}
    for i, values in enumerate(zip(*batch.values())):
        found.append(["", 0, 0, False])
        _, raw = _parse(dict(zip(batch, values)), int(positions[numbers[i]]), source)
        try:
            if raw is not None:
                row = to_row(raw)
                texts[i], _ = prompts(tokenizers, row, template)
                told = [] if template is None else [privileged(row, template)]
                digest = _hash([row.prompt, row.completion, row.thoughts, *told])
                found[i] = [None, row.key, digest, row.completion is not None]
        except Unusable as e:
            found[i][0] = str(e)
    for why, tokenizer, room, column in zip(TOO_LONG, tokenizers, rooms, zip(*texts.values())):
        for i, long in zip(texts, too_long(tokenizer, column, room)):
            found[i][0] = found[i][0] or (why if long else None)
    return dict(zip(("why", *INDEX.names[1:]), map(list, zip(*found))))


def load_rows(
    dataset: str, subset: str | None = None, split: str = "train", tokenizers: Sequence = (),
    rooms: Sequence[float] = (), template: str | None = None,
) -> tuple[Rows, Dropped]:  # fmt: skip
    """The usable rows of a data set, and why the others are not. Looked at once: `datasets` caches what was found.

    Args:
        tokenizers: of the student and, if there is one, the teacher: rows that a chat template refuses are dropped.
        rooms: most tokens of a prompt of each.
        template: of the teacher's prompts: see `privileged`.
    Raises ValueError if nothing is left, for a line that is no JSON, or a template that asks for an unknown column.
    """
    import datasets

    data, positions = open_dataset(dataset, subset, split)
    rows, dropped = Rows(data, np.zeros(len(positions), INDEX)), {}
    rows.index["position"] = positions
    if template is not None:
        first = (_parse(data[i], i, dataset)[1] for i in positions[:FIRST_ROWS].tolist())
        columns = {"prompt", "completion", "answer"}.union(*filter(None, first))
        unknown = {m[1] for m in FIELD.finditer(template)} - {None} - columns
        asked, known = (", ".join(f"{{{name}}}" for name in sorted(names)) for names in (unknown, columns))
        need(not unknown, f"teacher_prompt_template asks for {asked}, but rows of {dataset} have {known}")
    if len(rows):
        part, code = data.select(positions), Path(__file__).read_text()
        name = datasets.fingerprint.Hasher.hash([part._fingerprint, positions, code, tokenizers, rooms, template])
        cache, workers = Path(datasets.config.HF_DATASETS_CACHE) / "gold", min(os.cpu_count(), len(part) // 10_000)
        cache.mkdir(parents=True, exist_ok=True)
        types = {"why": "string", "key": "int64", "digest": "int64", "answered": "bool"}
        how = {"source": dataset, "positions": positions, "tokenizers": tuple(tokenizers), "rooms": rooms}
        how["template"] = template
        found = part.map(
            _examine, batched=True, with_indices=True, remove_columns=part.column_names, new_fingerprint=name,
            features=datasets.Features({k: datasets.Value(v) for k, v in types.items()}), fn_kwargs=how,
            cache_file_name=str(cache / f"{name}.arrow"), num_proc=workers if workers > 1 else None,
        ).data  # fmt: skip
        for name in INDEX.names[1:]:
            rows.index[name] = found[name].to_numpy()
        why = found["why"].to_numpy()
        for reason in filter(None, found["why"].unique().to_pylist()):
            rows.drop(why == reason, reason, dropped)
        rows = rows[np.equal(why, None)]
    need(
        len(rows), f"data set {dataset} ({split}) has no usable row; dropped: {in_words(dropped)}. Rows have {SCHEMAS}"
    )
    return rows, dropped


def hold_out(rows: Rows, ratio: float, seed: int, dropped: Dropped) -> tuple[Rows, Rows]:
    """(training rows, held-out rows); training rows that ask what a held-out row asks are dropped."""
    if ratio == 0:
        return rows, rows[:0]
    keys, first = np.unique(rows.index["key"], return_index=True)
    chosen = np.random.default_rng([seed, 5]).permutation(len(keys))[: max(1, round(ratio * len(keys)))]
    held = np.isin(np.arange(len(rows)), first[chosen])
    rows, held = rows[~held], rows[held]
    same = np.isin(rows.index["key"], held.index["key"])
    return rows.drop(same, "same question as a held-out row", dropped), held


def without(rows: Sequence[Row], others: Iterable[Row]) -> tuple[Sequence[Row], int]:
    """(rows that ask nothing that `others` ask, number dropped): keeps few-shot examples out of the questions."""
    if not (asked := [row.key for row in others]):
        return rows, 0
    same = np.isin(rows.index["key"], asked)
    return rows[~same], int(same.sum())


# ----------------------------------------------------------------------------------------------------------------------
# Countdown: combine the given numbers to reach a target

COUNTDOWN_SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in the mind and then provide the user "
    "with the answer."
)
COUNTDOWN_USER = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final "
    "equation and answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 = 1 </answer>."
)
BUILT_IN = ("countdown", "countdown-mini")
MINI_USER = "Make {target} from {nums}."  # short: a model of half a million parameters has to read it


def countdown_prompt(nums: list[int], target: int) -> list[Message]:
    """The prompt of HuggingFaceTB/Countdown-Task-GOLD."""
    user = COUNTDOWN_USER.format(nums=list(nums), target=target)
    return [{"role": "system", "content": COUNTDOWN_SYSTEM}, {"role": "user", "content": user}]


@dataclass(frozen=True)
class Difficulty:
    """How hard the puzzles of the published game are."""

    numbers: tuple[int, int] = (3, 4)  # fewest and most numbers of a puzzle
    top: int = 99  # largest number
    operations: str = "+-*/"  # what combines them
    top_target: int = 100  # largest target


def countdown_puzzle(rng: random.Random, rule: Difficulty) -> dict | None:
    """A puzzle {nums, target, solution} of a random expression over all its numbers; None if it breaks the rule.

    Intermediate values are positive integers, as in the game; the target is in 1..top_target.
    """
    nums = [rng.randint(1, rule.top) for _ in range(rng.randint(*rule.numbers))]
    terms = [(n, str(n), 2) for n in nums]  # value, text, binding strength: 0 sum, 1 product, 2 atom
    while len(terms) > 1:
        a, b = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        op = rng.choice(rule.operations)
        quotient = a[0] // b[0] if a[0] % b[0] == 0 else 0
        value = {"+": a[0] + b[0], "-": a[0] - b[0], "*": a[0] * b[0], "/": quotient}[op]
        if value <= 0:
            return None
        strength = 1 if op in "*/" else 0  # no more parentheses than it takes
        left = f"({a[1]})" if a[2] < strength else a[1]
        right = f"({b[1]})" if b[2] < strength or (b[2] == strength and op in "-/") else b[1]
        terms.append((value, f"{left} {op} {right}", strength))
    target, solution, _ = terms[0]
    return {"nums": nums, "target": target, "solution": solution} if target <= rule.top_target else None


def mini_puzzle(rng: random.Random) -> dict | None:
    """Three numbers up to 20, + and - only, with the reasoning that solves it: what tiny models learn on a CPU.

    All numbers together are too much by twice the sum of those that must be subtracted.
    """
    nums = [rng.randint(1, 20) for _ in range(3)]
    signs = [rng.choice((1, -1)) for _ in nums]
    target, total = sum(s * n for s, n in zip(signs, nums)), sum(nums)
    if target <= 0:
        return None
    solution = " + ".join(str(n) for s, n in zip(signs, nums) if s > 0)
    solution += "".join(f" - {n}" for s, n in zip(signs, nums) if s < 0)
    a, b, c = nums
    think = f"{a} + {b} = {a + b} + {c} = {total} - {target} = {total - target} / 2 = {(total - target) // 2}"
    return {"nums": nums, "target": target, "solution": solution, "think": think}


def make_countdown(
    n: int, seed: int = 0, mini: bool = False, test: bool = False, rule: Difficulty = Difficulty()
) -> list[dict]:
    """n different puzzles as rows with prompt, completion, nums and target; `mini`: `mini_puzzle`, asked in one line.

    Every puzzle belongs to train or test by a hash of its numbers, in any order, and target: the two never meet,
    whatever the seeds and rules. Raises ValueError for a rule that makes no sense or has no n different puzzles.
    """
    sense = 1 <= rule.numbers[0] <= rule.numbers[1] and min(n, rule.top, rule.top_target) >= 1
    need(sense, f"n and the limits of {rule} must be at least 1, and `numbers` in order")
    need(set() < {*rule.operations} <= {*"+-*/"}, f"operations {rule.operations!r}: choose some of +-*/")
    rng, rows, seen, misses = random.Random(f"countdown {seed} {test}"), [], set(), 0
    while len(rows) < n:
        puzzle = mini_puzzle(rng) if mini else countdown_puzzle(rng, rule)
        key = puzzle and (*puzzle["nums"], puzzle["target"])
        in_test = key and zlib.crc32(str((*sorted(key[:-1]), key[-1])).encode()) % 10 == 0
        misses = misses + 1 if key is None or key in seen or in_test != test else 0
        need(misses < 100_000, f"only {len(rows)} different puzzles found, {n} wanted: allow more or larger numbers")
        if misses:
            continue
        seen.add(key)
        nums, target, answer = puzzle["nums"], puzzle["target"], f"{puzzle['solution']} = {puzzle['target']}"
        ask = MINI_USER.format(target=target, nums=", ".join(map(str, nums)))
        prompt = [{"role": "user", "content": ask}] if mini else countdown_prompt(nums, target)
        completion = f"<think> {puzzle.get('think', answer)} </think>\n<answer> {answer} </answer>"
        rows.append({"prompt": prompt, "completion": completion, "nums": nums, "target": target})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# prompts: messages -> ids, through each model's own chat template


def render_prompt(tokenizer, messages: Iterable[Message], begin: bool = True) -> str:
    """The messages as text that ends where the assistant begins, or, unless `begin`, after the last message.

    Without a chat template: "User: ...\\n\\nAssistant:\\n" with one such block per message. A template that refuses
    system messages gets the system text in front of the first user message. Options and day are `load_tokenizer`'s.
    """
    if tokenizer.chat_template is None:
        blocks = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages)
        return f"{blocks}Assistant:\n" if begin else blocks
    messages, settings = list(messages), {"tokenize": False, "add_generation_prompt": begin}
    settings |= tokenizer.init_kwargs.get("chat_options", {})
    if day := tokenizer.init_kwargs.get("chat_date"):
        settings["strftime_now"] = date.fromisoformat(day).strftime
    try:
        return tokenizer.apply_chat_template(messages, **settings)
    except jinja2.TemplateError:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        folded = messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return tokenizer.apply_chat_template([folded] + messages[2:], **settings)


FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # of a template of the teacher's prompts, or a brace of its text
FIRST_ROWS = 1000  # a column that none of them has is unknown


def read_template(text: str | None) -> str | None:
    """A template of the teacher's prompts, which is given as it is or in a file. Raises ValueError for neither."""
    if text is None:
        return None
    if os.path.isfile(text):
        text = Path(text).read_text("utf-8").removesuffix("\n")
    fields = re.search(r"[\s{]", text.strip())
    need(fields, f"teacher_prompt_template {text!r} is neither a file nor a text with a {{field}}")
    single = re.search("[{}]|$", FIELD.sub("", text))[0]
    need(not single, f"teacher_prompt_template has a single {single}: braces of its text are doubled, {{{{ }}}}")
    return text


def privileged(row: Row, template: str | None) -> tuple[Message, ...]:
    """The messages that the teacher reads: the last one of the user is the template with its fields filled in.

    Fields are {prompt}, the text that is replaced, {completion} and {answer} as `to_row` finds them, and every column;
    what is no text is written as JSON. Raises Unusable for a row that lacks one.
    """
    if template is None:
        return row.prompt
    last = max(i for i, m in enumerate(row.prompt) if m["role"] == "user")
    has = row.columns | {"completion": row.completion, "answer": row.answer, "prompt": row.prompt[last]["content"]}
    names = {m[1] for m in FIELD.finditer(template)} - {None}
    lacks = sorted(name for name in names if has.get(name) in (None, "", []))
    _need(not lacks, f"without {' and '.join(lacks)}, which teacher_prompt_template asks for")
    tell = lambda v: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str)
    text = FIELD.sub(lambda m: m[0][0] if m[1] is None else _text(tell(has[m[1]]), m[1]), template)
    return *row.prompt[:last], row.prompt[last] | {"content": text}, *row.prompt[last + 1 :]


MARK = "5c1e"  # stands for an answer's text in a template
OPENED = re.compile(r"<(\w+)>\s*(</\1>\s*)?$")  # at the end of a prompt: the answer goes on inside, or after the pair


def prompts(tokenizers: Sequence, row: Row, template: str | None = None) -> tuple[list[str], str | None]:
    """(what each model, the student first, reads before the answer; the answer), by their own chat templates.

    The teacher reads what `privileged` says. One answer follows all of the prompts: what the student's template opens
    for it (<think>), the others open too, and the answer does not open it again. Its thoughts stand in front of it as
    the student's template writes them. Raises Unusable if a template refuses the row, or asks for what it lacks.
    """
    texts, opened, answer, asked = [], [], row.completion, (row.prompt, privileged(row, template))
    for name, tokenizer, messages in zip(("student", "teacher"), tokenizers, asked):
        try:
            texts.append(render_prompt(tokenizer, messages))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as e:
            raise Unusable(f"refused by the {name}'s chat template: {e}") from e
        found = OPENED.search(texts[-1][-100:])  # by the template itself, not by the text of a message
        known = found and tokenizer.chat_template and f"<{found[1]}>" in tokenizer.get_chat_template()
        opened.append(found[0] if known else "")
    tail, *others = opened or [""]
    if row.thoughts and answer is not None and tokenizers:
        turn = {"role": "assistant", "content": MARK} | row.thoughts
        whole, start = render_prompt(tokenizers[0], [*row.prompt, turn], begin=False), texts[0].removesuffix(tail)
        before = whole.removeprefix(start).rpartition(MARK)[0]
        written = whole.startswith(start) and any(t.strip() in before for t in row.thoughts.values())
        why = f"{' and '.join(row.thoughts)}, which the student's chat template does not write"
        _need(written and "</" not in tail, why)
        answer = before + answer
    if "</" not in tail:
        texts[1:] = [t if "</" in other else t.removesuffix(other) + tail for t, other in zip(texts[1:], others)]
    if tail and answer is not None:
        again = re.match(r"\s*" + r"\s*".join(map(re.escape, tail.split())), answer)
        answer = answer[again.end() :].removeprefix(tail[len(tail.rstrip()) :]) if again else answer
    return texts, answer


@functools.cache
def _longest(tokenizer) -> float:
    """Bytes that one token writes at most: without end where anything unknown becomes one (WordPiece), as cuneiform."""
    unknown = tokenizer("\U00012000", add_special_tokens=False)["input_ids"]
    longest = max(len(piece.encode()) for piece in tokenizer.get_vocab())
    return math.inf if tokenizer.unk_token_id in unknown else longest


def too_long(tokenizer, texts: list[str], room: int) -> list[bool]:
    """Whether prompts have more than `room` tokens. Only those are encoded whose size does not tell.

    Every token writes a byte or more, and none more than the longest entry of the vocabulary. Unicode's normal forms
    leave ASCII alone and make at most 11 bytes of one other; a phantom space and BOS may come in front.
    """
    out = [(len(text) if text.isascii() else 11 * len(text.encode())) + 2 > room for text in texts]
    unsure = [i for i, text in enumerate(texts) if out[i] and len(text) <= room * _longest(tokenizer)]
    for i, ids in zip(unsure, encode_texts(tokenizer, [texts[i] for i in unsure]) if unsure else ()):
        out[i] = len(ids) > room
    return out


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of prompts, each with exactly one beginning-of-text token where the tokenizer uses one."""
    out, bos = tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    if bos is None:
        return out
    if tokenizer.chat_template is None and tokenizer("a")["input_ids"][:1] == [bos]:
        out = [[bos, *ids] for ids in out]
    twice = lambda ids: next((i for i, t in enumerate(ids) if t != bos), len(ids)) - 1
    return [ids[max(0, twice(ids)) :] for ids in out]


def encode_prompt(tokenizer, messages: Iterable[Message]) -> list[int]:
    """Ids of `render_prompt`."""
    return encode_texts(tokenizer, [render_prompt(tokenizer, messages)])[0]


def end_ids(tokenizer, also: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end an assistant turn: the one the chat template writes, then eos, then `also` (generation config).

    Raises ValueError if there is none.
    """
    found = []
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        tail = render_prompt(tokenizer, turn, begin=False).rpartition(MARK)[2]
        special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        found += [i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special][:1]
    found += [i for i in (tokenizer.eos_token_id, *also) if i is not None]
    need(found, f"{tokenizer.name_or_path}: the tokenizer has no eos token, so no completion could ever end")
    return tuple(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------------------------
# vocabularies: token id <-> bytes


PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet writes as they are
GPT2_BYTES = {chr(b): b for b in PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PLAIN}))}
HEX_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def token_bytes(tokenizer) -> list[bytes | None]:
    """The bytes each id writes, None for ids that write none (specials, unknown, unused).

    ByteLevel (GPT-2, Llama-3, Qwen), SentencePiece / Metaspace with byte fallback (Llama-2, Mistral, Gemma), WordPiece
    and word-level vocabularies (a piece that starts a word writes a space first: lossy).
    Raises ValueError that names the tokenizer if it is none of these.
    """
    fast = hasattr(tokenizer, "backend_tokenizer")
    need(fast, f"{type(tokenizer).__name__} is no fast tokenizer: its bytes are unknown")
    spec, why = (
        json.loads(tokenizer.backend_tokenizer.to_str()),
        "with end-of-word suffixes does not say where spaces are",
    )
    need(not spec["model"].get("end_of_word_suffix"), f"{tokenizer.name_or_path}: BPE {why}")
    model, special = spec["model"], {token["id"]: token["special"] for token in spec["added_tokens"]}
    parts = json.dumps([spec[k] for k in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    byte_level, metaspace = "ByteLevel" in parts, "\u2581" in parts
    words = model["type"] == "WordPiece" or model["type"] == "WordLevel" and not metaspace
    inside = model.get("continuing_subword_prefix") or "\0"  # a piece that does not begin a word
    vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    out: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for piece, i in vocab.items():
        if special.get(i) or piece == model.get("unk_token") or i == model.get("unk_id"):
            continue
        literal = i in special  # an added token is text as it stands
        if byte_level and not literal and all(c in GPT2_BYTES for c in piece):
            out[i] = bytes(GPT2_BYTES[c] for c in piece)
        elif not byte_level and (match := HEX_BYTE.match(piece)):
            out[i] = bytes([int(match[1], 16)])
        elif words and not literal:
            out[i] = piece.removeprefix(inside).encode() if piece.startswith(inside) else b" " + piece.encode()
        else:
            out[i] = (piece.replace("\u2581", " ") if metaspace and not byte_level else piece).encode()
    return out


# letters, and what may stand before and behind them: every case that pre-tokenizers are known to tell apart
KINDS = "aAsdmtlvreSDMTLVRE0 \n\t\r'._/-(<\u00e9\u00c9\u660e\u0301\u0663\u3000\u20ac\u3002"
CATEGORY = {"Ll": "\u00e9", "Lu": "\u00c9", "L": "\u660e", "M": "\u0301", "N": "\u0663", "Z": "\u3000", "S": "\u20ac"}
BEFORE = ("", "a", "00", " ", "\n", "a'")
BEHIND = ("", "a", "s", "e", "l", "re", "ll", "A", "0", "00", " ", " a", "\n", ".", "'s", "\u00e9", "\u660e")


@functools.cache
def kind(code: int) -> int:
    """Index of the letter of KINDS that a pre-tokenizer treats like this code point."""
    c, name = chr(code), unicodedata.category(chr(code))
    table, other = ({"Ll": "a", "Lu": "A", "N": "0"}, ".") if code < 128 else (CATEGORY, "\u3002")
    return KINDS.index(c if c in KINDS else table.get(name) or table.get(name[0], other))


ASCII = np.array([kind(code) for code in range(128)])
END = 256  # behind the last byte of a text: begins no token


def ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, x): every x in start[i] .. stop[i] - 1."""
    count = stop - start
    index = np.repeat(np.arange(len(count)), count)
    return index, np.arange(len(index)) + np.repeat(start - count.cumsum() + count, count)


class Vocabulary:
    """A tokenizer as a map between ids and bytes, with its tokens sorted so that "starts with" is a range.

    `ends`: ids that end a completion, the first is the one written. `size`: rows of the model's head; ids the tokenizer
    does not know write nothing. Raises ValueError if the tokenizer has ids that the head has no row for.
    """

    def __init__(self, tokenizer, ends: tuple[int, ...], size: int):
        self.tokenizer, self.ends, self.size = tokenizer, ends, size
        known = token_bytes(tokenizer)
        fits = max(ends) < size and all(b is None for b in known[size:])
        need(fits, f"{tokenizer.name_or_path}: the tokenizer has {len(known)} ids, the head {size} rows")
        self.bytes: list[bytes | None] = known[:size] + [None] * (size - len(known))
        for i in ends:
            self.bytes[i] = None
        self.lengths = np.array([len(b or b"") for b in self.bytes])
        self.single = {b[0]: i for i, b in reversed(list(enumerate(self.bytes))) if b is not None and len(b) == 1}
        self.markers: dict[bytes, int] = {}  # see share_markers
        self.literal = [i for i, t in tokenizer.added_tokens_decoder.items() if i < size and self.bytes[i]]
        # a tokenizer that puts a phantom space in front of a text is given something else to put it in front of
        probe = "caf\u00e9 12 + 3 = 15 (ok)\n"
        writes = lambda guard: self.join((self._encode_after(guard, probe) or [[]])[0]) == probe.encode()
        self.guards = [""] if writes("") else [guard for guard in "\n=0." if writes(guard)]
        self.lossy = not self.guards
        self.words: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}  # what `_words` said
        self.encode_words = functools.lru_cache(1)(self._encode_words)  # `align` and `closed` ask for the same text

    def _encode_after(self, guard: str, text: str) -> tuple[list[int], list[int]] | None:
        """Tokens of `text` where it follows `guard`, and the word of each; None if a token spans both."""
        # what a sample spells out is text, even where it spells a special token
        encoded = self.tokenizer(guard + text, add_special_tokens=False, split_special_tokens=True)
        ids, words = encoded["input_ids"], encoded.word_ids()
        if not guard:
            return ids, words
        cut = np.flatnonzero(np.cumsum(self.lengths[ids]) == 1 + len(guard))  # phantom space and guard
        return (ids[cut[-1] + 1 :], words[cut[-1] + 1 :]) if len(cut) else None

    def normal(self, text: str) -> str:
        """`text` in the Unicode normal form that this tokenizer gives every text."""
        if (normalizer := self.tokenizer.backend_tokenizer.normalizer) is not None:
            spec = json.loads(normalizer.__getstate__())
            for form in (part["type"] for part in spec.get("normalizers", [spec])):
                text = unicodedata.normalize(form, text) if form in ("NFC", "NFD", "NFKC", "NFKD") else text
        return text

    def join(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.bytes[i] or b"" for i in ids)

    def encode(self, text: bytes) -> tuple[list[int], np.ndarray]:
        """(ids, ends): the canonical tokens of a completion and how many bytes of `text` the first i + 1 of them cover.

        Invalid UTF-8 becomes single-byte tokens. Where the tokenizer cannot write the text (no such byte, a
        normalisation), the ids stop before it: `ends` says how far they got. A lossy tokenizer's ends are its offsets.
        """
        ids, ends, _ = self.encode_words(text)
        return ids.copy(), ends.copy()

    def _encode_words(self, text: bytes) -> tuple[list[int], np.ndarray, np.ndarray]:
        """`encode`, and the number of the word that the pre-tokenizer cut, of each token; -1: of none."""
        if self.lossy:
            chars, options = text.decode(errors="replace"), {"add_special_tokens": False, "split_special_tokens": True}
            encoded = self.tokenizer(chars, return_offsets_mapping=True, **options)
            width = np.cumsum([0] + [len(c.encode()) for c in chars])
            return encoded["input_ids"], width[[end for _, end in encoded["offset_mapping"]]], np.zeros(0)
        ids, words = [], []
        parts = re.split("(\udcff[\udc80-\udcbf]|[\udc80-\udcff])", text.decode(errors="surrogateescape"))
        for i, part in enumerate(parts):
            if i % 2:  # what is not UTF-8: a marker, which is a word, or bytes, which are none
                marker = self.markers.get(data := part.encode(errors="surrogateescape"))
                words += [-1] * len(data) if marker is None else [len(ids)]
                ids += map(self.single.get, data) if marker is None else [marker]
            elif part:
                tries = (self._encode_after(guard, part) for guard in self.guards)
                found = next((found for found in tries if found is not None), ([None], [0]))
                words += [word + len(ids) for word in found[1]]
                ids += found[0]
        ids = ids[: next((i for i, t in enumerate(ids) if t is None or not self.bytes[t]), len(ids))]  # unknown
        ends = np.cumsum(self.lengths[ids]) if ids else np.zeros(0, dtype=np.int64)
        keep, written = len(ids), self.join(ids)
        if not text.startswith(written):
            same = next((i for i, (a, b) in enumerate(zip(written, text)) if a != b), len(text))
            keep = int(np.searchsorted(ends, same, side="right"))
        return ids[:keep], ends[:keep], np.array(words[:keep], dtype=np.int64)

    @cached_property
    def tokens(self) -> list[bytes]:
        """What its tokens write, sorted; twice what two of them write."""
        return sorted(filter(None, self.bytes))

    @cached_property
    def order(self) -> np.ndarray:
        """(size,) ids: those that write something sorted by their bytes, then the end ids, then the others."""
        last = lambda i: self.ends.index(i) if i in self.ends else self.size
        return np.array(sorted(range(self.size), key=lambda i: (0, b) if (b := self.bytes[i]) else (1, last(i))))

    @cached_property
    def rank(self) -> np.ndarray:
        """(size,) position of each id in `order`."""
        return np.argsort(self.order)

    @cached_property
    def edge(self) -> np.ndarray:
        """(258,) where in `order` the tokens that start with byte 0, 1, .. begin, then the ends, then the others."""
        edge = np.searchsorted([string[0] for string in self.tokens], np.arange(257))
        return np.append(edge, len(self.tokens) + len(self.ends))

    @cached_property
    def tree(self) -> "PrefixTree":
        return PrefixTree(self.tokens)

    @cached_property
    def rule(self) -> "BytePairs | Reencoded":
        """Which tokens may stand behind which. Raises ValueError for a kind of tokenizer we cannot tell it of."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kind, byte_level = spec["model"]["type"], "ByteLevel" in json.dumps([spec["pre_tokenizer"], spec["decoder"]])
        known = kind in ("BPE", "Unigram")
        need(known, f"{self.tokenizer.name_or_path}: prefix reads BPE and Unigram tokenizers, not {kind}")
        return BytePairs(self, spec["model"], byte_level) if kind == "BPE" else Reencoded(self)

    @cached_property
    def joins(self) -> np.ndarray:
        """(256, 256) whether some token has these two bytes side by side; between others is always a boundary."""
        joins = np.zeros((256, 256), dtype=bool)
        for b in self.tokens:
            joins[list(b[:-1]), list(b[1:])] = True
        return joins

    @cached_property
    def steady(self) -> np.ndarray:
        """(KINDS, KINDS) whether a text that ends in letters of these two kinds is cut the same whatever follows it.

        The pre-tokenizer is asked: most look ahead at the end of spaces, some in contractions or groups of digits.
        """
        cutter, n = self.tokenizer.backend_tokenizer.pre_tokenizer, len(KINDS)
        steady = np.ones((n, n), dtype=bool)
        for a, b, before in product(range(n), range(n), BEFORE if cutter else ()):
            size = len(text := before + KINDS[a] + KINDS[b])
            pieces = (cutter.pre_tokenize_str(text + behind) for behind in BEHIND)
            steady[a, b] &= len({tuple(stop for _, (_, stop) in cut if stop < size) for cut in pieces}) == 1
        return steady

    def _words(self, new: list[tuple[int, ...]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the tokens that the tokenizer makes of one word leave open, of each of some words: (offsets, at).

        An encoding that begins with the first k bytes of the word, but has a boundary before k that these tokens do not
        have, makes F(k) incomplete: k is among the offsets. Where k is a boundary of these tokens and F of the bytes up
        to k and one more, b, is incomplete, 256 k + b is in `at`. All words at once, each with an END behind it.
        """
        tree, texts = self.tree, [self.join(ids) for ids in new]
        data = np.concatenate([np.append(np.frombuffer(text, dtype=np.uint8), END) for text in texts])
        stop = np.array([len(text) + 1 for text in texts]).cumsum()
        begin = np.append(0, stop[:-1])
        path = np.full(len(data), -3)  # its token that ends at an offset
        path[begin] = -1
        state, still_open = self.rule.states(data, begin), np.zeros(len(data), dtype=bool)
        for ids, text, first in zip(new, texts, begin.tolist()):
            path[first + self.lengths[list(ids)].cumsum()] = ids
            if ids[0] in self.literal:  # cut out of the text before all else, but only where it is complete
                state[first : first + len(text) + 1] = -2
                still_open[first + 1 : first + len(text)] = text not in self.markers
        end = np.flatnonzero((state > -2) & (state != path))  # elsewhere the model has been asked
        state, node, at = state[end], np.zeros(len(end), dtype=np.int64), []
        while len(end):
            on = path[end] > -3
            at.append((end[on], state[on], node[on]))
            node = tree.down(node, data[end])
            some = np.flatnonzero(node >= 0)
            some = some[self.rule.some(state[some], node[some])]
            end, state, node = end[some] + 1, state[some], node[some]
            still_open[end] = True
        end, state, node = map(np.concatenate, zip(*at, (end, state, node)))
        index, child = tree.children(node)
        some = self.rule.some(state[index], child)
        at, still_open = np.unique(end[index[some]] * 256 + tree.byte[child[some]]), np.flatnonzero(still_open)
        parts = lambda x, n: pairwise([*np.searchsorted(x, begin * n).tolist(), None])
        cuts = zip(begin.tolist(), parts(still_open, 1), parts(at, 256))
        return [(still_open[a:b] - first, at[c:d] - first * 256) for first, (a, b), (c, d) in cuts]

    def mute(self, ids: list[int]) -> np.ndarray:
        """Which tokens are special ones that neither end a text nor are markers."""
        mute = self.lengths == 0
        mute[list(self.ends)] = False
        return mute[ids]

    def closed(self, text: bytes, ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(known (n + 1,), tells (n + 1, 256), broken (n + 1,)) of a text of n bytes, written with `ids`.

        known[k]: F(k) is complete. tells[k, b]: so is F of the bytes up to k and b, and k is a boundary. broken: number
        of words up to there that `ids` writes differently from the tokenizer; no offset in them is known.
        """
        data, n = np.frombuffer(text, dtype=np.uint8), len(text)
        canonical, ends, words = self.encode_words(text)
        starts, boundary = np.append(0, ends), np.cumsum([0, *self.lengths[ids]])[: len(ids)]
        path = np.full(n + 1, -1)
        path[boundary] = ids
        mute = boundary[self.mute(ids)]  # what is known begins anew with the word behind it
        path[mute] = -1
        inner = starts[1:-1]
        fresh = (words[1:] != words[:-1]) | (words[1:] < 0) | ~self.joins[data[inner - 1], data[inner]]
        first = np.unique([0, *np.flatnonzero(fresh) + 1, len(canonical)])
        other = np.append(0, ((path[starts[:-1]] != canonical) | (words < 0)).cumsum())[first]
        known, broken = np.ones(n + 1, dtype=bool), np.zeros(n + 1, dtype=np.int64)
        # what the pre-tokenizer does at the end of a prefix; what is inside a letter may end as any other letter
        letters = text.decode(errors="surrogateescape").encode("utf-32-le", "surrogatepass")
        code = np.frombuffer(letters, dtype=np.uint32)
        width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
        width[(code >= 0xDC80) & (code <= 0xDCFF)] = 1
        end, kinds = width.cumsum(), ASCII[code.clip(max=127)]
        kinds[code > 127] = [kind(c) for c in code[code > 127].tolist()]
        known[end[1:]] = self.steady[kinds[:-1], kinds[1:]]
        inside = np.flatnonzero(np.bincount(np.append(end, 0), minlength=n + 1) == 0)
        letter = np.repeat(end - width, width)[inside - 1]  # its first byte
        known[inside] = known[letter] & (path[letter] >= 0)
        last = np.full(n + 1, len(KINDS))  # kind of the letter that ends here
        last[end] = kinds
        last[:n][path[:n] < 0] = len(KINDS) + 1
        tells = np.pad(self.steady[:, ASCII], ((0, 2), (0, 128)), constant_values=True)
        tells[-1] = False
        tells, cut, same = tells[last], starts[first], np.diff(other) == 0
        known[ranges(cut[:-1][~same] + 1, cut[1:][~same] + 1)[1]], broken[cut[1:][~same]] = False, 1
        found, at = [tuple(canonical[i:j]) for i, j in zip(first[:-1][same], first[1:][same])], cut[:-1][same]
        if len(self.words) > 1 << 16:
            self.words.clear()
        if new := list(dict.fromkeys(word for word in found if word not in self.words)):
            self.words.update(zip(new, self._words(new)))
        if found:
            still_open, no = zip(*map(self.words.__getitem__, found))
            known[np.concatenate(still_open) + np.repeat(at, list(map(len, still_open)))] = False
            tells.reshape(-1)[np.concatenate(no) + np.repeat(at * 256, list(map(len, no)))] = False
        if starts[-1] < n:
            known[starts[-1] + 1 :], broken[n] = False, 1
        known[mute], broken[mute] = False, 1
        return known, tells, broken.cumsum()


def _pretrained(kind, name: str, revision: str | None):
    try:
        return kind.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as e:
        raise ValueError(f"model {name!r} is neither a directory with a model nor reachable on the Hub: {e}") from e


def load_tokenizer(name: str, revision: str | None = None, options: dict | None = None, day: str | None = None):
    """The tokenizer of a model. Raises ValueError that names the model, or an option that its template does not know.

    Args:
        options: of its chat template, like {"enable_thinking": False}; where None, those it was saved with.
        day: the date that its chat template writes, like 2026-11-26; where None, the one it was saved with, or today.
    """
    from transformers import AutoTokenizer

    tokenizer = _pretrained(AutoTokenizer, name, revision)
    template = "" if tokenizer.chat_template is None else tokenizer.get_chat_template()
    unknown = [k for k in options or () if not re.search(rf"\b{re.escape(k)}\b", template)]
    need(not unknown, f"the chat template of {name} has no option {' and no '.join(unknown)}")
    told = {"chat_options": options, "chat_date": day}  # saved with it: an evaluation of a checkpoint has them too
    tokenizer.init_kwargs |= {key: value for key, value in told.items() if value is not None}
    return tokenizer


def hub_name(name: str) -> tuple[str, str | None]:
    """(name, revision) of ID@REVISION; a directory is taken as it is called."""
    return (name, None) if "@" not in name or Path(name).exists() else tuple(name.rsplit("@", 1))


def load_vocabulary(
    name: str, revision: str | None = None, options: dict | None = None, day: str | None = None
) -> Vocabulary:
    """The tokenizer of a model as bytes, with the ids that end its completions. Arguments as in `load_tokenizer`."""
    from transformers import AutoConfig, GenerationConfig

    tokenizer, config = load_tokenizer(name, revision, options, day), _pretrained(AutoConfig, name, revision)
    try:
        ends = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except OSError:
        ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return Vocabulary(tokenizer, end_ids(tokenizer, ends), config.get_text_config().vocab_size)


def share_markers(student: Vocabulary, teacher: Vocabulary) -> None:
    """Special tokens of one text in both write two bytes that no text holds: they are aligned like other tokens."""
    unwritten = lambda v, i: i < v.size and v.bytes[i] is None
    added = [(v, v.tokenizer.added_tokens_decoder.items()) for v in (student, teacher)]
    known = [{t.content: i for i, t in tokens if unwritten(v, i)} for v, tokens in added]
    ends = {name for v in (student, teacher) for name in v.tokenizer.convert_ids_to_tokens(list(v.ends))}
    for n, name in enumerate(sorted(known[0].keys() & known[1].keys() - ends)[:64]):
        for v, ids in zip((student, teacher), known):
            v.bytes[i := ids[name]] = bytes([255, 128 + n])
            v.lengths[i], v.markers[v.bytes[i]] = 2, i
            v.literal.append(i)


class PrefixTree:
    """All prefixes of a sorted list of byte strings, in order: node 0 is b"".

    Node v is a prefix: strings lo[v] .. hi[v] - 1 start with it, and those before rest[v] are equal to it.
    """

    def __init__(self, strings: list[bytes]):
        prefixes = sorted({s[:n] for s in strings for n in range(len(s) + 1)} | {b""})
        node, last = {prefix: v for v, prefix in enumerate(prefixes)}, b"\xff" * max(map(len, strings))
        self.byte = np.array([prefix[-1] if prefix else 0 for prefix in prefixes])
        self.lo = np.array([bisect_left(strings, prefix) for prefix in prefixes])
        self.rest = np.array([bisect_right(strings, prefix) for prefix in prefixes])
        self.hi = np.array([bisect_right(strings, prefix + last) for prefix in prefixes])
        self.parent = np.array([node[prefix[:-1]] for prefix in prefixes])
        self.parent[0] = -1
        key = self.parent * 512 + self.byte
        self.child = 1 + np.argsort(key[1:], kind="stable")  # those of a node are consecutive, ordered by byte
        self.child_key = key[self.child]
        self.child_start = np.searchsorted(self.child_key, np.arange(len(prefixes) + 1) * 512)

    def down(self, node: np.ndarray, byte: np.ndarray) -> np.ndarray:
        """The nodes of these prefixes and one more byte each; -1: there is none."""
        at = np.searchsorted(self.child_key, key := node * 512 + byte).clip(max=len(self.child_key) - 1)
        return np.where(self.child_key[at] == key, self.child[at], -1)

    def walk(self, text: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every (i, end, node) such that some string starts with text[start[i]:end], end >= start[i]."""
        text, found = np.append(text, END), []
        index, end, node = np.arange(len(start)), start, np.zeros(len(start), dtype=np.int64)
        while len(index):
            found.append((index, end, node))
            node = self.down(node, text[end])
            on = np.flatnonzero(node >= 0)
            index, end, node = index[on], end[on] + 1, node[on]
        return tuple(np.concatenate(part) for part in zip(*found, (index, end, node)))

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(i, child): every child of nodes[i]."""
        index, at = ranges(self.child_start[nodes], self.child_start[nodes + 1])
        return index, self.child[at]


# ----------------------------------------------------------------------------------------------------------------------
# canonical tokens: which token may follow which, and what that says about the prefixes of a text


class BytePairs:
    """Byte-pair encoding by rank: which tokens may stand behind which in the encoding of a text.

    A token comes into being by its last merge, at a time: the rank of that merge, or the time of its parts if that is
    later. In the encoding of `a` + `b`, the right parts of a (a itself, its right half, that one's right half, ..) are
    there one after the other, each until it is merged into the one before, and so are the left parts of b. The encoding
    is (a, b) if and only if no pair of them is merged while both are there. A pair (x, y) merged at time t thus forbids
    y and all tokens that begin with y and merge it at t or later: a range, if a token is followed by the tokens that
    it is the left half of, late ones first.
    """

    def __init__(self, v: "Vocabulary", model: dict, byte_level: bool):
        vocab, pairs = model["vocab"], (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        merges = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(pairs)}
        letter = {} if byte_level else {c.replace("\u2581", " "): i for c, i in vocab.items() if len(c) == 1}
        alphabet = GPT2_BYTES if byte_level else {f"<0x{b:02X}>": b for b in range(256)}
        byte, never = {b: vocab.get(c) for c, b in alphabet.items()}, len(merges)
        left, self.right, self.time = (np.full(v.size, x) for x in (-1, -1, -1))
        made: dict[bytes, int] = {}  # the tokens that encodings hold
        for i in sorted((i for i, b in enumerate(v.bytes) if b), key=lambda i: len(v.bytes[i])):
            known = ([letter[c]] if c in letter else map(byte.get, c.encode(errors="surrogateescape"))
                     for c in v.bytes[i].decode(errors="surrogateescape"))  # fmt: skip
            ids, last = [*chain.from_iterable(known)], (-1, -1)
            while len(ids) > 1:
                rank, at = min((merges.get(p, (never,))[0], n) for n, p in enumerate(pairwise(ids)))
                if rank == never:
                    break
                last = ids[at], ids[at + 1]
                ids[at : at + 2] = [merges[last][1]]
            if ids == [i]:
                made[v.bytes[i]], (left[i], self.right[i]) = i, last
                if last[0] >= 0:
                    self.time[i] = max(rank, *self.time[list(last)])
        # in the order of the ranges: each enters, at its time, right behind its left half, in front of what is there
        made = np.array(sorted(made.values(), key=lambda i: (self.time[i], len(v.bytes[i]))))
        behind, after, self.place = {-1: v.size}, np.zeros(v.size, dtype=np.int64), np.full(v.size + 1, -1)
        for i, half in zip(made.tolist(), left[made].tolist()):
            after[i] = behind[i] = behind[half]
            behind[half] = i
        i = -1
        for place in range(len(made) + 1):
            self.place[i := behind[i]] = place
        # merges by their first token, then when they can happen at the earliest, and the range that each forbids: up to
        # what was behind the second then
        merges = np.array([(a, b, rank) for (a, b), (rank, _) in merges.items()], dtype=np.int64).reshape(-1, 3)
        first, second, rank = merges[self.place[merges[:, 1]] >= 0].T
        when = np.maximum(rank, np.maximum(self.time[first], self.time[second]))
        first, second, when = np.array([first, second, when])[:, np.lexsort((when, first))]
        key = lambda token, time: (token + 1) * (never + 1) + time
        self.never, self.key, self.first = never, key, key(first, when)
        child = made[np.argsort(key(left[made], self.time[made]), kind="stable")]
        last = np.searchsorted(key(left[child], self.time[child]), key(second, when)) - 1
        self.range = self.place[second], self.place[np.where(left[child[last]] == second, child[last], after[second])]
        self.place[v.literal] = v.size  # a token that is text as it stands: nothing forbids it
        # per node of the tree: its token, and the places of all tokens below it, in runs
        self.tree, self.width = v.tree, v.size + 2
        node = np.repeat(np.arange(len(v.tree.lo)), v.tree.rest - v.tree.lo)[v.rank[made]]
        self.token, found = np.full(len(v.tree.lo), -1), []
        self.token[node] = made
        while len(node):
            found.append(node * self.width + self.place[made])
            node, made = v.tree.parent[node], made[v.tree.parent[node] >= 0]
            node = node[node >= 0]
        key = np.unique(np.concatenate(found))
        start = np.flatnonzero(np.diff(key, prepend=-2) > 1)
        self.run_start, stop = key[start] % self.width, np.append(start[1:], len(key)) - 1
        self.run_stop = key[stop] % self.width + 1
        self.run = np.searchsorted(key[start], np.arange(len(v.tree.lo) + 1) * self.width)
        # what may not follow the tokens that have been asked for: disjoint ranges, by the number of the token
        self.number, self.count = np.append(np.full(v.size, -1), 0), 1
        self.start, self.end, self.used = np.zeros(1 << 16, dtype=np.int64), np.zeros(1 << 16, dtype=np.int64), 0

    def forbid(self, token: np.ndarray) -> None:
        """Find the ranges that may not follow these tokens, those of them that are new."""
        token = np.unique(token[self.number[token] < 0])
        number = self.number[token] = self.count + np.arange(len(token))
        self.count, limit, found = self.count + len(token), np.full(len(token), self.never), []
        while len(token):
            index, merge = ranges(*(np.searchsorted(self.first, self.key(token, time)) for time in (0, limit)))
            found.append([number[index] * self.width + side[merge] for side in self.range])
            on = self.right[token] >= 0
            number, limit, token = number[on], self.time[token[on]], self.right[token[on]]
        if not found:
            return
        start, stop = map(np.concatenate, zip(*found))
        order = np.argsort(start)
        start, stop = start[order], np.maximum.accumulate(stop[order])
        apart = start[1:] > stop[:-1]
        start, stop = start[np.append(True, apart)[: len(start)]], stop[np.append(apart, True)[: len(stop)]]
        used, self.used = self.used, self.used + len(start)
        if self.used > len(self.start):
            self.start, self.end = np.resize(self.start, 2 * self.used), np.resize(self.end, 2 * self.used)
        self.start[used : self.used], self.end[used : self.used] = start, stop

    def _free(self, token: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Whether some token of the places start .. stop - 1 may stand behind `token` (-1: a cut)."""
        of = self.number[token] * self.width
        at = np.searchsorted(self.start[: self.used], of + start, side="right") - 1
        return (at < 0) | (self.end[at] < of + stop)

    def states(self, data: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """(len(data),) last token of the encoding of a word up to each offset: -1 where it begins, -2: none."""
        first, end, node = self.tree.walk(data, np.arange(len(data)))
        on = self.token[node] >= 0
        first, end, token = first[on], end[on], self.token[node[on]]
        self.forbid(token)
        depth = first - begin[np.searchsorted(begin, first, side="right") - 1]
        order, place = np.argsort(depth, kind="stable"), self.place[token]
        state = np.full(len(data), -2)
        state[begin] = -1
        for some in np.split(order, np.flatnonzero(np.diff(depth[order])) + 1):
            some = some[state[first[some]] > -2]
            some = some[self._free(state[first[some]], place[some], place[some] + 1)]
            state[end[some]] = token[some]
        return state

    def some(self, token: np.ndarray, node: np.ndarray) -> np.ndarray:
        """Whether some token below each of these nodes may stand behind each of these tokens, which `forbid` knows."""
        out, todo, at, some = np.zeros(len(node), dtype=bool), np.arange(len(node)), self.run[node], 2
        while len(todo):  # a few runs of each at first: mostly one of them is free
            stop = np.minimum(at + some, self.run[node[todo] + 1])
            index, run = ranges(at, stop)
            out[todo[index[self._free(token[todo[index]], self.run_start[run], self.run_stop[run])]]] = True
            on = ~out[todo] & (stop < self.run[node[todo] + 1])
            todo, at, some = todo[on], stop[on], 8 * some
        return out


MOST = 64


class Reencoded:
    """Any other tokenizer whose encodings stay encodings when they are cut at a boundary, like Unigram: it is asked.

    Two tokens may stand side by side if the text of both is encoded as both. Where that would have to be asked of more
    than MOST tokens, all of them count as possible: fewer offsets are used then, not more.
    """

    def __init__(self, v: "Vocabulary"):
        self.model, self.order, self.tree = v.tokenizer.backend_tokenizer.model, v.order, v.tree
        self.pieces = v.tokenizer.convert_ids_to_tokens(list(range(len(v.tokenizer))))
        self.space = "\u2581" if any("\u2581" in piece for piece in self.pieces) else " "
        self.encode = functools.lru_cache(1 << 16)(lambda text: [token.id for token in self.model.tokenize(text)])

    def states(self, data: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """As BytePairs; -1 inside a letter, too: anything may follow."""
        state = np.full(len(data), -1)
        for first, stop in pairwise([*begin.tolist(), len(data)]):
            text = data[first : stop - 1].astype(np.uint8).tobytes()
            for k in range(1, len(text) + 1):
                prefix = text[:k].decode(errors="replace").replace(" ", self.space)
                state[first + k] = -1 if "\ufffd" in prefix else self.encode(prefix)[-1]
        return state

    def some(self, token: np.ndarray, node: np.ndarray) -> np.ndarray:
        """As BytePairs."""
        asked = zip(token.tolist(), self.tree.lo[node].tolist(), self.tree.hi[node].tolist())
        stands = lambda t, i: self.encode(self.pieces[t] + self.pieces[i]) == [t, i]
        some = lambda t, lo, hi: t < 0 or hi - lo > MOST or any(stands(t, i) for i in self.order[lo:hi])
        return np.array([some(*ask) for ask in asked], dtype=bool)


# ----------------------------------------------------------------------------------------------------------------------
# alignment


def spans(student_ends: np.ndarray, teacher_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(student span, teacher span, number of spans) of every token, from the byte offsets at which tokens end.

    A span closes where both sides have a token end; tokens after the last such offset have span -1.
    """
    common = np.intersect1d(student_ends, teacher_ends)
    span = lambda ends: np.where(ends <= common.max(initial=-1), np.searchsorted(common, ends), -1)
    return span(student_ends), span(teacher_ends), len(common)


def shared_ids(student: Vocabulary, teacher: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Ids (K,), (K,) of the same byte strings in both vocabularies, one to one, and of the first end ids."""
    first_s, first_t = ({b: i for i, b in reversed(list(enumerate(v.bytes))) if b} for v in (student, teacher))
    both = sorted(first_s.keys() & first_t.keys())
    ids = lambda first, end: np.array([first[b] for b in both] + [end])
    return ids(first_s, student.ends[0]), ids(first_t, teacher.ends[0])


class _PrefixSide:
    """One model's tokens over a text: where it has boundaries, and which prefixes cover which bytes."""

    def __init__(self, vocabulary: Vocabulary, ids: list[int], text: bytes):
        self.tree, self.rank, self.num_tokens = vocabulary.tree, vocabulary.rank[ids], int(vocabulary.edge[257])
        boundary = np.cumsum([0, *vocabulary.lengths[ids]])[: len(ids)]  # offset at which row i predicts
        rows = np.flatnonzero(~vocabulary.mute(ids))
        index, self.end, self.node = self.tree.walk(np.frombuffer(text, dtype=np.uint8), boundary[rows])
        self.row, self.row_at = rows[index], np.full(len(text) + 1, -1)
        self.row_at[boundary] = np.arange(len(ids))
        self.is_boundary = np.append(self.row_at[:-1] >= 0, True)
        self.known, self.tells, self.broken = vocabulary.closed(text, ids)


def prefix_queries(
    student: Vocabulary, teacher: Vocabulary, student_ids: list[int], teacher_ids: list[int], text: bytes, ended: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, int]:
    """What gold_loss.prefix_loss has to ask both models about one completion (its docstring defines the terms).

    An offset k is used if F(k) is complete for both models, and the next byte is told apart where both do so: see
    `Vocabulary.closed`. Everything between two used offsets is one outcome.

    Args:
        student_ids, teacher_ids: tokens that write exactly `text`, then an end id if `ended`.
    Returns: (student queries, teacher queries, offset (O,), number of offsets M); a query's slot is an outcome 0..O-1
        or, for the total of offset m, -1 - m; a token of the path has -1 - M.
    """
    n, sides = len(text), [_PrefixSide(student, student_ids, text), _PrefixSide(teacher, teacher_ids, text)]
    known = np.flatnonzero(sides[0].known & sides[1].known)  # begins with 0
    at, after = known, np.append(known[1:], n + 1)  # n + 1: the end of the text
    if not ended:
        at, after = at[at < n], after[at < n]
    num_offsets = len(at)
    told, here = sides[0].tells[at] & sides[1].tells[at], np.arange(num_offsets)
    full = sides[0].is_boundary[at] & sides[1].is_boundary[at]  # here the end of the text is told apart, too
    # the next byte is not told apart: one outcome for exactly the bytes up to the next offset
    leap = (at < n) & ~told[here, np.frombuffer(text + b"\0", dtype=np.uint8)[at]] & ((after <= n) | ended)
    for side in sides:
        leap &= side.broken[at] == side.broken[after.clip(max=n)]
    tells = told.any(1)
    some = np.flatnonzero(full | tells)
    told, line = told[some], np.full(num_offsets, -1)
    line[some] = np.arange(len(some))  # of an offset in `told` and `slot_of_byte`
    count = leap.astype(np.int64)
    count[some] += np.where(full[some], 257, np.count_nonzero(told, axis=1))
    first = count.cumsum() - count
    nowhere = int(count.sum())  # the number of outcomes
    whole = full[some][:, None]
    slot_of_byte = first[some][:, None] + np.where(whole, np.arange(256), told.cumsum(1, dtype=np.int16) - 1)
    offset = np.repeat(here, count)
    hidden = slot_of_byte[whole & ~told]  # part of "anything else", although every byte has a slot there
    offset[hidden] = -1 - offset[hidden]
    slot_of_byte[~told] = nowhere
    leap_to = np.full(n + 2, nowhere)
    leap_to[after[leap]] = (first + count - 1)[leap]
    offset_at = np.full(n + 1, -1)
    offset_at[at] = np.arange(num_offsets)

    queries = []
    for side in sides:
        tree, row, node, rows = side.tree, side.row, side.node, len(side.rank)
        path = np.arange(rows), side.rank, side.rank + 1, np.full(rows, -1 - num_offsets)
        leaps = row, tree.lo[node], tree.hi[node], np.where(node > 0, leap_to[side.end], nowhere)
        ends = [side.row_at[n]], [int(tree.hi[0])], [side.num_tokens], [leap_to[n + 1]]
        used = offset_at[side.end] >= 0
        row, node, here = row[used], node[used], offset_at[side.end[used]]
        # the next byte: below every prefix that reaches a used offset; a `full` row is asked for all 256 at once
        some = np.flatnonzero(tells[here] & ~(full[here] & (node == 0)))
        index, child = tree.children(node[some])
        slot = slot_of_byte[line[here[some]][index], tree.byte[child]]
        bytes_ = row[some][index], tree.lo[child], tree.hi[child], slot
        # the total: what continues past the offset. A token that ends at a boundary without being on the path is
        # dropped: its text goes on in a way that no row of the path describes
        lo = np.where(side.is_boundary[at[here]], tree.rest[node], tree.lo[node])
        totals = row, lo, np.where(node > 0, tree.hi[node], side.num_tokens), -1 - here
        row, lo, hi, slot = map(np.concatenate, zip(path, leaps, ends, bytes_, totals))
        keep = np.flatnonzero((lo < hi) & (slot < nowhere))
        keep = keep[np.argsort(row[keep], kind="stable")]
        own = np.flatnonzero(keep < rows)  # in the order of the rows
        q = {"row": row[keep], "lo": lo[keep], "hi": hi[keep], "slot": slot[keep], "path": own}
        queries.append(q | {"full_row": side.row_at[at[full]], "full_slot": first[full]})
    return queries[0], queries[1], offset, num_offsets


@dataclass(frozen=True)
class Alignment:
    """One completion in both models' tokens. The first `student_scored` and `teacher_scored` tokens are compared."""

    teacher_ids: list[int]
    student_scored: int
    teacher_scored: int
    student_span: np.ndarray  # (student_scored,)
    teacher_span: np.ndarray  # (teacher_scored,)
    num_spans: int
    num_bytes: int  # of the completion
    scored_bytes: int  # of them compared
    prefix: tuple | None = None  # what prefix_queries returned
    unwritten: int = 0  # bytes from the first on that the teacher cannot write, normalises to others or has no room for


def same_vocabulary(a: Vocabulary, b: Vocabulary) -> bool:
    """Same id -> same bytes for every id, and the same ids end a completion; padding rows of the heads do not count."""
    n = min(a.size, b.size)
    return a.bytes[:n] == b.bytes[:n] and not any(a.bytes[n:] + b.bytes[n:]) and set(a.ends) == set(b.ends)


def align(
    student: Vocabulary, teacher: Vocabulary, completion_ids: list[int], finished: bool, prefix: bool,
    room: float = math.inf,
) -> Alignment:  # fmt: skip
    """Find the teacher's tokens for the text of a sampled or encoded completion, and where the two meet.

    The text is the bytes of the student's ids as they are, never decoded and never re-tokenised for the student. The
    end token is part of it only where the student really stopped. If an id in the middle writes nothing (a special
    token that the teacher does not have) it counts as text of length 0, in no span. If the teacher cannot write some
    byte, or has no `room` for so many tokens, everything from there on is left out: see `unwritten`.
    """
    content = completion_ids[:-1] if finished else completion_ids
    text, student_ends = student.join(content), student.lengths[content].cumsum()
    if student.lossy and text[:1] == b" ":  # the space in front of the first word
        text, student_ends = text[1:], student_ends - 1
    teacher_ids, teacher_ends = teacher.encode(text)
    if teacher.lossy and len(teacher_ends):
        teacher_ends[-1] = len(text)
    most = int(max(0, min(len(teacher_ids), room - finished)))
    teacher_ids, teacher_ends = teacher_ids[:most], teacher_ends[:most]
    unwritten = len(text) - int(teacher_ends[-1] if len(teacher_ends) else 0)
    complete = finished and not unwritten
    common = np.intersect1d(student_ends, teacher_ends)
    stop = int(common[-1]) if len(common) else 0
    if not complete:
        student_ends, teacher_ends = student_ends[student_ends <= (stop or -1)], teacher_ends[teacher_ends <= stop]
    student_ids, teacher_ids = completion_ids[: len(student_ends)], teacher_ids[: len(teacher_ends)]
    if complete:  # the end of the text is a byte of its own
        student_ends, teacher_ends = np.append(student_ends, stop + 1), np.append(teacher_ends, stop + 1)
        student_ids, teacher_ids = completion_ids, teacher_ids + [teacher.ends[0]]
    both = student, teacher, student_ids, teacher_ids, text[:stop], complete
    queries = prefix_queries(*both) if prefix else None
    *span, num_spans = spans(student_ends, teacher_ends)
    span[0][np.diff(student_ends, prepend=0) == 0] = -1
    counts = num_spans, int(student.lengths[content].sum()), stop, queries, unwritten
    return Alignment(teacher_ids, len(student_ids), len(teacher_ids), *span, *counts)


# ----------------------------------------------------------------------------------------------------------------------
# batches


@dataclass
class Sample:
    """One prompt with one completion, by the student (on-policy) or from the data set."""

    prompt_ids: list[int]
    completion_ids: list[int]  # ends with an end id if and only if `finished`
    finished: bool
    on_policy: bool
    teacher_prompt_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None  # of completion_ids, by the sampler
    version: int = -1  # step of the weights that sampled it
    row: int = -1
    alignment: Alignment | None = None  # None: one vocabulary, or no teacher

    @property
    def num_tokens(self) -> int:
        """Student tokens that the distillation loss scores."""
        return len(self.completion_ids) if self.alignment is None else self.alignment.student_scored


@dataclass
class Batch:
    """A micro-batch, padded on the right: B samples, T, S student and teacher positions; flat rows index (B * T,)."""

    student_ids: Tensor  # (B, T)
    student_mask: Tensor  # (B, T)
    student_rows: Tensor  # (C,) flat positions that predict the completion tokens: logits[t] predict token t + 1
    student_targets: Tensor  # (C,)
    student_sample: Tensor  # (C,) which of the B samples
    scored: Tensor  # (N,) those of the C rows that the distillation loss scores
    written: Tensor  # (W,) those of off-policy samples
    on_policy: Tensor  # (B,) bool
    sampler_logprobs: Tensor  # (C,) what the sampler said, nan off-policy
    teacher_ids: Tensor | None = None  # (B, S)
    teacher_mask: Tensor | None = None  # (B, S)
    teacher_rows: Tensor | None = None  # (N',)
    teacher_targets: Tensor | None = None  # (N',)
    student_span: Tensor | None = None  # (N,)
    teacher_span: Tensor | None = None  # (N',)
    span_sample: Tensor | None = None  # (G,)
    student_queries: dict[str, Tensor | list] | None = None  # what of gold_loss.Queries is not the vocabulary's
    teacher_queries: dict[str, Tensor | list] | None = None
    offset: Tensor | None = None  # (O,)
    offset_sample: Tensor | None = None  # (M,)

    def to(self, device) -> "Batch":
        put = lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        return Batch(
            **{k: {n: put(x) for n, x in v.items()} if type(v) is dict else put(v) for k, v in vars(self).items()}
        )


def _side(prompts: list[list[int]], completions: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, mask, flat positions that predict the completions, their tokens) of one model."""
    long = lambda x: torch.tensor(x, dtype=torch.long)
    both = [long(p + c) for p, c in zip(prompts, completions)]
    ids, mask = (pad_sequence(rows, batch_first=True) for rows in (both, list(map(torch.ones_like, both))))
    rows = [
        i * ids.size(1) + len(p) - 1 + t for i, (p, c) in enumerate(zip(prompts, completions)) for t in range(len(c))
    ]
    return ids, mask, long(rows), long([t for c in completions for t in c])


def collate(samples: list[Sample], with_teacher: bool = True) -> Batch:
    """Tensors of a micro-batch. With a teacher, samples without an alignment share the student's completion ids."""
    aligned, completions = [s.alignment for s in samples], [s.completion_ids for s in samples]
    counts = np.array([len(c) for c in completions])
    batch = Batch(
        *_side([s.prompt_ids for s in samples], completions),
        student_sample=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        scored=torch.cat([n + torch.arange(s.num_tokens) for n, s in zip(counts.cumsum() - counts, samples)]),
        written=torch.from_numpy(np.repeat([not s.on_policy for s in samples], counts).nonzero()[0]),
        on_policy=torch.tensor([s.on_policy for s in samples]),
        sampler_logprobs=torch.tensor([x for s in samples for x in s.logprobs or [math.nan] * len(s.completion_ids)]),
    )
    if not with_teacher:
        return batch
    if aligned[0] is not None:
        completions = [a.teacher_ids for a in aligned]
    teacher = _side([s.teacher_prompt_ids for s in samples], completions)
    batch.teacher_ids, batch.teacher_mask, batch.teacher_rows, batch.teacher_targets = teacher
    if aligned[0] is None:
        return batch
    spans_before = np.cumsum([0] + [a.num_spans for a in aligned])
    for side in ("student_span", "teacher_span"):
        shifted = [np.where((x := getattr(a, side)) >= 0, x + n, -1) for a, n in zip(aligned, spans_before)]
        setattr(batch, side, torch.from_numpy(np.concatenate(shifted)))
    batch.span_sample = torch.from_numpy(np.repeat(np.arange(len(samples)), np.diff(spans_before)))
    if aligned[0].prefix is not None:
        batch.student_queries, batch.teacher_queries = (_queries([a.prefix for a in aligned], side) for side in (0, 1))
        offsets = np.cumsum([0] + [a.prefix[3] for a in aligned])
        shifted = [np.where((x := a.prefix[2]) < 0, x - n, x + n) for a, n in zip(aligned, offsets)]
        batch.offset = torch.from_numpy(np.concatenate(shifted))
        batch.offset_sample = torch.from_numpy(np.repeat(np.arange(len(samples)), np.diff(offsets)))
    return batch


NARROW = 16  # ranges of up to this many tokens are summed token by token, wider ones are differences of a running sum


def _queries(parts: list[tuple], side: int) -> dict[str, Tensor | list[list[int]]]:
    """One completion's queries after another's, in the form that gold_loss.Queries documents."""
    columns, rows, queries, outcomes, totals = defaultdict(list), 0, 0, 0, 0
    for part in parts:
        q, shift = part[side], {"row": rows, "full_row": rows, "path": queries, "full_slot": outcomes}
        shift["slot"] = np.where(q["slot"] < 0, -totals, outcomes)
        for key, column in q.items():
            columns[key].append(column + shift.get(key, 0))
        columns["start"].append(np.full(len(q["path"]), rows))
        rows, queries = rows + len(q["path"]), queries + len(q["row"])
        outcomes, totals = outcomes + len(part[2]), totals + part[3]
    q = {key: np.concatenate(column) for key, column in columns.items()}
    kind = 1 + (q["slot"] < 0).astype(np.int8)
    kind[q.pop("path")] = 0
    by_kind = kind.argsort(kind="stable")
    row, lo, hi, slot = (q.pop(key)[by_kind] for key in ("row", "lo", "hi", "slot"))
    slot, by_row, width = slot[rows:], row.argsort(kind="stable"), hi - lo
    narrow, wide = by_row[width[by_row] <= NARROW], by_row[width[by_row] > NARROW]
    count = width[narrow]
    place = np.arange(count.sum()) + np.repeat(lo[narrow] - count.cumsum() + count, count)
    q |= {"row": row, "narrow": np.repeat(narrow, count), "place": place, "wide": wide, "lo": lo[wide], "hi": hi[wide]}
    q |= {"slot": slot[slot >= 0], "total": -1 - slot[slot < 0]}
    bounds = [np.searchsorted(r, np.arange(rows + 1)).tolist() for r in (row[q["narrow"]], row[wide], q["full_row"])]
    return {key: torch.from_numpy(column) for key, column in q.items()} | {"bounds": bounds}


# ----------------------------------------------------------------------------------------------------------------------
# the report: how well two tokenizers align on a text


def coverage(student: Vocabulary, teacher: Vocabulary, texts: list[str], prefix: bool) -> dict[str, float]:
    """How two tokenizers meet on some texts: shares, and the most tokens in one span.

    prefix: also the share of offsets (bytes, and the end of each text) that the prefix loss uses.
    """
    total, largest = Counter(), 0
    for text in texts:
        ids, _ = student.encode(text.encode())
        a = align(student, teacher, ids + [student.ends[0]], finished=True, prefix=prefix)
        widths = np.stack([np.bincount(span, minlength=a.num_spans) for span in (a.student_span, a.teacher_span)])
        largest = max(largest, int(widths.max(initial=0)))
        total += Counter(spans=a.num_spans, one_to_one=int((widths == 1).all(0).sum()))
        total += Counter(bytes=len(text.encode()), covered=a.scored_bytes, offsets=a.prefix[3] if prefix else 0)
    report = {"coverage": total["covered"] / max(total["bytes"], 1), "largest_span": largest}
    report["one_to_one"] = total["one_to_one"] / max(total["spans"], 1)
    return report | ({"offsets": total["offsets"] / (total["bytes"] + len(texts))} if prefix else {})


def say_coverage(report: dict[str, float], student_name: str, teacher_name: str) -> str:
    """The coverage report in one line."""
    used = f", prefix uses {report['offsets']:.1%} of the offsets" if "offsets" in report else ""
    return (
        f"alignment of {student_name} (student) and {teacher_name} (teacher): {report['coverage']:.2%} of the bytes in "
        f"spans, {report['one_to_one']:.1%} of them one to one, at most {report['largest_span']} tokens in one{used}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# the command line


@dataclass(frozen=True)
class Config:
    """How well two tokenizers align on a text, or a file of Countdown puzzles."""

    student: str | None = None  # directory or Hub id of a model
    teacher: str | None = None  # directory or Hub id of another
    text: str | None = None  # file of the text that both tokenize
    make: Literal["countdown", "countdown-mini"] | None = None  # puzzles to write instead; mini is for tiny models
    n: int = 10_000  # how many of them, all different
    out: str | None = None  # .jsonl file to write
    test: bool = False  # of the puzzles that no training set contains
    seed: int = 0  # which puzzles
    rule: tyro.conf.OmitArgPrefixes[Difficulty] = Difficulty()


def main(config: Config) -> None:
    """Raises ValueError or OSError for what the user can put right."""
    if config.make is not None:
        need(config.out is not None, "--make needs a file to write: --out FILE.jsonl")
        fits = config.make == "countdown" or config.rule == Difficulty()
        need(fits, "countdown-mini has one difficulty: no --numbers, --top, --operations, --top-target")
        rows = make_countdown(config.n, config.seed, config.make == "countdown-mini", config.test, config.rule)
        Path(config.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} {'test' if config.test else 'training'} puzzles in {config.out}")
    else:
        named = None not in (config.student, config.teacher, config.text)
        need(named, "name --student, --teacher and --text for a report, or --make and --out for puzzles")
        texts = [Path(config.text).read_text()]
        student, teacher = load_vocabulary(config.student), load_vocabulary(config.teacher)
        report = coverage(student, teacher, texts, prefix=not (student.lossy or teacher.lossy))
        print(say_coverage(report, config.student, config.teacher))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as e:
        print(f"gold_data.py: {e}", file=sys.stderr)
        sys.exit(2)
