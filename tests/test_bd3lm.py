"""forks/gsm8k_bd3lm.py: the objective against enumeration, the mask and the sampler against plain code, the loop.

pytest tests/test_bd3lm.py
"""

import itertools
import json
import math
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import on_two_ranks, tiny_llama, tiny_model, tiny_qwen

sys.path.insert(0, str(Path(__file__).parent.parent / "forks"))

import gsm8k_bd3lm as fork
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import gold_data
import gold_eval
import gold_train
from gold_buffer import Request, Sampling

ROOT = Path(__file__).parent.parent
V = 12  # ids of the random models; the last one is the hole
ALONE = gold_train.Ranks(0, 0, 1, 1, torch.device("cpu"))


TOKENIZER = SimpleNamespace(mask_token_id=V - 1, eos_token_id=0)


def denoiser(size: int, shift: bool = True, model=None, **settings) -> fork.Denoiser:
    cfg = fork.Config(**{"length": 32, "block_size": size, "shift": shift} | settings)
    return fork.Denoiser(cfg, model or tiny_llama(V, hidden=16), TOKENIZER)


def with_settings(net: fork.Denoiser, **settings) -> fork.Denoiser:
    return fork.Denoiser(replace(net.cfg, **settings), net.model, TOKENIZER)


def texts(rows: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (rows, n) without a hole, keys that all exist)"""
    ids = torch.randint(V - 1, (rows, n), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones(rows, n, dtype=torch.bool)


def plain_logits(model, ids: torch.Tensor, size: int) -> torch.Tensor:
    """(B, n, V): one forward pass in which a block sees itself and what is before it, by eager attention."""
    block = torch.arange(ids.size(1)) // size
    mask = torch.zeros(1, 1, len(block), len(block)).masked_fill(block[:, None] < block, -1e9)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    z = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(before)
    return z


def enumerated(net: fork.Denoiser, ids: list[int]) -> float:
    """The bound of one text: for every block, every set of holes, by plain forward passes of [clean past | block]."""
    total, x = 0.0, torch.tensor([ids])
    for a in range(0, len(ids), net.size):
        free = [i for i in range(max(a, 1), min(a + net.size, len(ids)))]
        for m in range(1, len(free) + 1):
            sets = list(itertools.combinations(free, m))
            for holes in sets:
                noisy = x[:, : a + net.size].clone()
                noisy[0, list(holes)] = net.mask_id
                law = plain_logits(net.model, noisy, net.size)[0, :, : net.mask_id].log_softmax(-1)
                if net.shift:
                    law = law.roll(1, 0)
                total -= sum(law[i, ids[i]].item() for i in holes) / m / len(sets)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# what the model sees


def test_the_mask_is_what_its_definition_says_pair_by_pair():
    n, size, keys = 7, 3, torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).bool()
    mask = fork.block_mask(n, size, keys)[0, 0]
    for q, k in itertools.product(range(2 * n), repeat=2):
        (i, clean_q), (j, clean_k) = (q % n, q >= n), (k % n, k >= n)
        own = i // size == j // size and clean_q == clean_k
        past = clean_k and j // size < i // size
        assert mask[q, k] == (q == k or bool(keys[0, j]) and (own or past))


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_doubled_text_equals_a_plain_pass_over_clean_past_and_noisy_block(kind, size):
    models = {"llama": tiny_llama, "qwen2": tiny_qwen}
    make = models.get(kind, lambda v, h: tiny_model(Qwen3Config, Qwen3ForCausalLM, v, h, 2, True, 0))
    net, (clean, keys) = denoiser(size, model=make(V, 16)), texts(2, 24)
    noisy = torch.where(torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)) < 0.5, V - 1, clean)
    hidden = net.hidden(noisy, clean, keys, torch.arange(2 * 48)).view(2, 48, -1)
    z = hidden @ net.head.weight.T
    assert (z[:, 24:] - plain_logits(net.model, clean, size)).abs().max() < 2e-5
    for a in range(0, 24, size):
        ids = torch.cat([clean[:, :a], noisy[:, a : a + size]], 1)
        assert (z[:, a : a + size] - plain_logits(net.model, ids, size)[:, a:]).abs().max() < 2e-5


def test_nothing_sees_a_later_block_a_hidden_token_or_padding():
    net, (ids, keys) = denoiser(4), texts(1, 16)
    keys[:, 13:] = False
    see = lambda noisy, clean: net.hidden(noisy, clean, keys, torch.arange(32))
    base, changed = see(ids, ids), ids.clone()
    changed[0, [6, 14]] = V - 2 - ids[0, [6, 14]]
    noisy_moved = (see(changed, ids) - base).abs().amax(1) > 0
    clean_moved = (see(ids, changed) - base).abs().amax(1) > 0
    assert noisy_moved.nonzero()[:, 0].tolist() == [4, 5, 6, 7, 14]
    assert clean_moved.nonzero()[:, 0].tolist() == [*range(8, 16), *range(20, 32)]


# ----------------------------------------------------------------------------------------------------------------------
# the objective


def drawn(keys: torch.Tensor, size: int, seed: int = 0, **turn) -> tuple[torch.Tensor, torch.Tensor]:
    """(holes, weights) of texts whose tokens exist where keys (B, n) are true."""
    return fork.corrupt(keys, size, [[seed, i] for i in range(len(keys))], **turn)


def test_block_size_1_is_the_causal_lm():
    net, (ids, keys) = denoiser(1), texts(3, 16)
    ours = net.loss(ids, keys, *drawn(keys, 1)).total
    z = net.model(input_ids=ids).logits[:, :-1, : V - 1]
    theirs = torch.nn.functional.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert abs(ours - theirs) < 1e-6 * theirs
    grads = [torch.autograd.grad(loss, net.model.model.layers[0].mlp.up_proj.weight)[0] for loss in (ours, theirs)]
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


def test_block_size_1_without_shift_reads_each_token_at_a_hole_behind_its_past():
    net, (ids, keys) = denoiser(1, shift=False), texts(1, 8)
    theirs = 0.0
    for i in range(1, 8):
        z = net.model(input_ids=torch.cat([ids[:, :i], torch.tensor([[V - 1]])], 1)).logits[0, -1, : V - 1]
        theirs -= z.log_softmax(-1)[ids[0, i]]
    assert abs(net.loss(ids, keys, *drawn(keys, 1)).total - theirs) < 1e-5 * theirs


@pytest.mark.parametrize("shift", [True, False])
def test_one_draw_estimates_average_to_the_enumerated_bound(shift):
    """Blocks of 3 (behind BOS), 4 and, at the end, 2 tokens."""
    net, draws = denoiser(4, shift), 4000
    ids, keys = texts(1, 12)
    keys[:, 10:] = False
    exact = enumerated(net, ids[0, :10].tolist())
    with torch.no_grad():
        many = keys.repeat(draws, 1)
        loss = net.loss(ids.repeat(draws, 1), many, *drawn(many, 4))
    per_draw = torch.zeros(draws).index_add(0, loss.rows // 12, loss.values)
    assert abs(per_draw.mean() - exact) < 4 * per_draw.std() / math.sqrt(draws)
    assert per_draw.std() / math.sqrt(draws) < 0.01 * exact  # so that this can fail


def test_numbers_of_holes_estimate_what_rates_of_holes_estimate_with_a_fifth_of_the_spread_or_less():
    """Against the paper's: each token a hole with chance t, of weight 1 / t, t stratified over the batch's blocks."""
    net, (ids, keys), draws, rng = denoiser(4), texts(8, 16), 300, torch.Generator().manual_seed(2)
    ours, theirs = [], []
    with torch.no_grad():
        for k in range(draws):
            ours.append(net.loss(ids, keys, *drawn(keys, 4, k)).total.item())
            t = (torch.rand(32, generator=rng) + torch.randperm(32, generator=rng)) / 32
            t = (1e-3 + (1 - 1e-3) * t).view(8, 4).repeat_interleave(4, 1)
            holes = torch.rand(8, 16, generator=rng) < t
            holes[:, 0] = False
            theirs.append(net.loss(ids, keys, holes, 1 / t).total.item())
    ours, theirs = np.array(ours), np.array(theirs)
    assert abs(ours.mean() - theirs.mean()) < 4 * math.hypot(ours.std(), theirs.std()) / math.sqrt(draws)
    assert ours.std() < theirs.std() / 5


def test_every_number_of_holes_is_equally_likely_and_so_is_every_place():
    """In the first block, whose first token is known, and in a later one, whose last token does not exist."""
    keys, draws = torch.ones(20_000, 12, dtype=torch.bool), 20_000
    keys[:, 11] = False
    for turn in ({}, {"k": 3, "draws": 4}):
        holes, weight = drawn(keys, 4, **turn)
        for block, places in ((holes[:, :4], [0, 1, 1, 1]), (holes[:, 8:], [1, 1, 1, 0])):
            assert (block.sum(1).bincount() / draws - torch.tensor([0, 1, 1, 1]) / 3).abs().max() < 0.02
            assert (block.float().mean(0) - 2 / 3 * torch.tensor(places)).abs().max() < 0.02
        assert (holes[:, 4:8].sum(1).bincount() / draws - torch.tensor([0, 1, 1, 1, 1]) / 4).abs().max() < 0.02
        maskable = torch.tensor([3.0, 4.0, 3.0]).repeat_interleave(4)
        assert torch.equal(holes.view(-1, 3, 4).sum(-1).repeat_interleave(4, 1) * weight, maskable.expand_as(weight))


def test_draws_of_a_text_meet_every_number_of_holes_equally_often_and_do_not_depend_on_its_padding():
    keys = torch.ones(50, 16, dtype=torch.bool)
    counts = torch.stack([drawn(keys, 4, k=k, draws=8)[0][:, 4:].view(50, 3, 4).sum(-1) for k in range(8)])
    assert torch.equal(counts.sort(0).values[:, 0, 0], torch.tensor([1, 1, 2, 2, 3, 3, 4, 4]))
    assert (counts.sort(0).values == torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])[:, None, None]).all()
    longer = torch.nn.functional.pad(keys, (0, 8), value=False)
    assert torch.equal(drawn(longer, 4, k=2, draws=8)[0][:, :16], drawn(keys, 4, k=2, draws=8)[0])


class Teacher:
    """Laws that depend on the place alone."""

    def __init__(self, rows: int):
        rng = torch.Generator().manual_seed(1)
        self.states = torch.randn(rows, 4, generator=rng, dtype=torch.float64)
        self.head = {"weight": torch.randn(V - 3, 4, generator=rng, dtype=torch.float64)}  # of fewer tokens

    def hidden(self, ids, rows):
        return self.states[rows]


@pytest.mark.parametrize("soft", [None, "frontier", "all"])
def test_the_loss_has_the_value_and_the_gradient_of_its_formula(soft):
    """Weights x cross entropy, or x KL(teacher || student) over the tokens that both have."""
    net, (ids, keys) = denoiser(4, model=tiny_llama(V, hidden=16).double()), texts(2, 16)
    ids, net.dtype = ids.clamp_max(V - 4), torch.float64
    teacher, (holes, weight) = Teacher(32) if soft else None, drawn(keys, 4)
    (b, i), noisy = holes.nonzero(as_tuple=True), torch.where(holes, V - 1, ids)
    z = net.hidden(noisy, ids, keys, b * 32 + i - 1 + 16 * (i % 4 == 0)) @ net.head.weight[: V - 1].T
    slow = -z.log_softmax(-1)[torch.arange(len(i)), ids[holes]]
    if soft:
        logp, logq = (
            (teacher.states[b * 16 + i - 1] @ teacher.head["weight"].T).log_softmax(-1),
            z[:, : V - 3].log_softmax(-1),
        )
        last = [
            not any((~holes)[row, k] for k in range(at + 1, at // 4 * 4 + 4)) for row, at in zip(b.tolist(), i.tolist())
        ]
        assert True in last and False in last
        told = torch.tensor(last) | (soft == "all")
        slow = torch.where(told, (logp.exp() * (logp - logq)).sum(-1), slow)
    loss = net.loss(ids, keys, holes, weight, teacher, soft)
    assert torch.equal(loss.rows, b * 16 + i) and (loss.values - slow * weight[holes]).abs().max() < 1e-12
    assert abs(loss.total - loss.values.sum()) < 1e-12
    inputs = list(net.model.parameters())
    ours, theirs = (
        torch.autograd.grad(x, inputs, retain_graph=True) for x in (loss.total, slow @ weight[holes].double())
    )
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs))


# ----------------------------------------------------------------------------------------------------------------------
# a source with a known law: the bound, and what a teacher may tell


class Source:
    """Order-1 Markov chain over ids 1 .. V - 2; id 0 begins a text. As a teacher it knows its own law."""

    def __init__(self):
        law = torch.softmax(1.5 * torch.randn(V - 1, V - 1, generator=torch.Generator().manual_seed(3)), -1)
        law[:, 0] = 0.0
        self.law = law / law.sum(1, keepdim=True)  # (id, next id)
        self.head = {"weight": self.law.T.clamp_min(1e-30).log()}  # logits of the row of one-hot hidden states

    def hidden(self, ids, rows):
        return torch.nn.functional.one_hot(ids.flatten()[rows], V - 1).float()

    def sample(self, rows: int, n: int, seed: int) -> torch.Tensor:
        rng, ids = torch.Generator().manual_seed(seed), torch.zeros(rows, n, dtype=torch.long)
        for i in range(1, n):
            ids[:, i] = torch.multinomial(self.law[ids[:, i - 1]], 1, generator=rng)[:, 0]
        return ids

    def nats(self, ids: torch.Tensor) -> float:
        """Of these texts, per token but the first."""
        return -self.law[ids[:, :-1], ids[:, 1:]].log().mean().item()


def test_frontier_holes_have_no_later_token_of_their_block_in_sight():
    """Found by their values: a teacher that knows for certain what stands there loses a model that says it, nothing."""
    holes = torch.tensor([[0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0]]).bool()
    keys, (ids, _), net = torch.ones(1, 12, dtype=torch.bool), texts(1, 12), denoiser(4)
    hard = net.loss(ids, keys, holes, torch.ones(1, 12)).values

    def soft_places(keys):
        before = net.loss(ids, keys, holes, torch.ones(1, 12))
        after = net.loss(ids, keys, holes, torch.ones(1, 12), Source(), "frontier")
        return [row for row, a, b in zip(before.rows.tolist(), before.values, after.values) if a != b]

    assert len(hard) == 8 and soft_places(keys) == [3, 4, 5, 6, 7]
    keys[:, 11:] = False  # padding is nothing that one could see
    assert soft_places(keys) == [3, 4, 5, 6, 7, 10]


def test_a_teacher_at_frontier_holes_has_the_expected_gradient_of_answers_and_at_all_holes_it_has_not():
    """Exactly: every text of BOS and three letters out of three, with its probability, for every set of holes."""
    source, net = Source(), denoiser(4)
    source.law[:, 4:] = 0.0
    source.law = source.law / source.law.sum(1, keepdim=True)
    source.head = {"weight": source.law.T.clamp_min(1e-30).log()}
    ids = torch.tensor([[0, *letters] for letters in itertools.product((1, 2, 3), repeat=3)])
    chance, keys = torch.stack([source.law[row[:-1], row[1:]].prod() for row in ids]), torch.ones(27, 4).bool()
    assert abs(chance.sum() - 1) < 1e-6
    largest = {"frontier": 0.0, "all": 0.0}
    for holes in [s for m in (1, 2, 3) for s in itertools.combinations((1, 2, 3), m)]:
        draw = torch.tensor([[i in holes for i in range(4)]]), torch.full((1, 4), 3 / len(holes))
        grads = {}
        for name in ("hard", *largest):
            teacher = None if name == "hard" else source
            total = sum(p * net.loss(row[None], keys[:1], *draw, teacher, name).total for p, row in zip(chance, ids))
            grads[name] = torch.autograd.grad(total, net.model.model.layers[0].mlp.up_proj.weight)[0]
        for name in largest:
            gap = (grads[name] - grads["hard"]).abs().max() / grads["hard"].abs().max()
            largest[name] = max(largest[name], gap.item())
    assert largest["frontier"] < 1e-4 and largest["all"] > 1e-2, largest


def trained_gap(size: int, steps: int, soft: str | None = None) -> float:
    """Bound - nats of the same new texts, per token, after training on texts of the source."""
    torch.manual_seed(0)
    how = {"vocab_size": V, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, eos_token_id=None, **how))  # its laws begin flat
    source, net = Source(), denoiser(size, model=model)
    keys, tokens = torch.ones(32, 16, dtype=torch.bool), 32 * 15
    optimizer = torch.optim.AdamW(net.model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        x0, draw = source.sample(32, 16, step), drawn(keys, size, step)
        (net.loss(x0, keys, *draw, source if soft else None, soft).total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    new = source.sample(512, 16, 10_000)
    return -np.mean(net.score(new.tolist())) - source.nats(new)


@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_the_bound_stays_above_the_entropy_of_the_source_and_comes_near_it(size):
    assert 0 < trained_gap(size, 80) < (0.1 if size == 1 else 0.4)


@pytest.mark.slow
def test_frontier_laws_train_better_than_answers_and_laws_at_all_holes_worse():
    """Measured with seeds 0 and 1: 0.138, 0.155, 0.170 and 0.118, 0.155, 0.170 nats per token."""
    gaps = {soft: trained_gap(4, 250, soft) for soft in ("frontier", None, "all")}
    assert 0 < gaps["frontier"] < gaps[None] < gaps["all"], gaps


# ----------------------------------------------------------------------------------------------------------------------
# the engine: bounds and answers


def test_scores_of_block_size_1_are_log_probabilities():
    net, (ids, _) = denoiser(1), texts(3, 20)
    law = net.model(input_ids=ids).logits[..., : V - 1].log_softmax(-1)
    found = net.score([ids[0].tolist(), ids[1, :7].tolist(), ids[2, :1].tolist()])
    assert np.abs(found[0] - law[0, :-1].gather(1, ids[0, 1:, None])[:, 0].detach().numpy()).max() < 1e-5
    assert np.abs(found[1] - law[1, :6].gather(1, ids[1, 1:7, None])[:, 0].detach().numpy()).max() < 1e-5
    assert [len(x) for x in found] == [19, 6, 0] and found[0].dtype == np.float64


def test_scores_average_to_the_enumerated_bound_whatever_the_lengths_and_more_draws_spread_less():
    net, (ids, _) = denoiser(4), texts(2, 11)
    rows = [ids[0].tolist(), ids[1, :6].tolist()]
    exact = np.array([enumerated(net, row) for row in rows])
    spread = {}
    for draws, seeds in ((1, 200), (8, 60)):
        found = np.array(
            [[-x.sum() for x in with_settings(net, draws=draws, seed=seed).score(rows)] for seed in range(seeds)]
        )
        assert (np.abs(found.mean(0) - exact) < 4 * found.std(0) / math.sqrt(seeds)).all()
        spread[draws] = found.std(0)
    assert (spread[8] < spread[1] / 2).all()


def test_a_score_depends_on_the_text_and_its_place_not_on_its_neighbours():
    net, (ids, _) = denoiser(4), texts(3, 19)
    alone = net.score([ids[0, :9].tolist()])[0]
    together = net.score([ids[0, :9].tolist(), ids[1].tolist(), ids[2, :3].tolist()])[0]
    assert np.abs(alone - together).max() < 1e-5


ENDS = (0, 1, 2)  # so many that some answers end


def slow_answer(net: fork.Denoiser, prompt: list[int], new: int, ends: tuple[int, ...]) -> list[int]:
    """Greedy, without a cache: the surest hole of the current block, by a pass over everything."""
    ids, end = list(prompt), len(prompt) + new
    while len(ids) < end and not set(ids[len(prompt) :]) & set(ends):
        a = len(ids) // net.size * net.size
        ids += [net.mask_id] * (a + net.size - len(ids))
        while holes := [i for i in range(a, a + net.size) if ids[i] == net.mask_id]:
            law = plain_logits(net.model, torch.tensor([ids]), net.size)[0, :, : net.mask_id].log_softmax(-1)
            best = {i: law[i - net.shift].max(0) for i in holes}
            i = max(holes, key=lambda i: best[i].values)
            ids[i] = best[i].indices.item()
    out = ids[len(prompt) : end]
    return out[: next((i + 1 for i, t in enumerate(out) if t in ends), None)]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [1, 4, 8])
@torch.no_grad()
def test_cached_answers_in_a_batch_are_those_without_a_cache_one_by_one(size, shift):
    net, (ids, _) = denoiser(size, shift), texts(12, 12)
    prompts = [ids[i, : i + 1].tolist() for i in range(12)]
    requests, sampling = [Request(p, 0) for p in prompts], Sampling(9, 0.0, end_ids=ENDS)
    found = net.generate(requests, sampling)
    assert [r.completion_ids for r in found] == [slow_answer(net, p, 9, ENDS) for p in prompts]
    assert [r.finished for r in found] == [r.completion_ids[-1] in ENDS for r in found]
    assert {r.finished for r in found} == {True, False} and all(V - 1 not in r.completion_ids for r in found)


def test_answers_of_block_size_1_are_those_of_generate():
    net, (ids, _) = denoiser(1), texts(1, 6)
    with torch.no_grad():
        net.head.weight[V - 1] = -net.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    found = net.generate([Request(ids[0].tolist(), 0)], Sampling(12, 0.0))[0].completion_ids
    theirs = net.model.generate(ids, max_new_tokens=12, do_sample=False, suppress_tokens=[V - 1], pad_token_id=0)
    assert found == theirs[0, 6:].tolist()


def test_random_answers_depend_on_the_seed_alone():
    net, (ids, _) = denoiser(4), texts(5, 9)
    requests = [Request(ids[i, : 9 - i].tolist(), 7 * i) for i in range(5)]
    together = net.generate(requests, Sampling(10, 1.0))
    assert together == [net.generate([r], Sampling(10, 1.0))[0] for r in requests]
    other = net.generate([replace(r, seed=r.seed + 1) for r in requests], Sampling(10, 1.0))
    assert together != other


def test_first_tokens_at_temperature_1_follow_the_law_of_their_holes():
    """Block size 4, one hole left in the block: its law is the model's."""
    net, (ids, _) = denoiser(4), texts(1, 3)
    found = net.generate([Request(ids[0].tolist(), seed) for seed in range(4000)], Sampling(1, 1.0))
    noisy = torch.cat([ids, torch.tensor([[V - 1]])], 1)
    law = plain_logits(net.model, noisy, 4)[0, 2, : V - 1].softmax(-1).detach()
    share = torch.tensor([r.completion_ids[0] for r in found]).bincount(minlength=V - 1) / 4000
    assert ((share - law).abs() < 4 * (law * (1 - law) / 4000).sqrt() + 1e-3).all()


def test_a_nucleus_leaves_the_tokens_that_cross_it_and_no_others():
    net, (ids, _) = denoiser(4, top_p=0.3), texts(1, 3)
    found = net.generate([Request(ids[0].tolist(), seed) for seed in range(500)], Sampling(1, 1.0))
    noisy = torch.cat([ids, torch.tensor([[V - 1]])], 1)
    law = plain_logits(net.model, noisy, 4)[0, 2, : V - 1].softmax(-1).sort(descending=True)
    nucleus = law.indices[: int((law.values.cumsum(0) < 0.3).sum()) + 1].tolist()
    assert {r.completion_ids[0] for r in found} == set(nucleus) and len(nucleus) < V - 1


def test_several_holes_per_pass_need_fewer_passes_and_an_answer_never_exceeds_its_room(monkeypatch):
    net, passes = denoiser(4), []
    forward = net.model.forward
    monkeypatch.setattr(net.model, "forward", lambda *args, **how: passes.append(1) or forward(*args, **how))
    for per_step, wanted in ((1, 8), (2, 4), (4, 2)):
        engine = with_settings(net, per_step=per_step)
        passes.clear()
        found = engine.generate([Request([1, 2, 3, 4], 0)], Sampling(8, 0.0))
        assert len(passes) == wanted and len(found[0].completion_ids) == 8
    found = net.generate([Request([1] * 30, 0), Request([1, 2], 0)], Sampling(8, 0.0))  # length 32
    assert [len(r.completion_ids) for r in found] == [2, 8]


# ----------------------------------------------------------------------------------------------------------------------
# the loop


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with a tiny causal LM and word problems."""
    folder = tmp_path_factory.mktemp("bd3lm")
    for name, test in (("train", False), ("test", True)):
        rows = fork.word_problems(120, test, seed=0)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    gold_train.make_model(folder / "model", lines, True, hidden=32, layers=1, seed=0)
    return folder


def config(start: Path, out: Path, **settings) -> fork.Config:
    usual = {"max_steps": 4, "length": 32, "block_size": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    usual |= {"tasks": (f"gsm8k={start}/test.jsonl", f"ppl={start}/test.jsonl"), "subset": None, "ema": 0.5}
    usual |= {"eval_max_samples": 2, "draws": 1, "max_new_tokens": 4, "dataset": f"{start}/train.jsonl"}
    usual |= {"student_model": str(start / "model"), "output_dir": str(out)}
    return fork.Config(**usual | settings)


def state(out: Path, step: int) -> dict:
    return torch.load(out / "checkpoints" / f"step-{step:06d}" / "trainer.pt", weights_only=True)


def average(out: Path, step: int) -> dict:
    """The weights that are evaluated: the checkpoint as transformers reads it."""
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_killed_run_goes_on_bit_for_bit_and_only_as_the_same_run(start, tmp_path):
    cfg = config(start, tmp_path / "whole", save_steps=2)
    fork.train(cfg, ALONE)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True)
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-000004")
    again = replace(cfg, output_dir=str(tmp_path / "killed"), resume=True)
    with pytest.raises(ValueError, match="without {'block_size': 8}: choose another --output-dir"):
        fork.train(replace(again, block_size=8), ALONE)
    fork.train(again, ALONE)
    whole, resumed = state(tmp_path / "whole", 4), state(tmp_path / "killed", 4)
    assert all(equal(whole[part], resumed[part]) for part in ("step", "weights", "optimizer"))
    assert equal(*(average(tmp_path / name, 4) for name in ("whole", "killed")))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 4
    with pytest.raises(ValueError, match="holds a run already"):
        fork.train(cfg, ALONE)


def test_a_sigterm_ends_a_run_after_its_step_with_a_checkpoint(start, tmp_path, monkeypatch):
    fork.train(config(start, tmp_path / "whole"), ALONE)
    lr, cfg = gold_train.get_lr, config(start, tmp_path / "stopped", save_steps=0)
    told = lambda cfg, done, steps: (done == 1 and signal.raise_signal(signal.SIGTERM), lr(cfg, done, steps))[1]
    monkeypatch.setattr(gold_train, "get_lr", told)
    with pytest.raises(SystemExit, match="143"):
        fork.train(cfg, ALONE)
    monkeypatch.undo()
    assert state(tmp_path / "stopped", 2)["step"] == 2 and not (tmp_path / "stopped" / "results.json").exists()
    fork.train(replace(cfg, resume=True), ALONE)
    assert equal(state(tmp_path / "whole", 4)["weights"], state(tmp_path / "stopped", 4)["weights"])
    assert equal(average(tmp_path / "whole", 4), average(tmp_path / "stopped", 4))
    assert len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_gradient_that_is_not_finite_ends_a_run_before_it_reaches_the_weights(start, tmp_path):
    with pytest.raises(ValueError, match="the gradient of step [2-4] is not finite: lower --learning-rate"):
        fork.train(config(start, tmp_path, learning_rate=1e30, warmup_ratio=0.0), ALONE)


def test_the_saved_model_has_the_averaged_weights_and_knows_its_blocks(start, tmp_path):
    fork.train(config(start, tmp_path, save_steps=3), ALONE)
    weights, before, after = state(tmp_path, 4)["weights"], average(tmp_path, 3), average(tmp_path, 4)
    decay = min(0.5, 5 / 14)
    for name, mean in after.items():
        assert torch.allclose(mean, decay * before[name] + (1 - decay) * weights[name], atol=1e-7)
        assert not torch.equal(mean, weights[name])
    net = fork.open_denoiser(config(start, tmp_path), str(tmp_path / "checkpoints" / "latest"), ALONE)
    assert equal({k: p.data for k, p in net.model.named_parameters()}, after)
    tokenizer, stored = net.tokenizer, json.loads((tmp_path / "checkpoints" / "latest" / "config.json").read_text())
    assert stored["bd3lm"] == {"block_size": 4, "shift": True}
    assert tokenizer.convert_ids_to_tokens(net.mask_id) == "<|mask|>" and net.mask_id == len(tokenizer) - 1
    prompt = tokenizer.decode(gold_data.encode_prompt(tokenizer, [{"role": "user", "content": "Why?"}]))
    assert prompt == f"{tokenizer.eos_token}Question: Why?\nAnswer:"


def test_ranks_and_micro_batches_make_no_difference(start, tmp_path):
    cfg = config(start, tmp_path / "one", per_device_train_batch_size=8, tasks=("ppl=" + str(start / "test.jsonl"),))
    fork.train(cfg, ALONE)
    flags = f"--student-model {start}/model --dataset {start}/train.jsonl --subset None --tasks ppl={start}/test.jsonl"
    flags += " --max-steps 4 --length 32 --block-size 4 --per-device-train-batch-size 2 --gradient-accumulation-steps 2"
    flags += f" --learning-rate 1e-2 --ema 0.5 --eval-max-samples 2 --draws 1 --output-dir {tmp_path}/two"
    on_two_ranks(ROOT / "forks" / "gsm8k_bd3lm.py", *flags.split())
    one, two = (gold_eval.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert all(abs(a["actor/loss"] - b["actor/loss"]) < 1e-5 for a, b in zip(one, two, strict=True))
    one, two = state(tmp_path / "one", 4), state(tmp_path / "two", 4)
    assert all((p - two["weights"][name]).abs().max() < 5e-4 for name, p in one["weights"].items())


@pytest.mark.slow
def test_two_ranks_run_the_embedded_job_and_no_stage_begins_before_its_start_is_written(tmp_path):
    flags = f"--max-steps 2 --per-device-train-batch-size 4 --eval-max-samples 2 --draws 1 --output-dir {tmp_path}/out"
    printed = on_two_ranks(ROOT / "forks" / "gsm8k_bd3lm.py", *flags.split())
    assert f"| {tmp_path}/out/block-4 " in printed
    assert {len(gold_eval.read_jsonl(tmp_path / "out" / name / "metrics.jsonl")) for name in ("ar", "block-4")} == {
        2,
        4,
    }


def test_chunks_are_those_of_the_wrapped_perplexity_and_hold_no_question_of_the_tasks(start, tmp_path):
    vocabulary = gold_data.load_vocabulary(str(start / "model"))
    rows = gold_eval.read_jsonl(start / "train.jsonl") + gold_eval.read_jsonl(start / "test.jsonl")
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, said = config(start, tmp_path, dataset=str(tmp_path / "both.jsonl"), eval_max_samples=None), []
    chunks = fork.wrapped(cfg, vocabulary.tokenizer, said.append)
    assert "120 rows" in said[0] and "in the evaluation task" in said[0]
    order = np.random.default_rng([cfg.seed, 6]).permutation(120)
    (tmp_path / "order.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    asked = []
    recorder = SimpleNamespace(window=512, limit=512, end_ids=[])
    recorder.score = lambda sequences: asked.append(sequences) or [np.zeros(len(ids) - 1) for ids in sequences]
    gold_eval.evaluate(recorder, vocabulary.tokenizer, [f"ppl={tmp_path}/order.jsonl"], wrap=32)
    assert chunks.tolist() == asked[1]


def test_a_teacher_of_the_same_tokenizer_trains_and_gold_eval_draws_the_run(start, tmp_path):
    teacher = {"teacher_model": str(start / "model"), "soft": "all", "gradient_checkpointing": True}
    results = fork.train(config(start, tmp_path, **teacher), ALONE)
    assert set(results[str(tmp_path)]) == {"gsm8k", "ppl"}
    losses = gold_eval.read_run(tmp_path)["loss"]
    assert len(losses) == 4 and all(0 <= loss < 10 for loss in losses.values())  # KL from a model to itself, of holes


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"block_size": 5}, "length 32 is 6.40 blocks of 5"),
        ({"block_size": 0}, "block_size must be at least 1: got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1: got 0"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"length": 256}, "has 256 positions, 256 and a block exceed them"),
        ({"tasks": ("gsm9k",)}, "there is no task 'gsm9k'"),
        ({"mode": "eval"}, "is no checkpoint of this fork"),
        ({"mode": "eval", "student_model": None}, "--mode eval needs a checkpoint"),
        ({"student_model": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(start, tmp_path, settings, words, monkeypatch):
    monkeypatch.setattr(fork.gold_buffer, "load_model", None)
    with pytest.raises(ValueError, match=words):
        fork.check(config(start, tmp_path, **settings))


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding windows"),
    ],
)
def test_models_that_do_not_see_everything_are_refused_by_name(start, tmp_path, entries, words):
    shutil.copytree(start / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | entries | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=f"has {words}: blocks need full attention"):
        fork.check(config(start, tmp_path, student_model=str(tmp_path / "model")))


def test_a_teacher_with_another_tokenizer_is_refused(start, tmp_path, two_models):
    with pytest.raises(ValueError, match="has another tokenizer than"):
        fork.check(config(start, tmp_path, teacher_model=two_models[1]))


def test_a_model_that_ignores_the_mask_or_the_positions_is_refused(monkeypatch):
    model = tiny_llama(V, hidden=16)
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda position_ids=None, **how: forward(**how))
    with pytest.raises(ValueError, match="does not obey our masks"):
        denoiser(4, model=model)
    monkeypatch.undo()
    denoiser(4, model=model)
    monkeypatch.setattr(fork, "block_mask", lambda n, size, keys: torch.ones(1, 1, 2 * n, 2 * n).tril().bool())
    with pytest.raises(ValueError, match="does not obey our masks"):
        denoiser(4, model=model)


def test_the_embedded_job_prints_its_table_and_a_checkpoint_is_scored_with_its_own_blocks_only(
    tmp_path, monkeypatch, capsys
):
    def run(flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gsm8k_bd3lm.py", *flags.split()])
        fork.main()
        return capsys.readouterr().out

    few, out = "--per-device-train-batch-size 2 --eval-max-samples 4 --max-new-tokens 4", tmp_path / "out"
    text = run(f"{few} --max-steps 3 --output-dir {out}")
    assert f"| {out}/ar " in text and f"| {out}/block-4 " in text and "upper bounds" in text
    checkpoint = (
        f"--mode eval --student-model {out}/block-4/checkpoints/latest --length 128 --tasks ppl={out}/test.json"
    )
    with pytest.raises(SystemExit, match="it cannot be evaluated with {'block_size': 8, 'shift': True}"):
        run(f"{checkpoint} --block-size 8")
    ours = json.loads((out / "block-4" / "results.json").read_text())["ppl"]["perplexity"]
    assert f"{ours:.4f}" in run(f"{checkpoint} --block-size 4 --draws 4 --eval-max-samples 4")
