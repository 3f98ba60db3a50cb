"""Fork: block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573) on GSM8K, started from any causal LM.

    python forks/gsm8k_bd3lm.py --block-size 4                embedded: word problems, a tiny model, a CPU, minutes
    torchrun --nproc-per-node 4 forks/gsm8k_bd3lm.py --student-model Qwen/Qwen2.5-0.5B --block-size 16
    python forks/gsm8k_bd3lm.py --mode eval --student-model out/bd3lm/checkpoints/latest --block-size 16

Expected of the first: perplexity at most 1.811, 67.5 % of 200 new problems right; with block size 1 1.602 and 98.5 %,
8: 1.981 and 51.0 %, 16: 2.118 and 25.5 %. 112 CPU seconds of 2 shared cores, 2026-11-26. The second was not run here.

Blocks of a text are written from left to right, the tokens of a block in any order. The model reads [x_t ; x_0], the
text with holes and the text without: a position of x_t sees its own block of x_t and the earlier blocks of x_0. Token i
is read at position i - 1 (--no-shift: at i), as a causal LM has learned it: block size 1 *is* the causal LM.
Not as in the paper's code: the noise is the number of holes of a block, not their rate (the same bound, a twelfth of
its spread), and the model any causal LM with full attention. --teacher-model: its laws stand for tokens where that has
no bias, at holes with no later token of their block in sight. (At all holes of own samples: OPDLM, arXiv 2606.06712.)
"""

import json
import random
import sys
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import gold_train  # first: it sets the environment of threads  # isort: skip
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import gold_buffer
import gold_data
import gold_eval
import gold_loss


@dataclass(frozen=True)
class Config:
    mode: Literal["train", "eval"] = "train"  # eval: perplexity and accuracy of a checkpoint, --student-model
    student_model: str | None = None  # causal LM to start from: directory, Hub id, ID@REVISION; none: the embedded job
    teacher_model: str | None = None  # causal LM with the same tokenizer whose laws are targets; none: the answers are
    soft: Literal["frontier", "all"] = "frontier"  # at which holes; all is biased: the teacher sees no later token
    dataset: str = "openai/gsm8k"  # as in gold_train.py
    subset: str | None = "main"  # configuration of the data set
    split: str = "train"  # with an optional slice
    tasks: tuple[str, ...] = ("gsm8k", "ppl")  # of gold_eval.py, scored at the end; their questions are not trained
    length: int = 512  # tokens per chunk: BOS, rows with an end token each, EOS; and of prompt and answer
    block_size: int = 16  # tokens; 1: autoregressive; the paper's: 4, 8, 16
    shift: bool = True  # position i - 1 predicts token i, as in a causal LM; off: position i, as in the paper
    per_device_train_batch_size: int = 32  # chunks per micro-batch and rank
    gradient_accumulation_steps: int = 1  # micro-batches per step
    max_steps: int = 50_000  # optimizer steps
    learning_rate: float = 3e-4  # peak, AdamW
    lr_scheduler: Literal["cosine", "linear", "constant"] = "constant"  # after warm-up
    warmup_ratio: float = 0.05  # share of the steps with a linear warm-up (the paper: 2,500 steps)
    weight_decay: float = 0.0  # of matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    ema: float = 0.9999  # of the weights that are saved and evaluated; 0: off, better below a thousand steps
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of forward passes; auto: bf16 on GPU
    gradient_checkpointing: bool = False  # less memory, more time
    draws: int = 16  # of noise per text in evaluation
    eval_max_samples: int | None = None  # rows per task; none: all
    max_new_tokens: int = 256  # per answer
    temperature: float = 0.0  # of answers; 0: the surest hole first, its likeliest token; otherwise holes in any order
    per_step: int = 1  # holes filled per forward pass
    output_dir: str = "out/bd3lm"  # metrics.jsonl, checkpoints, answers, results.json
    save_steps: int = 5000  # steps between checkpoints, one more is written at the end; 0: only that one
    resume: bool = False  # go on from the last checkpoint in output_dir
    seed: int = 0  # of data order, noise and answers


EMBEDDED = Config(
    length=128, block_size=4, per_device_train_batch_size=16, max_steps=200, learning_rate=3e-3, lr_scheduler="cosine",
    ema=0.0, draws=4, eval_max_samples=200, max_new_tokens=40,
)  # fmt: skip
MAY_CHANGE = "output_dir save_steps resume tasks draws eval_max_samples max_new_tokens temperature per_step".split()
CHAT = (  # what gold_eval's ppl task reads, as a template: answers are prompted as texts were trained
    "BEGIN{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\nAnswer:"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}END{% endif %}{% endfor %}"
)


def need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check(cfg: Config) -> None:
    """What can be known to be wrong before any weights are read. Raises ValueError with what to change."""
    for name in "block_size draws per_step max_steps max_new_tokens per_device_train_batch_size".split():
        need(asdict(cfg)[name] >= 1, f"{name} must be at least 1: got {asdict(cfg)[name]}")
    need(0 <= cfg.ema < 1 and 0 <= cfg.warmup_ratio <= 1, f"no shares: ema {cfg.ema}, warmup_ratio {cfg.warmup_ratio}")
    blocks, name = cfg.length / cfg.block_size, cfg.student_model
    need(blocks % 1 == 0, f"length {cfg.length} is {blocks:.2f} blocks of {cfg.block_size}: make it a whole number")
    gold_eval.parse_tasks(cfg.tasks)
    if name is None:
        return need(cfg.mode == "train", "--mode eval needs a checkpoint of this fork: --student-model DIR")
    hub = gold_data.hub_name(name)
    ours, theirs = (gold_data.load_vocabulary(*gold_data.hub_name(n)) for n in (name, cfg.teacher_model or name))
    need(ours.tokenizer.eos_token is not None, f"the tokenizer of {name} has no eos token: no answer could end")
    need(gold_data.same_vocabulary(ours, theirs), f"{cfg.teacher_model} has another tokenizer than {name}")
    config = transformers.AutoConfig.from_pretrained(hub[0], revision=hub[1])
    text, most = config.get_text_config().to_dict(), gold_buffer.positions(config)
    kinds = sorted(set(text.get("layer_types") or ()) - {"full_attention"})
    kinds = kinds or ["sliding windows"] * bool(text.get("sliding_window") and text.get("use_sliding_window", True))
    need(not kinds, f"{name} has {', '.join(kinds)}: blocks need full attention")
    need(cfg.length + cfg.block_size <= most, f"{name} has {most} positions, {cfg.length} and a block exceed them")
    stored, here = config.to_dict().get("bd3lm"), {"block_size": cfg.block_size, "shift": cfg.shift}
    need(cfg.mode == "train" or stored, f"{name} is no checkpoint of this fork: gold_eval.py scores causal LMs")
    same = cfg.mode == "train" or here.items() <= stored.items()
    need(same, f"{name} was trained with {stored}: it cannot be evaluated with {here}")


def block_mask(n: int, size: int, keys: Tensor) -> Tensor:
    """(B, 1, 2n, 2n) where a query (row) may look; both are [x_t ; x_0], and keys (B, n) are the tokens that exist."""
    i = torch.arange(2 * n, device=keys.device)
    clean, block = i >= n, i % n // size
    past, own = block[:, None] > block, (clean[:, None] == clean) & (block[:, None] == block)
    seen = (clean & past | own) & keys.repeat(1, 2)[:, None, None, :]
    return seen | (i[:, None] == i)  # padding sees itself: an empty row is NaN


def noise(keys: list[list[int]], lengths: list[int], size: int) -> tuple[Tensor, Tensor]:
    """(u (B, blocks), each of a text in another stratum, order (B, blocks * size)) in [0, 1), of a text's key alone."""
    rngs = [(np.random.default_rng(key), -(-length // size)) for key, length in zip(keys, lengths)]
    u = [torch.tensor((rng.permutation(blocks) + rng.random(blocks)) / blocks) for rng, blocks in rngs]
    order = [torch.tensor(rng.random(blocks * size)) for rng, blocks in rngs]
    return pad_sequence(u, True), pad_sequence(order, True)


def corrupt(free: Tensor, size: int, u: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """(holes (B, n), weight (B, n)): of each block's c maskable tokens m are holes, m uniform in 1..c, of weight c / m.

    The mean of chance t and weight 1 / t, t uniform: t^(m-1) (1-t)^(c-m) integrates to 1 / m / (c choose m). But no
    weight exceeds the block size, and no block is without a hole.
    """
    count = (parts := free.view(len(free), -1, size)).sum(-1)
    m = ((u * count).floor() + 1).minimum(count).clamp_min(1)
    place = order.view_as(parts).masked_fill(~parts, 2.0).argsort(-1).argsort(-1)
    return ((place < m[..., None]) & parts).view_as(free), (count / m).float().repeat_interleave(size, 1)


def frontier(holes: Tensor, keys: Tensor, size: int) -> Tensor:
    """Holes (B, n) with no later token of their block in sight: there a causal teacher knows what the student knows."""
    seen = (~holes & keys).view(len(holes), -1, size).long()
    return holes & (seen.flip(-1).cumsum(-1).flip(-1) == 0).view_as(holes)


class Denoiser(NamedTuple):
    """A causal LM that is read as a block diffusion model."""

    model: torch.nn.Module
    backbone: torch.nn.Module  # of it
    head: gold_loss.Head
    mask_id: int  # of a hole; all ids below it can be predicted
    size: int  # tokens of a block
    shift: bool
    dtype: torch.dtype  # of computations

    def autocast(self):
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def hidden(self, noisy: Tensor, clean: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        """(N, H) at flat positions `rows` of [noisy ; clean] (B, 2n); keys (B or 1, n) are the tokens that exist."""
        n, skip = clean.size(1), clean.size(1) - noisy.size(1)  # no x_t where nobody asks it
        mask = block_mask(n, self.size, keys)[..., skip:, skip:]
        ids, at = torch.cat([noisy, clean], 1), torch.arange(n, device=clean.device).repeat(2)[None, skip:]
        told = self.backbone(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False).last_hidden_state
        return told.flatten(0, 1)[rows].to(self.dtype)

    def read(self, x0: Tensor, keys: Tensor, u: Tensor, order: Tensor) -> tuple[Tensor, Tensor, gold_loss.Side]:
        """(holes (B, n), their weights (N,), what predicts them) of one draw; the first token is never a hole."""
        n, free = x0.size(1), keys.expand_as(x0) & (torch.arange(x0.size(1), device=x0.device) > 0)
        holes, weight = corrupt(free, self.size, u.to(x0.device), order.to(x0.device))
        (b, i), noisy = holes.nonzero(as_tuple=True), torch.where(holes, self.mask_id, x0)
        rows = b * 2 * n + i
        if self.shift and self.size == 1:  # the causal LM
            noisy, rows = noisy[:, :0], b * n + i - 1
        elif self.shift:  # the first of a block is predicted by the end of the clean past
            rows = rows - 1 + n * (i % self.size == 0)
        side = gold_loss.Side(self.hidden(noisy, x0, keys, rows), self.head.first(self.mask_id), x0[holes])
        return holes, weight[holes], side


def weighted_loss(weight: Tensor, side: gold_loss.Side, teacher: gold_loss.Side | None = None) -> gold_loss.Loss:
    """Sum over rows of weight (N,) x cross entropy, or x KL(teacher || student); no (N, V) tensor."""

    def fn(z, teacher_z, extra, rows):
        if teacher is None:
            return F.cross_entropy(z, side.ids[rows], reduction="none") * weight[rows], {}
        logs = z.log_softmax(-1), teacher_z.log_softmax(-1)
        return F.kl_div(*logs, reduction="none", log_target=True).sum(-1) * weight[rows], {}

    return gold_loss.row_loss(gold_loss.by_autograd(fn), side, teacher)


def diffusion_loss(net: Denoiser, x0: Tensor, keys: Tensor, drawn, teacher=None, soft: str = "frontier") -> Tensor:
    """Sum over the tokens of x0 (B, n) of the negative evidence lower bound in nats, estimated by one draw of `noise`.

    A LocalTeacher's laws stand for tokens at frontier or all holes. At the frontier they are the tokens' mean given
    what the student sees: the same minimum, less spread. Elsewhere they ignore the later tokens.
    """
    holes, weight, side = net.read(x0, keys, *drawn)
    if teacher is None:
        return weighted_loss(weight, side).total
    told = (frontier(holes, keys, net.size) if soft == "frontier" else holes)[holes]
    softly, hard = told.nonzero()[:, 0], (~told).nonzero()[:, 0]
    hidden, head = teacher.hidden(x0, holes.flatten().nonzero()[softly, 0] - 1), gold_loss.Head(**teacher.head)
    common = min(net.mask_id, head.weight.size(0))  # above them there is only padding
    ours, theirs = replace(side.at(softly), head=side.head.first(common)), gold_loss.Side(hidden, head.first(common))
    return weighted_loss(weight[softly], ours, theirs).total + weighted_loss(weight[hard], side.at(hard)).total


def prepare(cfg: Config, folder: Path) -> None:
    """The causal LM with a hole as its last id, whose vector is the mean of the others, and our prompts."""
    name, hole = gold_data.hub_name(cfg.student_model), "<|mask|>"
    tokenizer, model = gold_data.load_tokenizer(*name), gold_buffer.load_model(*name, torch.float32, "cpu")
    if hole not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"mask_token": hole})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # otherwise there is a free padding row
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        vectors, last = model.get_input_embeddings().weight.data, len(tokenizer) - 1
        vectors[last] = vectors[:last].mean(0)
    mask_id, last = tokenizer.convert_tokens_to_ids(hole), max(tokenizer.get_vocab().values())
    need(mask_id == last, f"{cfg.student_model}: {hole} is token {mask_id}, and ids above it could not be predicted")
    begin = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.chat_template = CHAT.replace("BEGIN", begin).replace("END", tokenizer.eos_token)
    model.config.bd3lm = {"block_size": cfg.block_size, "shift": cfg.shift, "mask_id": mask_id}  # in its config.json
    gold_train.discard(folder)  # of a run that ended before its first checkpoint
    gold_train.save_model(folder, model, tokenizer)


def open_denoiser(cfg: Config, name: str, ranks: gold_train.Ranks) -> tuple[Denoiser, object]:
    """(model, tokenizer) that `prepare` has written. Raises ValueError if it does not obey masks and positions."""
    load = lambda: gold_buffer.load_model(*gold_data.hub_name(name), torch.float32, ranks.device)
    model, dtype = gold_train.in_turn(ranks, load).eval(), gold_train.compute_dtype(cfg, ranks.device)
    (backbone, head), how = gold_buffer.split_head(model), model.config.bd3lm
    model.set_attn_implementation("sdpa")  # eager would add a mask of True and False
    net = Denoiser(model, backbone, gold_loss.Head(**head), how["mask_id"], how["block_size"], how["shift"], dtype)
    ids, rows = torch.arange(8, device=ranks.device)[None], torch.arange(16, device=ranks.device)
    other, keys = torch.where(ids == 3, 9, ids), torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        before, after = (net._replace(size=4).hidden(ids, clean, keys, rows) for clean in (ids, other))
        ours, plain = net._replace(size=1).hidden(ids, ids, keys, rows[8:]), backbone(input_ids=ids, use_cache=False)[0]
    moved = (after - before).abs().amax(1) > 1e-4 * before.abs().max()  # by the end of the first clean block
    obeys = moved.tolist() == [False] * 4 + [True] * 12 and (ours - plain[0]).abs().max() <= 0.05 * plain.abs().max()
    need(obeys, f"{type(model).__name__} does not obey our mask and positions: blocks need full attention")
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return net, gold_data.load_tokenizer(*gold_data.hub_name(name))


def wrapped(cfg: Config, tokenizer, say) -> Tensor:
    """(chunks, length) ids: the rows as gold_eval's ppl task reads and wraps them; the remainder is dropped."""
    rows, dropped = gold_data.load_rows(cfg.dataset, cfg.subset, cfg.split)
    rows = rows.drop(~rows.index["answered"], "without a completion", dropped)
    for task in cfg.tasks:
        asked = [row.key for row in gold_eval.load_task_rows(task, cfg.eval_max_samples, cfg.seed)]
        rows = rows.drop(np.isin(rows.index["key"], asked), f"in the evaluation task {task}", dropped)
    stream, eos, body = [], tokenizer.eos_token_id, cfg.length - 2
    for row in map(rows.__getitem__, np.random.default_rng([cfg.seed, 6]).permutation(len(rows))):
        asked = "\n".join(m["content"] for m in row.prompt if m["role"] == "user")
        ids = tokenizer(f"Question: {asked}\nAnswer: {row.completion}", add_special_tokens=False)["input_ids"]
        stream += [*ids, eos]
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    chunks = [[bos, *stream[i : i + body], eos] for i in range(0, len(stream) - body + 1, body)]
    say(f"data: {len(rows)} rows, {len(stream)} tokens, {len(chunks)} chunks; dropped: {gold_data.in_words(dropped)}")
    need(chunks, f"{cfg.dataset} has {len(stream)} tokens, less than one chunk of {cfg.length}: lower --length")
    return torch.tensor(chunks)


class BlockEngine(gold_buffer.HFSampler):
    """What gold_eval asks for, by block diffusion: answers, and lower bounds of log probabilities."""

    def __init__(self, cfg: Config, net: Denoiser, tokenizer):  # not HFSampler's, which checks a causal cache
        self.cfg, self.net, self.model, self.device = cfg, net, net.model, net.model.device
        self.limit, self.window, self.end_ids = cfg.length, cfg.length, [tokenizer.eos_token_id]
        self.max_batch_tokens, self.version, self.progress, self.autocast = 2**15, 0, True, net.autocast()

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """The bound, token by token for all but the first: mean over cfg.draws, of which block size 1 needs one."""
        out, net, draws = {}, self.net, 1 if self.net.size == 1 else self.cfg.draws
        for batch in gold_buffer.by_length(list(map(len, sequences)), lambda longest: 2**15 // longest, True):
            lengths, put = [len(sequences[i]) for i in batch], lambda x: torch.tensor(x, device=self.device)
            u, order = noise([[self.cfg.seed, 5, i] for i in batch], lengths, net.size)
            x0 = put([sequences[i] + [0] * (order.size(1) - len(sequences[i])) for i in batch])
            keys = put(range(x0.size(1))) < put(lengths)[:, None]
            nll = torch.zeros(x0.shape, dtype=torch.float64, device=self.device)
            for k in range(draws):
                order = noise([[self.cfg.seed, 5, i, k] for i in batch], lengths, net.size)[1]
                with self._reading():  # each block's u is turned: it meets all numbers of holes as evenly as can be
                    holes, weight, side = net.read(x0, keys, (u + k / draws) % 1, order)
                    nll[holes] += weighted_loss(weight, side).values.double() / draws
            out |= {i: -row[1:n] for i, n, row in zip(batch, lengths, nll.cpu().numpy())}
        return [out[i] for i in range(len(sequences))]

    def _decode(self, requests: list[gold_buffer.Request], s: gold_buffer.Sampling) -> list[tuple[list[int], list]]:
        """Block by block with a cache of the blocks before; in a block, cfg.per_step holes per forward pass."""
        net, size, put = self.net, self.net.size, lambda x: torch.tensor(x, device=self.device)
        prompts, rngs = [r.prompt_ids for r in requests], [np.random.default_rng(r.seed) for r in requests]
        room = [min(s.max_new_tokens, self.limit - len(p)) for p in prompts]
        start = max(len(p) // size for p in prompts) * size  # the first block with a hole
        begin = [start - len(p) // size * size for p in prompts]  # padding on the left is whole blocks
        width = -(-max(b + len(p) + r for b, p, r in zip(begin, prompts, room)) // size) * size
        x = put([[0] * b + p + [net.mask_id] * (width - b - len(p)) for b, p in zip(begin, prompts)])
        column, first, answer = put(range(width)), put(begin)[:, None], [b + len(p) for b, p in zip(begin, prompts)]
        keys, position, block = column >= first, (column - first).clamp_min(0), column // size
        cache = transformers.DynamicCache(config=net.model.config)

        def run(a: int, b: int, last: int = 0) -> Tensor:
            """(B, last or b - a, ids) logits of these columns, whose keys and values the cache has then."""
            seen = (block[a:b, None] >= block[:b]) & keys[:, None, None, :b] | (column[a:b, None] == column[:b])
            known = {"attention_mask": seen, "past_key_values": cache, "use_cache": True, "logits_to_keep": last}
            return net.model(x[:, a:b], position_ids=position[:, a:b], **known).logits.float()[..., : net.mask_id]

        before, written = run(0, start, 1) if start else None, []
        for a in range(start, width, size):
            b, uniform = a + size, put(np.stack([rng.random((size, 2, size)) for rng in rngs]))
            while (holes := x[:, a:b] == net.mask_id).any():
                if (z := before) is None or size > 1 or not net.shift:
                    z = run(a, b)
                    cache.crop(a - b)
                    if net.shift:
                        z = torch.cat([z[:, :1] if before is None else before, z[:, :-1]], 1)
                u, uniform = uniform[:, 0], uniform[:, 1:]
                token = gold_buffer.draw(z.flatten(0, 1), u[:, 0].flatten(), s).view_as(holes)
                sure = z.log_softmax(-1).gather(2, token[..., None])[..., 0] if s.temperature == 0 else u[:, 1]
                chosen = sure.masked_fill(~holes, -torch.inf).topk(min(self.cfg.per_step, size)).indices
                x[:, a:b] = torch.where(torch.zeros_like(holes).scatter(1, chosen, True) & holes, token, x[:, a:b])
            written = [row[at : min(at + n, b)] for row, at, n in zip(x.tolist(), answer, room)]
            ends = [next((i + 1 for i, t in enumerate(ids) if t in s.end_ids), None) for ids in written]
            if all(end or len(ids) == n for end, ids, n in zip(ends, written, room)):
                break
            before = run(a, b, 1)
        return [(ids[:end], []) for ids, end in zip(written, ends)]


def evaluate(cfg: Config, net: Denoiser, tokenizer, save_to: Path | None = None) -> dict:
    """Results of cfg.tasks, by the code that scores causal LMs."""
    return gold_eval.evaluate(
        BlockEngine(cfg, net, tokenizer), tokenizer, cfg.tasks, save_to, max_samples=cfg.eval_max_samples, few_shot=0,
        max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, wrap=cfg.length, seed=cfg.seed,
    )  # fmt: skip


def train(cfg: Config, ranks: gold_train.Ranks) -> dict:
    """One run, from a configuration to a directory. Returns {directory: results}, on rank 0."""
    check(cfg)
    out, master, device = Path(cfg.output_dir), ranks.rank == 0, ranks.device
    say = print if master else lambda text: None
    with gold_train.run_folder(cfg, ranks):
        if master and not cfg.resume:
            prepare(cfg, out / "init")
        gold_train.wait_for_all()
        folder = gold_train.newest_checkpoint(out / "checkpoints", say) if cfg.resume else out / "init"
        net, tokenizer = open_denoiser(cfg, str(folder), ranks)
        chunks = gold_buffer.RowStream(wrapped(cfg, tokenizer, say), cfg.seed)
        optimizer, parameters = gold_train.open_optimizer(cfg, net.model), dict(net.model.named_parameters())
        start, average = 0, {name: p.detach().clone() for name, p in parameters.items()} if cfg.ema else {}
        put = lambda weights: net.model.load_state_dict(weights, strict=False)
        if cfg.resume:
            state = torch.load(folder / "trainer.pt", map_location=device, weights_only=True)
            differs = {k: v for k, v in asdict(cfg).items() if k not in MAY_CHANGE and state["config"][k] != v}
            need(not differs, f"--resume, but {out} holds a run without {differs}: choose another --output-dir")
            start, average = state["step"], state["average"]
            optimizer.load_state_dict(state["optimizer"])
            put(state["weights"])
            gold_train.forget_after(out / "metrics.jsonl", start)
        load = lambda: gold_buffer.load_model(*gold_data.hub_name(cfg.teacher_model), net.dtype, device)
        teacher = gold_buffer.LocalTeacher(gold_train.in_turn(ranks, load)) if cfg.teacher_model else None
        batch, micros, world = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps, ranks.world_size
        tokens = batch * micros * world * (cfg.length - 1)  # of a step: all but the first of each chunk
        say(f"{sum(p.numel() for p in parameters.values()):,} parameters, {batch * micros * world} chunks per step")
        bar = tqdm(range(start, cfg.max_steps), "train", cfg.max_steps, initial=start, disable=None if master else True)
        net.model.train()
        for done in bar:
            total, step, lr = 0.0, done + 1, gold_train.get_lr(cfg, done, cfg.max_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for micro in range(micros):
                first = ((done * micros + micro) * world + ranks.rank) * batch  # in the stream of all ranks
                x0 = torch.stack([chunks[first + i][2] for i in range(batch)]).to(device)
                drawn = noise([[cfg.seed, 4, first + i] for i in range(batch)], [cfg.length] * batch, net.size)
                with net.autocast():
                    loss = diffusion_loss(net, x0, torch.ones_like(x0).bool(), drawn, teacher, cfg.soft) / tokens
                loss.backward()
                total += loss.item()
            for p in parameters.values() if dist.is_initialized() else ():
                dist.all_reduce(p.grad)  # a sum: `tokens` counts those of all ranks
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
            for name, mean in average.items():  # the ramp: of few steps, about the last tenth
                mean.lerp_(parameters[name].data, 1 - min(cfg.ema, (1 + step) / (10 + step)))
            row = {"step": step, "actor/loss": gold_train.sum_over_ranks([total], device)[0]}
            row |= {"actor/grad_norm": norm.item(), "actor/lr": lr, "num_tokens": step * tokens}
            bar.set_postfix_str(f"loss {row['actor/loss']:.4f} |g| {norm:.2f}")
            if not master:
                continue
            gold_eval.append_jsonl(out / "metrics.jsonl", row)
            if gold_train.every(cfg.save_steps, step) or step == cfg.max_steps:
                state = {"step": step, "config": asdict(cfg), "average": average, "optimizer": optimizer.state_dict()}
                state["weights"] = {name: p.data.clone() for name, p in parameters.items()}
                put(average or state["weights"])
                gold_train.save_checkpoint(out / "checkpoints", state, net.model, tokenizer, keep=2)
                put(state["weights"])
        if not master:
            return {}
        put(average or parameters)
        results = evaluate(cfg, net, tokenizer, out / "answers")
        gold_train.write_json(out / "results.json", results)
        return {cfg.output_dir: results}


def word_problems(n: int, test: bool, seed: int) -> list[dict]:
    """Questions and answers in the shape of GSM8K; a tenth of the numbers are in the test split only."""
    rng, rows = random.Random(f"{seed} {test}"), {}
    names, things = "Ann Ben Eva Tom Sam Mia".split(), "apples books coins eggs cards pens".split()
    while len(rows) < n:
        who, what, (a, b, c) = rng.choice(names), rng.choice(things), (rng.randint(1, 15) for _ in range(3))
        if c < a + b and (zlib.crc32(f"{a} {b} {c}".encode()) % 10 == 0) == test:
            asked = f"{who} has {a} {what}, buys {b} and loses {c}. How many {what} are left?"
            rows[asked] = f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.\n#### {a + b - c}"
    return [{"question": asked, "answer": answer} for asked, answer in rows.items()]


def embedded(cfg: Config, ranks: gold_train.Ranks) -> dict:
    """A tiny causal LM, trained for 2 x max_steps: the pretrained start. Then block diffusion from it."""
    out, batch = Path(cfg.output_dir), max(1, cfg.per_device_train_batch_size // ranks.world_size)
    tasks = (f"gsm8k={out / 'test.jsonl'}", f"ppl={out / 'test.jsonl'}")
    cfg = replace(cfg, dataset=str(out / "train.jsonl"), subset=None, tasks=tasks, per_device_train_batch_size=batch)
    again = (start := out / "ar" / "checkpoints" / "latest").exists()
    gold_train.wait_for_all()
    if ranks.rank == 0 and not again:
        rows = {"train": word_problems(4000, False, cfg.seed), "test": word_problems(400, True, cfg.seed)}
        texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows["train"]]
        gold_train.make_model(out / "random", texts, True, hidden=96, layers=4, seed=cfg.seed)
        for name, part in rows.items():
            (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    gold_train.wait_for_all()
    school = {"teacher_model": None, "block_size": 1, "shift": True, "resume": again, "max_steps": 2 * cfg.max_steps}
    school = replace(cfg, student_model=str(out / "random"), output_dir=str(out / "ar"), **school)
    ours = replace(cfg, student_model=str(start), output_dir=str(out / f"block-{cfg.block_size}"))
    return train(school, ranks) | train(ours, ranks)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    if (cfg := tyro.cli(Config, description=__doc__)).student_model is None:
        cfg = tyro.cli(Config, default=EMBEDDED, description=__doc__)
    ranks, name = gold_train.setup_ranks(), cfg.student_model
    try:
        check(cfg)
        if cfg.mode == "eval":
            results = {name: evaluate(cfg, *open_denoiser(cfg, name, ranks))}
        else:
            results = (train if name else embedded)(cfg, ranks)
        if ranks.rank == 0:
            print(f"{gold_eval.report(results)}\nPerplexities of blocks larger than 1 are upper bounds.")
    except (ValueError, OSError) as e:
        raise SystemExit(f"gsm8k_bd3lm.py: {e}") from e
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
