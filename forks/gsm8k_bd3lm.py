"""Fork: block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573) on GSM8K, started from any causal LM.

    python forks/gsm8k_bd3lm.py --block-size 4                embedded: word problems, a tiny model, a CPU, minutes
    torchrun --nproc-per-node 4 forks/gsm8k_bd3lm.py --student-model Qwen/Qwen2.5-0.5B --block-size 16
    python forks/gsm8k_bd3lm.py --mode eval --student-model out/bd3lm/checkpoints/latest --block-size 16

Expected of the first: perplexity at most 1.691, 91.5 % of 200 new problems right; with block size 1 1.580 and 100 %,
8: 1.889 and 79.5 %, 16: 1.993 and 40.0 %. 113 CPU seconds on a busy machine, 2026-11-26. The second was not run here.

Blocks of a text are written from left to right, the tokens of a block in any order. The model reads [x_t ; x_0], the
text with holes and the text without: a position of x_t sees its own block of x_t and the earlier blocks of x_0. Token i
is read at position i - 1 (--no-shift: at i), as a causal LM has learned it: block size 1 *is* the causal LM. Not as in
the paper's code: the noise is a number of holes per block, not their rate (the same bound, less than a fifth of its
spread), and the model any causal LM with full attention. --teacher-model: its laws stand for tokens where that has no
bias, at holes with no later token of their block in sight. (At all holes of own samples: OPDLM, arXiv 2606.06712.)
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import gold_train  # first: it sets the environment of threads  # isort: skip
import numpy as np
import torch
import transformers
import tyro
from torch import Tensor
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
    top_p: float = 1.0  # nucleus of a hole's law, with a temperature; 1: all of it (the paper: 0.9)
    per_step: int = 1  # holes filled per forward pass
    output_dir: str = "out/bd3lm"  # metrics.jsonl, checkpoints, answers, results.json
    save_steps: int = 5000  # steps between checkpoints, one more is written at the end; 0: only that one
    resume: bool = False  # go on from the last checkpoint in output_dir
    seed: int = 0  # of data order, noise and answers


EMBEDDED = Config(length=128, block_size=4, per_device_train_batch_size=16, max_steps=200, learning_rate=3e-3, ema=0.0,
                  lr_scheduler="cosine", draws=4, eval_max_samples=200, max_new_tokens=40)  # fmt: skip
MAY_CHANGE = "output_dir save_steps resume tasks draws eval_max_samples max_new_tokens temperature top_p per_step"
GOLDEN, HOLE = 0.618, "<|mask|>"  # multiples of GOLDEN, modulo 1, lie evenly
CHAT = (  # what gold_eval's ppl task reads, as a template: answers are prompted as texts were trained
    "{{ bos_token or eos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "Answer:{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check(cfg: Config) -> None:
    """What can be known to be wrong before any weights are read. Raises ValueError with what to change."""
    for name, n in vars(cfg).items():
        need(type(n) is not int or n >= 1 or name in ("save_steps", "seed"), f"{name} must be at least 1: got {n}")
    need(0 <= cfg.ema < 1 and 0 <= cfg.warmup_ratio <= 1, f"no shares: ema {cfg.ema}, warmup_ratio {cfg.warmup_ratio}")
    blocks, name = cfg.length / cfg.block_size, cfg.student_model
    need(blocks % 1 == 0, f"length {cfg.length} is {blocks:.2f} blocks of {cfg.block_size}: make it a whole number")
    gold_eval.parse_tasks(cfg.tasks)
    if name is None:
        return need(cfg.mode == "train", "--mode eval needs a checkpoint of this fork: --student-model DIR")
    ours, theirs = (gold_data.load_vocabulary(*gold_data.hub_name(n)) for n in (name, cfg.teacher_model or name))
    need(gold_data.same_vocabulary(ours, theirs), f"{cfg.teacher_model} has another tokenizer than {name}")
    hub, revision = gold_data.hub_name(name)
    config = transformers.AutoConfig.from_pretrained(hub, revision=revision)
    text, most = config.get_text_config().to_dict(), gold_buffer.positions(config)
    kinds = sorted(set(text.get("layer_types") or ()) - {"full_attention"})
    kinds = kinds or ["sliding windows"] * bool(text.get("sliding_window") and text.get("use_sliding_window", True))
    need(not kinds, f"{name} has {', '.join(kinds)}: blocks need full attention")
    need(cfg.length + cfg.block_size <= most, f"{name} has {most} positions, {cfg.length} and a block exceed them")
    stored, here = config.to_dict().get("bd3lm"), {"block_size": cfg.block_size, "shift": cfg.shift}
    need(cfg.mode == "train" or stored, f"{name} is no checkpoint of this fork: gold_eval.py scores causal LMs")
    need(cfg.mode == "train" or stored == here, f"{name} was trained with {stored}: it cannot be evaluated with {here}")


def block_mask(n: int, size: int, keys: Tensor) -> Tensor:
    """(B, 1, 2n, 2n) where a query (row) may look; both are [x_t ; x_0], and keys (B, n) are the tokens that exist."""
    i = torch.arange(2 * n, device=keys.device)
    clean, block = i >= n, i % n // size
    past, own = block[:, None] > block, (clean[:, None] == clean) & (block[:, None] == block)
    seen = (clean & past | own) & keys.repeat(1, 2)[:, None, None, :]
    return seen | (i[:, None] == i)  # padding sees itself: an empty row is NaN


def corrupt(keys: Tensor, size: int, seeds: list[list[int]], k: int = 0, draws: int = 1) -> tuple[Tensor, Tensor]:
    """(holes (B, n), weight (B, n)): of each block's c tokens m are holes, m uniform in 1..c, of weight c / m.

    The mean of chance t and weight 1 / t, t uniform: t^(m-1) (1-t)^(c-m) integrates to 1 / m / (c choose m). But no
    weight exceeds the block size, and no block is without a hole. keys (B, n): the tokens that exist, of which the
    first is no hole. A text's seed is all that matters. With k = 0 .. draws - 1 a block meets all m evenly.
    """
    i, device = torch.arange(keys.size(1), device=keys.device), keys.device
    free = (keys & (i > 0)).view(len(keys), -1, size)
    draw = lambda n, j: torch.tensor(np.stack([np.random.default_rng([*s, j]).random(n) for s in seeds]), device=device)
    u = (draw(1, 1) + GOLDEN * i[: free.size(1)] + k / draws) % 1  # (B, blocks)
    place = draw(len(i), 2 + k).view_as(free).masked_fill(~free, 2.0).argsort(-1).argsort(-1)
    m = ((u * (count := free.sum(-1))).floor() + 1).minimum(count).clamp_min(1)
    return ((place < m[..., None]) & free).view_as(keys), (count / m).float().repeat_interleave(size, 1)


class Denoiser(gold_buffer.HFSampler):
    """A causal LM that is read as a block diffusion model: an engine of gold_eval. It knows the ids below HOLE."""

    def __init__(self, cfg: Config, model, tokenizer):
        self.cfg, self.size, self.shift, self.tokenizer = cfg, cfg.block_size, cfg.shift, tokenizer
        self.mask_id, self.dtype = tokenizer.mask_token_id, gold_train.compute_dtype(cfg, model.device)
        model.set_attn_implementation("sdpa")  # eager would add a mask of True and False
        self.backbone, head = gold_buffer.split_head(model)
        self.head = gold_loss.Head(**head)
        super().__init__(model, dtype=self.dtype, max_batch_tokens=2**15, limit=cfg.length, progress=True)

    def _check_cache(self) -> None:
        """Raises ValueError if the model does not obey our masks and positions: change the end of the first block."""
        n, at = self.size, torch.arange(4 * self.size, device=self.device)
        ids, moved = at[None, : 2 * n] % self.mask_id, (at[None, : 2 * n] + (at[: 2 * n] == n - 1)) % self.mask_id
        with self._reading():
            before, after = (self.hidden(ids, clean, ids >= 0, at) for clean in (ids, moved))
        obeys = (before != after).any(-1).tolist() == [False] * n + [True] * 3 * n
        same = (before[: 2 * n] - before[2 * n :]).abs().max() < 0.05 * before.abs().max()  # x_t is x_0
        need(obeys and same, f"{type(self.model).__name__} does not obey our masks: blocks need full attention")

    def hidden(self, noisy: Tensor, clean: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        """(N, H) at flat positions `rows` of [noisy ; clean] (B, 2n); keys (B or 1, n) are the tokens that exist."""
        n, skip = clean.size(1), clean.size(1) - noisy.size(1)  # no x_t where nobody asks it
        mask = block_mask(n, self.size, keys)[..., skip:, skip:]
        ids, at = torch.cat([noisy, clean], 1), torch.arange(n, device=clean.device).repeat(2)[None, skip:]
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            told = self.backbone(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False)
        return told.last_hidden_state.flatten(0, 1)[rows].to(self.dtype)

    def loss(self, x0: Tensor, keys: Tensor, holes: Tensor, weight: Tensor, teacher=None, soft="") -> gold_loss.Loss:
        """The negative evidence lower bound of x0 (B, n) in nats, estimated by one draw of `corrupt`.

        `total` is over all tokens but the first, `values` at the holes, flat positions `rows`. A LocalTeacher's laws
        stand for tokens at the frontier or (soft: all) at all holes. At the frontier they are the tokens' mean given
        what the student sees: the same minimum, less spread. Elsewhere they ignore later tokens.
        """
        n, (b, i), weight = x0.size(1), holes.nonzero(as_tuple=True), weight[holes]
        noisy, rows, at = torch.where(holes, self.mask_id, x0), b * n + i, b * 2 * n + i
        if self.shift and self.size == 1:  # the causal LM
            noisy, at = noisy[:, :0], rows - 1
        elif self.shift:  # the first of a block is predicted by the end of the clean past
            at = at - 1 + n * (i % self.size == 0)
        ours, laws = gold_loss.Side(self.hidden(noisy, x0, keys, at), self.head.first(self.mask_id), x0[holes]), None
        if teacher is not None:
            head = gold_loss.Head(**teacher.head).first(min(self.mask_id, len(teacher.head["weight"])))  # no padding
            laws = gold_loss.Side(teacher.hidden(x0, rows - 1), head)
            seen = (~holes & keys).view(len(holes), -1, self.size)
            later = seen.flip(-1).cumsum(-1).flip(-1).view_as(holes) > 0  # is a later token of its block in sight?
            told = (holes if soft == "all" else holes & ~later)[holes]

        def fn(z, teacher_z, extra, part):
            values = torch.nn.functional.cross_entropy(z, ours.ids[part], reduction="none")
            if laws is not None:
                logp, logq = teacher_z.log_softmax(-1), z[:, : teacher_z.size(1)].log_softmax(-1)
                values = torch.where(told[part], gold_loss.divergence(logp, logq, beta=0.0).sum(-1), values)
            return values * weight[part], {}

        return gold_loss.row_loss(gold_loss.by_autograd(fn), ours, laws, rows=rows)

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """The bound, token by token for all but the first: mean over cfg.draws, of which block size 1 needs one."""
        out, draws = {}, 1 if self.size == 1 else self.cfg.draws
        for batch in gold_buffer.by_length(list(map(len, sequences)), lambda longest: 2**15 // longest, True):
            width = -(-len(sequences[batch[0]]) // self.size) * self.size  # the first is the longest
            x0 = torch.tensor([sequences[i] + [-1] * (width - len(sequences[i])) for i in batch], device=self.device)
            keys, nll = x0 >= 0, torch.zeros(x0.numel(), dtype=torch.float64, device=self.device)
            for k in range(draws):
                holes, weight = corrupt(keys, self.size, [[self.cfg.seed, 5, i] for i in batch], k, draws)
                with self._reading():
                    loss = self.loss(x0.clamp_min(0), keys, holes, weight)
                nll[loss.rows] += loss.values.double() / draws
            out |= {i: -x[1 : len(sequences[i])] for i, x in zip(batch, nll.view_as(x0).cpu().numpy())}
        return [out[i] for i in range(len(sequences))]

    def _decode(self, requests: list[gold_buffer.Request], s: gold_buffer.Sampling) -> list[tuple]:
        """Block by block with a cache of the blocks before; in a block, cfg.per_step holes per forward pass."""
        size, s, prompts = self.size, replace(s, top_p=self.cfg.top_p), [r.prompt_ids for r in requests]
        room = [min(s.max_new_tokens, self.limit - len(p)) for p in prompts]
        width = -(-max(len(p) + n for p, n in zip(prompts, room)) // size) * size
        rngs, put = [np.random.default_rng(r.seed) for r in requests], lambda x: torch.tensor(x, device=self.device)
        x, column = put([p + [self.mask_id] * (width - len(p)) for p in prompts]), put(range(width))
        answer, block, ends = column >= put([[len(p)] for p in prompts]), column // size, put(s.end_ids).long()
        uniform = put(np.stack([rng.random((width // size, size, 2, size)) for rng in rngs], 3))
        cache, cached = transformers.DynamicCache(), 0  # of whole blocks, but for the token that predicts the next
        how = {"past_key_values": cache, "use_cache": True, "logits_to_keep": size + self.shift}
        for b, numbers in zip(range(size, width + 1, size), uniform):
            for u, places in numbers:  # of a pass
                if not (holes := x[:, b - size : b] == self.mask_id).any():
                    break
                at, seen = slice(cached, b), (block[cached:b, None] >= block[:b])[None, None]
                z = self.model(x[:, at], attention_mask=seen, position_ids=column[None, at], **how).logits.float()
                z = torch.cat([z[:, :1], z], 1)[:, -size - self.shift :][:, :size, : self.mask_id]  # of block's tokens
                cache.crop((cached := max(0, b - size - self.shift)) - b)
                token = gold_buffer.draw(z.flatten(0, 1), u.flatten(), s).view_as(holes)
                sure = z.log_softmax(-1).gather(2, token[..., None])[..., 0] if s.temperature == 0 else places
                first = sure.masked_fill(~holes, -torch.inf).topk(min(self.cfg.per_step, size)).indices
                holes &= torch.zeros_like(holes).scatter(1, first, True)
                x[:, b - size : b][holes] = token[holes]
            if (torch.isin(x, ends) & answer).any(1).all():
                break
        cut = lambda ids: ids[: next((n for n, t in enumerate(ids, 1) if t in s.end_ids), None)]
        return [(i, cut(x[i, len(p) : len(p) + n].tolist()), []) for i, (p, n) in enumerate(zip(prompts, room))]


def open_denoiser(cfg: Config, name: str, ranks: gold_train.Ranks) -> Denoiser:
    """Of a causal LM, which gets HOLE as its last id, with the mean of the others as vector, and our prompts."""
    name, revision = gold_data.hub_name(name)
    tokenizer = gold_data.load_tokenizer(name, revision)
    model = gold_train.in_turn(ranks, lambda: gold_buffer.load_model(name, revision, torch.float32, ranks.device))
    if tokenizer.add_special_tokens({"mask_token": HOLE}):  # it was not there
        rows = max(len(tokenizer), len(model.get_input_embeddings().weight))  # some may be free
        model.resize_token_embeddings(rows, mean_resizing=False)
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight.data[len(tokenizer) - 1] = part.weight.data[: len(tokenizer) - 1].mean(0)
    need(tokenizer.mask_token_id == max(tokenizer.get_vocab().values()), f"{name} has tokens behind {HOLE}")
    tokenizer.chat_template, model.config.bd3lm = CHAT, {"block_size": cfg.block_size, "shift": cfg.shift}
    return Denoiser(cfg, model, tokenizer)


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
        text = f"Question: {asked}\nAnswer: {row.completion}"
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], eos]
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    chunks = [[bos, *stream[i : i + body], eos] for i in range(0, len(stream) - body + 1, body)]
    say(f"data: {len(rows)} rows, {len(stream)} tokens, {len(chunks)} chunks; dropped: {gold_data.in_words(dropped)}")
    need(chunks, f"{cfg.dataset} has {len(stream)} tokens, less than one chunk of {cfg.length}: lower --length")
    return torch.tensor(chunks)


def evaluate(net: Denoiser, save_to: Path | None = None) -> dict:
    """Results of cfg.tasks, by the code that scores causal LMs."""
    cfg, names = net.cfg, ("max_new_tokens", "temperature", "seed")
    how = {name: vars(cfg)[name] for name in names} | {"max_samples": cfg.eval_max_samples, "wrap": cfg.length}
    return gold_eval.evaluate(net, net.tokenizer, cfg.tasks, save_to, few_shot=0, **how)


def train(cfg: Config, ranks: gold_train.Ranks) -> dict:
    """One run, from a configuration to a directory. Returns {directory: results}, on rank 0."""
    check(cfg)
    out, master, start, teacher = Path(cfg.output_dir), ranks.rank == 0, 0, None
    batch, micros = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps
    tokens = batch * micros * ranks.world_size * (cfg.length - 1)  # of a step: all but the first of each chunk
    say = tqdm.write if master else lambda text: None
    with gold_train.run_folder(cfg, ranks), gold_train.signals() as seen:
        folder = gold_train.newest_checkpoint(out / "checkpoints", say) if cfg.resume else cfg.student_model
        net, mean = (open_denoiser(cfg, str(folder), ranks) for _ in range(2))  # mean: of the weights over time
        model, weights = net.model.train(), list(net.model.parameters())
        optimizer = gold_train.open_optimizer(cfg, model)
        chunks = gold_buffer.RowStream(wrapped(cfg, net.tokenizer, say), cfg.seed)
        if cfg.resume:
            state = torch.load(folder / "trainer.pt", map_location=ranks.device, weights_only=True)
            differs = {k: v for k, v in vars(cfg).items() if k not in MAY_CHANGE.split() and state["config"][k] != v}
            need(not differs, f"--resume, but {out} holds a run without {differs}: choose another --output-dir")
            optimizer.load_state_dict(state["optimizer"])
            model.load_state_dict(state["weights"])
            start = state["step"]
            if master:
                gold_train.forget_after(out / "metrics.jsonl", start)
        if cfg.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if cfg.teacher_model:
            load = lambda: gold_buffer.load_model(*gold_data.hub_name(cfg.teacher_model), net.dtype, ranks.device)
            teacher = gold_buffer.LocalTeacher(gold_train.in_turn(ranks, load))
        say(f"{sum(p.numel() for p in weights):,} parameters, {tokens:,} tokens to predict per step")
        bar = tqdm(range(start, cfg.max_steps), total=cfg.max_steps, initial=start, disable=not master or None)
        for done in bar:
            total, step, lr = 0.0, done + 1, gold_train.get_lr(cfg, done, cfg.max_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for micro in range(micros):
                first = ((done * micros + micro) * ranks.world_size + ranks.rank) * batch  # in the stream of all ranks
                x0 = torch.stack([chunks[first + i][2] for i in range(batch)]).to(ranks.device)
                keys, seeds = torch.ones_like(x0).bool(), [[cfg.seed, 4, first + i] for i in range(batch)]
                loss = net.loss(x0, keys, *corrupt(keys, net.size, seeds), teacher, cfg.soft).total / tokens
                loss.backward()
                total += loss.item()
            for p in weights if torch.distributed.is_initialized() else ():
                torch.distributed.all_reduce(p.grad)  # a sum: `tokens` counts those of all ranks
            norm = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm)
            need(norm.isfinite(), f"the gradient of step {step} is not finite: lower --learning-rate")
            optimizer.step()
            optimizer.zero_grad()
            for p, q in zip(mean.model.parameters(), weights):  # the ramp: of few steps, about the last tenth
                p.data.lerp_(q.data, 1 - min(cfg.ema, (1 + step) / (10 + step)))
            total, stop = gold_train.sum_over_ranks([total, len(seen)], ranks.device)
            bar.set_postfix_str(f"loss {total:.4f} |g| {norm:.2f}")
            row = {"step": step, "actor/loss": total, "actor/grad_norm": norm.item(), "actor/lr": lr}
            if master:
                gold_eval.append_jsonl(out / "metrics.jsonl", row | {"num_tokens": step * tokens})
            if gold_train.every(cfg.save_steps, step) or step == cfg.max_steps or stop:
                state = dict(step=step, config=vars(cfg), weights=model.state_dict(), optimizer=optimizer.state_dict())
                if master:
                    gold_train.save_checkpoint(out / "checkpoints", state, mean.model, net.tokenizer, keep=2)
                gold_train.wait_for_all()  # it is there for whoever comes next
            if stop:
                raise SystemExit(143)  # as after a SIGTERM
    if master:
        gold_train.write_json(out / "results.json", results := evaluate(mean, out / "answers"))
    return {cfg.output_dir: results} if master else {}


def word_problems(n: int, test: bool, seed: int) -> list[dict]:
    """Questions and answers in the shape of GSM8K; a tenth of the numbers are in the test split only."""
    rng, rows = np.random.default_rng([seed, 7, test]), {}
    names, things = "Ann Ben Eva Tom Sam Mia".split(), "apples books coins eggs cards pens".split()
    while len(rows) < n:
        who, what, (a, b, c) = rng.choice(names), rng.choice(things), rng.integers(1, 16, 3).tolist()
        if c < a + b and (hash((a, b, c)) % 10 == 0) == test:
            asked = f"{who} has {a} {what}, buys {b} and loses {c}. How many {what} are left?"
            rows[asked] = f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.\n#### {a + b - c}"
    return [{"question": asked, "answer": answer} for asked, answer in rows.items()]


def embedded(cfg: Config, ranks: gold_train.Ranks) -> dict:
    """A tiny causal LM, trained for 2 x max_steps: the pretrained start. Then block diffusion from it."""
    out, batch = Path(cfg.output_dir), max(1, cfg.per_device_train_batch_size // ranks.world_size)
    again = (start := out / "ar" / "checkpoints" / "latest").exists()
    gold_train.wait_for_all()
    if ranks.rank == 0 and not again:
        for name, n in (("test", 400), ("train", 4000)):
            gold_train.write_json(out / f"{name}.json", rows := word_problems(n, name == "test", cfg.seed))
        texts = ["Question: {question}\nAnswer: {answer}".format(**row) for row in rows]
        gold_train.make_model(out / "random", texts, True, hidden=96, layers=4, seed=cfg.seed)
    gold_train.wait_for_all()
    tasks = (f"gsm8k={out}/test.json", f"ppl={out}/test.json")
    cfg = replace(cfg, dataset=f"{out}/train.json", subset=None, tasks=tasks, per_device_train_batch_size=batch)
    ours = replace(cfg, student_model=str(start), output_dir=f"{out}/block-{cfg.block_size}")
    school = replace(ours, student_model=f"{out}/random", output_dir=f"{out}/ar", max_steps=2 * cfg.max_steps)
    school = replace(school, teacher_model=None, block_size=1, shift=True, resume=again)
    return train(school, ranks) | train(ours, ranks)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    if (cfg := tyro.cli(Config, description=__doc__)).student_model is None:
        cfg = tyro.cli(Config, default=EMBEDDED, description=__doc__)
    ranks, name = gold_train.setup_ranks(), cfg.student_model
    try:
        check(cfg)
        scores = lambda cfg, ranks: {name: evaluate(open_denoiser(cfg, name, ranks))}
        results = (scores if cfg.mode == "eval" else train if name else embedded)(cfg, ranks)
        if ranks.rank == 0:
            print(f"{gold_eval.report(results)}\nPerplexities of blocks larger than 1 are upper bounds.")
    except (ValueError, OSError) as e:
        raise SystemExit(f"gsm8k_bd3lm.py: {e}") from e
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
