"""What the teacher reads beyond the student (--teacher-prompt-template), and how long completions may grow."""

import dataclasses
import functools
import json
import math
import re
import shutil
import signal

import conftest
import pytest
import test_teachers
import torch
from test_run import wait_for_steps
from test_teachers import K, fake, folder, losses, run_config, student
from test_train import ALONE, call, command, config, metrics, models, start, weights

import gold_buffer
import gold_data
import gold_eval
import gold_train
from gold_data import FIELD, Unusable, privileged, read_template, to_row

__all__ = ["fake", "folder", "models", "student"]  # fixtures
HINT = "{prompt} Know that {hint}"


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hinted(n: int = 40) -> list[dict]:
    return [
        {"prompt": f"What is {a} + 3?", "completion": f"It is {a + 3}.", "hint": f"{a} + 2 = {a + 2}"} for a in range(n)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("hints") / "rows.jsonl", hinted())


# ----------------------------------------------------------------------------------------------------------------------
# what stands in the teacher's prompt


@pytest.mark.parametrize(
    "row, template, text",
    [
        ({"prompt": "a?", "hint": "b"}, "{hint}: {prompt}", "b: a?"),
        ({"prompt": "a?", "completion": "c"}, "{completion}{completion}", "cc"),
        ({"problem": "a?", "generated_solution": "c", "expected_answer": 7}, "{answer} {completion}", "7 c"),
        ({"question": "a?", "answer": "<<1+1=2>>so 2 #### 2"}, "{completion}|{answer}", "so 2 #### 2|2"),
        ({"nums": [3, 4], "target": 7}, "{nums} make {target}", "[3, 4] make 7"),
        ({"prompt": "a?", "zero": 0, "no": False, "é": "è", "a b": ["ü"]}, "{zero}{no}{é}{a b}", '0falseè["ü"]'),
        ({"prompt": "\\frac{1}", "hint": "{prompt} {"}, "{{{hint}}} {prompt} {{x}}", "{{prompt} {} \\frac{1} {x}"),
    ],
)  # fmt: skip
def test_fields_are_the_prompt_the_answer_the_completion_and_every_column(row, template, text):
    """What a column says is never read as a template again."""
    assert privileged(to_row(row), read_template(template))[-1] == {"role": "user", "content": text}


def test_only_the_last_message_of_the_user_is_replaced():
    chat = [("system", "s"), ("user", "first"), ("assistant", "a"), ("user", "last"), ("tool", "t"), ("assistant", "b")]
    row = to_row({"messages": [{"role": role, "content": content} for role, content in chat]})
    seen = [(m["role"], m["content"]) for m in privileged(row, "{prompt}! {completion}")]
    assert seen == [*chat[:3], ("user", "last! b"), chat[4]]
    assert privileged(row, None) == row.prompt


@pytest.mark.parametrize("lacks", [{}, {"hint": None}, {"hint": ""}, {"hint": []}])
def test_a_row_without_the_column_is_unusable(lacks):
    with pytest.raises(Unusable, match="without hint, which teacher_prompt_template asks for"):
        privileged(to_row({"prompt": "a?"} | lacks), HINT)
    with pytest.raises(Unusable, match="hint with half a character"):
        privileged(to_row({"prompt": "a?", "hint": "\ud800"}), HINT)


def test_a_template_is_a_text_or_a_file_which_may_end_with_a_newline(tmp_path):
    (tmp_path / "hint.txt").write_text("{prompt}\n\nHint: é {hint}\n", "utf-8")
    assert read_template(str(tmp_path / "hint.txt")) == "{prompt}\n\nHint: é {hint}"
    for text in ("Think hard.", "{hint}", "{{}} and {a b}", "x " * 5000):
        assert read_template(text) == text == read_template(read_template(text))
    assert read_template(None) is None
    for text in ("hint.txt", "", " ", "hint"):
        with pytest.raises(ValueError, match="neither a file nor a text with a"):
            read_template(text)
    for text in ("{", "a }", "{{a}", "{a}}", "{{{a}}", "{a{b}}"):
        with pytest.raises(ValueError, match="single [{}]: braces of its text are doubled"):
            read_template(text)
    assert FIELD.sub("", "{{ {a} }}") == "  "


def both(template=None, cross=True) -> gold_buffer.Encoder:
    tokenizers = conftest.byte_level(), conftest.metaspace() if cross else conftest.byte_level()
    student, teacher = (gold_data.Vocabulary(t, (t.eos_token_id,), len(t)) for t in tokenizers)
    return gold_buffer.Encoder(student, teacher, 24, cross, cross, template)


@pytest.mark.parametrize("cross", [False, True])
def test_the_student_reads_what_it_always_read_and_the_teacher_the_template(cross):
    for raw in hinted(5):
        ids, teacher_ids, answer = both(HINT, cross).prompts(to_row(raw))
        assert (ids, answer) == (both(None, cross).prompts(to_row(raw))[0], raw["completion"])
        told = to_row(raw | {"prompt": f"{raw['prompt']} Know that {raw['hint']}"})
        assert teacher_ids == both(None, cross).prompts(told)[1] != both(None, cross).prompts(to_row(raw))[1]
        constant = both("Say it.", cross).prompts(to_row(raw))
        assert constant[0] == ids and constant[1] == both(None, cross).prompts(to_row({"prompt": "Say it."}))[1]


# ----------------------------------------------------------------------------------------------------------------------
# the loss


def expected_loss(directory: str, rows: list[dict], template: str) -> float:
    """JSD at beta 0.5, in float64, row by row: the same model after two prompts; mean over the tokens of all rows."""
    model = gold_buffer.load_model(directory, None, torch.float64, "cpu").eval()
    vocabulary = gold_data.load_vocabulary(directory)
    encoder, total, tokens = gold_buffer.Encoder(vocabulary, vocabulary, 24, False, False, template), 0.0, 0
    for raw in rows:
        *prompts, answer = encoder.prompts(to_row(raw))
        ids, _ = encoder.completion(answer)
        laws = []
        for prompt in prompts:
            with torch.no_grad():
                z = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            laws.append(z.softmax(-1))
        q, p = laws
        m = (p + q) / 2
        divergence = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
        total, tokens = total + divergence.sum().item() / 0.25, tokens + len(ids)
    return total / tokens


@pytest.mark.parametrize("template", [HINT, "A prompt without a field."])
def test_a_frozen_copy_teaches_what_the_template_tells_and_nothing_without(
    models, data, tmp_path, monkeypatch, template
):
    teachers, real = [], gold_buffer.LocalTeacher.__init__
    monkeypatch.setattr(gold_buffer.LocalTeacher, "__init__", lambda t, model: teachers.append(t) or real(t, model))
    cfg = config(
        models, data, tmp_path / "out", "student", lmbda=0.0, max_steps=1, per_device_train_batch_size=40,
        gradient_accumulation_steps=1, teacher_prompt_template=template,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    (row,) = metrics(cfg.output_dir)
    assert row["actor/loss"] == pytest.approx(expected_loss(models["student"], hinted(), template), rel=1e-4)
    assert row["actor/loss"] > 0.01 and row["actor/grad_norm"] > 0.01
    before = gold_buffer.load_model(models["student"], None, torch.float32, "cpu").state_dict()
    (teacher,) = teachers
    assert all(torch.equal(x, before[name]) for name, x in teacher.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert any(not torch.equal(x, before[name]) for name, x in weights(cfg.output_dir).items()), "the student learns"

    plain = dataclasses.replace(cfg, teacher_prompt_template=None, output_dir=str(tmp_path / "plain"))
    gold_train.train(plain, ALONE)
    assert abs(metrics(plain.output_dir)[0]["actor/loss"]) < 1e-6


@pytest.mark.parametrize("loss", ["prefix", "alm"])
def test_a_template_and_another_tokenizer_on_policy(models, data, tmp_path, loss):
    """Nothing but the teacher's prompt changes: the student's samples do not."""
    seen = {}
    for name, template in (("plain", None), ("hint", HINT), ("again", HINT), ("only the prompt", "{prompt}")):
        out = tmp_path / name
        cfg = config(models, data, out, lmbda=1.0, max_steps=1, cross_tokenizer_loss=loss)
        gold_train.train(dataclasses.replace(cfg, teacher_prompt_template=template), ALONE)
        seen[name] = metrics(out)[0]
    assert seen["only the prompt"] == seen["plain"] and seen["again"] == seen["hint"]
    assert seen["hint"]["num_tokens"] == seen["plain"]["num_tokens"], "the student samples the same"
    assert math.isfinite(seen["hint"]["actor/loss"]) and seen["hint"]["actor/loss"] != seen["plain"]["actor/loss"]


def shared(kind, load, local_rank: int, local_world_size: int):
    return kind(load, local_rank, 1)


def test_local_shared_and_served_teachers_agree(fake, folder, student, tmp_path):
    """A server that tells all tokens but one tells the whole law: the rest is that one. Its top k says less."""
    rows = write(tmp_path / "rows.jsonl", hinted(30))
    whole = {"teacher_url": fake.url, "teacher_top_k": len(test_teachers.TOKENIZER) - 1}
    kinds = {"local": {}, "served": whole, "top": whole | {"teacher_top_k": 8 * K}, "shared": {"teacher_device": "cpu"}}
    found = {}
    for name, how in kinds.items():
        cfg = run_config(folder, tmp_path / name, dataset=rows, max_steps=2, teacher_prompt_template=HINT, **how)
        with pytest.MonkeyPatch.context() as patch:
            if name == "shared":  # this rank is told of a second one that never comes
                patch.setattr(gold_buffer, "SharedTeacher", functools.partial(shared, gold_buffer.SharedTeacher))
            gold_train.train(cfg, ALONE._replace(local_world_size=1 + (name == "shared")))
        found[name] = losses(tmp_path / name)
    assert found["shared"] == found["local"]
    assert found["served"] == pytest.approx(found["local"], rel=1e-4)
    assert 0 < found["top"][0] < found["local"][0], "coarser laws are never further apart"
    asked = [test_teachers.TOKENIZER.decode(request["prompt"]) for request in fake.requests]
    assert len(asked) > 16 and all("Know that" in text for text in asked[2:] if "quick brown" not in text)


def test_seq_kd_writes_with_the_hint_for_a_student_that_never_sees_it(models, data, tmp_path, monkeypatch):
    asked, real = [], gold_buffer.LocalTeacher.generate

    def generate(teacher, requests, sampling):
        asked.extend(conftest.metaspace().decode(request.prompt_ids) for request in requests)
        return real(teacher, requests, sampling)

    monkeypatch.setattr(gold_buffer.LocalTeacher, "generate", generate)
    cfg = config(
        models, data, tmp_path / "out", seq_kd=True, lmbda=0.0, max_steps=1, max_completion_length=8,
        teacher_prompt_template=HINT,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    assert len(asked) == 8 and all("Know that" in text for text in asked)
    samples = gold_eval.read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert samples and not any("Know" in sample["prompt"] for sample in samples)


# ----------------------------------------------------------------------------------------------------------------------
# a run: what it says at the start, what it refuses, how it goes on


def test_the_start_shows_both_prompts_and_warns_of_a_copy_that_reads_the_same(models, data, tmp_path, capsys):
    cfg = config(models, data, tmp_path / "out", "student", max_steps=1, max_completion_length=4)
    gold_train.train(cfg, ALONE)
    text = capsys.readouterr().out
    assert text.count("warning: the teacher is the student and reads the same: loss 0") == 1
    gold_train.train(dataclasses.replace(cfg, teacher_prompt_template=HINT, output_dir=str(tmp_path / "b")), ALONE)
    text = capsys.readouterr().out
    assert re.search(r"student sees .*What is 0 \+ 3\?<", text) and "reads the same" not in text
    assert (
        re.search(r"teacher sees .*What is 0 \+ 3\? Know that 0 \+ 2 = 2<", text) and "two chat templates" not in text
    )


def test_rows_that_lack_a_field_or_are_too_long_for_the_teacher_are_counted_with_an_example(models, tmp_path, capsys):
    rows = hinted(20)
    del rows[3]["hint"]
    rows[7]["hint"] = rows[9]["hint"] = "word " * 600  # of 512 positions; the student never reads it
    cfg = config(models, write(tmp_path / "r.jsonl", rows), tmp_path / "out", max_steps=1, max_completion_length=4)
    gold_train.train(dataclasses.replace(cfg, teacher_prompt_template=HINT), ALONE)
    text = capsys.readouterr().out
    assert "20 rows, 17 for training" in text
    assert (
        "1 without hint, which teacher_prompt_template asks for (" in text and 'line 4: {"prompt": "What is 3' in text
    )
    assert "2 prompt of the teacher that leaves no room for max_completion_length in its context" in text
    gold_train.train(dataclasses.replace(cfg, output_dir=str(tmp_path / "plain")), ALONE)
    assert "20 rows, 20 for training" in capsys.readouterr().out


def test_the_room_is_the_teachers_positions_less_the_completion(models, tmp_path, capsys):
    """The longest prompt that fits is kept, with one token more it is dropped: 512 positions."""
    row, vocabularies = hinted(1)[0], [gold_data.load_vocabulary(models[name]) for name in ("student", "cross")]
    encoder = gold_buffer.Encoder(*vocabularies, 4, True, True, "{hint}")
    lengths = {n: len(encoder.prompts(to_row(row | {"hint": "a" * n}))[1]) for n in range(400, 520)}
    for room, left in ((508, 1), (509, 0)):
        n = next(n for n, length in lengths.items() if length == room)
        data = write(tmp_path / f"{room}.jsonl", [row, row | {"hint": "a" * n}])
        cfg = config(models, data, tmp_path / str(room), max_steps=1, max_completion_length=4)
        gold_train.train(dataclasses.replace(cfg, teacher_prompt_template="{hint}"), ALONE)
        assert f"2 rows, {1 + left} for training" in capsys.readouterr().out


BAD = {
    "an unknown field": (("{prompt} {hnt}",), r"asks for \{hnt\}, but rows of .* have \{answer\}, .*\{hint\}"),
    "braces of a formula": (("{prompt} \\frac{1}{2}",), r"asks for \{1\}, \{2\}, but rows"),
    "a field without a name": (("{prompt} {}",), r"asks for \{\}, but rows"),
    "a single brace": (("{prompt} {",), r"single \{: braces of its text are doubled, \{\{ \}\}"),
    "a file that is not there": (("hint.txt",), r"'hint.txt' is neither a file nor a text with a \{field\}"),
    "nothing": (("",), r"'' is neither a file"),
    "longer than the teacher's context": (("{prompt}" + "word " * 600,), r"40 prompt of the teacher that leaves no"),
    "no teacher": (("{hint}", "--teacher-model", "None", "--lmbda", "0", "--ce-weight", "1"), r"needs a --teacher-mo"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_template_is_one_line_before_any_weights_are_read(name, models, data, tmp_path, monkeypatch, capsys):
    (template, *more), message = BAD[name]
    monkeypatch.setattr(gold_buffer, "load_model", None)
    flags = [*command(config(models, data, tmp_path / "out")), "--teacher-prompt-template", template, *more]
    code, text = call(monkeypatch, capsys, *flags)
    assert code == 1 and re.search(message, text) and text.count("\n") <= 1 and "Traceback" not in text, text


def test_a_kill_and_a_resume_change_nothing_even_if_the_file_of_the_template_is_gone(
    models, data, tmp_path, monkeypatch
):
    cfg = config(models, data, tmp_path / "whole", max_steps=14, save_steps=2, teacher_prompt_template=HINT)
    gold_train.train(cfg, ALONE)
    (tmp_path / "hint.txt").write_text(HINT + "\n")
    cut = dataclasses.replace(cfg, output_dir=str(tmp_path / "cut"), teacher_prompt_template=str(tmp_path / "hint.txt"))
    process = start(cut)
    wait_for_steps(tmp_path / "cut", process, 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gold_train.newest_checkpoint(tmp_path / "cut" / "checkpoints", print).name < "step-000014"
    (tmp_path / "hint.txt").unlink()
    monkeypatch.setattr("sys.argv", ["gold_train.py", "--resume", "--output-dir", cut.output_dir])
    gold_train.main()
    assert metrics(cut.output_dir) == metrics(cfg.output_dir)
    for name, value in weights(cfg.output_dir).items():
        assert torch.equal(value, weights(cut.output_dir)[name]), name


def test_another_template_or_other_hints_are_another_run(models, tmp_path):
    path = tmp_path / "rows.jsonl"
    cfg = config(models, write(path, hinted()), tmp_path / "out", max_steps=2, max_completion_length=4)
    cfg = dataclasses.replace(cfg, teacher_prompt_template=HINT, resume=False)
    gold_train.train(cfg, ALONE)
    for template in ("{hint} {prompt}", None):
        with pytest.raises(SystemExit, match="another run.*teacher_prompt_template"):
            gold_train.train(dataclasses.replace(cfg, resume=True, teacher_prompt_template=template), ALONE)
    write(path, [row | {"hint": "something else"} for row in hinted()])
    with pytest.raises(SystemExit, match="another run.*rows_hash"):
        gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)


# ----------------------------------------------------------------------------------------------------------------------
# length


def test_completions_that_are_cut_step_after_step_are_warned_about_once(models, data, tmp_path, monkeypatch, capsys):
    """A random student never stops within four tokens."""
    monkeypatch.setattr(gold_train, "TRUNCATED_STEPS", 3)
    cfg = config(models, data, tmp_path / "out", lmbda=1.0, max_steps=6, save_steps=4, max_completion_length=4)
    gold_train.train(cfg, ALONE)
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "were cut" in line]
    assert "warning: step 3: for 3 steps more than 50% of the completions were cut" in line
    assert "max_completion_length 4" in line and "['<|im_end|>']" in line
    assert all(row["response_seq_len/truncated"] > 0.5 for row in metrics(cfg.output_dir))
    noted = gold_eval.read_jsonl(tmp_path / "out" / "warnings.jsonl")
    assert [(r["step"], r["metric"]) for r in noted] == [(3, "response_seq_len/truncated")]
    assert f"warning: step 3: {noted[0]['warning']}" == line
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000006")
    gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)
    text = capsys.readouterr().out
    assert "resumed after step 4" in text and "were cut" not in text
    assert gold_eval.read_jsonl(tmp_path / "out" / "warnings.jsonl") == noted


def row_of(share: float) -> dict:
    return {"actor/grad_norm": 1.0, "response_seq_len/truncated": share}


@pytest.mark.parametrize(
    "shares, warned", [([0.6] * 3, True), ([0.5] * 3, False), ([1, 0, 1, 1], False), ([1, 1], False)]
)
def test_the_tripwire_needs_every_one_of_the_last_steps(shares, warned, monkeypatch):
    monkeypatch.setattr(gold_train, "TRUNCATED_STEPS", 3)
    t = conftest.byte_level()
    ids = [t(text, add_special_tokens=False)["input_ids"] for text in ("done", "an answer", "\nround and\nround")]
    samples = [
        gold_data.Sample([1], i, finished, on)
        for i, finished, on in zip(ids, (True, False, False), (True, False, True))
    ]
    window = gold_buffer.Window(3, samples, 2)
    cfg = gold_train.Config(max_completion_length=7)
    found = gold_train.warnings([row_of(share) for share in shares], cfg, window, t, (t.eos_token_id,))
    assert list(found) == ["response_seq_len/truncated"] * warned
    if warned:  # the first line of what the student wrote
        assert found["response_seq_len/truncated"].endswith("'round and'") and "60%" not in str(found)


@pytest.mark.parametrize("asked, told", [(None, 24), (99, 99)])
def test_an_evaluation_may_have_longer_answers_than_training(models, data, tmp_path, monkeypatch, asked, told):
    class Evaluated(Exception):
        pass

    def evaluator(*args, max_new_tokens, **how):
        raise Evaluated(max_new_tokens)

    monkeypatch.setattr(gold_eval, "Evaluator", evaluator)
    cfg = config(models, data, tmp_path / "out", eval_tasks=("countdown-mini",), eval_max_new_tokens=asked)
    with pytest.raises(Evaluated, match=str(told)):
        gold_train.train(cfg, ALONE)


# ----------------------------------------------------------------------------------------------------------------------
# the fork


def test_the_self_distilling_fork_moves_the_student_towards_its_copy_that_reads_the_hint(tmp_path, monkeypatch):
    """A few steps of every stage: the distance to who reads the hint shrinks, on prompts without one."""
    import self_distill

    out = str(tmp_path / "out")
    fewer = {"SCHOOL_STEPS": 24, "STEPS": 10, "HINTED": 800, "PLAIN": 100, "PRACTICE": 100, "QUESTIONS": 8}
    for name, value in fewer.items():
        monkeypatch.setattr(self_distill, name, value)
    monkeypatch.setattr("sys.argv", ["self_distill.py", "--output-dir", out, "--per-device-train-batch-size", "16"])
    shares = self_distill.main()
    lines = ["before", "after", "before, with the hint", "answers alone", "after the other", "other, with the hint"]
    assert list(shares) == lines
    for name in ("self", "taught"):
        losses = [row["actor/loss"] for row in metrics(tmp_path / "out" / name)]
        assert len(losses) == 10 and losses[0] > 0 and sum(losses[-3:]) < 0.7 * sum(losses[:3]), name
        saved = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert (saved["teacher_model"] == saved["student_model"]) == (name == "self")
        assert "{hint}" in saved["teacher_prompt_template"]
        assert ("align/coverage" in metrics(tmp_path / "out" / name)[0]) == (name == "taught"), "two tokenizers"
        seen = gold_eval.read_jsonl(tmp_path / "out" / name / "samples.jsonl")
        assert seen and all(s["on_policy"] and "Hint" not in s["prompt"] for s in seen)
