"""TRL 1.16's ULD loss on the rows that predict a completion, written densely: what gold_loss.uld_loss is compared with.

Its two merge strategies differ from ours: probabilities are clamped at 1e-8, the matched part is eq. 1 on parts of laws
as if they were laws (it can be negative), scale "raw", and "observed" reads every law one position late. The last token
of a completion is in no span, as TRL skips it. TRL's value is the mean over rows of the mean over their spans.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def matched_terms(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    logp, logq = (x.exp().clamp_min(1e-8).log() for x in (logp, logq))
    if beta == 0:
        return logp.exp() * (logp - logq)
    if beta == 1:
        return logq.exp() * (logq - logp)
    logm = torch.logaddexp(logq + math.log1p(-beta), logp + math.log(beta))
    return beta * logp.exp() * (logp - logm) + (1 - beta) * logq.exp() * (logq - logm)


def merged(z: Tensor, ids: Tensor, span: Tensor, merge: str) -> Tensor:
    """Log (G, V) of what TRL takes for laws of spans: one law times the probabilities of the span's other tokens."""
    logp, late = F.log_softmax(z, dim=-1), int(merge == "observed")
    own = logp.gather(1, ids[:, None])[:, 0]
    out = []
    for g in range(int(span.max()) + 1):
        rows = (span == g).nonzero()[:, 0]
        base, others = (rows[0] + 1, rows[1:] + 1) if late else (rows[-1], rows[:-1])
        out.append(
            logp[base] + (logp[others, ids[others - late]] if late else own[others]).clamp_min(math.log(1e-8)).sum()
        )
    return torch.stack(out)


def trl_uld(student, teacher, match, weights, beta: float, merge: str) -> Tensor:
    """Values (G,); student, teacher: (logits (N, V), ids (N,), span (N,)); the rest as in gold_loss.uld_loss."""
    logq, logp = (merged(*side, merge) for side in (student, teacher))
    match_s, match_t = match or (torch.zeros(0, dtype=torch.long),) * 2
    share = match_t.numel() / logp.size(1)
    matched_weight, rest_weight = weights or (share, 1 - share)
    rest_q, rest_p = (
        x[:, [i for i in range(x.size(1)) if i not in set(ids.tolist())]].exp().sort(-1, descending=True).values
        for x, ids in ((logq, match_s), (logp, match_t))
    )
    width = max(rest_q.size(1), rest_p.size(1))
    rest_q, rest_p = (F.pad(x, (0, width - x.size(1))) for x in (rest_q, rest_p))
    matched = matched_terms(logp[:, match_t], logq[:, match_s], beta).sum(-1)
    return matched_weight * matched + rest_weight * (rest_q - rest_p).abs().sum(-1)
