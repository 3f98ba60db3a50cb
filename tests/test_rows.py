"""Rows of every supported data set, with their real columns, from local files: what becomes prompt, completion, answer.

pytest tests/test_rows.py
"""

import json
from pathlib import Path

import conftest
import datasets
import pytest

import gold_data

USER = "What is 3 + 4?"
CHAT = [{"role": "user", "content": USER}, {"role": "assistant", "content": "It is \\boxed{7}"}]


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def counts(dropped: gold_data.Dropped) -> dict[str, int]:
    return {why: n for why, (n, _) in dropped.items()}


OPENR1 = {  # open-r1/OpenR1-Math-220k
    "problem": USER,
    "solution": "3 + 4 = 7",
    "answer": "7",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "source": "olympiads",
    "uuid": "0c1f",
    "is_reasoning_complete": [True, True, False, True],
    "generations": ["<think>eight</think>8", "<think>hm</think>7", "<think>7", "<think>sure</think>7!"],
    "correctness_math_verify": [False, True, True, True],
    "correctness_llama": None,
    "finish_reasons": None,
    "correctness_count": 3,
    "messages": [{"content": USER, "role": "user"}, {"content": "<think>eight</think>8", "role": "assistant"}],
}
OPENMATH = {  # nvidia/OpenMathInstruct-2
    "problem": USER,
    "generated_solution": "It is \\boxed{7}",
    "expected_answer": "7",
    "problem_source": "augmented_math",
}
SCHEMAS = {  # name: (row, prompt roles, completion, answer)
    "HuggingFaceTB/OpenR1-Math-220k-default-verified": ({"messages": CHAT}, ["user"], "It is \\boxed{7}", None),
    "open-r1/OpenR1-Math-220k, several generations": (OPENR1, ["user"], "<think>hm</think>7", "7"),
    "nvidia/OpenMathInstruct-2": (OPENMATH, ["user"], "It is \\boxed{7}", "7"),
    "HuggingFaceTB/Countdown-Task-GOLD, verified": (
        {"target": 7, "nums": [3, 4], "messages": [{"role": "system", "content": "S"}, *CHAT]},
        ["system", "user"],
        "It is \\boxed{7}",
        None,
    ),
    "HuggingFaceTB/Countdown-Task-GOLD, test": (
        {"prompt": [{"role": "system", "content": "S"}, CHAT[0]], "target": 7, "nums": [3, 4]},
        ["system", "user"],
        None,
        None,
    ),
    "HuggingFaceTB/Countdown-Task-GOLD, all": ({"target": 7, "nums": [3, 4]}, ["system", "user"], None, None),
    "openai/gsm8k": (
        {"question": USER, "answer": "Add: 3+4=<<3+4=7>>7\n#### 1,007"},
        ["user"],
        "Add: 3+4=7\n#### 1,007",
        "1,007",
    ),
    "HuggingFaceH4/MATH-500": (
        {
            "problem": USER,
            "solution": "So \\boxed{7}.",
            "answer": "7",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "a",
        },
        ["user"],
        "So \\boxed{7}.",
        "7",
    ),
    "HuggingFaceH4/aime_2024": (
        {"id": 60, "problem": USER, "solution": "7", "answer": "007", "url": "u", "year": "2024"},
        ["user"],
        "7",
        "007",
    ),
    "yentinglin/aime_2025": ({"id": 1, "problem": USER, "answer": 7, "year": 2025}, ["user"], None, 7),
    "prompt and completion as text": ({"prompt": USER, "completion": "7"}, ["user"], "7", None),
    "prompt and completion as chats": (
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        ["user"],
        "It is \\boxed{7}",
        None,
    ),
}


@pytest.mark.parametrize("row, roles, completion, answer", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_of_every_named_data_set_are_understood(row, roles, completion, answer, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list([row]).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps([row]))
    else:
        write(path, [row])
    (read,), dropped = gold_data.load_rows(str(path))
    assert [m["role"] for m in read.prompt] == roles and not dropped
    assert "3" in read.prompt[-1]["content"] and "4" in read.prompt[-1]["content"]
    assert (read.completion, read.answer) == (completion, answer)
    if "nums" in row:
        assert list(read.meta["nums"]) == [3, 4] and read.meta["target"] == 7


def test_of_several_generations_the_first_verified_and_complete_one_is_taken_or_the_row_is_dropped(tmp_path):
    wrong = OPENR1 | {"correctness_math_verify": [False] * 4}
    rows, dropped = gold_data.load_rows(write(tmp_path / "r.jsonl", [OPENR1, wrong]))
    assert [row.completion for row in rows] == ["<think>hm</think>7"]
    assert counts(dropped) == {"no verified generation": 1}


def test_the_published_countdown_prompt_is_built_from_numbers_and_target():
    user = gold_data.to_row({"nums": [51, 48, 92, 8], "target": 47}).prompt[-1]["content"]
    assert user.startswith("Using the numbers [51, 48, 92, 8], create an equation that equals 47.")
    assert "<answer> (1 + 2) / 3 = 1 </answer>" in user


def test_rows_without_content_are_dropped_and_counted_and_unknown_columns_are_an_error(tmp_path):
    rows = [{"problem": USER, "solution": " "}, {"messages": CHAT[1:]}, {"problem": USER, "solution": "7"}]
    kept, dropped = gold_data.load_rows(write(tmp_path / "r.jsonl", rows))
    assert len(kept) == 1 and counts(dropped) == {"empty completion": 1, "empty prompt": 1}
    with pytest.raises(ValueError, match=r"1 columns of no known schema \(line 1: {.foo.: 1}.*`messages`.*`nums`"):
        gold_data.load_rows(write(tmp_path / "x.jsonl", [{"foo": 1}]))


# ---- where rows come from


def numbered(n: int, tag: str = "p") -> list[dict]:
    return [OPENMATH | {"problem": f"{tag}{i}"} for i in range(n)]


def names(rows) -> list[str]:
    return [row.prompt[-1]["content"] for row in rows]


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[3:5]", range(3, 5)),
        ("train[8:]", range(8, 10)),
        ("train[:99]", range(10)),
        ("train[50%:]", range(5, 10)),
        ("train[:20%]", range(2)),
        ("train[-3:]", range(7, 10)),
        ("train[:2]+train[50%:60%]", [0, 1, 5]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_slices_of_local_data(split, expected, kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    data = datasets.Dataset.from_list(numbered(10))
    if kind == "saved":
        datasets.DatasetDict(train=data).save_to_disk(path)
    else:
        data.to_parquet(path) if kind == "parquet" else write(path, numbered(10))
    assert names(gold_data.load_rows(str(path), split=split)[0]) == [f"p{i}" for i in expected]


@pytest.fixture(params=["a file per split", "the layout of the Hub"])
def openmath(request, tmp_path):
    """OpenMathInstruct-2's splits as a local directory."""
    for split, n in (("train", 12), ("train_1M", 6), ("train_2M", 8)):
        name = f"{split}.jsonl" if request.param == "a file per split" else f"data/{split}-00000-of-00001.jsonl"
        write(tmp_path / "openmath" / name, numbered(n, split + " "))
    return str(tmp_path / "openmath")


def test_each_split_of_a_directory_is_read_alone(openmath):
    for split, n in (("train", 12), ("train_1M", 6), ("train_2M", 8)):
        assert names(gold_data.load_rows(openmath, split=split)[0]) == [f"{split} {i}" for i in range(n)]
    assert len(gold_data.load_rows(openmath, split="train_1M[:2]")[0]) == 2


def test_a_subset_that_is_a_split_is_used_as_one(openmath):
    assert names(gold_data.load_rows(openmath, "train_1M", "train[:2]")[0]) == ["train_1M 0", "train_1M 1"]


def test_a_subset_or_split_that_does_not_exist_is_an_error_that_lists_what_does(openmath):
    with pytest.raises(ValueError, match="no subset 'train_9M'.*train"):
        gold_data.load_rows(openmath, "train_9M")
    with pytest.raises(ValueError, match=r'"test".*\[.train'):
        gold_data.load_rows(openmath, split="test")
    with pytest.raises(ValueError, match="not understood"):
        gold_data.load_rows(openmath, split="train[5")


def test_a_missing_subset_among_several_is_an_error_that_lists_them(tmp_path):
    for subset in ("main", "socratic"):
        write(tmp_path / "gsm8k" / subset / "train.jsonl", [{"question": subset, "answer": "#### 1"}])
    configs = "".join(
        f"- config_name: {s}\n  data_files:\n  - split: train\n    path: {s}/train*\n" for s in ("main", "socratic")
    )
    (tmp_path / "gsm8k" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert names(gold_data.load_rows(str(tmp_path / "gsm8k"), "socratic")[0]) == ["socratic"]
    for subset in (None, "mian"):
        with pytest.raises(ValueError, match="main.*socratic"):
            gold_data.load_rows(str(tmp_path / "gsm8k"), subset)


def test_a_broken_line_is_named_and_unicode_line_separators_are_no_lines(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"problem": "a", "solution": "b"}\n{"problem": \n')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        gold_data.load_rows(str(tmp_path / "broken.jsonl"))
    separated = [{"problem": "one\u2028line\u0085still", "solution": "7"}]
    (row,), _ = gold_data.load_rows(write(tmp_path / "separated.jsonl", separated))
    assert row.prompt[0]["content"] == "one\u2028line\u0085still"


def test_data_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        gold_data.load_rows(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gold_data.load_rows(str(tmp_path / "nowhere"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no usable row"):
        gold_data.load_rows(str(tmp_path / "empty.jsonl"))


def test_questions_of_the_evaluation_leave_the_training_rows(tmp_path):
    train = gold_data.load_rows(write(tmp_path / "a.jsonl", numbered(10)))[0]
    asked = gold_data.load_rows(
        write(tmp_path / "b.jsonl", [{"prompt": "p3"}, {"question": "p7", "answer": "#### 1"}])
    )[0]
    kept, dropped = gold_data.without(train, asked)
    assert dropped == 2 and names(kept) == [f"p{i}" for i in range(10) if i not in (3, 7)]


# ---- odd rows among good ones

PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 4?"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
SHARED = [{"from": "system", "value": "S"}, {"from": "human", "value": USER}, {"from": "gpt", "value": "7"}]
ODD = {  # name: (row, the completion that it has, or why it is dropped)
    "no role": ({"messages": [{"content": USER}]}, "a message without a role"),
    "role None": ({"messages": [{"role": None, "content": USER}]}, "a message without a role"),
    "a role of its own": (
        {"messages": [*CHAT[:1], {"role": "critic", "content": "?"}]},
        "a message of the unknown role",
    ),
    "no content": ({"messages": [{"role": "user"}, CHAT[1]]}, "no content"),
    "content None": ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "no content"),
    "parts of text": ({"messages": [{"role": "user", "content": PARTS}, CHAT[1]]}, "It is \\boxed{7}"),
    "parts as strings": ({"prompt": [{"role": "user", "content": ["What is ", "3 + 4?"]}], "completion": "7"}, "7"),
    "an answer in parts": ({"messages": [CHAT[0], {"role": "assistant", "content": PARTS[:1]}]}, "What is "),
    "a part that is an image": (
        {"messages": [{"role": "user", "content": [*PARTS, {"type": "image", "url": "x"}]}, CHAT[1]]},
        "content with parts that are no text",
    ),
    "a tool call": ({"messages": [CHAT[0], CALL, {"role": "tool", "content": "7"}, CHAT[1]]}, "a tool call"),
    "tools": ({"messages": CHAT, "tools": [{"name": "add"}]}, "tools"),
    "messages as JSON text": ({"messages": json.dumps(CHAT)}, "It is \\boxed{7}"),
    "messages as text": ({"messages": "user: hello"}, "messages are no objects"),
    "messages as an object": ({"messages": {"role": "user"}}, "messages are no objects"),
    "messages of text": ({"messages": [USER, "7"]}, "messages are no objects"),
    "ShareGPT": ({"conversations": SHARED}, "7"),
    "ShareGPT under another name": ({"messages": SHARED}, "7"),
    "a whole number": ({"prompt": USER, "completion": 7}, "7"),
    "a number": ({"prompt": USER, "completion": 7.5}, "completion is no text (float)"),
    "a truth value": ({"prompt": USER, "completion": True}, "completion is no text (bool)"),
    "an object": ({"prompt": USER, "completion": {"a": 7}}, "completion is no text (dict)"),
    "no messages": ({"messages": []}, "empty prompt"),
    "messages of nobody": ({"messages": CHAT[1:]}, "empty prompt"),
    "an empty list": ({"prompt": []}, "empty prompt"),
    "an empty completion": ({"prompt": USER, "completion": []}, "empty completion"),
    "an empty text": ({"prompt": " \n", "completion": "7"}, "empty prompt"),
    "several answers": (
        {"prompt": CHAT[:1], "completion": CHAT},
        "a completion that is not one message of the assistant",
    ),
    "an answer begun": ({"prompt": CHAT, "completion": "7"}, "a prompt that ends with the assistant"),
    "a question alone": ({"question": USER}, None),
    "an answer that is None": ({"question": USER, "answer": None}, None),
    "an answer that is a number": ({"question": USER, "answer": 7}, "7"),
    "an answer that is an object": ({"question": USER, "answer": {"value": 7}}, "answer is no text (dict)"),
    "MMLU": ({"question": USER, "subject": "x", "choices": ["6", "7"], "answer": 1}, "multiple choice"),
    "nums that are text": ({"nums": "3 4", "target": 7}, "nums and target are no whole numbers"),
    "nums that are no numbers": ({"nums": [3, "4"], "target": 7}, "nums and target are no whole numbers"),
    "half a character": ({"prompt": USER, "completion": "7 \ud83d"}, "completion with half a character"),
    "half a character asked": ({"prompt": "7 \udc00", "completion": "7"}, "question with half a character"),
    "other columns": ({"text": "7"}, "columns of no known schema"),
    "no columns": ({}, "columns of no known schema"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_row_is_read_as_it_is_meant_or_dropped_and_counted_with_an_example(name, tmp_path):
    row, expected = ODD[name]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in (OPENMATH, row, OPENMATH | {"problem": "other"})]
    path.write_text("\n".join(lines))
    rows, dropped = gold_data.load_rows(str(path))
    if dropped:
        ((why, (n, example)),) = dropped.items()
        assert len(rows) == 2 and n == 1 and why.startswith(expected)
        assert example.startswith(f"line 2: {lines[1][:40]}")
    else:
        assert [r.completion for r in rows] == ["It is \\boxed{7}", expected, "It is \\boxed{7}"]
        assert rows[1].prompt[-1] == {"role": "user", "content": USER}


def test_a_column_of_many_types_and_an_unknown_tail_cost_the_good_rows_nothing(tmp_path):
    """In .jsonl and in a .json list no row decides about the types of another."""
    odd = [row for row, _ in ODD.values()]
    good = numbered(5)
    both = [row for pair in zip(good * 9, odd) for row in pair]
    (tmp_path / "rows.json").write_text(json.dumps(both))
    write_escaped = "".join(json.dumps(row) + "\n" for row in both)
    (tmp_path / "rows.jsonl").write_text(write_escaped)
    (lines, dropped), (items, of_list) = (gold_data.load_rows(str(tmp_path / f"rows.{x}")) for x in ("jsonl", "json"))
    assert list(lines) == list(items) and counts(dropped) == counts(of_list) and lines.hash == items.hash
    assert len(lines) + sum(counts(dropped).values()) == len(both)
    assert set(names(good_rows := [r for r in lines if r.prompt[-1]["content"].startswith("p")])) == {
        f"p{i}" for i in range(5)
    }
    assert len(good_rows) == len(odd)


def test_files_from_other_systems_are_read(tmp_path):
    """A byte order mark, Windows' line ends, empty lines, no line end at the end, brackets in the name, CSV."""
    path = tmp_path / "rows[1].jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "completion": "b"}\r\n\r\n{"prompt": "c", "completion": "d"}')
    rows, dropped = gold_data.load_rows(str(path))
    assert [(r.prompt[0]["content"], r.completion) for r in rows] == [("a", "b"), ("c", "d")] and not dropped
    (tmp_path / "list.json").write_bytes(b'\xef\xbb\xbf [{"prompt": "a", "completion": "b"}]')
    assert gold_data.load_rows(str(tmp_path / "list.json"))[0][0].completion == "b"
    (tmp_path / "rows.csv").write_text('prompt,completion\na,"b, c"\n')
    assert gold_data.load_rows(str(tmp_path / "rows.csv"))[0][0].completion == "b, c"


@pytest.mark.parametrize(
    "second, message",
    [
        ('{"prompt": ', "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 2 is not valid JSON"),
        ("[1]", "line 2 is not an object"),
        ('"text"', "line 2 is not an object"),
        ("null", "line 2 is not an object"),
        ('{"prompt": "\\xff"}', "line 2 is not valid JSON"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(second, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        f'{{"prompt": "a"}}\n{second}\n{{"prompt": "a"}}\n'.replace("\\xff", "\udcff"), errors="surrogateescape"
    )
    with pytest.raises(ValueError, match=f"rows.jsonl {message}"):
        gold_data.load_rows(str(path))
    assert len(gold_data.load_rows(str(path), split="train[:1]")[0]) == 1, "what is not asked for is not looked at"


def test_a_changed_file_is_read_again_and_an_unchanged_one_from_the_cache(tmp_path, monkeypatch):
    rows = numbered(3)
    first = gold_data.load_rows(write(tmp_path / "r.jsonl", rows))[0]
    monkeypatch.setattr(gold_data, "to_row", None)  # nobody looks at the rows a second time
    again = gold_data.load_rows(str(tmp_path / "r.jsonl"))[0]
    monkeypatch.undo()
    assert again.hash == first.hash and list(again) == list(first)
    other = gold_data.load_rows(write(tmp_path / "r.jsonl", [rows[0], rows[2], rows[1]]))[0]
    assert names(other) == ["p0", "p2", "p1"] and other.hash != first.hash
    assert gold_data.load_rows(str(tmp_path / "r.jsonl"), split="train[:2]")[0].hash not in (first.hash, other.hash)


def test_several_processes_find_what_one_finds(tmp_path, monkeypatch):
    odd = [row for row, _ in ODD.values()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (numbered(500) + odd) * 42))
    one, why = gold_data.load_rows(str(path), tokenizers=[conftest.byte_level()], rooms=[200])
    monkeypatch.setattr(gold_data.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(gold_data, "Path", lambda p: Path(p) if p != gold_data.__file__ else Path(__file__))  # no cache
    other, same = gold_data.load_rows(str(path), tokenizers=[conftest.byte_level()], rooms=[200])
    assert (one.index == other.index).all() and why == same and len(one) > 20_000


def test_held_out_rows_are_kept_from_training_with_all_their_repetitions(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"prompt": f"{i % 20}", "completion": str(i)} for i in range(50)])
    rows, dropped = gold_data.load_rows(path)
    kept, held = gold_data.hold_out(rows, 0.2, 3, dropped)
    assert len(held) == 4 and [int(r.completion) for r in held] == sorted(int(r.prompt[0]["content"]) for r in held)
    assert not {row.key for row in kept} & {row.key for row in held}
    assert len(kept) + len(held) + counts(dropped)["same question as a held-out row"] == 50
    again, other = (gold_data.hold_out(rows, 0.2, seed, {})[1].hash for seed in (3, 4))
    assert again == held.hash != other
    kept, held = gold_data.hold_out(rows, 0, 3, {})
    assert kept is rows and not held


def test_a_row_is_read_and_made_only_when_it_is_asked_for(tmp_path, monkeypatch):
    rows, _ = gold_data.load_rows(write(tmp_path / "r.jsonl", numbered(100)))
    made = []
    real = gold_data.to_row
    monkeypatch.setattr(gold_data, "to_row", lambda raw: made.append(raw["problem"]) or real(raw))
    some = rows[10:20][::3]
    assert len(some) == 4 and not made and names([some[1]]) == ["p13"] and made == ["p13"]
    assert rows.index.nbytes == 100 * 25, "bytes in memory per row"
