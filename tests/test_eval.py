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
from transformers import AutoTokenizer

import gold_data
import gold_eval
from gold_eval import Evaluator, HFEngine, Options, Task

ROOT = Path(gold_eval.__file__).parent


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
    for size in (1, 5, 32):
        gold_eval.evaluate(student(), byte_level(), [guess], tmp_path / str(size), max_new_tokens=8, batch_size=size)
        answers.append((tmp_path / str(size) / "guess.jsonl").read_text())
    assert answers[0] == answers[1] == answers[2]


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


def test_answers_stop_at_the_end_token_and_only_those_cut_short_are_truncated():
    tokenizer, model = byte_level(), student()
    engine = HFEngine(model, Options(max_length=64))
    prompt = gold_data.encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    ((free,),) = engine.generate([prompt], 12, (0,))
    end = free[5]  # make what it writes sixth the end token
    ((cut,),) = engine.generate([prompt], 12, (end,))
    assert cut == free[: free.index(end) + 1]


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


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", [{"text": text} for text in MULTILINGUAL])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_perplexity_does_not_depend_on_batch_size_or_padding_side(texts, size, side, monkeypatch):
    tokenizer, model = byte_level(), student()
    monkeypatch.setattr(tokenizer, "padding_side", side)
    result = gold_eval.evaluate(model, tokenizer, [f"ppl={texts}"], batch_size=size)["ppl"]
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


# ---- the evaluator, with a child that does what it is told


def write_child(path: Path, body: str) -> str:
    """A script that speaks the child's side of the pipe and executes `body` for every job."""
    head = """
        import os, shutil, signal, sys, time
        from multiprocessing.connection import Connection
        connection = Connection(int(sys.argv[2]))
        setup = connection.recv()
        while True:
            name = os.path.basename(connection.recv()["save_to"])
            done = lambda **results: connection.send({"status": "ok", "results": {"t": results}})
    """
    path.write_text(textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body).strip(), "    "))
    return str(path)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Run an Evaluator whose child, for a job, executes `body`; its records after close are checked and returned."""
    made = []

    def start(body: str, **options) -> Evaluator:
        monkeypatch.setattr(Evaluator, "script", write_child(tmp_path / "child.py", body))
        made.append(Evaluator("student", ["countdown-mini"], tmp_path / "out", **({"timeout": 30} | options)))
        return made[-1]

    yield start
    for evaluator in made:
        evaluator.close(0)
        assert evaluator.child is None and not evaluator.thread.is_alive()
        lines = (tmp_path / "out" / "eval.jsonl").read_text().splitlines()
        assert len(lines) == evaluator.counts.total()


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8, 8), value)}


def statuses(records: list[dict]) -> dict:
    """{step or model: status}; fails if something was answered twice."""
    keys = [r["model"] if r["step"] is None else r["step"] for r in records]
    assert len(keys) == len(set(keys)), keys
    return {key: r["status"] for key, r in zip(keys, records)}


def test_every_submit_is_answered_and_summed_up(child):
    evaluator = child("done(accuracy=0.5)")
    for step in (0, 10):
        evaluator.submit(step, state(), final=step == 10)
    evaluator.submit_model("teacher", "elsewhere")
    assert evaluator.close()
    records = evaluator.poll()
    assert statuses(records) == {0: "ok", 10: "ok", "teacher": "ok"}
    assert [r["model"] for r in records] == ["student", "student", "teacher"]
    assert all(r["results"] == {"t": {"accuracy": 0.5}} for r in records)
    assert records[0]["seconds"] > 0  # with the start of the child; the others took less than a millisecond
    assert evaluator.summary() == "evaluations: 3 ok" and evaluator.failures == 0 and evaluator.poll() == []


def test_a_teacher_from_the_students_directory_is_scored_with_its_own_weights(child):
    evaluator = child("done(sent=setup['weights'] is not None)", policy="wait")
    evaluator.submit_model("teacher", "student")
    evaluator.submit(0, state())
    evaluator.submit_model("again", "student")
    assert evaluator.close()
    assert [r["results"]["t"]["sent"] for r in evaluator.poll()] == [False, True, False]


def test_submit_returns_at_once_while_an_evaluation_runs(child):
    evaluator = child("time.sleep(1); done()")
    weights = {str(i): torch.randn(256, 256) for i in range(40)}  # 10 MB
    slowest = 0.0
    for step in (0, 1, 2, 3):
        start = time.perf_counter()
        evaluator.submit(step, weights)
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.25  # milliseconds on an idle machine; the copy itself is the only work


def test_a_slow_evaluation_with_five_pending_submits_drops_the_old_ones(child):
    evaluator = child("time.sleep(0.7); done()")
    evaluator.submit(0, state())
    time.sleep(0.3)  # it is running now
    for step in (1, 2, 3, 4, 5):
        evaluator.submit(step, state())
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "ok", 1: "dropped", 2: "dropped", 3: "dropped", 4: "dropped", 5: "ok"}


def test_with_the_policy_wait_nothing_is_dropped(child):
    evaluator = child("time.sleep(0.2); done()", policy="wait")
    for step in range(6):
        evaluator.submit(step, state())
    assert evaluator.close()
    assert set(statuses(evaluator.poll()).values()) == {"ok"}


def test_the_baseline_the_teacher_and_the_final_one_are_never_dropped(child):
    evaluator = child("time.sleep(0.3); done()")
    evaluator.submit_model("teacher", "elsewhere")
    evaluator.submit(0, state())
    for step in (1, 2, 3):
        evaluator.submit(step, state(), final=step == 3)
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {"teacher": "ok", 0: "ok", 1: "dropped", 2: "dropped", 3: "ok"}


def test_a_dead_child_is_a_record_and_the_next_job_gets_a_new_one(child, capsys):
    evaluator = child(
        "if name == 'step-000001': os.kill(os.getpid(), signal.SIGSEGV)\nif name == 'step-000002': os._exit(3)\ndone()",
        policy="wait",
    )
    for step in range(4):
        evaluator.submit(step, state())
    assert evaluator.close()
    records = evaluator.poll()
    assert statuses(records) == {0: "ok", 1: "crashed", 2: "crashed", 3: "ok"}
    assert "exit code -11" in records[1]["error"] and "exit code 3" in records[2]["error"]
    assert evaluator.failures == 2 and "step 1: crashed" in capsys.readouterr().err


def test_a_child_that_hangs_up_but_does_not_end_is_killed(child):
    evaluator = child("connection.close(); time.sleep(1000)", timeout=60)
    start = time.perf_counter()
    evaluator.submit(0, state())
    assert evaluator.close() and time.perf_counter() - start < 30
    assert statuses(evaluator.poll()) == {0: "crashed"}


def test_an_exception_is_a_record_with_its_traceback(child):
    body = "if name[-1] == '1': connection.send({'status': 'error', 'error': 'Traceback: boom'}); sys.exit(1)\ndone()"
    evaluator = child(body, policy="wait")
    for step in range(3):
        evaluator.submit(step, state())
    assert evaluator.close()
    records = evaluator.poll()
    assert statuses(records) == {0: "ok", 1: "error", 2: "ok"} and "boom" in records[1]["error"]


def test_a_hanging_child_is_killed_at_its_time_limit(child, tmp_path):
    evaluator = child(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)", timeout=1.5)
    evaluator.submit(0, state())
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "timeout"}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_three_failures_in_a_row_end_it_loudly_and_the_rest_is_refused(child):
    evaluator = child("os._exit(1)", policy="wait", max_failures=3)
    for step in range(6):
        evaluator.submit(step, state())
    assert evaluator.close()
    assert list(statuses(evaluator.poll()).values()) == ["crashed"] * 3 + ["refused"] * 3
    assert "given up after 3 failures" in evaluator.summary()


def test_a_failure_between_successes_does_not_add_up(child):
    evaluator = child("if int(name[5:]) % 2: os._exit(1)\ndone()", policy="wait", max_failures=2)
    for step in range(6):
        evaluator.submit(step, state())
    assert evaluator.close()
    assert list(statuses(evaluator.poll()).values()) == ["ok", "crashed"] * 3


def test_close_with_a_deadline_cuts_short_and_still_answers_everything(child):
    evaluator = child("time.sleep(1000)")
    for step in (0, 1, 2):
        evaluator.submit(step, state())
    start = time.perf_counter()
    assert not evaluator.close(timeout=1)
    assert time.perf_counter() - start < 10
    evaluator.submit(3, state())
    assert statuses(evaluator.poll()) == {0: "timeout", 1: "dropped", 2: "dropped", 3: "refused"}


def test_a_submit_that_waits_is_answered_when_the_evaluator_gives_up(child):
    evaluator = child("time.sleep(0.3); os._exit(1)", policy="wait", max_failures=1)
    for step in range(4):
        evaluator.submit(step, state())
    assert evaluator.close()
    assert list(statuses(evaluator.poll()).values()) == ["crashed", "refused", "refused", "refused"]


def test_submits_from_a_child_that_cannot_start_are_errors(child, tmp_path):
    evaluator = child("done()")
    Path(Evaluator.script).write_text("raise SystemExit(7)")
    evaluator.submit(0, state())
    assert evaluator.close()
    assert statuses(evaluator.poll()) == {0: "crashed"}


def test_the_child_gets_the_weights_of_the_step_even_if_training_goes_on(child, tmp_path):
    evaluator = child(f"shutil.copy(setup['weights'], {str(tmp_path)!r} + '/' + name + '.pt'); done()", policy="wait")
    weight = torch.randn(64, 64)
    expected = weight.clone()
    names = {"module._orig_mod.embed": weight, "_orig_mod.head": weight, "module.layers.0._orig_mod.w": torch.ones(2)}
    evaluator.submit(5, names)
    weight.zero_()
    assert evaluator.close()
    received = torch.load(tmp_path / "step-000005.pt")
    assert set(received) == {"embed", "head", "layers.0.w"} and torch.equal(received["embed"], expected)
    assert received["embed"].data_ptr() == received["head"].data_ptr()  # a tied head travels once
    assert (tmp_path / "step-000005.pt").stat().st_size < 2 * expected.nbytes


def test_weights_travel_in_the_dtype_of_the_evaluation():
    copies = gold_eval.snapshot({"w": torch.ones(4), "steps": torch.tensor(3)}, torch.bfloat16)
    assert copies["w"].dtype == torch.bfloat16 and copies["steps"].dtype == torch.int64


def test_nothing_is_left_in_shared_memory_and_no_process(child, tmp_path):
    before = set(os.listdir("/dev/shm"))
    evaluator = child(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); done()")
    evaluator.submit(0, state())
    assert evaluator.close()
    assert set(os.listdir("/dev/shm")) == before and not list((tmp_path / "out").glob(".weights*"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_full_shared_memory_does_not_matter(tmp_path):
    """In a namespace of its own, /dev/shm holds 64 KiB, all of them used; the weights are 4 MB."""
    write_child(tmp_path / "child.py", "done(size=os.stat(setup['weights']).st_size)")
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        from gold_eval import Evaluator
        Evaluator.script = {str(tmp_path / "child.py")!r}
        evaluator = Evaluator("student", ["countdown-mini"], {str(tmp_path / "out")!r})
        evaluator.submit(0, {{"w": torch.ones(1024, 1024)}})
        evaluator.close()
    """
    (tmp_path / "run.py").write_text(textwrap.dedent(code))
    full = "mount -t tmpfs -o size=64k tmpfs /dev/shm && head -c 64k /dev/zero > /dev/shm/full"
    private = ["unshare", "-rm", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*private, full], capture_output=True).returncode:
        pytest.skip("this machine lends no namespaces")
    run = f"{full}; ! head -c 1 /dev/zero > /dev/shm/more 2> /dev/null && exec {sys.executable} {tmp_path / 'run.py'}"
    subprocess.run([*private, run], check=True)
    (record,) = (json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines())
    assert record["status"] == "ok" and record["results"]["t"]["size"] > 4_000_000


def test_where_memory_has_no_anonymous_files_the_weights_take_a_file_that_is_removed(child, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    evaluator = child("done(path=setup['weights'], size=os.stat(setup['weights']).st_size)")
    evaluator.submit(0, state())
    assert evaluator.close() and evaluator.close()
    assert evaluator.poll()[0]["results"]["t"]["path"] == str(tmp_path / "out" / ".weights.pt")
    assert not (tmp_path / "out" / ".weights.pt").exists()


def test_answers_of_a_model_named_by_its_path_stay_in_the_output_folder(child):
    evaluator = child("done(name=name)")
    evaluator.submit_model("/models/a b", "/models/a b")
    assert evaluator.close()
    (record,) = evaluator.poll()
    assert record["results"]["t"]["name"] == "_models_a_b" and record["model"] == "/models/a b"


def test_unknown_options_tasks_and_policies_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="there is no task"):
        Evaluator("m", ["nope"], tmp_path)
    with pytest.raises(TypeError, match="max_sample"):
        Evaluator("m", ["countdown"], tmp_path, max_sample=3)
    with pytest.raises(ValueError, match="drop_oldest nor wait"):
        Evaluator("m", ["countdown"], tmp_path, policy="skip")
    with pytest.raises(ValueError, match="no task to evaluate"):
        Evaluator("m", [], tmp_path)


def test_the_child_knows_nothing_of_torchrun_and_sees_one_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_NAME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("RANKING", "kept")
    env = gold_eval.child_env("cuda:2", "hf")
    assert env["CUDA_VISIBLE_DEVICES"] == "7" and env["RANKING"] == "kept"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_NAME"} & set(env)
    assert gold_eval.child_env("cpu", "hf")["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(ValueError, match="cuda:3 does not exist"):
        gold_eval.child_env("cuda:3", "hf")


# ---- the evaluator with its real child


@pytest.fixture
def saved(tmp_path):
    """A model's directory, one of the same shape with weights that are never to be scored, and their tokenizer."""
    for name, model in (("whole", student()), ("other", tiny_qwen(len(byte_level()), hidden=64, seed=9))):
        model.generation_config.eos_token_id = byte_level().eos_token_id
        byte_level().save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "whole", tmp_path / "other", AutoTokenizer.from_pretrained(tmp_path / "other")


@pytest.mark.slow
def test_during_training_afterwards_and_in_process_the_numbers_are_the_same(saved, tmp_path, texts):
    """Child with submitted weights == child with a directory == command line == evaluate(), answers included."""
    whole, other, tokenizer = saved
    tasks, options = ["countdown-mini", f"ppl={texts}"], dict(max_samples=12, max_new_tokens=10, batch_size=5)
    options |= dict(num_samples=2, temperature=1.0)
    changed = tiny_qwen(len(byte_level()), hidden=64, seed=5)
    expected = [
        gold_eval.evaluate(model, tokenizer, tasks, tmp_path / f"expected-{i}", **options)
        for i, model in enumerate((student(), changed))
    ]
    evaluator = Evaluator(other, tasks, tmp_path / "out", **options)
    evaluator.submit(0, student().state_dict())
    evaluator.submit(1, changed.state_dict(), final=True)
    assert evaluator.close()
    command = [sys.executable, "gold_eval.py", "--model", str(whole), "--task", *tasks, "--out", str(tmp_path / "cli")]
    command += ["--max-samples", "12", "--max-new-tokens", "10", "--batch-size", "5", "--device", "cpu", "--plot"]
    command += ["--num-samples", "2", "--temperature", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cli = json.loads((tmp_path / "cli" / "results.json").read_text())["models"]["whole"]

    def numbers(results: dict) -> dict:
        return {k: v for k, v in gold_eval.flatten(results).items() if "seconds" not in k}

    first, second = evaluator.poll()
    assert numbers(first["results"]) == numbers(expected[0]) == numbers(cli)
    assert numbers(second["results"]) == numbers(expected[1]) != numbers(expected[0])
    answers = [tmp_path / "out/completions/step-000000", tmp_path / "cli/completions/whole", tmp_path / "expected-0"]
    texts = [(folder / "countdown-mini.jsonl").read_text() for folder in answers]
    assert texts[0] == texts[1] == texts[2]
    assert gold_eval.table({"whole": cli["countdown-mini"]}) in done.stdout
    assert (tmp_path / "cli/report.md").read_text().count("### ") == 2
    assert (tmp_path / "cli/classes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_weights_that_do_not_fit_are_an_error_that_names_them(saved, tmp_path):
    evaluator = Evaluator(saved[1], ["countdown-mini"], tmp_path / "out", max_samples=2)
    evaluator.submit(0, {"unknown.weight": torch.ones(2)})
    evaluator.close()
    (record,) = evaluator.poll()
    assert record["status"] == "error" and "unknown.weight" in record["error"]


@pytest.mark.slow
def test_the_child_dies_with_a_parent_that_is_killed_even_while_it_hangs(tmp_path):
    """The child sleeps in C with the interpreter's lock held, so nothing in it could notice."""
    code = f"""
        import ctypes, os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import gold_eval
        def hang(*args, **options):
            open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
            ctypes.PyDLL(None).sleep(1000)
        gold_eval.open_engine = hang
        gold_eval.Evaluator.script = __file__
        if sys.argv[1:]:
            gold_eval.serve(*map(int, sys.argv[2:]))
        evaluator = gold_eval.Evaluator("student", ["countdown-mini"], {str(tmp_path / "out")!r})
        evaluator.submit(0, {{"w": gold_eval.torch.ones(1024)}})
        time.sleep(1000)
    """
    (tmp_path / "parent.py").write_text(textwrap.dedent(code))
    before = set(os.listdir("/dev/shm"))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    deadline = time.monotonic() + 90
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it lives
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while running(pid):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.1)
    assert set(os.listdir("/dev/shm")) == before


def running(pid: int) -> bool:
    """False for a process that is gone, or dead and waiting for whoever adopted it."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_gives_the_answers_and_perplexities_of_transformers_after_every_change_of_weights(saved, tmp_path, texts):
    pytest.importorskip("vllm")
    tasks, options = ["countdown-mini", f"ppl={texts}"], dict(max_samples=8, max_new_tokens=8, max_length=256, wrap=64)
    models = [
        student(),
        tiny_qwen(len(byte_level()), hidden=64, seed=5),
    ]  # tied heads: what a partial reload leaves stale
    evaluator = Evaluator(saved[1], tasks, tmp_path / "out", engine="vllm", timeout=300, **options)
    for step, model in enumerate(models):
        evaluator.submit(step, model.state_dict(), final=step == 1)
    assert evaluator.close()
    for step, (model, record) in enumerate(zip(models, evaluator.poll(), strict=True)):
        assert record["status"] == "ok", record["error"]
        expected = gold_eval.evaluate(model, saved[2], tasks, tmp_path / str(step), **options)
        for key in ("perplexity", "bits_per_byte", "wrapped_perplexity"):
            assert record["results"]["ppl"][key] == pytest.approx(expected["ppl"][key], rel=1e-4)
        answers = [tmp_path / f"out/completions/step-{step:06d}", tmp_path / str(step)]
        ours, theirs = ((folder / "countdown-mini.jsonl").read_text() for folder in answers)
        assert ours == theirs


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
    body = f"os._exit(1) if name == 'b' else connection.send({{'status': 'ok', 'results': {GRADED!r}}})"
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
