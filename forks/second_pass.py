"""Fork: the prefix loss at every offset of the text, by a second pass over the contexts that the first does not visit.

    python forks/second_pass.py --student-model S --teacher-model T --cross-tokenizer-loss whole      and any other flag

The canonical tokens of x_1..x_m are one sequence c_m. The tokens of every text that starts with x_1..x_k pass through
some c_m, m <= k, whose next token reaches beyond k:

    F(k) = sum over m <= k of P(c_m) p(tokens that start with x_{m+1}..x_k | c_m).

`prefix` has the c_m that are beginnings of the completion's own tokens, uses the offsets where no other can count, and
merges what lies between. Here all c_m are read: they form a tree, which is one row of tokens behind the prompt, where
each sees its ancestors only (a mask, and positions by depth). So both laws of the next byte are known everywhere, and
their JSD is that of the two laws of text, not of a coarser view of them. The price is a row that is four to five times
as long (tests/bench_missed.py), in both models. Numbers: tests/RESULTS.md, Losses for two tokenizers.

Exact for canonical tokens, where no character is cut by tokens of which only some texts have the cut (ASCII is fine).
Needs both models in this process and attention that takes a mask of pairs (sdpa, eager).
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor

import gold_data
import gold_loss
import gold_train
from gold_data import Vocabulary, need
from gold_loss import Loss, Side


@dataclass
class Batch(gold_data.Batch):
    student_tree: dict[str, Tensor] | None = None
    teacher_tree: dict[str, Tensor] | None = None


@functools.lru_cache(4096)  # the answers of a data set come again
def tree_of(v: Vocabulary, text: bytes, offsets: int) -> dict[str, np.ndarray]:
    """All contexts of a text as a tree of K tokens, and what the law of the next byte at 0..offsets-1 asks of them.

    Node 0 is the end of the prompt, node i > 0 its parent followed by one token; parents come first.

    Returns: token, parent (K,) of nodes 1..K. row, lo, hi, slot (E,): the mass order[lo:hi] of node `row` is part of
    outcome `slot` = 257 x offset + byte. full_row, full_offset (F,): a node that ends at this offset, whose whole
    next-byte law, and the end of the text, counts there.
    """
    nodes, parent, at = {(): 0}, [], {}
    for m in range(offsets):
        context = tuple(v.encode(text[:m])[0])
        if v.join(context) != text[:m]:
            continue  # it ends inside a character
        for n in range(1, len(context) + 1):
            if context[:n] not in nodes:
                parent.append(nodes[context[: n - 1]])
                nodes[context[:n]] = len(nodes)
        at[m] = nodes[context]
    start, node_at = (np.array([*x], dtype=np.int64) for x in (at, at.values()))
    index, end, prefix = v.tree.walk(np.frombuffer(text[:offsets], np.uint8).astype(np.int64), start)
    inside = (end > start[index]) & (end < offsets)
    index, end, prefix = index[inside], end[inside], prefix[inside]
    of, child = v.tree.children(prefix)
    query = {"row": node_at[index[of]], "lo": v.tree.lo[child], "hi": v.tree.hi[child]}
    query["slot"] = 257 * end[of] + v.tree.byte[child]
    order = query["row"].argsort(kind="stable")
    full = node_at.argsort(kind="stable")
    return {k: x[order] for k, x in query.items()} | {
        "token": np.array([c[-1] for c in [*nodes][1:]], dtype=np.int64), "parent": np.array(parent, dtype=np.int64),
        "full_row": node_at[full], "full_offset": start[full],
    }  # fmt: skip


def collate_trees(v: Vocabulary, prompts: list[list[int]], texts: list[tuple[bytes, int]]) -> dict[str, Tensor]:
    """Trees of a batch behind their prompts: ids, position (B, T), mask (B, 1, T, T) of what a token sees; `at` (N,)
    flat positions of all nodes; and the trees' columns, counted over the batch."""
    trees = [tree_of(v, text, offsets) for text, offsets in texts]
    longest = max(len(p) + len(t["token"]) for p, t in zip(prompts, trees))
    ids, position = np.zeros((2, len(trees), longest), dtype=np.int64)
    mask = np.zeros((len(trees), 1, longest, longest), dtype=bool)
    mask[:] = np.eye(longest, dtype=bool)
    columns, nodes, offsets = [], 0, 0
    for i, (prompt, tree, (_, size)) in enumerate(zip(prompts, trees, texts)):
        p, k = len(prompt), len(tree["token"])
        ids[i, : p + k] = prompt + tree["token"].tolist()
        position[i, :p] = np.arange(p)
        sees = mask[i, 0]
        sees[:p, :p] = np.tri(p, dtype=bool)
        for n, above in enumerate(tree["parent"].tolist()):
            sees[p + n, : p + k] |= sees[p + above - 1, : p + k]
            position[i, p + n] = position[i, p + above - 1] + 1
        node, ancestor = np.nonzero(sees[p : p + k, p : p + k])  # of each node, and itself
        part = {"node": nodes + 1 + node, "ancestor": nodes - i + ancestor, "parent": nodes + tree["parent"]}
        part |= {"token": tree["token"], "at": i * longest + p - 1 + np.arange(k + 1)}
        part |= {k: nodes + tree[k] for k in ("row", "full_row")} | {k: tree[k] for k in ("lo", "hi")}
        part |= {"slot": 257 * offsets + tree["slot"], "full_offset": offsets + tree["full_offset"]}
        columns.append(part)
        nodes, offsets = nodes + k + 1, offsets + size
    tree = {k: np.concatenate([part[k] for part in columns]) for k in columns[0]}
    found = {"ids": ids, "position": position, "mask": mask} | tree
    return {k: torch.from_numpy(x) for k, x in found.items()}


def collate(samples, with_teacher: bool = True, plain=gold_data.collate) -> gold_data.Batch:
    batch = plain(samples, with_teacher)
    if not with_teacher or samples[0].alignment is None or not PAIR:
        return batch
    texts = []
    for s in samples:
        text = PAIR[0].join(s.completion_ids)[: s.alignment.scored_bytes]
        ended = s.finished and s.alignment.student_scored == len(s.completion_ids)  # then the law at its end counts
        texts.append((text, len(text) + ended))
    prompts = zip(*((s.prompt_ids, s.teacher_prompt_ids) for s in samples))
    batch.student_tree, batch.teacher_tree = (collate_trees(v, list(p), texts) for v, p in zip(PAIR, prompts))
    batch.offset_sample = torch.arange(len(samples)).repeat_interleave(torch.tensor([n for _, n in texts]))
    return batch


def hidden_states(backbone, tree: dict[str, Tensor]) -> Tensor:
    """(N, H) of all nodes."""
    inputs = {"input_ids": tree["ids"], "position_ids": tree["position"], "attention_mask": tree["mask"]}
    return backbone(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[tree["at"]]


def text_law(side: Side, tree: dict[str, Tensor], order: Tensor, edge: Tensor, num_offsets: int) -> Tensor:
    """(M, 257) law of the next byte, or the end, at every offset of the batch, float64."""
    rows = torch.arange(side.hidden.size(0) + 1)
    before = lambda r: torch.searchsorted(r.cpu(), rows).tolist()
    by_parent = tree["parent"].argsort(stable=True)
    token = tree["parent"][by_parent], tree["token"][by_parent]
    first = edge[:257].expand(len(tree["full_row"]), -1)
    full_row = tree["full_row"][:, None].expand_as(first)
    ranges = [(tree["row"], tree["lo"], tree["hi"]), (full_row, first, edge[1:].expand_as(first))]
    reads = (*token, before(token[0])), order, [(*r, before(r[0].view(len(r[0]), -1)[:, 0])) for r in ranges]
    _, logp, mass, full = gold_loss._law_reads(side, None, *reads)
    own = torch.zeros_like(logp).index_copy(0, by_parent, logp)
    path = logp.new_zeros(len(rows) - 1).index_add(0, tree["node"], own[tree["ancestor"]])  # log P(c_m)
    top = path.new_full((num_offsets,), -torch.inf)
    top = top.scatter_reduce(0, tree["full_offset"], path.detach()[tree["full_row"]], "amax")
    top = top.scatter_reduce(0, tree["slot"] // 257, path.detach()[tree["row"]], "amax")
    weight = lambda row, offset: (path[row] - top[offset]).exp()
    law = mass.new_zeros(num_offsets * 257).index_add(0, tree["slot"], mass * weight(tree["row"], tree["slot"] // 257))
    full = full * weight(tree["full_row"], tree["full_offset"])[:, None]
    law = law.view(-1, 257).index_add(0, tree["full_offset"], full)
    return law / law.sum(-1, keepdim=True)


def compare(cfg, parts, tables, ours: Side, theirs: Side, batch: Batch) -> tuple[Loss, Tensor]:
    """JSD of the laws of text, offset by offset; the first pass tells what is logged."""
    model, num_offsets = getattr(parts.model, "module", parts.model), len(batch.offset_sample)
    with parts.autocast:
        hidden = hidden_states(model.backbone, batch.student_tree).to(model.dtype)
    q = text_law(Side(hidden, ours.head), batch.student_tree, *tables[0], num_offsets)
    with torch.no_grad():
        hidden = hidden_states(parts.teacher.backbone, batch.teacher_tree)
        p = text_law(Side(hidden, theirs.head), batch.teacher_tree, *tables[1], num_offsets)
        logprob, entropy = gold_loss.token_logprobs(ours)
    logp, logq = (law.clamp_min(gold_loss.TINY).log() for law in (p, q))
    values = gold_loss.divergence(logp, logq, cfg.beta, cfg.jsd_scale).sum(-1)
    return Loss(values.sum(), values.detach(), {"entropy": entropy, "logprob": logprob}), batch.offset_sample


PAIR: list[Vocabulary] = []  # student's and teacher's, of the run


def whole_pair(cfg, student: Vocabulary, teacher: Vocabulary, put):
    """Raises ValueError for a vocabulary without all single bytes, or a teacher in another process."""
    for v in (student, teacher):
        name = v.tokenizer.name_or_path
        need(len(v.single) == 256 and not v.lossy, f"{name} cannot write every byte: --cross-tokenizer-loss prefix")
    need(not cfg.teacher_device, "the second pass needs a teacher on each rank: no --teacher-device")
    need(cfg.shard == "none", "the second pass runs beside the model's own: --shard none")
    PAIR[:] = student, teacher
    return [(put(v.order), put(v.edge)) for v in PAIR]


def pair(cfg, student, teacher, device, plain=gold_train.pair) -> gold_train.Pairing:
    PAIR.clear()  # of an earlier run of this process
    return plain(cfg, student, teacher, device)


def distill(cfg, parts, student, batch, stats, plain=gold_train.distill) -> tuple[Loss, Tensor]:
    if parts.pairing.loss == "whole":
        with_models = functools.partial(compare, cfg, parts, parts.pairing.compare)
        parts = parts._replace(pairing=parts.pairing._replace(compare=with_models))
    return plain(cfg, parts, student, batch, stats)


gold_train.CROSS_LOSSES["whole"] = whole_pair
gold_train.AT_TEMPERATURE_1.add("whole")
gold_train.pair = pair
gold_data.Batch = Batch
gold_data.collate = collate
gold_train.distill = distill

if __name__ == "__main__":
    gold_train.main()
