"""What a GPU needs of us: memory that is known before the engine is sized, gradients in one place, streams and devices
that nobody shares by accident. Tests marked gpu need one; bench_gpu.py proves the rest and runs at toy size here."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import bench_gpu
import conftest
import pytest
import torch

import gold_buffer
import gold_loss
import gold_train
from gold_train import Config, Ranks

ROOT = Path(gold_train.__file__).parent
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_size_and_has_nothing_to_look_at():
    environment = os.environ | {"TINY": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "bench_gpu.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0 and "LOOK" not in done.stdout, done.stdout + done.stderr[-3000:]
    for part in bench_gpu.PARTS:
        assert f"| {part} | all of it, seconds |" in done.stdout
    assert done.stdout.count("| ok |") == 18, "those that hold on any machine"


def test_a_line_outside_its_range_is_to_be_looked_at(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu, "LINES", [])
    for value in (1.0, 3.0, float("nan")):
        bench_gpu.line("part", "what", value, 0, 2, exact=True)
    assert bench_gpu.LINES == [True, False, False] and capsys.readouterr().out.count("LOOK") == 2


# ----------------------------------------------------------------------------------------------------------------------
# memory


def test_adams_state_exists_before_the_first_step_and_changes_no_number():
    models = [conftest.tiny_qwen(50) for _ in range(2)]
    ours = gold_train.open_optimizer(Config(weight_decay=0.1, learning_rate=1e-2), models[0])
    groups = [{"params": [p for p in models[1].parameters() if (p.dim() >= 2) == matrix]} for matrix in (True, False)]
    plain = torch.optim.AdamW([groups[0], groups[1] | {"weight_decay": 0.0}], lr=1e-2, weight_decay=0.1, fused=True)
    parameters = list(models[0].parameters())
    assert sum(x.numel() for p in parameters for x in ours.state[p].values()) == sum(
        2 * p.numel() + 1 for p in parameters
    )
    for step in range(3):
        for model, optimizer in zip(models, (ours, plain)):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))
    saved = [o.state_dict()["state"] for o in (ours, plain)]
    for i, state in saved[1].items():
        assert all(
            torch.equal(saved[0][i][name], x) and saved[0][i][name].dtype == x.dtype for name, x in state.items()
        )
    assert saved[0].keys() == saved[1].keys()


def test_weights_that_are_sampled_while_training_goes_on_are_copied_once_each():
    model = conftest.tiny_qwen(50, tied=True)
    weights = model.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        copies = gold_buffer._copies(weights, dtype)
        assert copies.keys() == weights.keys()
        assert copies["lm_head.weight"].data_ptr() == copies["model.embed_tokens.weight"].data_ptr()
        for name, x in weights.items():
            assert torch.equal(copies[name], x.to(dtype)) and copies[name].data_ptr() != x.data_ptr()
    assert gold_buffer._copies({"n": torch.tensor(3)}, torch.bfloat16)["n"].dtype == torch.long


# ----------------------------------------------------------------------------------------------------------------------
# devices and deadlines


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    return Ranks(0, 0, 7, 7, torch.device("cpu"))


def test_a_teacher_shared_by_ranks_has_a_gpu_of_its_own(eight_gpus, tmp_path):
    cfg = Config(student_model="s", teacher_model="t", sampler="hf", output_dir=str(tmp_path))
    for device in ("cuda:0", "cuda:6", "cuda"):
        with pytest.raises(ValueError, match=f"teacher_device {device} is also a rank's"):
            gold_train.check(gold_train.replace(cfg, teacher_device=device), eight_gpus)
    gold_train.check(gold_train.replace(cfg, teacher_device="cuda:7"), eight_gpus)
    alone = Ranks(0, 0, 1, 1, torch.device("cpu"))
    gold_train.check(gold_train.replace(cfg, teacher_device="cuda:0"), alone)  # one rank may have both


def test_lag_beside_tensor_parallelism_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(gold_buffer, "choose_sampler", lambda sampler: ("vllm", "as asked"))
    ranks = Ranks(0, 0, 2, 2, torch.device("cpu"))
    cfg = Config(student_model="s", teacher_model="t", sampler="vllm", vllm_tensor_parallel_size=2, output_dir="none")
    gold_train.check(cfg, ranks)
    with pytest.raises(ValueError, match="two NCCL communicators at once: --lag 0"):
        gold_train.check(gold_train.replace(cfg, lag=1), ranks)


def test_the_process_group_waits_longer_than_anything_that_one_rank_may_wait_for():
    assert gold_train.longest_wait(Config()) == 2400
    assert gold_train.longest_wait(Config(eval_policy="wait", eval_timeout=9000)) == 9600
    assert gold_train.longest_wait(Config(eval_timeout=7200)) == 2400, "nobody waits for an evaluation"
    assert gold_train.longest_wait(Config(eval_timeout=7200, eval_policy="wait")) == 7800


# ----------------------------------------------------------------------------------------------------------------------
# on a GPU


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("part", ["exact", "streams", "memory"])
def test_the_exact_parts_of_the_benchmark_hold(part, monkeypatch):
    monkeypatch.setattr(bench_gpu, "LINES", [])
    bench_gpu.PARTS[part]()
    assert bench_gpu.LINES and all(bench_gpu.LINES)


def bf16_problem(n: int = 300, v: int = 5001, h: int = 256):
    """Sides in bf16 with a master weight in float32, and both models' logits as bf16 inputs make them, in float64."""
    random = lambda *shape: torch.randn(*shape, device="cuda")
    hidden, weight = random(n, h).bfloat16().requires_grad_(), (3 * random(v, h) / h**0.5).requires_grad_()
    known, other, ids = random(n, h).bfloat16(), (3 * random(v, h) / h**0.5).bfloat16(), torch.arange(n, device="cuda")
    student = gold_loss.Side(hidden, gold_loss.Head(weight), ids)
    exact = hidden.detach().double(), weight.detach().bfloat16().double()
    return student, gold_loss.Side(known, gold_loss.Head(other), ids), exact, known.double() @ other.double().t()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_logits_and_the_gradient_of_the_head_are_not_rounded_to_bf16(beta):
    student, teacher, (hidden, weight), known = bf16_problem()
    z = gold_loss._project(student.hidden.detach(), student.head.weight.detach().bfloat16(), student.head)
    assert z.dtype == torch.float32 and torch.allclose(z.double(), hidden @ weight.t(), rtol=1e-4, atol=1e-4)
    weight.requires_grad_()
    values = gold_loss.jsd(hidden @ weight.t(), known, beta)
    (expected,) = torch.autograd.grad(values.sum(), weight)
    loss = gold_loss.fused_jsd(student, teacher, beta)
    assert torch.allclose(loss.values.double(), values, rtol=1e-4, atol=1e-4), "bf16 logits are off by up to 0.06"
    (grad,) = torch.autograd.grad(loss.total, student.head.weight)
    assert grad.dtype == torch.float32 and (grad - expected).norm() < 4e-3 * expected.norm(), "dz alone is rounded"


@pytest.mark.gpu
@gpu
def test_the_loss_needs_no_second_gradient_of_the_head():
    """Beside the gradient itself: the weight in bf16, half as large, and chunks."""
    student, teacher, *_ = bf16_problem(64, 100_000, 512)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, head = torch.cuda.memory_allocated(), student.head.weight.numel()
    gold_loss.fused_jsd(student, teacher, 0.5, chunk=8).total.backward()
    assert torch.cuda.max_memory_allocated() - before < (4 + 2 + 1) * head
    assert student.head.weight.grad.numel() == head


@pytest.mark.gpu
@gpu
def test_the_loss_never_waits_for_the_gpu():
    """test_loss.py shows it of all losses on tensors without values; here cuBLAS and the kernel have a say."""
    student, teacher, *_ = bf16_problem()
    run = lambda: gold_loss.fused_jsd(student, teacher, 0.5, chunk=100).total.backward()
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
def test_forward_and_backward_of_a_student_wait_for_the_gpu_at_most_once():
    """transformers looks once for rows that are packed."""
    _, _, parts = bench_gpu.build("qwen2.5-0.5b")
    ids, rows = torch.zeros(2, 64, dtype=torch.long, device="cuda"), torch.arange(64, device="cuda")
    with parts.autocast:
        parts.model(ids, rows).sum().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen, parts.autocast:
            warnings.simplefilter("always")
            parts.model(ids, rows).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) <= 1


@pytest.mark.gpu
@gpu
def test_the_main_threads_stream_is_unchanged_by_the_engines():
    before = torch.cuda.current_stream()
    with torch.cuda.stream(gold_buffer.engine_stream()):
        assert torch.cuda.current_stream() == gold_buffer.engine_stream() != before, "one for the process, whoever asks"
    assert torch.cuda.current_stream() == before
