"""Who produces the tokens and the teacher's knowledge of them: samplers, the window buffer, teachers.

A *window* is what one optimizer step trains on, on one rank: `slots` prompts. The buffer decides which rows of the data
set they are and which of them are on-policy, has the sampler answer those in one call, and finds the teacher's tokens
for every completion. With lag > 0 windows are made ahead, by a thread, from a copy of earlier weights.

From top to bottom: samplers (HF, vLLM), windows, models, teachers (local, shared by the ranks of a node, served).

This file knows nothing about losses, the optimizer, evaluation, or wandb.
"""

import collections
import contextlib
import functools
import gc
import http.client
import importlib.util
import inspect
import json
import math
import multiprocessing.connection
import os
import pickle
import queue
import random
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import gold_data
from gold_data import Row, Sample, Vocabulary, need

DEADLINE = 1800.0  # seconds for one window, or one answer of a teacher's process


# ----------------------------------------------------------------------------------------------------------------------
# weights that are split over ranks


def whole(state, device: str | None = None):
    """`state`, a tensor or containers of them, with all that is split over ranks in one piece. Every rank takes part.

    device: where to; None: they stay; "meta": nobody needs them here. What is one tensor (tied weights) remains one.
    """
    once = functools.cache(lambda x: x.detach().full_tensor().to(device=device))
    return tree_map_only(DTensor, once, state)


def whole_weights(model: torch.nn.Module, wanted: bool) -> dict[str, Tensor]:
    """The state dict of a model in one piece, on the CPU if it was split; without content where it is not `wanted`."""
    found = whole(model.state_dict(keep_vars=True), "cpu" if wanted else "meta")  # not copies: tied weights are one
    return {name: x.detach() for name, x in found.items()}


def split_like(optimizer, state: dict) -> dict:
    """An optimizer's state dict of whole tensors, split as its parameters are, without communication."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(params[0], DTensor):
        return state
    part = lambda p, x: distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if x.dim() else x
    return state | {"state": {i: {k: part(params[i], x) for k, x in s.items()} for i, s in state["state"].items()}}


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Inside, each rank has all weights of a sharded model, in compute precision: its passes need no other rank."""
    blocks = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for block in blocks:
        block.unshard()
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(block is not model, recurse=False)
            block.reshard()  # what stays whole would be stale after the optimizer's step


# ----------------------------------------------------------------------------------------------------------------------
# samplers


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 cut nothing off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    end_ids: tuple[int, ...] = ()

    def for_vllm(self) -> dict:
        """As its engine and its server want it: these end ids, whatever the model's own files say."""
        law = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        return law | {"stop_token_ids": list(self.end_ids), "ignore_eos": True}


@dataclass
class Rollout:
    completion_ids: list[int]  # ends with an end id if finished
    logprobs: list[float]  # log-softmax of the model's own logits at temperature 1, for each id
    finished: bool
    version: int  # of the weights


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    seed: int


def ids_of(eos: int | list[int] | None) -> list[int]:
    """End ids as a list, however a generation config writes them."""
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def by_length(lengths: list[int], rows: Callable[[int], int], progress: bool = False) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: less padding; `rows(longest)` at a time, at least 1."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), disable=None if progress else True, leave=False) as bar:  # None: where somebody watches
        while order:
            size = max(1, rows(lengths[order[0]]))
            yield order[:size]
            bar.update(len(order[:size]))
            order = order[size:]


class HFSampler:
    """Batched decoding with a transformers model and its KV cache; also scores what is written.

    A request's random numbers depend on its seed alone, not on the batch it is decoded in.

    Args:
        model: a causal LM. `own`: nobody else's, so load_weights writes into it; otherwise it *is* the trained one.
        dtype: of computations on a GPU. max_batch_tokens: rows x longest of what is decoded together stays below.
        limit: tokens of prompt + completion, where the model does not read fewer; a row that has so many ends there.
    """

    collective = False  # a rank without requests need not take part
    check = sleep = close = lambda self: None  # nothing here hangs, has memory to give back or needs an end

    def __init__(
        self, model, own: bool = False, dtype=torch.float32, max_batch_tokens: int = 2**17, limit: float = math.inf,
        progress: bool = False,
    ):  # fmt: skip
        self.own, self.max_batch_tokens, self.version, self.progress = own, max_batch_tokens, 0, progress
        self.limit = self.window = min(positions(model.config), limit)  # window: tokens that score reads at a time
        self.end_ids = ids_of(model.generation_config.eos_token_id)
        self.model, self.device = model, next(model.parameters()).device
        on = self.device.type == "cuda" and dtype == torch.bfloat16
        self.autocast = torch.autocast("cuda", torch.bfloat16) if on else contextlib.nullcontext()
        used = dtype if isinstance(model, FSDPModule) else model.dtype  # of its passes, without autocast
        self.exact = not on and used != torch.bfloat16
        self._check_cache()

    def _check_cache(self) -> None:
        """Raises ValueError if a padded row that stays while another leaves is not continued as without a cache."""
        pair, ends = [Request([4, 3, 2, 1], 0), Request([1, 2, 3, 4, 5, 6, 7], 1)], ()
        try:
            for _ in range(2):  # the second time, the second row ends first
                rollout, other = self.generate(pair, Sampling(3, end_ids=ends))
                ends = (other.completion_ids[0],)
            known = self.score([pair[0].prompt_ids + rollout.completion_ids])[0][3:]
        except (AttributeError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"{type(self.model).__name__}: the hf sampler cannot use its cache ({e})") from e
        if np.abs(known - rollout.logprobs).mean() > (0.002 if self.exact else 0.5):
            raise ValueError(f"{type(self.model).__name__}: batches of the hf sampler would be wrong: --sampler vllm")

    def load_weights(self, weights: dict[str, Tensor], version: int) -> None:
        """Sample from these weights from now on."""
        if self.own:
            self.model.load_state_dict(weights)
        self.version = version

    @contextlib.contextmanager
    def _reading(self):
        """Around every use of the model, which is left in the mode it was in."""
        training = self.model.training
        self.model.eval()
        try:
            # one context for all steps: it keeps the weights that are gathered or cast
            with torch.no_grad(), gathered(self.model), self.autocast:
                yield
        finally:
            self.model.train(training)

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Callable = lambda i, x: None
    ) -> list[Rollout]:
        """The rollouts, in order; each is told to done(its number, rollout) as soon as it has ended."""
        rollouts: dict[int, Rollout] = {}
        rows = lambda longest: int(self.max_batch_tokens // min(self.limit, longest + sampling.max_new_tokens))
        with self._reading():
            for batch in by_length([len(r.prompt_ids) for r in requests], rows, self.progress):
                for row, ids, logprobs in self._decode([requests[i] for i in batch], sampling):
                    i = batch[row]
                    rollouts[i] = Rollout(ids, logprobs, ids[-1] in sampling.end_ids, self.version)
                    done(i, rollouts[i])
        return [rollouts[i] for i in range(len(requests))]

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Natural log probability of every token but the first, float64 (len - 1,), whatever the batches are."""
        out, vocabulary = {}, self.model.config.get_text_config().vocab_size
        rows = lambda longest: min(self.max_batch_tokens, 2**28 // vocabulary) // longest  # a gigabyte of logits
        with self._reading():
            for batch in by_length(list(map(len, sequences)), rows, self.progress):
                ids = pad_sequence([torch.tensor(sequences[i]) for i in batch], True).to(self.device)  # on the right
                z = self.model(input_ids=ids[:, :-1], use_cache=False).logits.float()  # (B, T, V)
                nll = torch.nn.functional.cross_entropy(z.transpose(1, 2), ids[:, 1:], reduction="none")
                out |= {i: -x[: len(sequences[i]) - 1] for i, x in zip(batch, nll.double().cpu().numpy())}
        return [out[i] for i in range(len(sequences))]

    def _decode(self, requests: list[Request], s: Sampling) -> Iterator[tuple[int, list[int], list[float]]]:
        """(number of the request, its ids, their log probabilities) of each as it ends."""
        from transformers import DynamicCache

        left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        prompts = [torch.tensor(r.prompt_ids, dtype=torch.long) for r in requests]
        ids, mask = (left(x).to(self.device) for x in (prompts, [torch.ones_like(p) for p in prompts]))
        position, read, padded = (mask.cumsum(1) - 1).clamp_min(0), ids.size(1), len(set(map(len, prompts))) > 1
        mask = torch.nn.functional.pad(mask, (0, s.max_new_tokens), value=1)  # as wide as it will be
        rngs = (np.random.Generator(np.random.Philox(r.seed)) for r in requests)
        uniform = torch.tensor(np.stack([rng.random(s.max_new_tokens) for rng in rngs]), device=self.device)
        room = [min(s.max_new_tokens, self.limit - len(r.prompt_ids)) for r in requests]
        alive, out = [*range(len(requests))], [([], []) for _ in requests]
        cache = DynamicCache(config=self.model.config)
        recurrent = "cache_params" in inspect.signature(self.model.forward).parameters  # swallows what it does not know
        known = {"cache_params" if recurrent else "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        for t in range(s.max_new_tokens):
            seen = mask[:, read - ids.size(1) if recurrent else 0 : read] if padded else None
            z = self.model(input_ids=ids, attention_mask=seen, position_ids=position, **known).logits[:, -1].float()
            token = draw(z, uniform[:, t], s)
            logprob, going = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1), []
            for row, (i, new, x) in enumerate(zip(alive, token.tolist(), logprob.tolist())):
                out[i][0].append(new)
                out[i][1].append(x)
                if new in s.end_ids or t + 1 >= room[i]:
                    yield i, *out[i]
                else:
                    going.append(row)
            if not going:
                return
            if len(going) < len(alive):  # rows that have ended leave the batch
                alive, keep = [alive[row] for row in going], torch.tensor(going, device=self.device)
                cache.reorder_cache(keep)
                token, mask, position, uniform = (x[keep] for x in (token, mask, position, uniform))
            ids, position, read = token[:, None], position[:, -1:] + 1, read + 1


def draw(z: Tensor, u: Tensor, s: Sampling) -> Tensor:
    """One token (B,) per row of logits z (B, V) from uniform numbers u (B,) in [0, 1), by inverting the CDF."""
    if s.temperature == 0:
        return z.argmax(-1)
    p = torch.softmax(z if s.temperature == 1 else z / s.temperature, -1)
    if s.top_k and s.top_k < p.size(1):
        p = p.masked_fill(p < p.topk(s.top_k).values[:, -1:], 0.0)
    if s.min_p > 0:
        p = p.masked_fill(p < s.min_p * p.amax(-1, keepdim=True), 0.0)
    if s.top_p < 1:
        p = p / p.sum(-1, keepdim=True)
        ordered, index = p.sort(-1, descending=True)
        outside = (ordered.cumsum(-1) - ordered) >= s.top_p  # the token that crosses top_p stays
        p = p.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), 0.0)
    blocks = torch.nn.functional.pad(p, (0, -p.size(1) % 256)).unflatten(1, (-1, 256))  # running sums of these alone
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = _invert(sums, u * sums.sum(-1))
    token, _ = _invert(blocks[torch.arange(len(block)), block].double(), rest)
    return 256 * block + token


def _invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index (B,) whose running sum of mass (B, K) exceeds the target, so one with mass; what is left of it."""
    running = mass.cumsum(-1)
    target = torch.minimum(target, torch.nextafter(running[:, -1], torch.zeros_like(target)))[:, None]
    index = (running <= target).sum(-1, keepdim=True)
    return index[:, 0], (target - (running - mass).gather(1, index))[:, 0]


class VLLMSampler:
    """One vLLM engine in this process; in training one per rank, or per `tensor_parallel` neighbouring ranks.

    With load_format "dummy" it starts with random weights: the first load_weights is the first time it can say anything
    sensible, so a forgotten synchronisation cannot go unnoticed. "auto" reads the weights of `model`. Under torchrun
    the process group must exist first: the constructor is collective. Any exception of the engine is final: it may hold
    half of the weights or requests nobody waits for.

    Args:
        max_model_len: prompt + completion tokens.
        memory: KV cache size in bytes if > 1, share of the device's memory if <= 1.
        deadline: seconds after which one call raises TimeoutError with the unfinished requests.
        sleep: give the engine's memory back between windows (level 2: weights are dropped, each window loads new ones).
    """

    def __init__(
        self, model: str, max_model_len: int, dtype: str, memory: float, tensor_parallel: int = 1,
        revision: str | None = None, deadline: float = DEADLINE, sleep: bool = False, load_format: str = "dummy",
    ):  # fmt: skip
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are handed over by reference
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are the same for good and bad weights
        from vllm import LLM

        self.limit, self.deadline, self.version = max_model_len, deadline, -1 if load_format == "dummy" else 0
        self.window = max_model_len - 2  # of score: the last token is read too, and one more has to be written
        self.until, self.late, self.dead = math.inf, {}, False
        self.collective, self.group = tensor_parallel > 1, None  # every rank of an engine must make every call
        if self.collective:
            self.group, _ = dist.new_subgroups(tensor_parallel, backend="gloo")
            # the CPU engine's shared memory has one name for all runs, and a killed run leaves it behind
            for path in Path("/dev/shm").glob(f"*-cpushm_{dist.get_rank(self.group)}"):
                path.unlink()
            dist.barrier()
        self.use_sleep, self.asleep = sleep and torch.cuda.is_available(), False  # the CPU engine has no sleep mode
        self.had_group = dist.is_initialized()
        extra = {"distributed_executor_backend": "external_launcher"} if self.had_group else {}
        extra |= {"kv_cache_memory_bytes": int(memory)} if memory > 1 else {"gpu_memory_utilization": memory}
        environment, set_num_threads = dict(os.environ), torch.set_num_threads
        precision = torch.get_float32_matmul_precision()
        with self._engine():
            self.llm = LLM(
                model=model, revision=revision, dtype=dtype, max_model_len=max_model_len, max_num_seqs=256,
                tensor_parallel_size=tensor_parallel, enable_sleep_mode=self.use_sleep,
                enforce_eager=not torch.cuda.is_available(),  # compiling for a CPU takes too long
                max_num_batched_tokens=max(4096, max_model_len),  # larger ones mislead the memory profiler
                load_format=load_format, skip_tokenizer_init=True, generation_config="vllm", **extra,
            )  # fmt: skip
        self.llm.update_weight_version(str(self.version))
        self.end_ids = ids_of(self.llm.model_config.try_get_generation_config().get("eos_token_id"))
        torch.set_num_threads = set_num_threads  # the CPU engine replaces it, and writes to the environment
        torch.set_float32_matmul_precision(precision)  # the GPU engine sets its own for the whole process
        for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD"):
            os.environ.pop(name, None)
            os.environ.update({k: v for k, v in environment.items() if k == name})

    def load_weights(self, weights: dict[str, Tensor], version: int) -> None:
        """Replace all weights, in one call: a partial reload leaves the other shards of fused layers empty.

        Args: weights: a state dict, where a tied head has its own entry; parameter lists leave the old head in place.
        """
        with self._engine():
            if self.asleep:
                self.llm.wake_up(["weights"])
            stream = ((k, whole(v.detach())) for k, v in weights.items())  # one at a time
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            if self.asleep:
                self.llm.wake_up(["kv_cache"])
                self.asleep = False
            if not self.llm.reset_prefix_cache():  # its blocks were computed by the old weights
                raise RuntimeError("vLLM kept its prefix cache: requests are still running while weights are loaded")
            self.llm.update_weight_version(str(version))
            self.version = version

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Callable = lambda i, x: None
    ) -> list[Rollout]:
        """As HFSampler.generate."""
        parts, rank = [requests], 0
        if self.collective:  # every rank of an engine gives it all requests
            parts, rank = [None] * dist.get_world_size(self.group), dist.get_rank(self.group)
            dist.all_gather_object(parts, requests, group=self.group)
        asked, first, how = sum(parts, []), sum(map(len, parts[:rank])), sampling.for_vllm()
        room = [min(sampling.max_new_tokens, self.limit - len(r.prompt_ids)) for r in asked]
        how = [how | {"logprobs": 0, "seed": r.seed, "max_tokens": n} for r, n in zip(asked, room)]  # of its own tokens
        rollouts: dict[int, Rollout] = {}
        for i, out in self._run([r.prompt_ids for r in asked], how):
            if first <= i < first + len(requests):
                c, i = out.outputs[0], i - first
                logprobs = [entry[token].logprob for token, entry in zip(c.token_ids, c.logprobs)]
                version = int(c.weight_versions[0].version)
                rollouts[i] = Rollout(list(c.token_ids), logprobs, c.finish_reason == "stop", version)
                done(i, rollouts[i])
        return [rollouts[i] for i in range(len(requests))]

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """As HFSampler.score."""
        outputs = dict(self._run(sequences, [{"max_tokens": 1, "prompt_logprobs": 0}] * len(sequences)))
        found = [outputs[i].prompt_logprobs for i in range(len(sequences))]
        return [np.array([at[i].logprob for i, at in zip(s[1:], f[1:])]) for s, f in zip(sequences, found)]

    def _run(self, prompts: list[list[int]], how: list[dict]) -> Iterator[tuple[int, object]]:
        """(number of the prompt, vLLM's output) as they end."""
        from vllm import SamplingParams

        if self.version < 0:
            raise RuntimeError("load_weights before generate: the engine holds random weights")
        if not prompts:
            return
        params = [SamplingParams(detokenize=False, **settings) for settings in how]
        with self._engine():
            names = self.llm.enqueue([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            # outputs are named without the random part
            self.late = {name.rpartition("-")[0]: i for i, name in enumerate(names)}
            while self.late:
                for out in (out for out in self.llm.llm_engine.step() if out.finished):
                    yield self.late.pop(out.request_id), out
                self.check()

    @contextlib.contextmanager
    def _engine(self):
        """Around every use of the engine, which seeds python, numpy and torch and draws from their generators."""
        if self.dead:
            raise RuntimeError("the vLLM engine cannot be used any more: an earlier call failed")
        self.until, self.late, self.dead = time.monotonic() + self.deadline, {}, True
        python, numpy_state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            try:
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numpy_state)
        self.until, self.dead = math.inf, False

    def check(self) -> None:
        """Raises TimeoutError if a call is past its deadline; from another thread when the engine itself hangs."""
        if time.monotonic() > self.until:
            late = list(self.late.values())
            what = f"{len(late)} requests (positions {late[:20]})" if late else "loading weights"
            advice = "lower the window or --max-completion-length. The last checkpoint goes on with --resume."
            raise TimeoutError(f"vLLM has not finished {what} after {self.deadline:.0f} s: {advice}")

    def sleep(self) -> None:
        """Between the last generate of a window and the next load_weights."""
        if self.use_sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """End the engine. The default process group, which vLLM's own shutdown destroys, stays if it was here first."""
        from vllm.distributed import parallel_state
        from vllm.v1.engine import core

        if self.had_group:
            core.cleanup_dist_env_and_memory = parallel_state.destroy_model_parallel
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def choose_sampler(sampler: str) -> tuple[str, str]:
    """("hf" | "vllm", why) for --sampler auto | hf | vllm. Raises ValueError if vLLM is asked for but not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if sampler == "vllm" and not installed:
        raise ValueError("--sampler vllm needs vLLM: pip install 'vllm==0.32.0' (README, Install), or use --sampler hf")
    if sampler != "auto":
        return sampler, "as asked"
    if installed and torch.cuda.is_available():
        return "vllm", "GPU and vLLM found"
    return "hf", "vLLM is not installed" if torch.cuda.is_available() else "no GPU"


# ----------------------------------------------------------------------------------------------------------------------
# windows


@dataclass
class Window:
    step: int
    samples: list[Sample]
    version: int  # of the weights that sampled its on-policy part; `step` if it has none
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def on_policy_ratio(self) -> float:
        return sum(s.on_policy for s in self.samples) / len(self.samples)


@dataclass(frozen=True)
class Slot:
    """A place in a window: one on-policy prompt with all its generations, or as many different data set rows."""

    on_policy: bool
    rows: tuple[int, ...]  # positions in the endless stream of rows
    seeds: tuple[int, ...]


@dataclass
class Schedule:
    """Which row is where: a pure function of (seed, step, rank), so that any window can be made again.

    Slots are numbered through the run, over steps and ranks. Slot g is on-policy if the running total of lmbda crosses
    an integer there, so every window, on every rank, has its share of lmbda to within one slot. An on-policy slot uses
    one row for all its generations, an off-policy slot one row for each: no row is skipped, none is repeated within an
    epoch, and every token counts the same.
    """

    seed: int
    lmbda: float
    slots: int  # prompts of a window, on each rank
    generations: int  # completions of a slot
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        self.phase = np.random.default_rng([self.seed, 1]).random()

    def _on_policy_before(self, slot: int) -> int:
        return int(np.floor(slot * self.lmbda + self.phase)) if self.lmbda < 1 else slot

    def rows_before(self, slot: int) -> int:
        on = self._on_policy_before(slot)
        return on + (slot - on) * self.generations

    def steps_for(self, rows: int) -> int:
        """Fewest steps after which the first `rows` of the stream have all been used."""
        per_step = self.slots * self.world_size
        return bisect_left(range(2**62), rows, key=lambda step: self.rows_before(step * per_step))

    def draw(self, step: int) -> list[Slot]:
        first = (step * self.world_size + self.rank) * self.slots
        out = []
        for g in range(first, first + self.slots):
            on_policy = self._on_policy_before(g + 1) > self._on_policy_before(g)
            rows = tuple(range(self.rows_before(g), self.rows_before(g + 1)))
            seeds = np.random.SeedSequence([self.seed, 2, g]).generate_state(self.generations)
            out.append(Slot(on_policy, rows, tuple(seeds.tolist())))
        return out


class RowStream:
    """Rows of a data set, numbered over all epochs; each epoch is a new permutation of all of them."""

    def __init__(self, rows: Sequence[Row], seed: int):
        self.rows, self.seed = rows, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def where(self, position: int) -> tuple[int, int]:
        """(epoch, index of the row) of a position."""
        epoch, within = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, 3, epoch]).permutation(len(self.rows))
        return epoch, int(self._order[within])

    def __getitem__(self, position: int) -> tuple[int, int, Row]:
        epoch, index = self.where(position)
        return epoch, index, self.rows[index]


@dataclass
class Encoder:
    """Rows -> prompt and completion ids of both models. `teacher` is None when there is no teacher.

    Encoding changes tokenizers: once there are windows, only the thread that makes them or, meanwhile, its aligner may.
    """

    student: Vocabulary
    teacher: Vocabulary | None
    max_completion_length: int
    cross_tokenizer: bool
    prefix: bool
    template: str | None = None  # of the teacher's prompts: see gold_data.privileged
    teacher_positions: float = math.inf  # that its prompt and completion may have

    def prompts(self, row: Row) -> tuple[list[int], list[int], str | None]:
        """(student's prompt ids, teacher's, the answer that the row has for them)"""
        tokenizers = [v.tokenizer for v in (self.student, self.teacher) if v is not None]
        texts, answer = gold_data.prompts(tokenizers, row, self.template)
        student, *teacher = (gold_data.encode_texts(t, [text])[0] for t, text in zip(tokenizers, texts))
        return student, teacher[0] if teacher else [], answer

    def completion(self, text: str, whole: bool = True) -> tuple[list[int], bool]:
        """(ids, finished): the student's ids of a written completion; a cut one has no end, so none is trained.

        No more of a text is encoded than could be kept if all of its tokens were as long as the longest there is.
        """
        room = self.max_completion_length
        most = room * int(self.student.lengths.max())
        whole, text = whole and len(text) <= most, self.student.normal(text[:most])
        ids, ends = self.student.encode(text.encode())
        whole = whole and (self.student.lossy or (int(ends[-1]) if len(ends) else 0) == len(text.encode()))
        ids = list(ids) + ([self.student.ends[0]] if whole else [])
        return ids[:room], whole and len(ids) <= room

    def known(self, ids: list[int]) -> list[int]:
        """Up to the first id that is only padding of the student's head: the teacher may have no row for it."""
        size = min(v.size for v in (self.student, self.teacher) if v is not None)
        return ids if self.cross_tokenizer else ids[: next((i for i, t in enumerate(ids) if t >= size), len(ids))]

    def align(self, sample: Sample) -> Sample:
        if self.cross_tokenizer:
            both, ids = (self.student, self.teacher), sample.completion_ids
            room = self.teacher_positions - len(sample.teacher_prompt_ids)
            sample.alignment = gold_data.align(*both, ids, sample.finished, self.prefix, room)
        return sample

    def sampled(self, sample: Sample, rollout: Rollout) -> Sample:
        ids = self.known(rollout.completion_ids)
        sample.completion_ids, sample.finished = ids, rollout.finished and len(ids) == len(rollout.logprobs)
        sample.logprobs, sample.version = rollout.logprobs[: len(ids)], rollout.version
        return self.align(sample)

    def written(self, sample: Sample, text: str, whole: bool) -> Sample:
        sample.completion_ids, sample.finished = self.completion(text, whole)
        return self.align(sample)


def _copies(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of a state dict, numbers in this dtype; what is tied is copied once."""
    once = {(v.data_ptr(), v.shape): v.detach() for v in weights.values()}
    once = {k: v.to(dtype if v.is_floating_point() else v.dtype, copy=True) for k, v in once.items()}
    return {k: once[v.data_ptr(), v.shape] for k, v in weights.items()}


@functools.cache
def engine_stream() -> "torch.cuda.Stream | None":
    """For making an engine, which remembers it, and for the thread that uses it: training queues on another one."""
    return torch.cuda.Stream() if torch.cuda.is_available() else None


@dataclass
class WindowBuffer:
    """Makes windows, `lag` of them ahead of training, in a thread of its own: the only one that uses the engine."""

    schedule: Schedule
    rows: RowStream  # position -> (epoch, index, row)
    encoder: Encoder
    sampler: object | None  # answers on-policy prompts as `sampling` says; None if lmbda is 0
    sampling: Sampling
    weights_of: Callable[[], dict]  # the student's state dict, as the sampler wants it
    last_step: int  # no window is made from this step on
    lag: int = 0
    teacher_answers: Callable | None = None  # seq_kd: (epoch, index, teacher's prompt ids) of off-policy rows -> texts
    dtype: torch.dtype = torch.float32  # of the weights' copy with lag > 0

    def __post_init__(self):
        self.pending, self.queue = {}, queue.SimpleQueue()  # windows on the way, by step; those to be made
        self.thread = threading.Thread(target=self._work, args=(engine_stream(),), daemon=True, name="sampler")
        self.thread.start()

    def _work(self, stream) -> None:
        with torch.cuda.stream(stream):
            for future, ready, args in iter(self.queue.get, None):
                try:
                    if ready is not None:
                        ready.synchronize()  # the optimizer step that these weights come from is on another stream
                    future.set_result(self.make(*args))
                except BaseException as e:  # noqa: BLE001  raised by get
                    future.set_exception(e)
                future = args = None  # the copy of the weights must not live until the next item comes

    def get(self, step: int) -> Window:
        """The window of this step. Called before the step trains, with the weights of `step` finished optimizer steps.

        Starts the windows up to step + lag from these weights. Raises what the making of any window has raised.
        """
        new = [s for s in range(step, min(step + self.lag + 1, self.last_step)) if s not in self.pending]
        weights = self.weights_of() if new and self.sampler is not None else None
        if weights is not None and self.lag:  # training goes on while they are used
            weights = _copies(weights, self.dtype)
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        for ahead in new:
            self.pending[ahead] = Future()
            self.queue.put((self.pending[ahead], ready, (ahead, weights, step)))
        self._wait([self.pending[step]])
        for future in [f for f in self.pending.values() if f.done()]:
            future.result()
        return self.pending.pop(step).result()

    def _wait(self, futures) -> None:
        while wait(futures, timeout=1.0).not_done:
            if self.sampler is not None:
                self.sampler.check()  # the thread cannot, if it hangs inside the engine

    def make(self, step: int, weights: dict[str, Tensor] | None, version: int) -> Window:
        """The window of `step`, sampled from `weights`, those of `version` finished steps."""
        start, seconds = time.perf_counter(), {"sync": 0.0}
        samples, requests, answers = [], [], []  # all; (sample, its request); (sample, epoch, the row's own text)
        for slot in self.schedule.draw(step):
            found = [self.rows[position] for position in slot.rows]
            for seed, (epoch, index, row) in zip(slot.seeds, found * len(slot.seeds)):
                prompt, teacher_prompt, text = self.encoder.prompts(row)
                samples.append(Sample(prompt, [], False, slot.on_policy, teacher_prompt, version=step, row=index))
                if slot.on_policy:
                    requests.append((samples[-1], Request(prompt, seed)))
                else:
                    answers.append((samples[-1], epoch, text))
        texts = [(text, True) for *_, text in answers]
        if self.teacher_answers is not None:
            wanted = [(epoch, s.row, s.teacher_prompt_ids) for s, epoch, _ in answers]
            texts = self.teacher_answers(wanted, self._soon(step))
        split = weights is not None and any(isinstance(x, DTensor) for x in weights.values())  # gathered by all ranks
        # what is written is aligned while the sampler computes. A thread: a process would need vocabularies and caches
        with ThreadPoolExecutor(1, "aligner") as aligner:
            aligned = [aligner.submit(self.encoder.written, s, *text) for (s, *_), text in zip(answers, texts)]
            done = lambda i, rollout: aligned.append(aligner.submit(self.encoder.sampled, requests[i][0], rollout))
            if requests or split or (self.sampler and self.sampler.collective):
                begun = time.perf_counter()
                self.sampler.load_weights(weights, version)
                seconds["sync"] = time.perf_counter() - begun
                self.sampler.generate([r for _, r in requests], self.sampling, done)
                self.sampler.sleep()
        for job in aligned:
            job.result()
        seconds["generate"] = time.perf_counter() - start - seconds["sync"]
        return Window(step, samples, version if requests else step, seconds)

    def _soon(self, step: int) -> Iterator[tuple[int, int, list[int]]]:
        """What the teacher will be asked for the 15 windows behind this one: many answers at once cost less each."""
        for later in range(step + 1, min(step + 16, self.last_step)):
            for position in (p for slot in self.schedule.draw(later) if not slot.on_policy for p in slot.rows):
                epoch, index, row = self.rows[position]
                yield epoch, index, self.encoder.prompts(row)[1]

    def state(self) -> list[dict]:
        """Windows made ahead and not yet trained; waits for those being made. Part of a checkpoint."""
        self._wait(self.pending.values())
        windows = [future.result() for future in self.pending.values()]
        return [vars(w) | {"samples": [vars(s) | {"alignment": None} for s in w.samples]} for w in windows]

    def load_state(self, windows: list[dict]) -> None:
        for w in windows:
            samples = [self.encoder.align(Sample(**s)) for s in w["samples"]]
            self.pending[w["step"]] = Future()
            self.pending[w["step"]].set_result(Window(**w | {"samples": samples}))

    def close(self) -> None:
        """End the thread and the engine. Windows that nobody asked for any more are made to the end first."""
        self._wait(self.pending.values())
        self.queue.put(None)
        self.thread.join()  # one that is in torch's code when the interpreter ends would abort the process
        if self.sampler is not None:
            self.sampler.close()


# ----------------------------------------------------------------------------------------------------------------------
# models in two parts: a backbone that makes hidden states, and the head


def positions(config) -> float:
    """How many tokens a model can read, by its configuration; inf for recurrent models and those that count none."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}  # stretched: factor x what it was trained with
    stretched = rope.get("factor", 1) * rope.get("original_max_position_embeddings", 0)
    return max(getattr(config, "max_position_embeddings", None) or math.inf, stretched)


def check_positions(name: str, revision: str | None, length: int) -> float:
    """How many tokens a model can read, of which no weights are. Raises ValueError if `length` is more."""
    from transformers import AutoConfig

    most = positions(AutoConfig.from_pretrained(name, revision=revision))
    need(length <= most, f"max_length {length} is more than the {most:.0f} positions of {name}: lower --max-length")
    return most


def load_model(name: str, revision: str | None, dtype: torch.dtype, device: str):
    """A causal LM from a directory or the Hub, without dropout. Raises ValueError that names what was not found."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    except OSError as e:
        raise ValueError(f"model {name!r} is neither a directory with a model nor reachable on the Hub: {e}") from e
    without_dropout(model)  # a student is trained as it will be used, and a resumed run needs no generator state
    try:
        model.generation_config.validate(strict=True)  # as save_pretrained will, at the first checkpoint
    except ValueError:
        model.generation_config.do_sample = True  # a shipped temperature or top_p without it: what its author meant
        model.generation_config.validate(strict=True)
    return model.to(device)


def without_dropout(model) -> None:
    """Many layers hold a probability as a plain number, and some read the configuration's in each forward pass."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", module)):
            for name, value in vars(holder).items():
                if ("drop" in name or "jitter" in name) and isinstance(value, float):
                    setattr(holder, name, 0.0)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0


def split_head(model) -> tuple[torch.nn.Module, dict]:
    """(backbone, keyword arguments of gold_loss.Head) of a causal LM, checked against the model's own logits.

    Rows are padded on the right and need no mask: what is read stands left of the padding. Masks of sliding windows and
    the like are transformers' own. Raises ValueError that names the architecture if its logits are not
    softcap(scale * (hidden W + b)) of one matrix, or if a token changes what stands to its left.
    """
    backbone, head, config = model.base_model, model.get_output_embeddings(), model.config.get_text_config()
    separate, name = head is not None and backbone is not model, type(model).__name__
    need(separate, f"{name} has no separate output head: it is not a causal language model")
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    parts = {"weight": head.weight, "bias": getattr(head, "bias", None), "scale": scale, "softcap": softcap}
    probe, training = torch.arange(8, device=head.weight.device)[None] % head.weight.size(0), model.training
    model.eval()
    with torch.no_grad():
        pair = (probe, torch.where(probe < 5, probe, 0))
        hidden, other = (backbone(input_ids=ids, use_cache=False).last_hidden_state for ids in pair)
        z = scale * (hidden @ head.weight.T + (0 if parts["bias"] is None else parts["bias"])).float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        own = model(input_ids=probe, use_cache=False).logits.float()
    model.train(training)
    differs = z.shape != own.shape or (z - own).abs().max() > 0.02 * own.abs().max() + 1e-3
    need(not differs, f"{name}: its logits are not those of its output matrix; this head is unknown")
    moved = (hidden - other)[:, :5].float().std() / hidden.float().std()  # by experts, chosen in bf16, a little
    sees = moved > (0.1 if hidden.dtype == torch.bfloat16 else 1e-3)
    need(not sees, f"{name} sees the tokens that it should predict: it is not a causal model")
    return backbone, parts


# ----------------------------------------------------------------------------------------------------------------------
# teachers: what the teacher knows at the scored positions of a batch


class LocalTeacher:
    """A causal LM on one device. Only hidden states of the asked rows leave it; the caller projects them."""

    close = ahead = lambda self, *asked: None  # nothing to end, or to prepare

    def __init__(self, model):
        self.model = model.eval().requires_grad_(False)
        self.backbone, self.head = split_head(self.model)
        self.device, self.most = self.head["weight"].device, positions(model.config)

    @torch.no_grad()
    def hidden(self, ids: Tensor, rows: Tensor) -> Tensor:
        """(N, D) hidden states at flat positions `rows` of ids (B, S), padded on the right."""
        n, most = ids.size(1), self.most
        need(n <= most, f"{n} teacher tokens are more than its {most} positions: lower --max-length")
        hidden = self.backbone(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[rows.to(self.device)]

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        return HFSampler(self.model).generate(requests, sampling)


def _together(teacher: LocalTeacher, asked: list[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """teacher.hidden of several batches in one pass, all padded to the longest."""
    longest, rows, before = max(ids.size(1) for ids, _ in asked), [], 0
    for ids, flat in asked:
        rows.append((flat // ids.size(1) + before) * longest + flat % ids.size(1))
        before += len(ids)
    ids = torch.cat([torch.nn.functional.pad(ids, (0, longest - ids.size(1))) for ids, _ in asked])
    return teacher.hidden(ids, torch.cat(rows)).split([len(r) for r in rows])


def _serve_teacher(load, address: str, key: bytes, clients: int) -> None:
    """The process that owns the node's teacher: answers until all `clients` ranks have left, or its parent is gone.

    An answer is (True, the result) or (False, what went wrong). Tensors of a GPU go by its address (CUDA IPC), others
    as bytes: multiprocessing's own way for these, shared memory, needs the sender to live on.
    """
    die_with_parent = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=die_with_parent, daemon=True).start()
    teacher = LocalTeacher(load())
    dumps = ForkingPickler.dumps if teacher.device.type == "cuda" else pickle.dumps
    asked = {
        "head": lambda: [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in teacher.head.items()}],
        "hidden": lambda *some: _together(teacher, some),
        "generate": lambda *args: [teacher.generate(*args)],
    }

    def answers(name: str, *args) -> list[tuple[bool, object]]:
        try:
            return [(True, x) for x in asked[name](*args)]
        except Exception as e:  # noqa: BLE001
            return [(False, f"{type(e).__name__}: {e}")]

    with multiprocessing.connection.Listener(address, family="AF_UNIX", authkey=key, backlog=64) as listener:
        ranks = [listener.accept() for _ in range(clients)]
    while ranks:
        found, some = {}, {}  # `some`: those that ask for hidden states get them of one pass
        for connection in multiprocessing.connection.wait(ranks):
            with contextlib.suppress(EOFError, OSError):
                name, args = pickle.loads(connection.recv_bytes())
                if name == "hidden":
                    some[connection] = args
                else:
                    (found[connection],) = answers(name, *args)
                continue
            ranks.remove(connection)  # this rank has left
        together = answers("hidden", *some.values()) if some else []
        if len(together) < len(some):  # one may be wrong, or all too much
            together = [answers("hidden", args)[0] for args in some.values()]
        for connection, answer in (found | dict(zip(some, together))).items():
            with contextlib.suppress(OSError):
                connection.send_bytes(dumps(answer))


class SharedTeacher:
    """One teacher per node on a device of its own, in a process of its own; the ranks of the node share it.

    Hidden states travel (40 to 60 times less than logits); every rank holds a copy of the teacher's head. `load()`,
    which is pickled, makes the model on its device, in the new process only.
    """

    timeout = DEADLINE  # seconds for loading, and for each answer

    def __init__(self, load: Callable, local_rank: int, local_world_size: int):
        self.lock, self.process, here = threading.Lock(), None, None  # seq_kd asks from the sampler's thread
        self.pool, self.window = ThreadPoolExecutor(1, "teacher"), collections.deque()
        if local_rank == 0:
            self.folder = tempfile.TemporaryDirectory(prefix="gold-teacher-", dir="/tmp")  # its path may have 107 bytes
            here = (f"{self.folder.name}/socket", os.urandom(16))
            args, spawn = (load, *here, local_world_size), multiprocessing.get_context("spawn")
            self.process = spawn.Process(target=_serve_teacher, args=args, daemon=True)
            self.process.start()
        if dist.is_initialized():  # of all addresses, the one that was made on this node
            found, node = [None] * dist.get_world_size(), (socket.gethostname(), os.environ.get("GROUP_RANK"))
            dist.all_gather_object(found, (node, here))
            here = next(address for n, address in found if n == node and address is not None)
        until, self.connection = time.monotonic() + self.timeout, None
        while self.connection is None:
            if self.process and not self.process.is_alive():
                raise RuntimeError(f"the teacher's process ended with exit code {self.process.exitcode} while loading")
            if time.monotonic() > until:
                raise TimeoutError(f"the teacher was not ready after {self.timeout:.0f} s")
            try:
                self.connection = multiprocessing.connection.Client(here[0], family="AF_UNIX", authkey=here[1])
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.1)
        self.head = self._ask("head")

    def _ask(self, name: str, *args):
        with self.lock:
            try:
                self.connection.send_bytes(pickle.dumps((name, args)))
                if not self.connection.poll(self.timeout):
                    raise TimeoutError(f"the teacher's process did not answer in {self.timeout:.0f} s")
                ok, result = pickle.loads(self.connection.recv_bytes())
            except (EOFError, ConnectionError) as e:
                raise RuntimeError("the teacher's process has died: its own output says why") from e
        if not ok:
            raise RuntimeError(f"the teacher's process failed: {result}")
        return result

    def ahead(self, asked: list[tuple[Tensor, Tensor]]) -> None:
        """Ask for what `hidden` will be asked for, in that order, while something else is done."""
        self.window.extend(self.pool.submit(self._ask, "hidden", ids.cpu(), rows.cpu()) for ids, rows in asked)

    def hidden(self, ids: Tensor, rows: Tensor) -> Tensor:
        return self.window.popleft().result() if self.window else self._ask("hidden", ids.cpu(), rows.cpu())

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        return self._ask("generate", requests, sampling)

    def close(self) -> None:
        """Leave; the process ends when every rank has left."""
        self.pool.shutdown(cancel_futures=True)
        self.connection.close()
        if self.process is not None:
            self.process.join(10)
            self.folder.cleanup()


def served_url(url: str) -> str:
    """scheme://host:port/path of a server, without the /v1 at its end. Raises ValueError if it is none, or tells."""
    if set(url) & set("@?#"):
        raise ValueError("teacher_url with credentials or a query would be printed and saved: see --teacher-key")
    parts = urllib.parse.urlsplit(url.strip() if "://" in url else f"http://{url.strip()}")
    ok = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    need(ok, f"teacher_url must be like http://host:8000: got {url}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


class ServedTeacher:
    """A teacher behind vLLM's OpenAI-compatible server, scored by token ids: top-k log probabilities of prompt tokens.

        python -m vllm.entrypoints.openai.api_server --model TEACHER --max-logprobs 64

    Servers answer at temperature 1 whatever is asked, so that is the only loss temperature there is. Redirects are not
    followed, proxies are not used.

    Args:
        model: what the server is expected to serve, as a name or directory.
        k: how many tokens per position; at most the server's --max-logprobs.
        timeout: seconds of one try, to its last byte; there are retries + 1, with pauses of 0.5, 1, 2, .. up to 20.
    Raises: ConnectionError if the server cannot be reached, ValueError if it serves or answers something else.
    """

    ahead = lambda self, asked: None  # its server would have to keep what it found

    def __init__(
        self, url: str, model: str, vocabulary: Vocabulary, k: int, key: str | None = None, timeout: float = 120.0,
        retries: int = 4,
    ):  # fmt: skip
        self.url, self.k, self.timeout, self.retries, self.size = served_url(url), k, timeout, retries, vocabulary.size
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.pool = ThreadPoolExecutor(16, thread_name_prefix="teacher")
        served = self._ask("/v1/models", "data")[0]
        self.model, self.max_length = served.get("id"), served.get("max_model_len") or math.inf
        if Path(model).name not in {Path(str(served.get(name))).name for name in ("id", "root")}:
            raise ValueError(f"{url} serves {self.model}, but --teacher-model is {model}: they must be the same model")
        text = "The quick brown fox: 12 + 34 = 46, caf\u00e9."
        ours = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        if (theirs := self._ask("/tokenize", "tokens", body)) != ours:
            raise ValueError(f"{url} tokenises differently from --teacher-model {model}: {theirs} is not {ours}")
        first, second = (self._score_one(ours, 1) for _ in range(2))
        self.nondeterminism = float(np.abs(first[0] - second[0]).max())

    def _send(self, path: str, body: dict | None) -> tuple[int, bytes]:
        """(status, answer) of one try. A server that drips its answer is hung up on at the deadline."""
        parts, until = urllib.parse.urlsplit(self.url), time.monotonic() + self.timeout
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with contextlib.closing(kind(parts.netloc, timeout=self.timeout)) as connection:
            connection.connect()
            hang_up = threading.Timer(self.timeout, connection.sock.shutdown, [socket.SHUT_RDWR])
            hang_up.start()
            try:
                data = body and json.dumps(body)
                connection.request("POST" if data else "GET", parts.path + path, data, self.headers)
                reply = connection.getresponse()
                return reply.status, reply.read()
            finally:
                hang_up.cancel()
                if time.monotonic() > until:
                    raise TimeoutError("timed out")

    def _ask(self, path: str, wanted: str, body: dict | None = None) -> list:
        """The entry `wanted` of the answer, a list with something in it."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2.0 ** (attempt - 1), 20))
            try:
                status, data = self._send(path, body)
                answer = json.loads(data) if status == 200 else None
            except ssl.SSLCertVerificationError as e:
                raise ValueError(f"{self.url}: {e.verify_message}: SSL_CERT_FILE may name its authority's file") from e
            except (OSError, http.client.HTTPException, ValueError) as e:
                error = f"{type(e).__name__}: {e}"
                continue
            error = f"{status} {data[:500].decode(errors='replace')}"
            found = answer.get(wanted) if isinstance(answer, dict) else None
            if isinstance(found, list) and found and isinstance(found[0], int if wanted == "tokens" else dict):
                return found
            if status < 500 and status not in (408, 429):  # asking again would not help
                what = f"answered without {wanted!r}, is it vLLM?" if status == 200 else "refused"
                key = ": it asks for a key, see --teacher-key" if status in (401, 403) else ""
                raise ValueError(f"{self.url}{path} {what}: {error}{key}")
        tries = f"{self.retries + 1} tries of {self.timeout:.0f} s: {error}"
        advice = "Is it running (README, A served teacher)? The last checkpoint goes on with --resume."
        raise ConnectionError(f"the teacher at {self.url} did not answer {path} in {tries}. {advice}")

    def _complete(self, ids: list[int], **settings) -> dict:
        body = {"model": self.model, "prompt": ids, "add_special_tokens": False, "return_token_ids": True} | settings
        if (length := len(ids) + settings["max_tokens"]) > self.max_length:
            what = f"{length} teacher tokens are more than the {self.max_length} that {self.url} takes"
            raise ValueError(f"{what}: restart it with a larger --max-model-len, or let it read less")
        choice = self._ask("/v1/completions", "choices", body)[0]
        if (read := choice.get("prompt_token_ids")) != ids:
            raise ValueError(f"{self.url} read other tokens than it was sent: {read} for {ids}")
        return choice

    def _score_one(self, ids: list[int], first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(own (n,), top ids (n, k), their log probabilities (n, k)) of the tokens ids[first:]."""
        entries = self._complete(ids, max_tokens=1, prompt_logprobs=self.k).get("prompt_logprobs") or []
        n, told = len(ids), len(entries)
        need(n == told, f"{self.url} returned {told} prompt log probabilities for {n} tokens")
        own, best = np.zeros(len(ids) - first), np.zeros((len(ids) - first, self.k, 2))
        for row, position in enumerate(range(first, len(ids))):
            try:
                entry = {int(i): (e["rank"], int(i), float(e["logprob"])) for i, e in entries[position].items()}
                best[row] = [x[1:] for x in sorted(entry.values()) if x[0] <= self.k]
                own[row], values = entry[ids[position]][2], np.array([x for *_, x in entry.values()])
                need(0 <= min(entry) and max(entry) < self.size, "an id is no token")
                need(np.isfinite(values).all() and values.max() < 1e-3 and np.exp(values).sum() < 1.001, "it is no law")
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                what = f"log probabilities of the top {self.k} and token {ids[position]} of a vocabulary of {self.size}"
                found = f"{str(entries[position])[:300]}; does the server allow --max-logprobs {self.k}?"
                raise ValueError(f"{self.url}: at position {position} are not the {what}: {found}") from e
        return np.minimum(own, 0), best[..., 0].astype(np.int64), np.minimum(best[..., 1], 0)

    def score(self, sequences: list[list[int]], firsts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Own (N,), top ids (N, k), their log probabilities (N, k) of tokens firsts[i].. of each sequence, in a row."""
        parts = list(self.pool.map(self._score_one, sequences, firsts))
        return tuple(torch.from_numpy(np.concatenate(x)) for x in zip(*parts))

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        settings = sampling.for_vllm() | {"max_tokens": sampling.max_new_tokens}
        asked = [self.pool.submit(self._complete, r.prompt_ids, seed=r.seed, **settings) for r in requests]
        choices = [future.result() for future in asked]
        if bad := [c for c in choices if not c.get("token_ids")]:
            raise ValueError(f"{self.url} wrote nothing for {len(bad)} of {len(choices)} prompts: {str(bad[0])[:200]}")
        return [Rollout(list(c["token_ids"]), [], c["finish_reason"] == "stop", 0) for c in choices]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def append_jsonl(path: Path, row: dict) -> None:
    """Add a line; what a killed run left of one becomes a line of its own first."""
    with path.open("ab+") as file:
        torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def read_jsonl(path: Path) -> list[dict]:
    """Its lines, none if there is no such file. A line that is torn, as a kill leaves it, is no line."""
    rows = []
    for line in path.read_text(errors="replace").split("\n") if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


@dataclass
class TeacherAnswers:
    """seq_kd: off-policy completions written by the teacher, once per epoch and row, kept on disk."""

    teacher: object
    vocabulary: Vocabulary  # the teacher's
    sampling: Sampling
    folder: Path  # one JSON-lines file per epoch and rank; what is there is not generated again
    rank: int
    seed: int

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        written = [e for path in sorted(self.folder.glob("epoch-*.jsonl")) for e in read_jsonl(path)]
        self.known = {(e["epoch"], e["row"]): (e["completion"], e["finished"]) for e in written}

    def __call__(self, wanted: list[tuple], soon: Iterable[tuple] = ()) -> list[tuple[str, bool]]:
        """(text, whether the teacher ended it) for each (epoch, index of the row, the teacher's prompt ids).

        If it has to write any of them, it writes those of `soon` in the same go.
        """
        missing = lambda some: {(e, i): ids for e, i, ids in some if (e, i) not in self.known}
        new = missing(wanted)
        new |= missing(soon) if new else {}
        seed = lambda where: int(np.random.SeedSequence([self.seed, 4, *where]).generate_state(1)[0])
        requests = [Request(ids, seed(where)) for where, ids in new.items()]
        rollouts = self.teacher.generate(requests, self.sampling) if requests else []
        for (epoch, index), r in zip(new, rollouts):
            ids = r.completion_ids[: len(r.completion_ids) - r.finished]
            text = self.vocabulary.join(ids).decode(errors="replace")
            self.known[epoch, index] = (text, r.finished)
            entry = {"epoch": epoch, "row": index, "completion": text, "finished": r.finished}
            append_jsonl(self.folder / f"epoch-{epoch}.rank-{self.rank}.jsonl", entry)
        return [self.known[epoch, index] for epoch, index, _ in wanted]
