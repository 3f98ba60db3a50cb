"""gold_loss against slow references in plain Python, finite differences, and everything that must not change it.

pytest tests/test_loss.py
"""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace

import bins_loss
import pytest
import reference
import torch
import vocab_parallel
from conftest import LongestMatch, byte_level, metaspace
from torch.autograd import gradcheck
from trl_uld import trl_uld

import gold_data
import gold_loss
from gold_loss import Head, Side

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def logits(*shape, seed=0, spread=2.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laws(z):
    return [reference.softmax(row) for row in z.tolist()]


def as_side(z, ids=None, span=None, temperature=1.0, masked=()):
    """A side whose hidden states are the logits themselves; the ids in `masked` get -inf from the head's bias."""
    bias = torch.zeros(z.size(1), dtype=z.dtype).index_fill(0, torch.tensor(masked), -math.inf) if masked else None
    return Side(z, Head(torch.eye(z.size(1), dtype=z.dtype), bias), ids, span, temperature)


def heads(softcap=None, scale=1.0, bias=True, n=7, h=5, v=11, d=4, u=11):
    """Student and teacher sides with real heads; the student's tensors want gradients."""
    hidden, weight = logits(n, h, seed=1).requires_grad_(), logits(v, h, seed=2).requires_grad_()
    b = logits(v, seed=3).requires_grad_() if bias else None
    student = Side(hidden, Head(weight, b, scale, softcap), torch.arange(n) % v)
    teacher = Side(logits(n, d, seed=4), Head(logits(u, d, seed=5)), torch.arange(n) % u)
    return student, teacher


# ---------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("scale", ["kl", "raw"])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_the_reference(beta, scale):
    s, t = logits(6, 9), logits(6, 9, seed=1)
    expected = [reference.jsd(p, q, beta, scale) for p, q in zip(laws(t / 0.7), laws(s / 0.7))]
    assert torch.allclose(gold_loss.jsd(s, t, beta, 0.7, scale), torch.tensor(expected, dtype=s.dtype), rtol=1e-12)


def test_beta_zero_is_forward_kl_and_beta_one_is_reverse_kl():
    s, t = logits(5, 8).log_softmax(-1), logits(5, 8, seed=1).log_softmax(-1)
    assert torch.allclose(gold_loss.jsd(s, t, 0.0), (t.exp() * (t - s)).sum(-1), rtol=1e-12)
    assert torch.allclose(gold_loss.jsd(s, t, 1.0), (s.exp() * (s - t)).sum(-1), rtol=1e-12)


def test_the_scaled_divergence_is_continuous_at_both_ends_where_the_raw_one_jumps():
    s, t = logits(5, 8), logits(5, 8, seed=1)
    for end, near in ((0.0, 1e-8), (1.0, 1 - 1e-8)):
        assert torch.allclose(gold_loss.jsd(s, t, near), gold_loss.jsd(s, t, end), rtol=1e-4)
        raw = gold_loss.jsd(s, t, near, scale="raw") / gold_loss.jsd(s, t, end, scale="raw")
        assert raw.max() < 1e-6


def test_every_beta_has_the_same_curvature_near_the_teacher():
    t = logits(5, 8)
    s = t + 1e-3 * logits(5, 8, seed=1)
    values = torch.stack([gold_loss.jsd(s, t, b) for b in BETAS])
    assert torch.allclose(values, values[:1].expand_as(values), rtol=1e-2)


def test_swapping_the_models_swaps_beta():
    s, t = logits(5, 8), logits(5, 8, seed=1)
    for beta in BETAS:
        assert torch.allclose(gold_loss.jsd(s, t, beta), gold_loss.jsd(t, s, 1 - beta), rtol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_terms_are_never_negative_even_on_parts_of_laws(beta):
    p, q = logits(50, 6).log_softmax(-1)[:, :4], logits(50, 6, seed=1).log_softmax(-1)[:, :4]
    assert gold_loss.divergence(p, q, beta).min() >= 0


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_give_finite_values_and_gradients(beta):
    z = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, 0.0], [0.0, 80.0, 80.0]])
    for dtype in (torch.float32, torch.bfloat16):
        s = z.clone().to(dtype).requires_grad_()
        value = gold_loss.jsd(s, z[[1, 0, 2]].to(dtype), beta)
        value.sum().backward()
        assert value.isfinite().all() and s.grad.isfinite().all() and value.min() >= -1e-6


def test_log_zero_on_both_sides_is_no_outcome():
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    for beta in BETAS:
        assert gold_loss.divergence(p, p, beta).abs().max() == 0


def test_bad_beta_and_bad_scale_are_refused_with_what_they_mean():
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\] \(0 = KL\(teacher\|\|student\)"):
        gold_loss.jsd(logits(2, 3), logits(2, 3), 1.5)
    with pytest.raises(ValueError, match="scale"):
        gold_loss.jsd(logits(2, 3), logits(2, 3), 0.5, scale="nll")


def test_bf16_logits_are_widened_before_the_laws_are_made():
    s, t = logits(64, 500).float(), logits(64, 500, seed=1).float()
    exact = gold_loss.jsd(s.bfloat16().float(), t.bfloat16().float(), 0.5)
    assert torch.equal(gold_loss.jsd(s.bfloat16(), t.bfloat16(), 0.5), exact)


# ---------------------------------------------------------------------------------------------- the fused form


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("softcap,scale", [(None, 1.0), (3.0, 1.0), (None, 0.25), (3.0, 2.0)])
@pytest.mark.parametrize("beta", BETAS)
def test_fused_jsd_equals_jsd_in_value_and_gradient(beta, softcap, scale, chunk):
    student, teacher = heads(softcap, scale)
    student, teacher = (Side(s.hidden, s.head, s.ids, temperature=0.8) for s in (student, teacher))

    def dense(h, w, b):
        z = scale * (h @ w.T + b)
        return gold_loss.jsd(
            softcap * torch.tanh(z / softcap) if softcap else z, teacher.hidden @ teacher.head.weight.T, beta, 0.8
        )

    inputs = (student.hidden, student.head.weight, student.head.bias)
    values = dense(*inputs)
    expected = torch.autograd.grad(values.sum(), inputs)
    loss = gold_loss.fused_jsd(student, teacher, beta, chunk=chunk)
    got = torch.autograd.grad(loss.total, inputs)
    assert torch.allclose(loss.values, values, atol=1e-12) and torch.allclose(loss.total, values.sum())
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, atol=1e-12)


def test_fused_jsd_is_right_to_1e6_in_float32_at_a_large_vocabulary():
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(16, 32, generator=g), torch.randn(30_000, 32, generator=g) * 0.3
    th, tw = torch.randn(16, 24, generator=g), torch.randn(30_000, 24, generator=g) * 0.3
    for beta in (*BETAS, 1e-6, 1e-3, 0.999, 1 - 1e-6):  # near the ends nothing is divided that rounding has spoilt
        exact = gold_loss.jsd(h.double() @ w.double().T, th.double() @ tw.double().T, beta)
        h32 = h.clone().requires_grad_()
        loss = gold_loss.fused_jsd(Side(h32, Head(w), None), Side(th, Head(tw), None), beta)
        assert torch.allclose(loss.values.double(), exact, rtol=2e-6, atol=1e-6)
        h64 = h.double().requires_grad_()
        gold_loss.jsd(h64 @ w.double().T, th.double() @ tw.double().T, beta).sum().backward()
        (grad,) = torch.autograd.grad(loss.total, h32)
        assert (grad.double() - h64.grad).norm() < 2e-6 * h64.grad.norm()


@pytest.mark.parametrize("beta", BETAS)
def test_fused_jsd_passes_gradcheck(beta):
    student, teacher = heads(softcap=2.0, scale=0.5)

    def total(h, w, b):
        return gold_loss.fused_jsd(Side(h, Head(w, b, 0.5, 2.0), None), teacher, beta, chunk=3).total

    assert gradcheck(total, (student.hidden, student.head.weight, student.head.bias))


@triton
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", [5, 2048, 5001])  # less than one block of the kernel, exactly one, two and a bit
@pytest.mark.parametrize("beta", (*BETAS, 1e-6, 1e-3, 0.999, 1 - 1e-6))
def test_the_kernel_for_gpus_is_at_least_as_exact_as_the_plain_form(beta, size, temperature):
    """On a GPU, or in Triton's interpreter, against float64, with masked ids of either side and of both."""
    s, t = (logits(5, size, seed=i, spread=3.0).float() for i in (0, 1))
    s[0, 2] = t[1, 1] = s[2, 3] = t[2, 3] = gold_loss.MASKED
    ids, exact = torch.tensor([0, 1, 2, 4, 3]), s.double().requires_grad_()
    values = gold_loss.divergence(t.double().log_softmax(-1), (exact / temperature).log_softmax(-1), beta).sum(-1)
    (expected,) = torch.autograd.grad(values.sum(), exact)
    logp = s.double().log_softmax(-1)
    told = {"entropy": -(logp.exp() * logp).sum(-1), "logprob": logp.gather(1, ids[:, None])[:, 0]}
    student = Side(s.clone().requires_grad_(), Head(torch.eye(size)), ids, temperature=temperature)
    plain = gold_loss.fused_jsd(student, Side(t, Head(torch.eye(size))), beta)
    (plain_grad,) = torch.autograd.grad(plain.total, student.hidden)
    off = lambda got: ((got.cpu() - values).abs() / (1 + values)).max().item()
    off_grad = lambda got: ((got.cpu() - expected).norm() / expected.norm()).item()
    s, t, ids = (x.to("cuda" if torch.cuda.is_available() else "cpu") for x in (s, t, ids))
    got, dz, _, stats = gold_loss._jsd_rows(z := s.clone(), t.clone(), ids, beta, temperature, 1.0)
    assert dz is z and off(got) < max(2e-6, off(plain.values)) and off_grad(dz) < max(1e-6, 2 * off_grad(plain_grad))
    assert all(torch.allclose(stats[name].double().cpu(), x, rtol=2e-6, atol=2e-6) for name, x in told.items())
    half, dz, _, stats = gold_loss._jsd_rows(s.clone(), t.clone(), None, beta, temperature, 0.5)
    assert torch.equal(half, got * 0.5) and torch.allclose(dz, z * 0.5) and stats.keys() == {"entropy"}
    for bad in (math.nan, math.inf):  # of one row of one model: nothing hides it
        for which in (0, 1):
            pair = [s.clone(), t.clone()]
            pair[which][1, 0] = bad
            value, *_ = gold_loss._jsd_rows(*pair, ids, beta, temperature, 1.0)
            assert value.isfinite().tolist() == [True, False, True, True, True]


COMPILE = """
import gold_loss, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
names = ["z", "t", "ids", "out", "size", "beta", "heat", "gain", "KIND", "FLOOR", "BLOCK"]
for ids in ("*i64", "constexpr"):
    for kind in range(4):
        kinds = dict(zip(names, ["*fp32"] * 2 + [ids, "*fp32", "i32"] + ["fp32"] * 3 + ["constexpr"] * 3))
        given = {"KIND": kind, "FLOOR": gold_loss.FLOOR, "BLOCK": 2048} | ({"ids": None} if ids == "constexpr" else {})
        source = ASTSource(fn=gold_loss._jsd_kernel(), signature=kinds, constexprs=given)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]
"""


@triton
def test_the_kernel_for_gpus_compiles_for_one():
    """To machine code of sm_90: the interpreter accepts what the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # gold_loss is there, and triton
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tied_and_frozen_heads():
    student, teacher = heads(bias=False)
    w = student.head.weight
    embedded = lambda: w[torch.arange(7)] * 1.0  # the embedding is the head: both paths reach one parameter
    loss = gold_loss.fused_jsd(Side(embedded(), Head(w), None), teacher, 0.3)
    (both,) = torch.autograd.grad(loss.total, w)
    z = embedded() @ w.T
    (expected,) = torch.autograd.grad(gold_loss.jsd(z, teacher.hidden @ teacher.head.weight.T, 0.3).sum(), w)
    assert torch.allclose(both, expected, atol=1e-12)
    frozen = Side(student.hidden, Head(w.detach()), None)
    assert torch.autograd.grad(gold_loss.fused_jsd(frozen, teacher, 0.3).total, student.hidden)[0].isfinite().all()


def test_two_paddings_of_one_vocabulary_compare_on_their_common_rows():
    for v, u in ((11, 14), (14, 11)):
        student, teacher = heads(v=v, u=u)
        dense = gold_loss.jsd(
            student.hidden @ student.head.weight[:11].T + student.head.bias[:11],
            teacher.hidden @ teacher.head.weight[:11].T,
            0.5,
        )
        loss = gold_loss.fused_jsd(student, teacher, 0.5)
        assert torch.allclose(loss.values, dense, atol=1e-12)
        (grad,) = torch.autograd.grad(loss.total, student.head.weight)
        assert grad[11:].abs().sum() == 0 and grad[:11].abs().sum() > 0


def test_no_scored_rows_still_give_a_gradient_of_zero():
    """A rank whose window has nothing to score must still take part in the gradient all-reduce."""
    student, teacher = heads()
    empty = Side(student.hidden[:0], student.head, student.ids[:0])
    loss = gold_loss.fused_jsd(empty, Side(teacher.hidden[:0], teacher.head, None), 0.5)
    grads = torch.autograd.grad(loss.total, (student.hidden, student.head.weight))
    assert loss.total == 0 and all(g.abs().sum() == 0 for g in grads)


def test_the_largest_buffer_is_a_chunk_not_the_batch():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    sizes.append(x.numel())
            return out

    n, v, chunk = 64, 1000, 4
    h, w = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    with Watch():
        gold_loss.fused_jsd(Side(h, Head(w), None), Side(torch.randn(n, 8), Head(w.detach()), None), 0.5, chunk=chunk)
    assert max(sizes) == max(chunk * v, v * 8)


MASKS = [((2, 5), ()), ((), (2, 5)), ((2, 5), (2, 5)), ((2, 5), (5, 6))]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_ids_give_fused_jsd_the_values_and_gradients_of_the_definition(beta, masks, dtype, temperature):
    """A logit of -inf on either side."""
    student, teacher = heads(bias=False)
    h, w, th, tw = (
        x.detach().to(dtype) for x in (student.hidden, student.head.weight, teacher.hidden, teacher.head.weight)
    )
    inputs = [h.requires_grad_(), w.requires_grad_(), torch.zeros(11, dtype=dtype, requires_grad=True)]
    ours, theirs = (
        torch.zeros(11, dtype=dtype).index_fill(0, torch.tensor(m, dtype=torch.long), -math.inf) for m in masks
    )
    inputs[2].data += ours
    values = gold_loss.jsd(h @ w.T + inputs[2], th @ tw.T + theirs, beta, temperature)
    expected = torch.autograd.grad(values.sum(), inputs)
    sides = (
        Side(h, Head(w, inputs[2]), student.ids, None, temperature),
        Side(th, Head(tw, theirs), None, None, temperature),
    )
    loss = gold_loss.fused_jsd(*sides, beta, chunk=3)
    got = torch.autograd.grad(loss.total, inputs)
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    assert loss.values.isfinite().all() and all(
        stat.isfinite().all() for stat in loss.stats.values() if stat is not loss.stats["logprob"]
    )
    assert torch.allclose(loss.values, values, **close)
    for a, b in zip(got, expected):
        assert a.isfinite().all() and torch.allclose(a, b, **close)


def test_one_pass_backward_hands_its_gradient_over_and_a_second_one_is_refused():
    student, teacher = heads(bias=False)
    w = student.head.weight
    loss = gold_loss.fused_jsd(student, teacher, 0.5).total
    twice = [torch.autograd.grad(3 * loss, w, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)
    (last,) = torch.autograd.grad(3 * loss, w)
    assert torch.equal(last, twice[0])
    with pytest.raises(RuntimeError, match="a second backward pass through one loss"):
        loss.backward()


def test_in_bf16_the_gradient_of_fp32_weights_is_not_rounded_to_bf16():
    student, teacher = heads(bias=False, n=64)
    low = lambda x: x.detach().bfloat16()
    w = student.head.weight.detach().float().requires_grad_()
    sides = Side(low(student.hidden), Head(w), None), Side(low(teacher.hidden), Head(low(teacher.head.weight)), None)
    (grad,) = torch.autograd.grad(gold_loss.fused_jsd(*sides, 0.5).total, w)
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


def test_entropy_is_reported():
    student, teacher = heads(bias=False)
    law = torch.softmax(student.hidden @ student.head.weight.T, -1)
    loss = gold_loss.fused_jsd(student, teacher, 0.5)
    assert torch.allclose(loss.stats["entropy"], -(law * law.log()).sum(-1))


def test_cross_entropy_and_token_logprobs():
    student, _ = heads()
    inputs = (student.hidden, student.head.weight, student.head.bias)
    z = student.hidden @ student.head.weight.T + student.head.bias
    ce = torch.nn.functional.cross_entropy(z, student.ids, reduction="none")
    for chunk in (2, None):
        loss = gold_loss.fused_cross_entropy(student, chunk)
        logp, entropy = gold_loss.token_logprobs(student, chunk)
        assert torch.allclose(loss.values, ce) and torch.allclose(-logp, ce)
        assert torch.allclose(entropy, loss.stats["entropy"])
        expected = torch.autograd.grad(ce.sum(), inputs, retain_graph=True)
        for total in (loss.total, -logp.sum()):
            for a, b in zip(torch.autograd.grad(total, inputs), expected):
                assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 40, 10**6])  # entries of laws that wait for the backward pass: 40 are two chunks
@pytest.mark.parametrize("softcap,masked", [(None, ()), (3.0, (2, 5))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_read_of_laws_has_the_values_and_gradients_of_autograd(dtype, softcap, masked, kept, monkeypatch):
    """Single tokens, also twice; ranges, also nested, empty and of everything; at a temperature."""
    monkeypatch.setitem(gold_loss.KEPT, "cpu", kept)
    student, _ = heads()
    inputs = [x.detach().to(dtype) for x in (student.hidden, student.head.weight, student.head.bias)]
    inputs[2][list(masked)] = -math.inf
    for x in inputs:
        x.requires_grad_()
    side = Side(inputs[0], Head(*inputs[1:], 0.5, softcap), temperature=0.7)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    rows, ids = torch.tensor([0, 0, 1, 3, 3, 6]), torch.tensor([4, 4, 7, 0, 10, 1])
    lo, hi = torch.tensor([0, 2, 3, 5, 5, 10]), torch.tensor([11, 9, 5, 5, 11, 11])
    bound = [int((rows < i).sum()) for i in range(8)]
    square = rows[:2, None].expand(2, 3), torch.tensor([0, 3, 3]).expand(2, 3), torch.tensor([3, 3, 8]).expand(2, 3)
    ranges = (rows, lo, hi, bound), (*square, [min(b, 2) for b in bound])
    entropy, *got = gold_loss._law_reads(side, 2, (rows, ids, bound), order, ranges)

    x, w, b = (x.detach().double().requires_grad_() for x in inputs)
    z = 0.5 * (x @ w.T + b)
    logp = ((softcap * (z / softcap).tanh() if softcap else z).clamp_min(-1e6) / 0.7).log_softmax(-1)
    mass = lambda r, a, b: logp[r, order[a:b]].exp().sum()
    expected = [logp[rows, ids], torch.stack(list(map(mass, rows, lo, hi)))]
    expected.append(torch.stack(list(map(mass, *(c.flatten() for c in square)))).view(2, 3))
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    weights = [logits(*e.shape, seed=i) for i, e in enumerate(expected)]
    total = lambda reads: sum((w * r).sum() for w, r in zip(weights, reads))
    assert torch.allclose(entropy.double(), -(logp.exp() * logp).sum(-1), **close)
    assert all(torch.allclose(a, e, **close) for a, e in zip(got, expected))
    wanted = torch.autograd.grad(total(expected), (x, w, b))
    for again in (True, False):  # the second pass has nothing that was kept
        found = torch.autograd.grad(total(got), inputs, retain_graph=again)
        for a, e in zip(found, wanted):
            assert torch.allclose(a.double(), e.nan_to_num(0.0), **close)


def test_no_loss_but_alm_waits_for_the_device_and_alm_once(monkeypatch):
    """On `meta` tensors, which have no values, every look at one fails."""
    for table in (gold_loss.CHUNK, gold_loss.KEPT):
        monkeypatch.setitem(table, "meta", table["cpu"])
    batch, _, s, t = problem()
    m, batch, away = len(batch.offset_sample), batch.to("meta"), lambda x: x.to("meta")
    tables = [(LongestMatch(v), q) for v, q in ((STUDENT, batch.student_queries), (TEACHER, batch.teacher_queries))]
    q = [gold_loss.Queries(order=away(torch.tensor(v.order)), edge=away(torch.tensor(v.edge)), **q) for v, q in tables]
    head = lambda z: Head(away(torch.eye(z.size(1), dtype=z.dtype)))
    ours = Side(away(s).requires_grad_(), head(s), batch.student_targets, batch.student_span)
    theirs = Side(away(t), head(t), batch.teacher_targets, batch.teacher_span)
    same = Side(away(s), head(s), batch.student_targets)
    for loss in (
        gold_loss.prefix_loss(ours, theirs, *q, batch.offset, m, 0.5),
        gold_loss.fused_jsd(ours, same, 0.5),
        gold_loss.fused_cross_entropy(ours),
    ):
        loss.total.backward()
    with pytest.raises(RuntimeError, match="item"):
        gold_loss.alm_loss(ours, away(torch.zeros(len(t))), theirs.span)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: 12)  # the one look, at the number of spans
    gold_loss.alm_loss(ours, away(torch.zeros(len(t))), theirs.span).total.backward()


# ---------------------------------------------------------------------------------------------- sparse and sharded


@pytest.mark.parametrize("beta", BETAS)
def test_topk_jsd_is_the_reference_and_passes_gradcheck(beta):
    s, t = logits(5, 12).requires_grad_(), logits(5, 12, seed=1).log_softmax(-1)
    top = t.topk(4)
    values, stats = gold_loss.topk_jsd(s, top.indices, top.values, beta)
    expected = [
        reference.topk_jsd(z, i, p, beta) for z, i, p in zip(s.tolist(), top.indices.tolist(), top.values.tolist())
    ]
    assert torch.allclose(values, torch.tensor(expected, dtype=s.dtype), rtol=1e-9)
    assert torch.allclose(stats["teacher_mass"], top.values.exp().sum(-1))
    assert (values <= gold_loss.jsd(s, t, beta) + 1e-9).all(), "a coarsening cannot tell more"
    assert gradcheck(lambda z: gold_loss.topk_jsd(z, top.indices, top.values, beta)[0], (s,))


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda i, p: (i, p * math.nan), "NaN"),
        (lambda i, p: (i, p + 9), "above 0"),
        (lambda i, p: (i, p * 0 - 0.1), "total mass above 1"),
        (lambda i, p: (i[:, :1].expand(5, 4), p - 2), "one token twice"),
        (lambda i, p: (i[:, :0], p[:, :0]), "top 0"),
    ],
)
def test_what_no_server_should_answer_is_refused(change, match):
    s, top = logits(5, 12), logits(5, 12, seed=1).log_softmax(-1).topk(4)
    ids, logprobs = change(top.indices, top.values)
    with pytest.raises(ValueError, match=f"the teacher's server.*{match}"):
        gold_loss.topk_jsd(s, ids, logprobs, 0.5)
    with pytest.raises(ValueError, match=f"the teacher's server.*{match}"):
        gold_loss.fused_topk_jsd(as_side(s), ids, logprobs, 0.5)


@pytest.mark.parametrize("beta", BETAS)
def test_topk_jsd_with_masked_ids_is_finite_and_the_fused_form_is_the_same(beta):
    """The student cannot say what the server names, and the server gives one of its names no probability."""
    s, top = logits(5, 12), logits(5, 12, seed=1).log_softmax(-1).topk(4)
    ids, logprobs = top.indices, top.values.clone()
    logprobs[:, 3] = -math.inf
    for masked in ((0, 3), tuple(ids[0].tolist())):
        side = as_side(s.clone().requires_grad_(), masked=masked)
        dense = side.hidden + side.head.bias
        values, _ = gold_loss.topk_jsd(dense, ids, logprobs, beta)
        loss = gold_loss.fused_topk_jsd(side, ids, logprobs, beta, chunk=2)
        grads = [torch.autograd.grad(x, side.hidden)[0] for x in (values.sum(), loss.total)]
        assert values.isfinite().all() and torch.allclose(loss.values, values)
        assert grads[0].isfinite().all() and torch.allclose(*grads, atol=1e-9)


def test_topk_of_the_whole_vocabulary_is_jsd():
    s, t = logits(5, 12), logits(5, 12, seed=1).log_softmax(-1)
    ids = torch.arange(12).expand(5, 12)
    for beta in BETAS:
        assert torch.allclose(gold_loss.topk_jsd(s, ids, t, beta)[0], gold_loss.jsd(s, t, beta), atol=1e-5)


def test_fused_topk_equals_topk():
    student, teacher = heads(bias=False)
    top = (teacher.hidden @ teacher.head.weight.T).log_softmax(-1).topk(3)
    inputs = (student.hidden, student.head.weight)
    values, _ = gold_loss.topk_jsd(inputs[0] @ inputs[1].T, top.indices, top.values, 0.4)
    loss = gold_loss.fused_topk_jsd(student, top.indices, top.values, 0.4, chunk=2)
    assert torch.allclose(loss.values, values)
    for a, b in zip(torch.autograd.grad(loss.total, inputs), torch.autograd.grad(values.sum(), inputs)):
        assert torch.allclose(a, b, atol=1e-12)


def test_reverse_kl_wants_the_students_top_k():
    """At k = 8 of 500, far from the teacher, the student's support gives the true direction, the teacher's less so."""
    z = torch.randn(200, 500, generator=torch.Generator().manual_seed(0)) * 4
    t = z + 2.5 * torch.randn(200, 500, generator=torch.Generator().manual_seed(1))

    def direction(fn):
        s = z.clone().requires_grad_()
        fn(s).sum().backward()
        return s.grad

    exact = direction(lambda s: gold_loss.jsd(s, t, 1.0))
    top = t.log_softmax(-1).topk(8)
    teachers = direction(lambda s: gold_loss.topk_jsd(s, top.indices, top.values, 1.0)[0])
    ids = z.topk(8).indices
    students = direction(lambda s: gold_loss.topk_jsd(s, ids, t.log_softmax(-1).gather(1, ids), 1.0)[0])
    cosine = [torch.cosine_similarity(g, exact, dim=-1).mean().item() for g in (students, teachers)]
    assert cosine[0] > 0.9 > cosine[1]


@pytest.mark.parametrize("world", [2, 4])
def test_vocab_parallel_jsd_equals_dense_on_gloo_ranks(world, tmp_path):
    torch.multiprocessing.spawn(vocab_parallel.check, (world, str(tmp_path / "store")), nprocs=world)


# ---------------------------------------------------------------------------------------------- across tokenizers

# two texts; student and teacher tokens as (bytes, id); None ends the text
STUDENT = [b"a", b"b", b"c", b"ab", b"bc", b"ca", b"x", b"abca", None]
TEACHER = [b"c", b"abc", b"ab", b"a", b"b", b"abd", b"x", b"abcab", b"ca", b"cax", None]


def completion(student_text, teacher_text, ended, student=STUDENT, teacher=TEACHER):
    import numpy as np

    s, t = [student.index(b) for b in student_text], [teacher.index(b) for b in teacher_text]
    text = b"".join(student_text)
    assert text == b"".join(teacher_text)
    ends = [np.cumsum([len(b) for b in x]) for x in (student_text, teacher_text)]
    if ended:
        s, t = s + [len(student) - 1], t + [len(teacher) - 1]
        ends = [np.append(e, len(text) + 1) for e in ends]
    span_s, span_t, n = gold_data.spans(*ends)
    prefix = gold_data.prefix_queries(LongestMatch(student), LongestMatch(teacher), s, t, text, ended)
    alignment = gold_data.Alignment(t, len(s), len(t), span_s, span_t, n, len(text), len(text), prefix)
    return gold_data.Sample([0], s, ended, True, [0], alignment=alignment), (s, t, text, ended)


TEXTS = [
    ([b"ab", b"c", b"a", b"b", b"x"], [b"abc", b"ab", b"x"], True),
    ([b"abca", b"bc"], [b"abcab", b"c"], False),
    ([b"a", b"bc", b"ab"], [b"ab", b"cax"[:1], b"ab"], True),
    ([b"ca", b"x", b"c"], [b"cax", b"c"], False),
    ([], [], True),
]


def problem(texts=TEXTS, student=STUDENT, teacher=TEACHER, seed=0):
    samples, parts = zip(*(completion(*t, student=student, teacher=teacher) for t in texts))
    batch = gold_data.collate(list(samples))
    n_s, n_t = len(batch.student_targets), len(batch.teacher_targets)
    return batch, parts, logits(n_s, len(student), seed=seed), logits(n_t, len(teacher), seed=seed + 1)


def queries_of(batch, student=STUDENT, teacher=TEACHER):
    return [
        gold_loss.Queries(order=torch.tensor(LongestMatch(v).order), edge=torch.tensor(LongestMatch(v).edge), **q)
        for v, q in ((student, batch.student_queries), (teacher, batch.teacher_queries))
    ]


def bins_of(student=STUDENT, teacher=TEACHER):
    s, t, n = bins_loss.shared_bins(LongestMatch(student), LongestMatch(teacher))
    return torch.tensor(s), torch.tensor(t), n


def run(name, batch, s, t, beta=0.5, chunk=None, student=STUDENT, teacher=TEACHER, masked=((), ())):
    """The loss called `name` on logits s (N, V) and t (N', U)."""
    a = as_side(s, batch.student_targets, batch.student_span, masked=masked[0])
    b = as_side(t, batch.teacher_targets, batch.teacher_span, masked=masked[1])
    if name == "prefix":
        q = queries_of(batch, student, teacher)
        return gold_loss.prefix_loss(a, b, *q, batch.offset, len(batch.offset_sample), beta, chunk=chunk)
    if name == "bins":
        return bins_loss.bins_loss(a, b, *bins_of(student, teacher), beta, chunk=chunk)
    if name == "alm":
        return gold_loss.alm_loss(a, gold_loss.token_logprobs(b)[0].detach(), b.span, chunk)
    match = tuple(map(torch.tensor, gold_data.shared_ids(LongestMatch(student), LongestMatch(teacher))))
    return gold_loss.uld_loss(a, b, match if name == "hybrid" else None, beta=beta, chunk=chunk)


CROSS = ["prefix", "bins", "alm", "uld", "hybrid"]


def expected_values(name, batch, parts, s, t, beta):
    if name == "prefix":
        out, row_s, row_t = [], 0, 0
        for ids_s, ids_t, text, ended in parts:
            rows_s, rows_t = s[row_s : row_s + len(ids_s)], t[row_t : row_t + len(ids_t)]
            out += reference.prefix(
                (STUDENT, [len(STUDENT) - 1], ids_s, laws(rows_s), LongestMatch(STUDENT).closed(text, ids_s)),
                (TEACHER, [len(TEACHER) - 1], ids_t, laws(rows_t), LongestMatch(TEACHER).closed(text, ids_t)),
                text,
                ended,
                beta,
            )
            row_s, row_t = row_s + len(ids_s), row_t + len(ids_t)
        return out
    args = (
        laws(s), batch.student_targets.tolist(), batch.student_span.tolist(),
        laws(t), batch.teacher_targets.tolist(), batch.teacher_span.tolist(),
    )  # fmt: skip
    if name == "bins":
        sbin, tbin, n = bins_of()
        return reference.bins(*args, sbin.tolist(), tbin.tolist(), n, beta)
    if name == "alm":
        return reference.alm(*args)
    match = (
        [x.tolist() for x in gold_data.shared_ids(LongestMatch(STUDENT), LongestMatch(TEACHER))]
        if name == "hybrid"
        else None
    )
    return reference.uld(*args, match, None, beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", CROSS)
def test_cross_tokenizer_losses_are_their_references(name, beta):
    batch, parts, s, t = problem()
    loss = run(name, batch, s, t, beta)
    expected = torch.tensor(expected_values(name, batch, parts, s, t, beta), dtype=torch.float64)
    assert torch.allclose(loss.values.double(), expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(loss.total.double(), expected.sum())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CROSS)
def test_cross_tokenizer_losses_pass_gradcheck(name, beta):
    batch, _, s, t = problem(TEXTS[:3])
    assert gradcheck(lambda z: run(name, batch, z, t, beta, chunk=4).total, (s.requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("masked", [((), (9,)), ((7,), ()), ((7,), (9,))], ids=str)
@pytest.mark.parametrize("name", CROSS)
def test_ids_masked_with_minus_infinity_outside_the_text_are_ids_of_no_probability(name, masked):
    batch, _, s, t = problem([TEXTS[2], TEXTS[4]])  # where neither abca (student's 7) nor cax (teacher's 9) is written
    low_s, low_t = (z.index_fill(1, torch.tensor(m, dtype=torch.long), -690.0) for z, m in zip((s, t), masked))
    for beta in BETAS:
        loss = run(name, batch, s.requires_grad_(), t, beta, masked=masked)
        (grad,) = torch.autograd.grad(loss.total, s)
        assert loss.values.isfinite().all() and grad.isfinite().all() and loss.stats["entropy"].isfinite().all()
        assert grad[:, list(masked[0])].abs().sum() == 0
        if 0 < beta < 1:  # at the ends a probability of 0 costs what log 0 is taken to be
            low = run(name, batch, low_s.detach().requires_grad_(), low_t, beta)
            assert torch.allclose(loss.values, low.values, rtol=1e-9, atol=1e-12)


def not_finite(loss):
    return not (loss.total.isfinite() and loss.values.isfinite().all())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_hidden_states_that_are_not_finite_never_give_a_finite_loss(wrong):
    """Of student or teacher, in one row; NaN is in no comparison, so a filter like `law > 0` would lose it."""
    batch, _, s, t = problem()
    student, teacher = heads(bias=False)
    bad_s, bad_t = (x.clone().index_fill(0, torch.tensor([1]), wrong) for x in (s, t))
    for name in CROSS:
        for beta in BETAS:
            assert not_finite(run(name, batch, s, bad_t, beta)) and not_finite(run(name, batch, bad_s, t, beta)), name
    top = (teacher.hidden @ teacher.head.weight.T).log_softmax(-1).topk(3)
    bad_s, bad_t = (
        replace(x, hidden=x.hidden.detach() * torch.tensor([1, wrong, 1, 1, 1, 1, 1.0])[:, None])
        for x in (student, teacher)
    )
    for beta in BETAS:
        assert not_finite(gold_loss.fused_jsd(bad_s, teacher, beta)) and not_finite(
            gold_loss.fused_jsd(student, bad_t, beta)
        )
        assert not_finite(gold_loss.fused_topk_jsd(bad_s, top.indices, top.values, beta))
    assert not_finite(gold_loss.fused_cross_entropy(bad_s))


@pytest.mark.parametrize("name", CROSS)
def test_they_are_never_negative_and_chunks_do_not_matter(name):
    batch, _, s, t = problem(seed=5)
    for beta in BETAS:
        whole = run(name, batch, s.requires_grad_(), t, beta)
        assert whole.values.min() >= 0
        grad = torch.autograd.grad(whole.total, s)[0]
        for chunk in (1, 4):
            part = run(name, batch, s, t, beta, chunk)
            assert torch.allclose(part.values, whole.values, rtol=1e-9, atol=1e-12)
            assert torch.allclose(torch.autograd.grad(part.total, s)[0], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CROSS)
def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient(name):
    texts = [(t[0], t[0], t[2]) for t in TEXTS]
    batch, _, s, _ = problem(texts, STUDENT, STUDENT)
    for beta in BETAS:
        loss = run(name, batch, s.requires_grad_(), s.detach().clone(), beta, student=STUDENT, teacher=STUDENT)
        (grad,) = torch.autograd.grad(loss.total, s)
        assert loss.values.abs().max() < 1e-12 and grad.abs().max() < 1e-9


def test_identical_tokenizers_make_bins_plain_jsd():
    texts = [(t[0], t[0], t[2]) for t in TEXTS]
    batch, _, s, t = problem(texts, STUDENT, STUDENT)
    t = t[:, : len(STUDENT)]
    for beta in BETAS:
        loss = run("bins", batch, s, t, beta, student=STUDENT, teacher=STUDENT)
        assert torch.allclose(loss.values, gold_loss.jsd(s, t, beta), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["prefix", "bins", "alm"])
def test_renumbering_a_vocabulary_changes_nothing(name):
    perm = torch.randperm(len(TEACHER) - 1, generator=torch.Generator().manual_seed(0)).tolist()
    renumbered = [TEACHER[i] for i in perm] + [None]
    batch, _, s, t = problem()
    again, *_ = problem(teacher=renumbered)
    moved = torch.cat([t[:, perm], t[:, -1:]], 1)
    for beta in BETAS:
        a, b = run(name, batch, s, t, beta), run(name, again, s, moved, beta, teacher=renumbered)
        assert torch.allclose(a.values, b.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CROSS)
def test_certain_models_that_agree_have_no_loss(name):
    """Student a, b, end; teacher ab, end: both certain. (TRL's default merge says 0.50 here.)"""
    batch, *_ = problem([([b"a", b"b"], [b"ab"], True)])
    s = torch.full((3, len(STUDENT)), -60.0, dtype=torch.float64)
    t = torch.full((2, len(TEACHER)), -60.0, dtype=torch.float64)
    s[torch.arange(3), batch.student_targets] = t[torch.arange(2), batch.teacher_targets] = 0.0
    if name in ("uld", "hybrid"):
        # at the predicting positions the scaled laws of "b" and "ab" both hold one certain entry
        assert run("uld", batch, s, t).values.max() < 1e-9
    else:
        for beta in BETAS:
            assert run(name, batch, s, t, beta).values.max() < 1e-9


@pytest.mark.parametrize("name", CROSS)
def test_order_and_company_of_samples_do_not_matter(name):
    batch, _, s, t = problem()
    whole = run(name, batch, s, t).total
    total, row_s, row_t = 0.0, 0, 0
    for text in TEXTS:
        one, parts, *_ = problem([text])
        n_s, n_t = len(parts[0][0]), len(parts[0][1])
        total += run(name, one, s[row_s : row_s + n_s], t[row_t : row_t + n_t]).total
        row_s, row_t = row_s + n_s, row_t + n_t
    assert torch.allclose(whole, total, rtol=1e-9)


@pytest.mark.parametrize("name", CROSS)
def test_the_end_of_the_text_has_a_gradient_only_where_the_student_stopped(name):
    for ended in (True, False):
        batch, _, s, t = problem([([b"ab", b"c"], [b"abc"], ended)])
        (grad,) = torch.autograd.grad(run(name, batch, s.requires_grad_(), t).total, s)
        assert len(s) == (3 if ended else 2), "no row predicts an end that was not sampled"
        if ended:
            assert grad[-1].abs().max() > 1e-4


@pytest.mark.parametrize("name", ["prefix", "bins", "alm", "uld", "hybrid"])
def test_tokens_outside_every_span_have_no_gradient(name):
    """A student token that the teacher could not be aligned with is not trained."""
    batch, _, s, t = problem([([b"ab", b"c"], [b"abc"], False)])
    if name == "prefix":
        return  # prefix scores exactly the rows it is given; gold_data.align leaves the others out
    extra = as_side(
        torch.cat([s, logits(1, len(STUDENT), seed=9)]).requires_grad_(),
        torch.cat([batch.student_targets, torch.tensor([0])]),
        torch.cat([batch.student_span, torch.tensor([-1])]),
    )
    teacher = as_side(t, batch.teacher_targets, batch.teacher_span)
    match = tuple(map(torch.tensor, gold_data.shared_ids(LongestMatch(STUDENT), LongestMatch(TEACHER))))
    loss = {
        "bins": lambda: bins_loss.bins_loss(extra, teacher, *bins_of(), 0.5),
        "alm": lambda: gold_loss.alm_loss(extra, gold_loss.token_logprobs(teacher)[0], teacher.span),
        "uld": lambda: gold_loss.uld_loss(extra, teacher),
        "hybrid": lambda: gold_loss.uld_loss(extra, teacher, match),
    }[name]()
    (grad,) = torch.autograd.grad(loss.total, extra.hidden)
    assert grad[-1].abs().max() == 0 and grad[0].abs().max() > 0


def test_prefix_refuses_a_temperature():
    batch, _, s, t = problem()
    hot = as_side(s, batch.student_targets, temperature=2.0)
    with pytest.raises(ValueError, match="temperature 1"):
        gold_loss.prefix_loss(
            hot, as_side(t, batch.teacher_targets), *queries_of(batch), batch.offset, len(batch.offset_sample), 0.5
        )


def test_prefix_reads_real_tokenizers_like_its_reference():
    """Byte-level against SentencePiece, random laws, text in several scripts with an invalid byte."""
    student, teacher = (gold_data.Vocabulary(t, gold_data.end_ids(t), len(t)) for t in (byte_level(), metaspace()))
    text = "Ça 12 + 3\n明 ok".encode() + b"\xe2 x"
    ids, _ = student.encode(text)
    a = gold_data.align(student, teacher, ids + [student.ends[0]], finished=True, prefix=True)
    assert a.scored_bytes == len(text)
    batch = gold_data.collate([gold_data.Sample([0], ids + [student.ends[0]], True, True, [0], alignment=a)])
    s = logits(a.student_scored, student.size, spread=1.0)
    t = logits(a.teacher_scored, teacher.size, seed=1, spread=1.0)
    q = [
        gold_loss.Queries(order=torch.tensor(v.order), edge=torch.tensor(v.edge), **part)
        for v, part in ((student, batch.student_queries), (teacher, batch.teacher_queries))
    ]
    loss = gold_loss.prefix_loss(
        as_side(s, batch.student_targets),
        as_side(t, batch.teacher_targets),
        *q,
        batch.offset,
        len(batch.offset_sample),
        0.5,
    )
    completion = ids + [student.ends[0]]
    expected = reference.prefix(
        (student.bytes, student.ends, completion, laws(s), student.closed(text, completion)),
        (teacher.bytes, teacher.ends, a.teacher_ids, laws(t), teacher.closed(text, a.teacher_ids)),
        text,
        True,
        0.5,
    )
    assert torch.allclose(loss.values, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------- TRL 1.16's numbers

# (merge strategy, hybrid, weights, beta): loss, sum |gradient|, <gradient, logits>; computed once with trl 1.16.0's
# ULDLoss on the inputs below
TRL = {
    ("observed", False, None, 0.5): (0.693158561230931, 0.4286792052533943, -0.09344897942877432),
    ("observed", True, None, 0.0): (1.6530460808994158, 1.087708301000256, 0.9160112880759719),
    ("observed", True, None, 0.5): (0.24945149409953116, 0.10861123261607876, 0.019435855459805737),
    ("observed", True, None, 1.0): (0.2497359993674768, 0.35963780867253364, 0.14783152236960312),
    ("observed", True, (1.0, 0.5), 0.0): (2.8837621472446067, 1.9418446520437427, 1.6538375169820467),
    ("observed", True, (1.0, 0.5), 0.5): (0.3572918910048144, 0.13126550393450329, 0.04000173827294788),
    ("observed", True, (1.0, 0.5), 1.0): (0.3578040004871166, 0.6745719710158957, 0.2711139387105831),
    ("bayesian", False, None, 0.5): (0.7617705808277759, 0.34170095655127036, -0.04424673469761428),
    ("bayesian", True, None, 0.0): (1.7056333701974333, 0.8581330889313732, 1.1688759989648327),
    ("bayesian", True, None, 0.5): (0.292874562588308, 0.07981018880618794, 0.02135773379230814),
    ("bayesian", True, None, 1.0): (0.3619509058509779, 0.2786975619528499, 0.05288131313592974),
    ("bayesian", True, (1.0, 0.5), 0.0): (2.939931131539625, 1.5215551716748608, 2.1003850526030057),
    ("bayesian", True, (1.0, 0.5), 0.5): (0.3969652778432, 0.08331288954843545, 0.03485217529246136),
    ("bayesian", True, (1.0, 0.5), 1.0): (0.5213026957160057, 0.5096325334060652, 0.09159461811098046),
}
TRL_JSD = {0.0: 6.055249586551386, 0.1: 0.40756665690719657, 0.5: 0.9038646897961308, 0.9: 0.35176904983755786}
TRL_STUDENT = ["a", "b", "c", "ab", "bc", "ca", "x", "y", "z", "</s>", "abc"]
TRL_TEACHER = ["c", "abc", "ab", "q", "a", "r", "z", "cab", "<eos>"]


def wave(n, v, a, b):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(v, dtype=torch.float64)[None]
    return 2.5 * torch.sin(a * i * (j + 1) + b * j + 0.3 * i)


@pytest.mark.parametrize("case", TRL, ids=str)
def test_the_dense_form_of_trls_loss_has_trls_numbers_and_the_sorted_part_is_ours(case):
    merge, hybrid, weights, beta = case

    def side(length, a, b, vocabulary, texts):
        """TRL's inputs: row p holds the logits after token p; ours keep the rows that predict a completion token."""
        rows, ids, span, first = [], [], [], 0
        for k, (prompt, tokens, spans) in enumerate(texts):
            z = wave(length, len(vocabulary), a + 0.1 * k, b)
            rows.append(z[prompt - 1 : prompt - 1 + len(tokens)])
            ids += [vocabulary.index(t) for t in tokens]
            span += [s + first if s >= 0 else -1 for s in spans]
            first += max(spans) + 1
        return torch.cat(rows), torch.tensor(ids), torch.tensor(span)

    s = side(8, 0.7, 0.4, TRL_STUDENT, [(2, ["ab", "c", "a", "b", "</s>"], [0, 0, 1, 1, -1]), (3, ["a", "bc", "z", "</s>"], [0, 0, 1, -1])])  # fmt: skip # noqa: E501
    t = side(
        7, 1.1, 0.2, TRL_TEACHER, [(3, ["abc", "ab", "<eos>"], [0, 1, -1]), (1, ["abc", "z", "<eos>"], [0, 1, -1])]
    )
    both = sorted(set(TRL_STUDENT) & set(TRL_TEACHER), key=TRL_TEACHER.index)
    match = tuple(torch.tensor([v.index(x) for x in both]) for v in (TRL_STUDENT, TRL_TEACHER)) if hybrid else None
    z = s[0].requires_grad_()
    values = trl_uld((z, *s[1:]), t, match, weights, beta, merge)
    (grad,) = torch.autograd.grad(values.sum() / 4, z)
    per_sample = values.view(2, 2).mean(1).mean()  # two spans in each of two rows
    expected = TRL[case]
    assert math.isclose(per_sample.item(), expected[0], rel_tol=1e-9)
    assert math.isclose(grad.abs().sum().item(), expected[1], rel_tol=1e-9)
    assert math.isclose((grad * z).sum().item(), expected[2], rel_tol=1e-9, abs_tol=1e-12)
    if merge == "bayesian" and not hybrid:
        assert torch.allclose(gold_loss.uld_loss(as_side(z, *s[1:]), as_side(*t)).values, values, rtol=1e-9)


def test_raw_jsd_reproduces_trl():
    for beta, expected in TRL_JSD.items():
        ours = gold_loss.jsd(wave(4, 11, 0.7, 0.4), wave(4, 11, 0.9, 0.1), beta, 0.9, scale="raw").sum()
        assert math.isclose(ours.item(), expected, rel_tol=1e-9)


def test_sorted_l1_is_blind_to_which_token_is_likely():
    """Why uld is no loss to train with: certain of the wrong token, and no complaint. bins and prefix complain."""
    texts = [([b"a"], [b"a"], False)]
    batch, *_ = problem(texts, STUDENT, STUDENT)
    s = torch.full((1, len(STUDENT)), -40.0, dtype=torch.float64)
    t = s.clone()
    s[0, 1], t[0, 0] = 0.0, 0.0
    value = {n: run(n, batch, s, t, student=STUDENT, teacher=STUDENT).total.item() for n in ("uld", "bins", "prefix")}
    assert value["uld"] < 1e-9 and value["bins"] > 1 and value["prefix"] > 1
