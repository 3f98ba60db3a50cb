"""Rows of every supported data set, with their real columns, from local files: what becomes prompt, completion, answer.

pytest tests/test_rows.py
"""

import json
from pathlib import Path

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
