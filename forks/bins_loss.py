"""Fork: add a loss in one file. `bins` compares both next-token laws, coarsened to shared byte strings, at span starts.

    python forks/bins_loss.py --cross-tokenizer-loss bins --output-dir out/bins       any flag of gold_train.py
    python forks/bins_loss.py --cross-tokenizer-loss bins+alm --output-dir out/bins   plus the likelihood of spans

Expected of the first: 64.8 % of the embedded job's 512 held-out puzzles after 600 steps (0.4 % before, answers alone
47.9 %, teacher 89.5 %), seed 0, 2 shared CPU cores, minutes, 2026-11-26; `prefix` has 65.2 % with that seed.

What to copy: a function (student side, teacher side, ..) -> gold_loss.Loss, a function that makes its tables once and
returns what compares a batch, and the line that enters it into gold_train.CROSS_LOSSES.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import gold_data
import gold_loss
import gold_train
from gold_loss import Loss, Side


def span_logprobs(side: Side, num_spans: int, wanted: Tensor, chunk: int | None) -> Tensor:
    """Chain-rule log probability (G,) of the wanted spans' own tokens, 0 for the others; gradient for both tensors."""
    rows = ((side.span >= 0) & wanted[side.span.clamp_min(0)]).nonzero()[:, 0] if num_spans else side.span.new_zeros(0)
    logp, _ = gold_loss.token_logprobs(side.at(rows), chunk)
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
    vocabularies this is `gold_loss.jsd`. Biased: RESULTS, The known optimum.

    Args: student_bin (V,), teacher_bin (U,): bin of each token id (shared_bins).
    Returns: Loss with values (G,).
    """
    (first_s, last_s), (first_t, last_t) = gold_loss.span_ends(student.span), gold_loss.span_ends(teacher.span)
    num_spans = first_s.numel()
    most = torch.maximum(*(torch.bincount(bins, minlength=num_bins) for bins in (student_bin, teacher_bin)))
    crowded = most > 1
    bin_s, bin_t = student_bin[student.ids[first_s]], teacher_bin[teacher.ids[first_t]]
    wanted = (first_s < last_s) | (first_t < last_t) | crowded[bin_s] | crowded[bin_t]
    span_s = span_logprobs(student, num_spans, wanted, chunk)
    with torch.no_grad():
        span_t = span_logprobs(teacher, num_spans, wanted, chunk)

    def coarse(logs, bins, span_logp, own_bin, wanted):
        law = logs.exp()
        law = law.new_zeros(law.size(0), num_bins).scatter_add(1, bins.expand_as(law), law)
        span_p = torch.where(wanted, span_logp.exp(), 0.0).to(law.dtype)[:, None]
        law = law.scatter_add(1, own_bin[:, None], -span_p).clamp_min(0.0)
        return torch.cat([law, span_p], 1).clamp_min(1e-30).log()

    def fn(z, teacher_z, extra, rows):
        logz = F.log_softmax(z, dim=-1)
        logs_s = F.log_softmax(z / student.temperature, dim=-1)
        logs_t = F.log_softmax(teacher_z / teacher.temperature, dim=-1)
        logq = coarse(logs_s, student_bin, extra[:, 0], bin_s[rows], wanted[rows])
        logp = coarse(logs_t, teacher_bin, extra[:, 1].detach(), bin_t[rows], wanted[rows])
        values = gold_loss.divergence(logp, logq, beta, scale).sum(-1)
        return values, gold_loss.law_stats(logz, student.ids[first_s[rows]])

    extra, starts = torch.stack([span_s, span_t], 1), (student.at(first_s), teacher.at(first_t))
    return gold_loss.row_loss(gold_loss.by_autograd(fn), *starts, extra, chunk, first_s)


def shared_bins(student: gold_data.Vocabulary, teacher: gold_data.Vocabulary) -> tuple[np.ndarray, np.ndarray, int]:
    """(student bin (V,), teacher bin (U,), number of bins): many-to-one maps of both vocabularies onto shared bytes.

    A token's bin is its longest prefix that is a token of both vocabularies; all ids that end a text share one bin, by
    role, and what has no shared prefix shares the last.
    """
    number = {b: i for i, b in enumerate(sorted({*student.tokens} & {*teacher.tokens}))}
    end, nothing = len(number), len(number) + 1

    def bins(v: gold_data.Vocabulary) -> np.ndarray:
        prefixes = ((number.get(b[:n]) for n in range(len(b), 0, -1)) for b in (b or b"" for b in v.bytes))
        out = np.array([next((bin for bin in some if bin is not None), nothing) for some in prefixes])
        out[list(v.ends)] = end
        return out

    return bins(student), bins(teacher), len(number) + 2


def bins_pair(cfg: gold_train.Config, student: gold_data.Vocabulary, teacher: gold_data.Vocabulary, put) -> Callable:
    """What gold_train.distill calls with both sides of a batch; alm gives the other half of bins+alm."""
    student_bin, teacher_bin, num_bins = shared_bins(student, teacher)
    bins, alm = (put(student_bin), put(teacher_bin), num_bins), gold_train.alm_pair(cfg, student, teacher, put)

    def compare(ours: Side, theirs: Side, batch: gold_data.Batch) -> tuple[Loss, Tensor]:
        loss, sample = bins_loss(ours, theirs, *bins, cfg.beta, cfg.jsd_scale), batch.span_sample
        if cfg.cross_tokenizer_loss == "bins+alm":
            more, _ = alm(ours, theirs, batch)
            loss = Loss(loss.total + more.total, loss.values + more.values, more.stats)
        return loss, sample

    return compare


gold_train.CROSS_LOSSES |= {"bins": bins_pair, "bins+alm": bins_pair}
gold_train.AT_TEMPERATURE_1 |= {"bins", "bins+alm"}  # spans multiply token probabilities

if __name__ == "__main__":
    gold_train.main()
