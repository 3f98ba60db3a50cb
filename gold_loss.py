"""Every divergence GOLD trains with: dense, fused, sparse and across tokenizers. Needs torch and nothing else.

Letters    N scored rows    V, U student and teacher vocabulary    H, D student and teacher hidden size    G spans
           E queries    M text offsets    O outcomes    P teacher law    Q student law    z logits

1. Generalized JSD (Agarwal et al. 2024, arXiv 2306.13649, eq. 1). With M = beta P + (1 - beta) Q,

       JSD = beta KL(P||M) + (1 - beta) KL(Q||M).

   It vanishes at both ends of beta: no learning rate fits all. We divide by beta (1 - beta). With d = log P - log Q and
   g_a(x) = log(1 + a (e^x - 1)) / a, g_0(x) = e^x - 1, the sum then reads, entry by entry,

       JSD / (beta (1 - beta)) = - sum_v [ P g_{1-beta}(-d) + Q g_beta(d) ],

   in which every term is >= 0, beta = 0 is KL(P||Q) (forward, mean seeking), beta = 1 is KL(Q||P) (reverse, mode
   seeking), and nothing jumps in between. scale="raw" multiplies beta (1 - beta) back in for 0 < beta < 1 (TRL's
   values). The gradient is short because the two dM terms cancel: with h = -g_beta(d),

       d/dz = Q (h - sum_v Q h) / temperature,        which is Q - P at beta = 0.

2. The fused form never sees a vocabulary-sized tensor for more than one chunk of rows: project a chunk of hidden
   states, take value and d/dz of each row, push d/dz back through the head at once, drop the chunk. The loss is a sum,
   so nothing has to be kept for the backward pass except the gradients themselves.

3. Two tokenizers. Let o_0 < o_1 < .. be the byte offsets of a model's own token ends (its boundaries), L_j its log
   probability of the first j tokens and p_j its next-token law there. Then

       F(k) = P(text starts with x_1..x_k) = sum over o_j < k of exp(L_j) p_j(tokens that start with x_{o_j+1}..x_k)

   is a probability of *text*: it means the same for every tokenizer. `prefix_loss` compares both models' laws of the
   next byte (and of the end of the text) given the text so far, which are ratios of such sums. The other losses compare
   probabilities of whole spans (`alm_loss`) or sorted probabilities (`uld_loss`); both are biased (RESULTS, The known
   optimum).

Every loss returns a `Loss`: a *sum* with a gradient and the values it sums. Whoever calls divides.

This file knows nothing about configs, tokenizers, models, ranks, or who made the tokens.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # the builds of torch for GPUs bring it
TINY = 1e-200  # stands for a probability too small to see, where 0 would say that the text cannot be written
FLOOR = -1e3  # stands for log 0: exp() of it is exactly 0, and differences of it stay finite
MASKED = -1e6  # stands for a logit of -inf: its log probability is below FLOOR
CHUNK = {"cpu": 2**26, "cuda": 2**34}  # vocabulary x rows^2 of a chunk; 32,000: 46 (6 MB), 733 rows; 151,936: 22, 337
KEPT = {"cpu": 2**25, "cuda": 2**29}  # size of the laws that are kept for the backward pass: 128 MB, 2 GB in float32


class Loss(NamedTuple):
    """A sum with a gradient, what it sums, and what is worth logging; everything but `total` is detached.

    stats: {"entropy", "logprob"} (n,) of the student's law at temperature 1 and of the token that was drawn from it,
    at student rows `rows` (None: every row in order), and more per loss.
    """

    total: Tensor
    values: Tensor
    stats: dict[str, Tensor]
    rows: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """Output head: logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = softcap * tanh(z / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # Cohere's logit_scale, 1 / Granite's logits_scaling
    softcap: float | None = None  # Gemma's final_logit_softcapping

    def first(self, rows: int) -> "Head":
        """The head of the first `rows` entries: there two paddings (151936, 152064) of one vocabulary are compared."""
        if rows == self.weight.size(0):
            return self
        return Head(self.weight[:rows], None if self.bias is None else self.bias[:rows], self.scale, self.softcap)

    def at(self, temperature: float) -> "Head":
        """The head whose logits are these over `temperature`."""
        return replace(self, scale=self.scale / temperature, softcap=self.softcap and self.softcap / temperature)


@dataclass(frozen=True)
class Side:
    """One model's view of the completions of a batch; rows of one completion are consecutive and in order."""

    hidden: Tensor  # (N, H) row i predicts ids[i]
    head: Head
    ids: Tensor | None = None  # (N,)
    span: Tensor | None = None  # (N,) aligned span of token i, counted over the batch; -1: outside every span
    temperature: float = 1.0

    def at(self, rows: Tensor) -> "Side":
        """These rows only, without their spans."""
        ids = None if self.ids is None else self.ids[rows]
        return Side(self.hidden[rows], self.head, ids, temperature=self.temperature)


# ----------------------------------------------------------------------------------------------------------------------
# divergence of two laws


def scale_factor(beta: float, scale: str) -> float:
    """Multiplier on the scaled divergence: 1 for "kl"; for "raw" beta (1 - beta) inside the interval and 1 at its ends.

    Raises ValueError for an unknown scale or a beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1] (0 = KL(teacher||student), 1 = KL(student||teacher)), got {beta}")
    if scale not in ("kl", "raw"):
        raise ValueError(f'jsd scale must be "kl" or "raw", got {scale!r}')
    return beta * (1 - beta) if scale == "raw" and 0 < beta < 1 else 1.0


def divergence(teacher_logp: Tensor, student_logp: Tensor, beta: float, scale: str = "kl") -> Tensor:
    """Generalized JSD entry by entry, from log probabilities over any one partition of events.

    Args:
        teacher_logp, student_logp: same shape, natural logs, -inf allowed; need not sum to one.
        beta: 0 = KL(teacher||student) .. 1 = KL(student||teacher), arXiv 2306.13649 eq. 1.
        scale: "kl" is divided by beta (1 - beta) and continuous in beta; "raw" is eq. 1 itself, TRL's values.
    Returns: terms >= 0 of the same shape; their sum over the partition is the divergence.
    """
    factor, logp, logq = scale_factor(beta, scale), teacher_logp.clamp_min(FLOOR), student_logp.clamp_min(FLOOR)
    q, p, d = logq.exp(), logp.exp(), logp - logq
    if beta == 0:
        return factor * (p * d + q - p)
    if beta == 1:
        return factor * (p - q - q * d)
    g = lambda x, a: torch.log1p(a * torch.expm1(x.clamp(max=80.0))) / a  # also small a, x; beyond 80 its weight is 0
    return -factor * (p * g(-d, 1 - beta) + q * g(d, beta))


def row_terms(logp: Tensor, logq: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor, float]:
    """`divergence` at scale "kl" summed over the last dimension, with what its gradient is made of, in few passes.

    Args: logp, logq (n, V) both logs, overwritten; q (n, V) = exp(logq).
    Returns: values (n,); w (n, V) and a number a: the gradient at the logits is a (w - q sum_v w).
    """
    if beta == 0:
        gone = logq.clamp_min_(FLOOR) <= FLOOR
        d, p = torch.sub(logp, logq, out=logq), logp.exp_()
        values = torch.linalg.vecdot(p, d)
        w = torch.sub(q, p, out=p)
        values += w.sum(-1)
        return values, w.masked_fill_(gone, 0.0), 1.0
    if beta == 1:
        d = logq.sub_(logp.clamp_min_(FLOOR))
        values = torch.sub(logp.exp_(), q, out=logp).sum(-1)
        w = d.mul_(q)
        return values.add_(w.sum(-1)), w, 1.0
    ratio = (logp, logq) if beta <= 0.5 else (logq, logp)  # what has the smaller weight in M, to what has the larger
    x, p = torch.sub(*ratio, out=logq).clamp_(max=80.0), logp.exp_()  # beyond 80 what it multiplies is 0
    u = torch.expm1(x).mul_(min(beta, 1 - beta)).log1p_()
    rest = torch.sub(u, x, out=x)
    w, v = (u, rest) if beta <= 0.5 else (rest, u)  # log M/Q, log M/P
    values = torch.linalg.vecdot(p, v) / (beta - 1)
    w.mul_(q)
    return values.sub_(w.sum(-1) / beta), w, -1 / beta


def jsd(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0, scale: str = "kl"
) -> Tensor:
    """Generalized JSD between next-token laws: the definition that every fast form is tested against.

    Args: logits (N, V) of both models over one vocabulary. Returns: (N,) nats, computed in float32 at least.
    """
    logq, logp = (F.log_softmax(_wide(z) / temperature, dim=-1) for z in (student_logits, teacher_logits))
    return divergence(logp, logq, beta, scale).sum(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()  # a JSD of bf16 laws is half of the true one


# ----------------------------------------------------------------------------------------------------------------------
# hidden states -> logits -> loss, a chunk of rows at a time


def _chunks(num_rows: int, head: Head, chunk: int | None) -> list[slice]:
    """Without rows one empty chunk: there are empty results then, not none."""
    size = chunk or math.isqrt(CHUNK[head.weight.device.type] // head.weight.size(0)) + 1
    return [slice(i, min(i + size, num_rows)) for i in range(0, max(1, num_rows), size)]


def _project(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    """Logits (n, V) of a chunk in float32 at least, by the `weight` in hidden's dtype; MASKED, not -inf: no 0 x inf."""
    rounds = hidden.is_cuda and hidden.dtype.itemsize == 2  # CPUs have no kernel that does not
    unrounded = {"out_dtype": torch.float32} if rounds else {}
    z = _wide(torch.mm(hidden, weight.t(), **unrounded))
    if head.bias is not None:
        z.add_(head.bias)
    if head.scale != 1.0:
        z.mul_(head.scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z.clamp_min_(MASKED)


def _log_sum(z: Tensor, law: Tensor) -> Tensor:
    """log sum exp (n, 1) of logits whose softmax is known."""
    return (z.amax(-1) - law.amax(-1).log())[:, None]


def _slope(z: Tensor, head: Head) -> Tensor | float:
    """d z / d (h W + b), to be taken before anything overwrites z; 0 for masked ids."""
    slope = head.scale if head.softcap is None else (z / head.softcap).square_().neg_().add_(1).mul_(head.scale)
    return slope if head.bias is None else slope * (head.bias > -math.inf).to(z.dtype)


class _HeadGradients:
    """Gradients of hidden, weight and bias, collected chunk by chunk, the last two in float32 at least."""

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool]):
        zeros = lambda x, want, kind: torch.zeros_like(x, dtype=kind) if want else None
        kinds = hidden.dtype, *2 * [_wide(hidden[:0]).dtype]
        self.hidden, self.weight, self.bias = map(zeros, (hidden, head.weight, head.bias), wanted, kinds)

    def add(self, rows: slice, hidden: Tensor, weight: Tensor, dz: Tensor, slope: Tensor | float) -> None:
        """Push dz (n, V), the gradient at the chunk's logits, through the head with this `weight`; overwrites dz."""
        if isinstance(slope, Tensor) or slope != 1.0:
            dz.mul_(slope)
        if self.bias is not None:
            self.bias += dz.sum(0)
        low, hidden = dz.to(hidden.dtype), hidden[rows]
        if self.hidden is not None:
            self.hidden[rows] = low @ weight
        if self.weight is not None and low is not dz and dz.is_cuda:  # of bf16: not rounded to it, not made aside
            torch.addmm(self.weight, low.t(), hidden, out_dtype=torch.float32, out=self.weight)
        elif self.weight is not None:
            self.weight.addmm_(dz.t(), hidden.to(dz.dtype))


class _RowLoss(torch.autograd.Function):
    """Sum over rows of a row-local loss, value and gradient in one pass.

    row_fn(z, teacher_z, extra, rows, want_grad) -> (values (n,), dz (n, V), d_extra or None, stats) may overwrite z.
    """

    @staticmethod
    def forward(ctx, row_fn, stats, chunk, head, teacher, hidden, weight, bias, extra):
        weight, want_grad = weight.to(hidden.dtype), any(ctx.needs_input_grad)
        grads = _HeadGradients(hidden, head, ctx.needs_input_grad[5:8])
        teacher_weight = None if teacher is None else teacher.head.weight.to(teacher.hidden.dtype)

        values = torch.zeros(hidden.size(0), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        d_extra = torch.zeros_like(extra) if ctx.needs_input_grad[8] else None

        def one_chunk(rows: slice) -> None:  # a function: its buffers are gone before the next chunk's are made
            z = _project(hidden[rows], weight, head)
            slope = _slope(z, head) if want_grad else None
            teacher_z = None if teacher is None else _project(teacher.hidden[rows], teacher_weight, teacher.head)
            values[rows], dz, dx, stat = row_fn(z, teacher_z, None if extra is None else extra[rows], rows, want_grad)
            for name, x in stat.items():
                stats.setdefault(name, torch.zeros_like(values))[rows] = x.detach()
            if want_grad:
                grads.add(rows, hidden, weight, dz, slope)
            if d_extra is not None:
                d_extra[rows] = dx

        for rows in _chunks(hidden.size(0), head, chunk):
            one_chunk(rows)
        ctx.grads = (grads.hidden, grads.weight, grads.bias, d_extra)
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total, _):
        if ctx.grads is None:
            raise RuntimeError("a second backward pass through one loss: its gradients were handed over in the first")
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph: there may be another pass
        grads, ctx.grads = ctx.grads, ctx.grads if again else None  # (V, H) is large: scaled in place, taken as it is
        return (None,) * 5 + tuple(g if g is None else g * d_total if again else g.mul_(d_total) for g in grads)


def law_stats(logq: Tensor, ids: Tensor | None, q: Tensor | None = None) -> dict[str, Tensor]:
    """Entropy (n,) of the laws with logs (n, V) and, if there are `ids` (n,), their log probability; `q`: the laws."""
    logq = logq.detach()
    stats = {"entropy": -torch.linalg.vecdot(logq.exp() if q is None else q, logq)}
    return stats if ids is None else stats | {"logprob": logq.gather(1, ids[:, None])[:, 0]}


def row_loss(
    row_fn: Callable, student: Side, teacher: Side | None = None, extra: Tensor | None = None, chunk: int | None = None,
    rows: Tensor | None = None,
) -> Loss:  # fmt: skip
    """Sum over rows of a row-local loss, its gradient taken in the same pass, a chunk of rows at a time.

    Args: row_fn as in `_RowLoss`, or `by_autograd(fn)`; extra (n, ..): more inputs with a gradient; rows: see `Loss`.
    """
    stats, head = {}, student.head
    total, values = _RowLoss.apply(row_fn, stats, chunk, head, teacher, student.hidden, head.weight, head.bias, extra)
    return Loss(total, values, stats, rows)


def by_autograd(fn: Callable) -> Callable:
    """Row function for `row_loss` from fn(z, teacher_z, extra, rows) -> (values, stats), by autograd in the chunk."""

    def row_fn(z, teacher_z, extra, rows, want_grad):
        with torch.set_grad_enabled(want_grad):
            z = z.detach().requires_grad_(want_grad)
            extra = None if extra is None else extra.detach().requires_grad_(want_grad)
            values, stats = fn(z, teacher_z, extra, rows)
            leaves = [z] if extra is None else [z, extra]
            grads = torch.autograd.grad(values.sum(), leaves, allow_unused=True) if want_grad else [None]
        return values.detach(), grads[0], grads[-1], stats

    return row_fn


class _LawReads(torch.autograd.Function):
    """Entropy (N,) of each row's law and what is read of it, with a gradient that is known only after the last row.

    tokens (row, token, bound): log probabilities (P,) of single tokens. ranges, each (row, lo, hi, bound) of one shape:
    masses of the tokens order[lo:hi]. Rows ascend; bound[i] of them are before row i, which the host knows.
    """

    @staticmethod
    def forward(ctx, head, chunk, tokens, order, ranges, hidden, weight, bias):
        (num_rows, _), size, compute_weight = hidden.shape, weight.size(0), weight.to(hidden.dtype)
        ctx.args, ctx.chunks, ctx.kept = (head, tokens, order, ranges), _chunks(num_rows, head, chunk), {}
        ctx.save_for_backward(hidden, weight)
        room = KEPT[weight.device.type] // size if any(ctx.needs_input_grad) else 0
        running = hidden.new_zeros(ctx.chunks[0].stop, size + 1, dtype=torch.float64) if ranges else None
        entropy, few, masses = [], [], [[] for _ in ranges]
        for rows in ctx.chunks:
            z = _project(hidden[rows], compute_weight, head)
            p = F.softmax(z, dim=-1)
            log_sum = _log_sum(z, p)
            if rows.stop <= room:
                ctx.kept[rows.start] = p, _slope(z, head)
            entropy.append(log_sum[:, 0] - torch.linalg.vecdot(p, z))
            row, token = _part(rows, *tokens)
            few.append((z[row, token] - log_sum[row, 0]).double())
            if ranges:
                running[: len(p), 1:].copy_(p.index_select(1, order)).cumsum_(-1)
            for mass, wanted in zip(masses, ranges, strict=True):
                row, lo, hi = _part(rows, *wanted)
                mass.append(running[row, hi] - running[row, lo])
        entropy, *reads = map(torch.cat, (entropy, few, *masses))
        ctx.mark_non_differentiable(entropy)
        return entropy, *reads

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, d_few, *d_masses):
        """At the logits: p (c - sum_v p c) with c(v) the sum of d_mass over the ranges that hold v; d_few (1 - p)."""
        (hidden, weight), (head, tokens, order, ranges) = ctx.saved_tensors, ctx.args
        size, compute_weight, most = weight.size(0), weight.to(hidden.dtype), torch.finfo(_wide(hidden).dtype).max
        grads = _HeadGradients(hidden, head, ctx.needs_input_grad[5:])
        place, law = order.argsort() if ranges else None, lambda z: (F.softmax(z, dim=-1), _slope(z, head))
        for rows in ctx.chunks:
            dz, slope = ctx.kept.pop(rows.start, None) or law(_project(hidden[rows], compute_weight, head))
            row, token, d = _part(rows, *tokens[:2], d_few, tokens[2])
            total, c = d.new_zeros(len(dz), 1).index_add_(0, row, d[:, None]), 0.0
            if ranges:
                c = total.new_zeros(len(dz), size + 1)
                for (*wanted, bound), d_mass in zip(ranges, d_masses, strict=True):
                    line, lo, hi, dm = (x.flatten() for x in _part(rows, *wanted, d_mass, bound))
                    c.view(-1).index_add_(0, line * (size + 1) + lo, dm).index_add_(0, line * (size + 1) + hi, -dm)
                c = c.cumsum_(-1).clamp_(-most, most).to(dz.dtype).index_select(1, place).mul_(dz)
                total = total + c.sum(-1, keepdim=True)
            dz.mul_(-total).add_(c).view(-1).index_add_(0, row * size + token, d.to(dz.dtype))
            grads.add(rows, hidden, compute_weight, dz, slope)
        return (None,) * 5 + (grads.hidden, grads.weight, grads.bias)


def _part(rows: slice, row: Tensor, *columns) -> tuple[Tensor, ...]:
    """Of reads, and what belongs to them, those of a chunk of rows, with its own row numbers; `bound` is the last."""
    part = slice(columns[-1][rows.start], columns[-1][rows.stop])
    return row[part] - rows.start, *(x[part] for x in columns[:-1])


def _law_reads(side: Side, chunk: int | None, tokens: tuple, order: Tensor | None = None, ranges=()) -> tuple:
    head = side.head.at(side.temperature)
    return _LawReads.apply(head, chunk, tokens, order, ranges, side.hidden, head.weight, head.bias)


def token_logprobs(side: Side, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Log probability (N,) float64 of each row's own token, with gradient, and the entropy (N,) of each row's law."""
    rows = torch.arange(len(side.ids), device=side.ids.device)
    entropy, logp = _law_reads(side, chunk, (rows, side.ids, range(len(rows) + 1)))
    return logp.clamp_min(FLOOR), entropy


# ----------------------------------------------------------------------------------------------------------------------
# one vocabulary


@functools.cache
def _jsd_kernel():
    """What `fused_jsd` needs of a row in three passes over it, by Triton, which torch brings for a GPU."""
    import triton
    import triton.language as tl

    globals()["tl"] = tl  # where a kernel looks for it

    def kernel(z, t, ids, out, size, beta, heat, gain, KIND: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
        """Overwrites z by the gradient; out (3, n): value, entropy, log probability; KIND: beta 0, 1, <= 0.5, > 0.5."""
        row, n, lanes = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, BLOCK)
        z, t, out, nothing = z + row * size, t + row * size, out + row, tl.zeros([BLOCK], tl.float32)
        top, top_t, total, total_t, hot = nothing - 1e9, nothing - 1e9, nothing, nothing, nothing  # -1e9: no token
        for i in range(0, size, BLOCK):
            x = tl.load(z + i + lanes, mask=i + lanes < size, other=-1e9)
            y = tl.load(t + i + lanes, mask=i + lanes < size, other=-1e9)
            more, more_t = tl.maximum(top, x), tl.maximum(top_t, y)
            total = total * tl.exp(top - more) + tl.exp(x - more)
            total_t = total_t * tl.exp(top_t - more_t) + tl.exp(y - more_t)
            hot = hot * tl.exp((top - more) * heat) + tl.exp((x - more) * heat)
            top, top_t = more, more_t
        most, most_t = tl.max(top, 0), tl.max(top_t, 0)
        norm = tl.log(tl.sum(total * tl.exp(top - most), 0))
        norm_t = tl.log(tl.sum(total_t * tl.exp(top_t - most_t), 0))
        norm_hot = tl.log(tl.sum(hot * tl.exp((top - most) * heat), 0))
        if ids is not None:
            tl.store(out + 2 * n, tl.load(z + tl.load(ids + row)) - most - norm)
        value, entropy, weight, sum_w = nothing, nothing, nothing, 0.0
        for last in tl.static_range(2):
            for i in range(0, size, BLOCK):
                x = tl.load(z + i + lanes, mask=i + lanes < size, other=-1e9) - most
                logp = tl.load(t + i + lanes, mask=i + lanes < size, other=-1e9) - most_t - norm_t
                logq = x * heat - norm_hot
                p, q = tl.exp(logp), tl.exp(logq)
                if KIND == 0:
                    w = tl.where(logq <= FLOOR, 0.0, q - p)
                    term = p * (logp - tl.where(logq <= FLOOR, FLOOR, logq)) + q - p
                elif KIND == 1:
                    w = q * (logq - tl.where(logp <= FLOOR, FLOOR, logp))
                    term = p - q + w
                else:
                    d = logp - logq if KIND == 2 else logq - logp
                    d = tl.where(d > 80.0, 80.0, d)
                    few = d * (1 + d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720))))))
                    e = tl.where(tl.abs(d) < 0.25, few, tl.exp(d) - 1) * (beta if KIND == 2 else 1 - beta)
                    s = e / (2 + e)  # log(1 + e) = 2 artanh(s)
                    few = s * (2 + s * s * (2 / 3 + s * s * (2 / 5 + s * s * (2 / 7))))
                    u = tl.where(tl.abs(e) < 0.25, few, tl.log(1 + e))
                    w, v = (u, u - d) if KIND == 2 else (u - d, u)
                    term = p * v / (beta - 1) - q * w / beta
                    w *= q
                if last:
                    tl.store(z + i + lanes, (w - q * sum_w) * gain, mask=i + lanes < size)
                else:
                    value, weight, entropy = value + term, weight + w, entropy - tl.exp(x - norm) * (x - norm)
            if last == 0:
                sum_w = tl.sum(weight, 0)
                tl.store(out, tl.sum(value, 0))
                tl.store(out + n, tl.sum(entropy, 0))

    return triton.jit(kernel)


def _jsd_rows(z: Tensor, t: Tensor, ids: Tensor | None, beta: float, temperature: float, factor: float) -> tuple:
    """What a row function returns, for logits z, t (n, V), by `_jsd_kernel`."""
    kind, a = {0.0: (0, 1.0), 1.0: (1, 1.0)}.get(beta, (2 if beta <= 0.5 else 3, -1 / (beta or 1)))
    out, gain = z.new_empty(3, len(z)), a * factor / temperature
    _jsd_kernel()[len(z),](z, t, ids, out, z.size(1), beta, 1 / temperature, gain, kind, FLOOR, 2048, num_warps=8)
    return out[0] * factor, z, None, dict(zip(("entropy", "logprob")[: 1 if ids is None else 2], out[1:]))


def fused_jsd(student: Side, teacher: Side, beta: float, scale: str = "kl", chunk: int | None = None) -> Loss:
    """Sum of `jsd` over rows, from hidden states: no (N, V) tensor in either direction.

    Args: student, teacher: rows that predict the same tokens; of unequal vocabularies the common first entries are
        compared. Gradients flow to student.hidden and its head. chunk: rows at a time; None: as CHUNK says.
    Returns: Loss with values (N,).
    """
    factor = scale_factor(beta, scale)
    common = min(student.head.weight.size(0), teacher.head.weight.size(0))

    def row_fn(z, teacher_z, extra, rows, want_grad):
        ids = None if student.ids is None else student.ids[rows]
        if z.is_cuda and z.dtype == torch.float32 and len(z) and HAS_TRITON:
            return _jsd_rows(z, teacher_z, ids, beta, student.temperature, factor)
        q = F.softmax(z, dim=-1)
        logp = teacher_z.sub_(_log_sum(teacher_z, F.softmax(teacher_z, dim=-1)))
        logq = z.sub_(_log_sum(z, q))
        stats = law_stats(logq, ids, q)
        if student.temperature != 1.0:
            logq = F.log_softmax(logq / student.temperature, dim=-1)
            q = logq.exp()
        values, w, a = row_terms(logp, logq, q, beta)
        if want_grad:
            w.sub_(q.mul_(w.sum(-1, keepdim=True))).mul_(a * factor / student.temperature)
        return values.mul_(factor), w if want_grad else None, None, stats

    ours, theirs = student.head.first(common), teacher.head.first(common).at(teacher.temperature)
    return row_loss(row_fn, replace(student, head=ours), replace(teacher, head=theirs), chunk=chunk)


def fused_cross_entropy(student: Side, chunk: int | None = None) -> Loss:
    """Sum of -log P(ids) over rows, from hidden states, in one pass."""

    def row_fn(z, teacher_z, extra, rows, want_grad):
        logq, ids = F.log_softmax(z, dim=-1), student.ids[rows]
        stats = law_stats(logq, ids)
        dz = logq.exp_().scatter_add_(1, ids[:, None], torch.full_like(logq[:, :1], -1.0)) if want_grad else None
        return -stats["logprob"], dz, None, stats

    return row_loss(row_fn, student, chunk=chunk)


def _check_served(logprobs: Tensor, ids: Tensor) -> None:
    """Raises ValueError if log probabilities (N, k) of distinct `ids` (N, k) cannot be those of a law."""
    if logprobs.size(1) == 0:
        raise ValueError("the teacher's server tells the top 0 tokens: ask it for at least 1")
    ordered = ids.sort(1).values
    wrong = {
        "that are NaN": logprobs.isnan(),
        "above 0": logprobs > 1e-3,
        "of a total mass above 1": logprobs.double().exp().sum(1, keepdim=True) > 1 + 1e-2,
        "of one token twice": ordered[:, 1:] == ordered[:, :-1],
    }
    for what, where in wrong.items():
        if where.any():
            row = int(where.any(1).nonzero()[0, 0])
            told = f"in row {row}: {[x[row, :8].tolist() for x in (logprobs, ids)]}"
            raise ValueError(f"the teacher's server answers with log probabilities {what}, {told}")


def topk_jsd(
    student_logits: Tensor, ids: Tensor, teacher_logprobs: Tensor, beta: float, scale: str = "kl"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Generalized JSD over k named tokens and one bucket for all others: what a served teacher can tell.

    The coarsening of both laws to k + 1 outcomes: a lower bound of `jsd`; a renormalised top-k would forget the rest.

    Args: student_logits (N, V); ids (N, k), distinct within a row; teacher_logprobs (N, k) of those ids.
    Returns: (N,) values and {"teacher_mass", "student_mass"}: (N,) probability on the named tokens.
    Raises ValueError for k = 0 and what is no law, see `_check_served`.
    """
    _check_served(teacher_logprobs, ids)
    logq = F.log_softmax(_wide(student_logits), dim=-1).gather(1, ids).clamp_min(FLOOR)
    logp = teacher_logprobs.to(logq.dtype).clamp_min(FLOOR)
    log_mass_q, log_mass_p = logq.logsumexp(-1), logp.logsumexp(-1)
    log1mexp = lambda x: torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    tail_q, tail_p = (log1mexp(mass.clamp(max=-1e-7))[:, None] for mass in (log_mass_q, log_mass_p))
    terms = divergence(torch.cat([logp, tail_p], 1), torch.cat([logq, tail_q], 1), beta, scale)
    return terms.sum(-1), {"teacher_mass": log_mass_p.exp(), "student_mass": log_mass_q.exp()}


def fused_topk_jsd(
    student: Side, ids: Tensor, teacher_logprobs: Tensor, beta: float, scale: str = "kl", chunk: int | None = None
) -> Loss:
    """Sum of `topk_jsd` over rows from hidden states. More stats: teacher_mass, student_mass."""

    def fn(z, teacher_z, extra, rows):
        logq = F.log_softmax(z, dim=-1)
        values, stats = topk_jsd(logq / student.temperature, ids[rows], teacher_logprobs[rows], beta, scale)
        return values, stats | law_stats(logq, None if student.ids is None else student.ids[rows])

    return row_loss(by_autograd(fn), student, chunk=chunk)


# ----------------------------------------------------------------------------------------------------------------------
# two vocabularies: spans


def span_ends(span: Tensor) -> tuple[Tensor, Tensor]:
    """First and last row (G,), (G,) of each span; spans are numbered 0..G-1 in row order, -1 is no span."""
    rows = (span >= 0).nonzero()[:, 0]
    inside, none = span[rows], span.new_full((1,), -1)
    return rows[torch.cat([none, inside])[:-1] != inside], rows[torch.cat([inside, none])[1:] != inside]


def alm_loss(student: Side, teacher_logprobs: Tensor, teacher_span: Tensor, chunk: int | None = None) -> Loss:
    """Approximate likelihood matching of spans (Minixhofer et al. 2025, arXiv 2503.20083) in the limit tau -> infinity.

    With a, b = -log P(span) of teacher and student, tau KL(Bernoulli(e^{-a/tau}) || Bernoulli(e^{-b/tau})) tends to
    a log(a/b) - a + b. The teacher's own token probabilities are all it needs: a served teacher has them.

    Args: teacher_logprobs (N',), teacher_span (N',): of the teacher's tokens. Returns: Loss with values (G,).
    """
    num_spans = int(student.span.max()) + 1 if student.span.numel() else 0
    logq, entropy = token_logprobs(student, chunk)

    # -1, no span, is the last of one more
    per_span = lambda logs, span: -logs.new_zeros(num_spans + 1).index_add(0, span % (num_spans + 1), logs)[:-1]
    sides = (teacher_logprobs.double(), teacher_span), (logq, student.span)
    a, b = (per_span(*side).clamp_min(1e-9) for side in sides)
    values = a * (a / b).log() - a + b  # >= 0, and exactly 0 at a = b
    return Loss(values.sum(), values.detach(), {"entropy": entropy, "logprob": logq.detach()})


def uld_loss(
    student: Side, teacher: Side, match: tuple[Tensor, Tensor] | None = None, beta: float = 0.5, scale: str = "kl",
    chunk: int | None = None,
) -> Loss:  # fmt: skip
    """Universal Logit Distillation (Boizard et al. 2024, arXiv 2402.12030): L1 between sorted laws, for comparison.

    A span of several tokens is the law at its last token times the chain-rule probability of the tokens before, so that
    a span of one token is untouched. With `match`, the hybrid of GOLD: `divergence` on matched tokens, sorted L1 on the
    rest, weighted K / U and 1 - K / U as TRL does. Both are biased: the minimum is not the teacher (RESULTS, The known
    optimum).

    Args: match: ids (K,), (K,) of the same K byte strings in student and teacher vocabulary; None: sorted laws only.
    Returns: Loss with values (G,) and more stats {"matched", "unmatched"} per span.
    """
    last_s, last_t = span_ends(student.span)[1], span_ends(teacher.span)[1]
    match_s, match_t = match or (last_s[:0], last_t[:0])
    rest_s, rest_t = (  # ids that are not among the matched ones
        torch.ones(side.head.weight.size(0), device=ids.device).index_fill(0, ids, 0.0).nonzero()[:, 0]
        for side, ids in ((student, match_s), (teacher, match_t))
    )
    share = match_t.numel() / teacher.head.weight.size(0)

    def before(side: Side, last: Tensor) -> Tensor:
        """Log probability (G,) of the span's tokens before the one whose whole law is compared."""
        keep = side.span >= 0
        keep[last] = False
        logp, _ = token_logprobs(side.at(rows := keep.nonzero()[:, 0]), chunk)
        return logp.new_zeros(last.numel()).index_add(0, side.span[rows], logp)

    def sorted_l1(q: Tensor, p: Tensor) -> Tensor:
        if not (q.size(1) and p.size(1)):
            return q.new_zeros(q.size(0))
        width = max(q.size(1), p.size(1))
        q, p = (F.pad(x.sort(dim=-1, descending=True).values, (0, width - x.size(1))) for x in (q, p))
        return (q - p).abs().sum(-1)

    def fn(z, teacher_z, extra, rows):
        extra = extra.to(z.dtype)
        logz = F.log_softmax(z, dim=-1)
        logq = F.log_softmax(z / student.temperature, dim=-1) + extra[:, :1]
        logp = F.log_softmax(teacher_z / teacher.temperature, dim=-1) + extra[:, 1:].detach()
        matched = divergence(logp[:, match_t], logq[:, match_s], beta, scale).sum(-1)
        unmatched = sorted_l1(logq[:, rest_s].exp(), logp[:, rest_t].exp())
        stats = law_stats(logz, student.ids[last_s[rows]]) | {"matched": matched, "unmatched": unmatched}
        return share * matched + (1 - share) * unmatched, stats

    before_s = before(student, last_s)
    with torch.no_grad():
        before_t = before(teacher, last_t)
    extra = torch.stack([before_s, before_t], 1)
    return row_loss(by_autograd(fn), student.at(last_s), teacher.at(last_t), extra, chunk, last_s)


# ----------------------------------------------------------------------------------------------------------------------
# two vocabularies: text


@dataclass(frozen=True)
class Queries:
    """What `prefix_loss` asks of one model: masses of token ranges, each "tokens that start with these bytes".

    `order` lists token ids sorted by their bytes, then the ends of a text, then all others; a range is [lo, hi) in it.
    Query e reads the law of row[e]. The first N ask for the rows' own tokens, the next K for outcomes, the last T for
    the totals that the outcomes of an offset are divided by; to them the mass is added, times the probability of the
    path up to the row. Row full_row[f] also adds its whole next-byte law to the 257 outcomes from full_slot[f]: bytes,
    then the end. Small ranges are given token by token: exact.
    """

    order: Tensor  # (V,)
    edge: Tensor  # (258,) where in `order` each first byte begins; then the end-of-text ids; then the others
    row: Tensor  # (E,)
    narrow: Tensor  # (P,) the query that place[p] in `order` is part of, rows ascending
    place: Tensor  # (P,)
    wide: Tensor  # (W,) the query that asks for [lo[w], hi[w]), rows ascending
    lo: Tensor  # (W,)
    hi: Tensor  # (W,)
    slot: Tensor  # (K,) outcome 0..O-1
    total: Tensor  # (T,) offset 0..M-1
    start: Tensor  # (N,) first row of the completion that row i belongs to
    full_row: Tensor  # (F,) ascending
    full_slot: Tensor  # (F,)
    bounds: list[list[int]]  # how many of narrow, wide and full_row are of rows before row 0, 1, .., N


def _segment_logsumexp(x: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """log sum exp of x (E,) over each segment (num_segments,); of an empty one it has no gradient."""
    top = x.new_full((num_segments,), -math.inf).scatter_reduce(0, segment, x.detach(), "amax")
    return x.new_zeros(num_segments).index_add(0, segment, (x - top[segment]).exp()).log() + top


def prefix_loss(
    student: Side, teacher: Side, student_queries: Queries, teacher_queries: Queries, offset: Tensor, num_offsets: int,
    beta: float, scale: str = "kl", chunk: int | None = None,
) -> Loss:  # fmt: skip
    """JSD of both models' laws of the text that follows, byte offset by byte offset: exact across tokenizers.

    At every offset where both models' F is known (section 3 of the module), the possible continuations are split into
    what both can tell apart: single next bytes, the actual bytes up to the next such offset, "anything else". Where
    both models have a boundary these are all 256 bytes and the end of the text. By the chain rule the sum over offsets
    is an unbiased sample of the divergence between the two laws of whole texts. gold_data.prefix_queries makes the
    queries and documents which offsets are used and what the sums leave out.

    Covering sums for byte-level probabilities of token models: Phan et al. 2024 (arXiv 2410.09303), Vieira et al. 2024
    (arXiv 2412.03719).

    Args: offset (O,): which of the offsets 0..num_offsets-1 each outcome belongs to; -1 - m for one of offset m that
        cannot be told apart and is part of "anything else". Temperatures must be 1.
    Returns: Loss with values (M,) in nats.
    """
    if student.temperature != 1.0 or teacher.temperature != 1.0:
        raise ValueError("prefix_loss multiplies conditional laws, which is only a law of text at temperature 1")
    counted = offset >= 0
    offset = torch.where(counted, offset, -1 - offset)

    def text_law(side: Side, q: Queries) -> tuple[Tensor, dict[str, Tensor]]:
        """Probabilities (O,) of the outcomes: sums of path times range, over the total of the outcome's offset."""
        whole = q.full_row.size(0), 257
        tokens, wide = (q.row[q.narrow], q.order[q.place], q.bounds[0]), (q.row[q.wide], q.lo, q.hi, q.bounds[1])
        full = *(x.expand(whole) for x in (q.full_row[:, None], q.edge[:-1], q.edge[1:])), q.bounds[2]
        entropy, few, many, full = _law_reads(side, chunk, tokens, q.order, (wide, full))
        mass = _segment_logsumexp(few, q.narrow, q.row.size(0)).index_copy(0, q.wide, many.clamp_min(TINY).log())
        full = full.clamp_min(TINY) * (q.edge.diff() > 0)  # only what a vocabulary cannot write at all is 0
        own, *_ = mass.split(sizes := [q.start.numel(), q.slot.numel(), q.total.numel()])
        before = own.cumsum(0) - own  # (N,) log probability of all earlier tokens of the batch
        log_path = before - before[q.start]
        _, named, totals = (log_path[q.row] + mass).split(sizes)
        log_total = _segment_logsumexp(totals, q.total, num_offsets)
        part = (named - log_total[offset[q.slot]]).clamp_min(math.log(TINY)).exp()
        full = full * (log_path[q.full_row] - log_total[offset[q.full_slot]]).exp()[:, None]
        full_slot = q.full_slot[:, None] + torch.arange(257, device=offset.device)
        law = full.new_zeros(offset.numel()).index_add(0, full_slot.flatten(), full.flatten())
        return law.index_add(0, q.slot, part), {"entropy": entropy, "logprob": own.detach()}

    student_law, stats = text_law(student, student_queries)
    with torch.no_grad():
        teacher_law, _ = text_law(teacher, teacher_queries)

    # what one vocabulary cannot write at all is part of "anything else", the rest, for both; NaN stays
    shared = counted & (student_law != 0) & (teacher_law != 0)
    q, p = (law.where(shared, 0.0) for law in (student_law, teacher_law))
    rest = lambda law: (1 - law.new_zeros(num_offsets).index_add(0, offset, law)).clamp_min(1e-12).log()
    terms = divergence((p + ~shared).log(), (q + ~shared).log(), beta, scale)  # log 1 and log 1: 0
    values = divergence(rest(p), rest(q), beta, scale).index_add(0, offset, terms)
    return Loss(values.sum(), values.detach(), stats)
