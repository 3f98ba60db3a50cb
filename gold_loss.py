"""Every divergence GOLD trains with: dense, fused, sparse, sharded and across tokenizers. Needs torch and nothing else.

Letters    N scored rows    V, U student and teacher vocabulary    H, D student and teacher hidden size    G spans
           E queries    M text offsets    O outcomes    P teacher law    Q student law    z logits

1. Generalized JSD (Agarwal et al. 2024, arXiv 2306.13649, eq. 1). With M = beta P + (1 - beta) Q,

       JSD = beta KL(P||M) + (1 - beta) KL(Q||M).

   It vanishes at both ends of beta, so one learning rate does not fit all betas. We divide by beta (1 - beta). With
   d = log P - log Q and g_a(x) = log(1 + a (e^x - 1)) / a, g_0(x) = e^x - 1, the sum then reads, entry by entry,

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
   next-token laws where both models have a boundary (`bins_loss`), probabilities of whole spans (`alm_loss`) or sorted
   probabilities (`uld_loss`); all three are biased, see README.

Every loss returns a `Loss`: a *sum* with a gradient and the values it sums. Whoever calls divides.

This file knows nothing about configs, tokenizers, models, ranks, or who made the tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

FLOOR = -1e3  # stands for log 0: exp() of it is exactly 0, and differences of it stay finite
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # size of one (rows, vocabulary) buffer: 8 MB / 256 MB in float32


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


def _g(x: Tensor, a: float) -> Tensor:
    """g_a(x) for 0 < a < 1, accurate for small a and small x; x beyond 80 only occurs with weight 0."""
    return torch.log1p(a * torch.expm1(x.clamp(max=80.0))) / a


def _terms(logp: Tensor, logq: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(terms of the scaled divergence, Q, Q h) entry by entry, from finite logs; h as in section 1 of the module."""
    q, d, p = logq.exp(), logp - logq, logp.exp()
    if beta == 0:
        qh = q - p
        return p * d + qh, q, qh
    if beta == 1:
        qh = -q * d
        return p - q + qh, q, qh
    qh = -q * _g(d, beta)
    return qh - p * _g(-d, 1 - beta), q, qh


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
    return scale_factor(beta, scale) * _terms(teacher_logp.clamp_min(FLOOR), student_logp.clamp_min(FLOOR), beta)[0]


def jsd(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0, scale: str = "kl"
) -> Tensor:
    """Generalized JSD between next-token laws: the definition that every fast form is tested against.

    Args: logits (N, V) of both models over one vocabulary; beta and scale as in `divergence`.
    Returns: (N,) nats per position, computed in float32 at least.
    """
    logq = F.log_softmax(_wide(student_logits) / temperature, dim=-1)
    logp = F.log_softmax(_wide(teacher_logits) / temperature, dim=-1)
    return divergence(logp, logq, beta, scale).sum(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()  # a JSD of bf16 laws is half of the true one


# ----------------------------------------------------------------------------------------------------------------------
# hidden states -> logits -> loss, a chunk of rows at a time


def _chunks(num_rows: int, head: Head, chunk: int | None) -> list[slice]:
    size = chunk or max(1, CHUNK_ELEMENTS[head.weight.device.type] // head.weight.size(0))
    return [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]


def _project(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    """Logits (n, V) of a chunk, float32 at least; `weight` is head.weight in the precision of hidden."""
    z = _wide(hidden @ weight.t())
    if head.bias is not None:
        z = z + head.bias
    if head.scale != 1.0:
        z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


class _HeadGradients:
    """Gradients of hidden, weight and bias, collected chunk by chunk in the precision of each parameter."""

    def __init__(self, hidden: Tensor, weight: Tensor, head: Head, wanted: tuple[bool, bool, bool]):
        self.head, self.compute_weight = head, weight
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias) if wanted[2] else None

    def slope(self, z: Tensor) -> Tensor | float:
        """d z / d (h W + b), to be taken before anything overwrites z."""
        return self.head.scale if self.head.softcap is None else self.head.scale * (1 - (z / self.head.softcap) ** 2)

    def add(self, rows: slice, hidden: Tensor, dz: Tensor, slope: Tensor | float) -> None:
        """Push dz (n, V), the gradient at the chunk's logits, through the head."""
        dz = dz * slope
        if self.bias is not None:
            self.bias += dz.sum(0)
        dz = dz.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = dz @ self.compute_weight
        if self.weight is not None and self.weight.dtype == dz.dtype:
            self.weight.addmm_(dz.t(), hidden[rows])
        elif self.weight is not None:
            self.weight += dz.t() @ hidden[rows]


class _RowLoss(torch.autograd.Function):
    """Sum over rows of a row-local loss, value and gradient in one pass.

    row_fn(z, teacher_z, extra, rows, want_grad) -> (values (n,), dz (n, V), d_extra or None, stats) may overwrite z.
    """

    @staticmethod
    def forward(ctx, row_fn, stats, chunk, head, teacher, hidden, weight, bias, extra):
        weight = weight.to(hidden.dtype)
        want_grad, want_extra = any(ctx.needs_input_grad), ctx.needs_input_grad[8]
        grads = _HeadGradients(hidden, weight, head, ctx.needs_input_grad[5:8])
        d_extra = torch.zeros_like(extra) if want_extra else None
        teacher_weight = None if teacher is None else teacher.head.weight.to(teacher.hidden.dtype)
        values = torch.zeros(hidden.size(0), dtype=_wide(hidden[:0]).dtype, device=hidden.device)

        def one_chunk(rows: slice) -> None:  # a function: its buffers are gone before the next chunk's are made
            z = _project(hidden[rows], weight, head)
            slope = grads.slope(z) if want_grad else None
            teacher_z = None if teacher is None else _project(teacher.hidden[rows], teacher_weight, teacher.head)
            values[rows], dz, dx, stat = row_fn(z, teacher_z, None if extra is None else extra[rows], rows, want_grad)
            for name, x in stat.items():
                stats.setdefault(name, torch.zeros_like(values))[rows] = x.detach()
            if want_grad:
                grads.add(rows, hidden, dz, slope)
            if want_extra:
                d_extra[rows] = dx

        for rows in _chunks(hidden.size(0), head, chunk) or [slice(0, 0)]:  # no rows: empty stats, not none
            one_chunk(rows)
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias, d_extra)
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total, _):
        return (None,) * 5 + tuple(None if g is None else g * d_total for g in ctx.saved_tensors)


def _law_stats(logq: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    logq = logq.detach()
    stats = {"entropy": -torch.linalg.vecdot(logq.exp(), logq)}
    return stats if ids is None else stats | {"logprob": logq.gather(1, ids[:, None])[:, 0]}


def _tempered(logq: Tensor, temperature: float) -> Tensor:
    return logq if temperature == 1.0 else F.log_softmax(logq / temperature, dim=-1)


def _row_loss(
    row_fn: Callable,
    student: Side,
    teacher: Side | None = None,
    extra: Tensor | None = None,
    chunk: int | None = None,
    rows: Tensor | None = None,
) -> Loss:
    stats: dict[str, Tensor] = {}
    head = student.head
    inputs = (student.hidden, head.weight, head.bias, extra)
    total, values = _RowLoss.apply(row_fn, stats, chunk, head, teacher, *inputs)
    return Loss(total, values, stats, rows)


def _by_autograd(fn: Callable) -> Callable:
    """Row function for `_RowLoss` from fn(z, teacher_z, extra, rows) -> (values, stats), by autograd in the chunk."""

    def row_fn(z, teacher_z, extra, rows, want_grad):
        with torch.set_grad_enabled(want_grad):
            z = z.detach().requires_grad_(want_grad)
            extra = None if extra is None else extra.detach().requires_grad_(want_grad)
            values, stats = fn(z, teacher_z, extra, rows)
            if not want_grad:
                return values, None, None, stats
            leaves = [z] if extra is None else [z, extra]
            grads = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        return values.detach(), grads[0], grads[-1], stats

    return row_fn


class _RowFeatures(torch.autograd.Function):
    """Features of each row's log law whose gradient is known only after the last row: recomputed in the backward pass.

    feature_fn(logp (n, V), rows) -> tuple of tensors, each concatenated over chunks along its first dimension.
    """

    @staticmethod
    def forward(ctx, feature_fn, temperature, chunk, head, hidden, weight, bias):
        ctx.feature_fn, ctx.temperature, ctx.head = feature_fn, temperature, head
        ctx.chunks = _chunks(hidden.size(0), head, chunk) or [slice(0, 0)]
        ctx.save_for_backward(hidden, weight, bias)
        weight = weight.to(hidden.dtype)
        parts, entropy = [], []
        for rows in ctx.chunks:
            logp = F.log_softmax(_project(hidden[rows], weight, head) / temperature, dim=-1)
            parts.append(feature_fn(logp, rows))
            entropy.append(-(logp.exp() * logp).sum(-1))
        ctx.sizes = [[x.size(0) for x in part] for part in zip(*parts, strict=True)]
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return entropy, *(torch.cat(part) for part in zip(*parts, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, *d_features):
        hidden, weight, _ = ctx.saved_tensors
        weight = weight.to(hidden.dtype)
        grads = _HeadGradients(hidden, weight, ctx.head, ctx.needs_input_grad[4:7])
        d_chunks = zip(*(d.split(sizes) for d, sizes in zip(d_features, ctx.sizes, strict=True)), strict=True)
        for rows, d in zip(ctx.chunks, d_chunks, strict=True):
            z = _project(hidden[rows], weight, ctx.head)
            slope = grads.slope(z)
            with torch.enable_grad():
                z.requires_grad_()
                features = ctx.feature_fn(F.log_softmax(z / ctx.temperature, dim=-1), rows)
                (dz,) = torch.autograd.grad(features, z, d)
            grads.add(rows, hidden, dz, slope)
        return None, None, None, None, grads.hidden, grads.weight, grads.bias


def _row_features(feature_fn: Callable, side: Side, chunk: int | None) -> tuple[Tensor, ...]:
    return _RowFeatures.apply(
        feature_fn, side.temperature, chunk, side.head, side.hidden, side.head.weight, side.head.bias
    )


def token_logprobs(side: Side, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Log probability (N,) float64 of each row's own token, with gradient, and the entropy (N,) of each row's law."""
    entropy, logp = _row_features(
        lambda logp, rows: (logp.gather(1, side.ids[rows, None])[:, 0].double(),), side, chunk
    )
    return logp, entropy


# ----------------------------------------------------------------------------------------------------------------------
# one vocabulary


def fused_jsd(student: Side, teacher: Side, beta: float, scale: str = "kl", chunk: int | None = None) -> Loss:
    """Sum of `jsd` over rows, from hidden states: no (N, V) tensor in either direction.

    Args:
        student, teacher: rows that predict the same tokens. Unequal numbers of vocabulary rows are compared on the
            common first ones. Gradients flow to student.hidden and its head.
        chunk: rows at a time; None fits CHUNK_ELEMENTS.
    Returns: Loss with values (N,).
    """
    factor = scale_factor(beta, scale)
    common = min(student.head.weight.size(0), teacher.head.weight.size(0))

    def row_fn(z, teacher_z, extra, rows, want_grad):
        logq, logp = (x.sub_(x.logsumexp(-1, keepdim=True)) for x in (z, teacher_z.div_(teacher.temperature)))
        stats = _law_stats(logq, None if student.ids is None else student.ids[rows])
        terms, q, qh = _terms(logp, _tempered(logq, student.temperature), beta)
        dz = None
        if want_grad:
            dz = qh.sub_(q.mul_(qh.sum(-1, keepdim=True))).mul_(factor / student.temperature)
        return factor * terms.sum(-1), dz, None, stats

    sides = (replace(side, head=side.head.first(common)) for side in (student, teacher))
    return _row_loss(row_fn, *sides, chunk=chunk)


def fused_cross_entropy(student: Side, chunk: int | None = None) -> Loss:
    """Sum of -log P(ids) over rows, from hidden states, in one pass."""

    def row_fn(z, teacher_z, extra, rows, want_grad):
        logq = F.log_softmax(z, dim=-1)
        ids = student.ids[rows, None]
        stats = _law_stats(logq, student.ids[rows])
        dz = logq.exp().scatter_add_(1, ids, torch.full_like(logq[:, :1], -1.0)) if want_grad else None
        return -stats["logprob"], dz, None, stats

    return _row_loss(row_fn, student, chunk=chunk)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0; -inf at 0."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def topk_jsd(
    student_logits: Tensor, ids: Tensor, teacher_logprobs: Tensor, beta: float, scale: str = "kl"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Generalized JSD over k named tokens and one bucket for all others: what a served teacher can tell.

    The coarsening of both laws to k + 1 outcomes, so a lower bound of `jsd`, and never a renormalised top-k: that has
    gradient cosine 0.49 to the true reverse KL at k = 8 (README, "what others get wrong").

    Args: student_logits (N, V); ids (N, k), distinct within a row; teacher_logprobs (N, k) of those ids.
    Returns: (N,) values and {"teacher_mass", "student_mass"}: (N,) probability on the named tokens.
    """
    logq = F.log_softmax(_wide(student_logits), dim=-1).gather(1, ids)
    logp = teacher_logprobs.to(logq.dtype)
    log_mass_q, log_mass_p = logq.logsumexp(-1), logp.logsumexp(-1)
    tail_q, tail_p = (_log1mexp(m.clamp(max=-1e-7))[:, None] for m in (log_mass_q, log_mass_p))
    terms = divergence(torch.cat([logp, tail_p], 1), torch.cat([logq, tail_q], 1), beta, scale)
    return terms.sum(-1), {"teacher_mass": log_mass_p.exp(), "student_mass": log_mass_q.exp()}


def fused_topk_jsd(
    student: Side, ids: Tensor, teacher_logprobs: Tensor, beta: float, scale: str = "kl", chunk: int | None = None
) -> Loss:
    """Sum of `topk_jsd` over rows from hidden states. More stats: teacher_mass, student_mass."""

    def fn(z, teacher_z, extra, rows):
        logq = F.log_softmax(z, dim=-1)
        values, stats = topk_jsd(logq / student.temperature, ids[rows], teacher_logprobs[rows], beta, scale)
        return values, stats | _law_stats(logq, None if student.ids is None else student.ids[rows])

    return _row_loss(_by_autograd(fn), student, chunk=chunk)


def student_topk_jsd(
    student_logits: Tensor, teacher_logits: Tensor, k: int, beta: float, scale: str = "kl"
) -> tuple[Tensor, dict[str, Tensor]]:
    """`topk_jsd` on the *student's* k likeliest tokens: the right support for reverse KL (beta near 1).

    Needs the teacher's probabilities at ids that the student names, which a local teacher has.
    """
    ids = student_logits.detach().topk(k, dim=-1).indices
    return topk_jsd(student_logits, ids, F.log_softmax(_wide(teacher_logits), dim=-1).gather(1, ids), beta, scale)


class _VocabParallelJSD(torch.autograd.Function):
    """Each rank holds a shard of every row's logits; three small all-reduces make the rows whole."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, beta, temperature, factor, group):
        def log_softmax(z):
            z = _wide(z) / temperature
            top = z.amax(-1)
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
            z = z - top[:, None]
            total = z.exp().sum(-1)
            dist.all_reduce(total, dist.ReduceOp.SUM, group)
            return z - total.log()[:, None]

        terms, q, qh = _terms(log_softmax(teacher_logits), log_softmax(student_logits), beta)
        sums = torch.stack([terms.sum(-1), qh.sum(-1)])
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        ctx.save_for_backward((qh - q * sums[1][:, None]) * (factor / temperature))
        return factor * sums[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_values):
        return (ctx.saved_tensors[0] * d_values[:, None],) + (None,) * 5


def vocab_parallel_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float,
    temperature: float = 1.0,
    scale: str = "kl",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`jsd` when each rank of `group` holds (N, V / ranks) logits of the same rows.

    Returns: (N,) the full value on every rank. The gradient of each rank's shard is that of the whole row, if every
    rank backpropagates the same gradient of the values.
    """
    return _VocabParallelJSD.apply(student_logits, teacher_logits, beta, temperature, scale_factor(beta, scale), group)


# ----------------------------------------------------------------------------------------------------------------------
# two vocabularies: spans


def _span_ends(span: Tensor) -> tuple[Tensor, Tensor]:
    """First and last row (G,), (G,) of each span; spans are numbered 0..G-1 in row order, -1 is no span."""
    rows = (span >= 0).nonzero()[:, 0]
    inside, none = span[rows], span.new_full((1,), -1)
    return rows[torch.cat([none, inside])[:-1] != inside], rows[torch.cat([inside, none])[1:] != inside]


def _span_logprobs(side: Side, num_spans: int, wanted: Tensor, chunk: int | None) -> Tensor:
    """Chain-rule log probability (G,) of the wanted spans' own tokens, 0 for the others; gradient for both tensors."""
    rows = ((side.span >= 0) & wanted[side.span.clamp_min(0)]).nonzero()[:, 0] if num_spans else side.span.new_zeros(0)
    logp, _ = token_logprobs(side.at(rows), chunk)
    return logp.new_zeros(num_spans).index_add(0, side.span[rows], logp)


def bins_loss(
    student: Side,
    teacher: Side,
    student_bin: Tensor,
    teacher_bin: Tensor,
    num_bins: int,
    beta: float,
    scale: str = "kl",
    chunk: int | None = None,
) -> Loss:
    """JSD of both next-token laws, coarsened to shared byte bins, at the start of every span.

    Below the bins one more outcome, "exactly this span", carries the chain-rule probability of the span's tokens; it is
    taken out of the first token's bin. Spans whose bins hold one token on both sides need none, so for identical
    vocabularies this is `jsd`.

    Args: student_bin (V,), teacher_bin (U,): bin of each token id (gold_data.shared_bins).
    Returns: Loss with values (G,).
    """
    (first_s, last_s), (first_t, last_t) = _span_ends(student.span), _span_ends(teacher.span)
    num_spans = first_s.numel()
    most = torch.maximum(*(torch.bincount(bins, minlength=num_bins) for bins in (student_bin, teacher_bin)))
    crowded = most > 1
    bin_s, bin_t = student_bin[student.ids[first_s]], teacher_bin[teacher.ids[first_t]]
    wanted = (first_s < last_s) | (first_t < last_t) | crowded[bin_s] | crowded[bin_t]
    span_s = _span_logprobs(student, num_spans, wanted, chunk)
    with torch.no_grad():
        span_t = _span_logprobs(teacher, num_spans, wanted, chunk)

    def coarse(logs, bins, span_logp, own_bin, wanted):
        law = logs.exp()
        law = law.new_zeros(law.size(0), num_bins).scatter_add(1, bins.expand_as(law), law)
        span_p = torch.where(wanted, span_logp.exp(), 0.0).to(law.dtype)[:, None]
        law = law.scatter_add(1, own_bin[:, None], -span_p).clamp_min(0.0)
        return torch.cat([law, span_p], 1).clamp_min(1e-30).log()

    def fn(z, teacher_z, extra, rows):
        logz = F.log_softmax(z, dim=-1)
        logy = F.log_softmax(teacher_z / teacher.temperature, dim=-1)
        logq = coarse(_tempered(logz, student.temperature), student_bin, extra[:, 0], bin_s[rows], wanted[rows])
        logp = coarse(logy, teacher_bin, extra[:, 1].detach(), bin_t[rows], wanted[rows])
        return divergence(logp, logq, beta, scale).sum(-1), _law_stats(logz, student.ids[first_s[rows]])

    extra = torch.stack([span_s, span_t], 1)
    return _row_loss(_by_autograd(fn), student.at(first_s), teacher.at(first_t), extra, chunk, first_s)


def alm_loss(student: Side, teacher_logprobs: Tensor, teacher_span: Tensor, chunk: int | None = None) -> Loss:
    """Approximate likelihood matching of spans (Minixhofer et al. 2025, arXiv 2503.20083) in the limit tau -> infinity.

    With a, b = -log P(span) of teacher and student, tau KL(Bernoulli(e^{-a/tau}) || Bernoulli(e^{-b/tau})) tends to
    a log(a/b) - a + b. The teacher's own token probabilities are all it needs: a served teacher has them.

    Args: teacher_logprobs (N',), teacher_span (N',): of the teacher's tokens.
    Returns: Loss with values (G,).
    """
    num_spans = int(student.span.max()) + 1 if student.span.numel() else 0
    logq, entropy = token_logprobs(student, chunk)

    def per_span(logs, span):
        inside = span >= 0
        return -logs.new_zeros(num_spans).index_add(0, span[inside], logs[inside])

    values = alm_terms(per_span(teacher_logprobs.double(), teacher_span), per_span(logq, student.span))
    return Loss(values.sum(), values.detach(), {"entropy": entropy, "logprob": logq.detach()})


def alm_terms(a: Tensor, b: Tensor) -> Tensor:
    """a log(a/b) - a + b >= 0 for negative log probabilities a (teacher) and b (student); exactly 0 at a = b."""
    a, b = a.clamp_min(1e-9), b.clamp_min(1e-9)
    return a * (a / b).log() - a + b


def uld_loss(
    student: Side,
    teacher: Side,
    match: tuple[Tensor, Tensor] | None = None,
    weights: tuple[float, float] | None = None,
    beta: float = 0.5,
    scale: str = "kl",
    chunk: int | None = None,
    trl: str | None = None,
) -> Loss:
    """Universal Logit Distillation (Boizard et al. 2024, arXiv 2402.12030): L1 between sorted laws, for comparison.

    A span of several tokens is the law at its last token times the chain-rule probability of the tokens before, so that
    a span of one token is untouched. With `match`, the hybrid of GOLD: `divergence` on matched tokens, sorted L1 on the
    rest. Both are biased: the minimum is not the teacher (README, "the known optimum").

    Args:
        match: ids (K,), (K,) of the same K byte strings in student and teacher vocabulary; None compares sorted laws.
        weights: of the matched and the unmatched part; None is TRL's (K / U, 1 - K / U).
        trl: None is the above. "bayesian" and "observed" reproduce TRL 1.16's two merge strategies where they differ
            from it: probabilities clamped at 1e-8, terms without normalisation (they can be negative), raw scale, and
            for "observed" every law read one position late. Then the last token of each completion must not be in a
            span, as TRL skips it, and TRL's value is the mean over rows of the mean over their spans.
    Returns: Loss with values (G,) and more stats {"matched", "unmatched"} per span.
    """
    late = 1 if trl == "observed" else 0
    (first_s, last_s), (first_t, last_t) = _span_ends(student.span), _span_ends(teacher.span)
    base_s, base_t = (first_s + 1, first_t + 1) if late else (last_s, last_t)
    match_s, match_t = match or (first_s[:0], first_t[:0])
    rest_s, rest_t = _unmatched(student, match_s), _unmatched(teacher, match_t)
    share = match_t.numel() / teacher.head.weight.size(0)
    matched_weight, rest_weight = weights or (share, 1 - share)

    def others(side: Side, base: Tensor) -> Tensor:
        """Log probability (G,) of the span's tokens other than the one whose whole law is compared."""
        keep = side.span >= 0
        keep[base - late] = False
        rows = keep.nonzero()[:, 0]
        logp, _ = token_logprobs(replace(side.at(rows), hidden=side.hidden[rows + late]), chunk)
        logp = logp.clamp_min(math.log(1e-8)) if trl else logp
        return logp.new_zeros(base.numel()).index_add(0, side.span[rows], logp)

    def sorted_l1(q: Tensor, p: Tensor) -> Tensor:
        if q.size(1) == 0 or p.size(1) == 0:
            return q.new_zeros(q.size(0))
        width = max(q.size(1), p.size(1))
        q, p = (F.pad(x.sort(dim=-1, descending=True).values, (0, width - x.size(1))) for x in (q, p))
        return (q - p).abs().sum(-1)

    def fn(z, teacher_z, extra, rows):
        extra = extra.to(z.dtype)
        logz = F.log_softmax(z, dim=-1)
        logq = _tempered(logz, student.temperature) + extra[:, :1]
        logp = F.log_softmax(teacher_z / teacher.temperature, dim=-1) + extra[:, 1:].detach()
        part_q, part_p = logq[:, match_s], logp[:, match_t]
        matched = (_trl_terms(part_p, part_q, beta) if trl else divergence(part_p, part_q, beta, scale)).sum(-1)
        unmatched = sorted_l1(logq[:, rest_s].exp(), logp[:, rest_t].exp())
        stats = _law_stats(logz, student.ids[base_s[rows]]) | {"matched": matched, "unmatched": unmatched}
        return matched_weight * matched + rest_weight * unmatched, stats

    others_s = others(student, base_s)
    with torch.no_grad():
        others_t = others(teacher, base_t)
    extra = torch.stack([others_s, others_t], 1)
    return _row_loss(_by_autograd(fn), student.at(base_s), teacher.at(base_t), extra, chunk, base_s)


def _unmatched(side: Side, matched: Tensor) -> Tensor:
    """Ids of the side's vocabulary that are not among `matched`."""
    rest = torch.ones(side.head.weight.size(0), dtype=torch.bool, device=matched.device)
    rest[matched] = False
    return rest.nonzero()[:, 0]


def _trl_terms(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """TRL 1.16's matched part: eq. 1 on parts of laws, as if they were laws."""
    logp, logq = (x.exp().clamp_min(1e-8).log() for x in (logp, logq))
    if beta == 0:
        return logp.exp() * (logp - logq)
    if beta == 1:
        return logq.exp() * (logq - logp)
    logm = torch.logaddexp(logq + math.log1p(-beta), logp + math.log(beta))
    return beta * logp.exp() * (logp - logm) + (1 - beta) * logq.exp() * (logq - logm)


# ----------------------------------------------------------------------------------------------------------------------
# two vocabularies: text


@dataclass(frozen=True)
class Queries:
    """What `prefix_loss` asks of one model: masses of token ranges, each "tokens that start with these bytes".

    `order` (K,) lists token ids sorted by their bytes, the end-of-text ids last; a range is [lo, hi) in it. Query e
    reads the law of row[e] (ascending) and adds its mass, times the probability of the path up to that row, to slot[e]:
    slots 0..O-1 are outcomes, O..O+M-1 the totals that the outcomes of an offset are divided by, O+M is discarded.
    Row full_row[f] also adds its whole next-byte law to the 257 slots from full_slot[f]: the bytes, then the end.
    """

    order: Tensor  # (K,)
    edge: Tensor  # (258,) where in `order` each first byte begins; then the end-of-text ids; then K
    row: Tensor  # (E,)
    lo: Tensor  # (E,)
    hi: Tensor  # (E,)
    slot: Tensor  # (E,)
    path: Tensor  # (N,) the query that asks for row i's own token
    start: Tensor  # (N,) first row of the completion that row i belongs to
    full_row: Tensor  # (F,) ascending
    full_slot: Tensor  # (F,)


NARROW = 16  # ranges of up to this many tokens are summed directly, wider ones by differences of a running sum
TINY = 1e-200  # stands for a probability too small to see, where 0 would say that the text cannot be written


def _range_masses(side: Side, q: Queries, chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy (N,), log mass (E,) of each query's range, next-byte law (F, 257) of the full rows; float64.

    What the vocabulary can write is never 0, what it cannot write is exactly 0.
    """
    steps = torch.arange(NARROW, device=q.row.device)
    rows_up_to = torch.arange(side.hidden.size(0) + 1, device=q.row.device)
    query_bound, full_bound = (torch.searchsorted(r, rows_up_to).tolist() for r in (q.row, q.full_row))
    writable = q.edge.diff() > 0

    def feature_fn(logp, rows):
        part = slice(query_bound[rows.start], query_bound[rows.stop])
        row, lo, hi = q.row[part] - rows.start, q.lo[part], q.hi[part]
        logp = logp[:, q.order]
        running = F.pad(logp.exp().cumsum(-1, dtype=torch.float64), (1, 0))
        mass = running[row, hi] - running[row, lo]
        narrow = (hi - lo <= NARROW).nonzero()[:, 0]
        a, b = lo[narrow, None] + steps, hi[narrow, None]
        few = logp[row[narrow, None], a.clamp(max=logp.size(1) - 1)].double().masked_fill(a >= b, -math.inf)
        mass = mass.clamp_min(TINY).log().index_copy(0, narrow, few.logsumexp(-1))
        full = q.full_row[full_bound[rows.start] : full_bound[rows.stop]] - rows.start
        return mass, running[full][:, q.edge].diff(dim=1).clamp_min(TINY) * writable

    return _row_features(feature_fn, side, chunk)


def _segment_logsumexp(x: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """log sum exp of x (E,) over each segment (num_segments,), none of which is empty."""
    top = x.new_full((num_segments,), -math.inf).scatter_reduce(0, segment, x.detach(), "amax")
    return x.new_zeros(num_segments).index_add(0, segment, (x - top[segment]).exp()).log() + top


def prefix_loss(
    student: Side,
    teacher: Side,
    student_queries: Queries,
    teacher_queries: Queries,
    offset: Tensor,
    num_offsets: int,
    beta: float,
    scale: str = "kl",
    chunk: int | None = None,
) -> Loss:
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
    num_outcomes, counted = offset.numel(), offset >= 0
    offset = torch.where(counted, offset, -1 - offset)

    def text_law(side: Side, q: Queries) -> tuple[Tensor, dict[str, Tensor]]:
        """Probabilities (O,) of the outcomes: sums of path times range, over the total of the outcome's offset."""
        entropy, mass, full = _range_masses(side, q, chunk)
        own = mass[q.path]
        before = own.cumsum(0) - own  # (N,) log probability of all earlier tokens of the batch
        log_path = before - before[q.start]
        joint, slot = log_path[q.row] + mass, q.slot - num_outcomes
        totals = (slot >= 0) & (slot < num_offsets)
        log_total = _segment_logsumexp(joint[totals], slot[totals], num_offsets)
        named = (slot < 0).nonzero()[:, 0]
        part = (joint[named] - log_total[offset[q.slot[named]]]).clamp_min(math.log(TINY)).exp()
        full = full * (log_path[q.full_row] - log_total[offset[q.full_slot]]).exp()[:, None]
        full_slot = q.full_slot[:, None] + torch.arange(257, device=offset.device)
        law = full.new_zeros(num_outcomes).index_add(0, full_slot.flatten(), full.flatten())
        return law.index_add(0, q.slot[named], part), {"entropy": entropy, "logprob": own.detach()}

    student_law, stats = text_law(student, student_queries)
    with torch.no_grad():
        teacher_law, _ = text_law(teacher, teacher_queries)

    # what one vocabulary cannot write at all is part of "anything else" for both
    shared = (counted & (student_law > 0) & (teacher_law > 0)).nonzero()[:, 0]
    logq, logp, offset = student_law[shared].log(), teacher_law[shared].log(), offset[shared]

    def anything_else(law):
        return (1 - law.new_zeros(num_offsets).index_add(0, offset, law[shared])).clamp_min(1e-12).log()

    values = divergence(anything_else(teacher_law), anything_else(student_law), beta, scale)
    values = values.index_add(0, offset, divergence(logp, logq, beta, scale))
    return Loss(values.sum(), values.detach(), stats)
