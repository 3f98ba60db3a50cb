"""What an operator does to a run: stops it, copies it, damages it, starts it twice, resumes it with other words."""

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_level, metaspace, tiny_llama
from test_train import ALONE, ROOT, call, command, config, data, metrics, models, save, start, weights, write_rows

import gold_train

__all__ = ["data", "models"]  # fixtures


def wait_for_steps(out: Path, process: subprocess.Popen, steps: int) -> None:
    path = out / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


@pytest.fixture
def done(models, data, tmp_path) -> gold_train.Config:
    """A finished run of four steps with two checkpoints."""
    cfg = config(models, data, tmp_path / "out", max_steps=4, save_steps=2, max_completion_length=4)
    gold_train.train(cfg, ALONE)
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("number, lag", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGINT, 1)])
def test_a_signal_ends_the_step_and_a_resume_goes_on_bit_for_bit(models, data, tmp_path, number, lag):
    cfg = config(models, data, tmp_path / "whole", max_steps=30, save_steps=0, lag=lag)
    gold_train.train(cfg, ALONE)
    cut = dataclasses.replace(cfg, output_dir=str(tmp_path / "cut"))
    process = start(cut)
    wait_for_steps(tmp_path / "cut", process, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    at = gold_train.newest_checkpoint(tmp_path / "cut" / "checkpoints", print)
    assert 3 <= int(at.name.removeprefix("step-")) < 30
    gold_train.train(dataclasses.replace(cut, resume=True), ALONE)
    assert metrics(cut.output_dir) == metrics(cfg.output_dir)
    for name, value in weights(cfg.output_dir).items():
        assert torch.equal(value, weights(cut.output_dir)[name]), name


def test_all_ranks_stop_at_the_same_step_and_end_with_their_launcher(models, data, tmp_path):
    """SIGKILL of torchrun itself: the ranks are told by the kernel, write a checkpoint and are gone."""
    cfg = config(models, data, tmp_path / "out", max_steps=2000, save_steps=0)
    process = start(cfg, ranks=2)
    wait_for_steps(tmp_path / "out", process, 2)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    process.kill()
    until = time.monotonic() + 60
    alive = lambda: [
        pid for pid in ranks if Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    ]
    while alive():
        assert time.monotonic() < until, "the ranks train on without their launcher"
        time.sleep(0.1)
    step = len(metrics(tmp_path / "out"))
    assert gold_train.newest_checkpoint(tmp_path / "out" / "checkpoints", print).name == f"step-{step:06d}"


def test_minutes_between_checkpoints(models, data, tmp_path):
    cfg = config(models, data, tmp_path / "out", max_steps=3, save_steps=0, save_minutes=1e-6, save_total_limit=9)
    gold_train.train(cfg, ALONE)
    assert len(list((tmp_path / "out" / "checkpoints").glob("step-*"))) == 3


# ----------------------------------------------------------------------------------------------------------------------
# one folder, one run


def test_the_second_of_two_runs_in_a_folder_ends_with_one_line(models, data, tmp_path):
    cfg = config(models, data, tmp_path / "out", max_steps=500, save_steps=1)
    first = start(cfg)
    wait_for_steps(tmp_path / "out", first, 2)
    for second in (dataclasses.replace(cfg, resume=True), cfg):
        process = start(second)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "another process trains in" in output and "Traceback" not in output
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 143
    steps = [row["step"] for row in metrics(tmp_path / "out")]
    assert steps == list(range(1, len(steps) + 1))


def test_what_a_run_left_without_a_checkpoint_is_moved_aside_not_deleted(done, tmp_path):
    out = tmp_path / "out"
    before = (out / "metrics.jsonl").read_text()
    shutil.rmtree(out / "checkpoints")
    gold_train.train(done, ALONE)
    assert (out / "before-1" / "metrics.jsonl").read_text() == before
    assert metrics(out) == metrics(out / "before-1")


# ----------------------------------------------------------------------------------------------------------------------
# resume


def test_resume_takes_what_it_is_not_told_from_the_run(done, tmp_path, monkeypatch, capsys):
    """The command of the documentation: neither models nor data are named again."""
    first = metrics(done.output_dir)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")  # a kill after two steps
    monkeypatch.setattr(sys, "argv", ["gold_train.py", "--resume", "--output-dir", done.output_dir])
    gold_train.main()
    assert metrics(done.output_dir) == first
    assert "resumed after step 2" in capsys.readouterr().out


def test_resume_says_what_changed(done, capsys):
    gold_train.train(dataclasses.replace(done, resume=True, learning_rate=5e-4, save_steps=1), ALONE)
    text = capsys.readouterr().out
    assert "'learning_rate': '0.001 -> 0.0005'" in text and "'save_steps': '2 -> 1'" in text


def test_the_embedded_job_is_not_resumed_with_another_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gold_train, "TEACHER_STEPS", 1)
    monkeypatch.setattr(gold_train, "STUDENT_STEPS", 1)
    flags = ["--output-dir", str(tmp_path / "out"), "--max-steps", "1", "--eval-steps", "0", "--eval-tasks"]
    monkeypatch.setattr(sys, "argv", ["gold_train.py", *flags])
    gold_train.main()
    for more in (["--seed", "1"], ["--seed", "1", "--resume"]):
        code, text = call(monkeypatch, capsys, *flags, *more)
        assert code == 1 and ("--resume it" in text or "--seed 0" in text)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "tokenizer.json", "files.json"])
@pytest.mark.parametrize("harm", ["truncated", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(done, tmp_path, capsys, name, harm):
    path = tmp_path / "out" / "checkpoints" / "step-000004" / name
    path.write_bytes(path.read_bytes()[:-20]) if harm == "truncated" else path.unlink()
    first = metrics(done.output_dir)
    gold_train.train(dataclasses.replace(done, resume=True), ALONE)
    text = capsys.readouterr().out
    assert f"step-000004/{name}" in text and "resumed after step 2" in text
    assert metrics(done.output_dir) == first
    assert (tmp_path / "out" / "checkpoints" / "latest").resolve().name == "step-000004"


@pytest.mark.parametrize("latest", ["dangling", "a folder", "gone"])
def test_resume_survives_what_copying_does_to_latest(done, tmp_path, latest, capsys):
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "latest").unlink()
    if latest == "dangling":
        (checkpoints / "latest").symlink_to("step-000009")
    if latest == "a folder":
        (checkpoints / "step-000004").rename(checkpoints / "latest")
    gold_train.train(dataclasses.replace(done, resume=True, save_steps=1), ALONE)
    assert "resumed after step 4" in capsys.readouterr().out
    longer = dataclasses.replace(done, output_dir=str(tmp_path / "longer"), max_steps=5)
    shutil.copytree(tmp_path / "out", tmp_path / "longer", symlinks=False, ignore_dangling_symlinks=True)
    with pytest.raises(SystemExit, match=r"steps.*4 -> 5"):
        gold_train.train(dataclasses.replace(longer, resume=True), ALONE)


def test_a_checkpoint_written_over_a_copied_latest_is_a_link_again(done, tmp_path):
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "step-000002").rename(checkpoints / "latest")
    shutil.rmtree(checkpoints / "step-000004")
    gold_train.train(dataclasses.replace(done, resume=True), ALONE)
    assert (checkpoints / "latest").is_symlink() and (checkpoints / "latest").resolve().name == "step-000004"


def test_a_checkpoint_holds_no_code(done, tmp_path):
    """It loads with weights_only: an untrusted directory can lie, but not run anything."""
    state = torch.load(tmp_path / "out" / "checkpoints" / "latest" / "trainer.pt", weights_only=True)
    assert state["step"] == 4 and state["run"]["seed"] == 5


# ----------------------------------------------------------------------------------------------------------------------
# the folder itself


def test_files_have_the_users_mode(models, data, tmp_path):
    before = os.umask(0o027)
    try:
        gold_train.train(config(models, data, tmp_path / "out", max_steps=1, max_completion_length=4), ALONE)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 8
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {p.name: "0o640" for p in files}


def test_a_folder_that_cannot_be_written_is_one_line(models, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    code, text = call(monkeypatch, capsys, *command(config(models, data, tmp_path / "file" / "out")))
    assert code == 1 and "file/out" in text and "Traceback" not in text


def test_a_full_disk_ends_in_one_line_that_names_the_last_checkpoint(models, data, tmp_path, monkeypatch, capsys):
    cfg = config(models, data, tmp_path / "out", max_steps=4, save_steps=2, max_completion_length=4)
    real = gold_train.save_model

    def full(folder, *args, **named):
        if "000004" in str(folder):
            raise OSError(28, "No space left on device")
        real(folder, *args, **named)

    monkeypatch.setattr(gold_train, "save_model", full)
    code, text = call(monkeypatch, capsys, *command(cfg))
    assert code == 1 and "No space left" in text and "--resume" in text
    assert gold_train.newest_checkpoint(tmp_path / "out" / "checkpoints", print).name == "step-000002"


def test_keys_on_the_command_line_are_not_written_down(models, data, tmp_path, monkeypatch):
    key = "hf_" + "a" * 20
    monkeypatch.setattr(sys, "argv", ["gold_train.py", "--x", key, "--teacher-url", "http://me:pass@host:1/v1"])
    gold_train.train(config(models, data, tmp_path / "out", max_steps=1, max_completion_length=4), ALONE)
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert key not in text and "pass@" not in text and "***@host:1" in text


# ----------------------------------------------------------------------------------------------------------------------
# numbers that are none


def test_a_teacher_that_is_not_finite_is_named_and_the_last_checkpoint_stays(models, data, tmp_path):
    bad = tiny_llama(len(metaspace()), seed=2)
    bad.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    folder = save(tmp_path / "bad", bad, metaspace())
    for loss in ("prefix", "alm", "uld", "hybrid"):
        cfg = config(models, data, tmp_path / loss, cross_tokenizer_loss=loss)
        with pytest.raises(FloatingPointError, match="the teacher's .* at step 1"):
            gold_train.train(dataclasses.replace(cfg, teacher_model=folder), ALONE)


def test_weights_that_overflow_are_never_written(models, data, tmp_path):
    cfg = config(models, data, tmp_path / "out", max_steps=3, save_steps=1, learning_rate=1e18, max_completion_length=4)
    with pytest.raises(FloatingPointError, match="student's .* not finite"):
        gold_train.train(cfg, ALONE)
    for path in (tmp_path / "out" / "checkpoints").glob("step-*/model.safetensors"):
        from safetensors.torch import load_file

        assert all(value.isfinite().all() for value in load_file(path).values())


def test_a_step_that_is_not_finite_can_be_left_out_and_is_counted(models, data, tmp_path, monkeypatch):
    real = gold_train.micro_batch_loss
    calls = []

    def sometimes(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(gold_train, "micro_batch_loss", sometimes)
    cfg = config(models, data, tmp_path / "out", max_steps=3, max_completion_length=4)
    with pytest.raises(FloatingPointError, match="step 2.*--skip-nonfinite"):
        gold_train.train(cfg, ALONE)
    calls.clear()
    gold_train.train(dataclasses.replace(cfg, skip_nonfinite=True, output_dir=str(tmp_path / "skip")), ALONE)
    assert [row["actor/skipped"] for row in metrics(tmp_path / "skip")] == [0.0, 1.0, 0.0]


def test_a_gradient_of_exactly_zero_is_said(models, data, tmp_path, capsys):
    """A learning rate that makes every weight so large that the law is one token, whatever comes."""
    cfg = config(models, data, tmp_path / "out", "same", max_steps=4, learning_rate=1e6, max_completion_length=4)
    gold_train.train(cfg, ALONE)
    assert "the gradient is exactly 0" in capsys.readouterr().out


def test_samples_without_a_scored_token_are_counted_and_warned_about(models, tmp_path, monkeypatch, capsys):
    """A student that writes one special token again and again."""
    start_id = byte_level().convert_tokens_to_ids("<|im_start|>")
    cfg = config(models, write_rows(tmp_path / "rows.jsonl", str), tmp_path / "out", max_steps=1, lmbda=1.0)
    real = gold_train.open_sampler

    def only_special(*args):
        sampler = real(*args)
        generate = sampler.generate

        def say_nothing(requests, sampling, done):
            def change(i, rollout):
                rollout.completion_ids, rollout.finished = [start_id] * len(rollout.completion_ids), False
                done(i, rollout)

            return generate(requests, sampling, change)

        sampler.generate = say_nothing
        return sampler

    monkeypatch.setattr(gold_train, "open_sampler", only_special)
    gold_train.train(cfg, ALONE)
    assert metrics(cfg.output_dir)[0]["align/unscored"] == 1.0
    assert "without a single scored token" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# wandb


def test_wandb_without_a_key_or_network_ends_in_one_line_before_models_are_read(models, data, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    cfg = config(models, data, tmp_path / "out", wandb_mode="online", max_steps=1)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "gold_train.py"), *command(cfg)], env=environment, capture_output=True, text=True,
        timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1 and "--wandb-mode offline" in done.stderr, done.stderr[-2000:]
    assert time.monotonic() - began < 100


def test_a_resumed_run_goes_on_in_the_same_wandb_run(done, tmp_path):
    pytest.importorskip("wandb")
    cfg = dataclasses.replace(done, output_dir=str(tmp_path / "w"), wandb_mode="offline")
    gold_train.train(cfg, ALONE)
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "step-000004")
    gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)
    runs = {path.name.rpartition("-")[2] for path in (tmp_path / "w" / "wandb").glob("offline-run-*")}
    assert runs == {(tmp_path / "w" / "wandb_id").read_text()}
    assert json.loads((tmp_path / "w" / "config.json").read_text())["wandb_mode"] == "offline"
