"""Proves the GPU path on one card, without weights, data or a network: one line per fact, with what is expected of it.

    python tests/bench_gpu.py [parts]        about ten minutes on an H100, or only these parts
    TINY=1 python tests/bench_gpu.py         the same code at toy size on a CPU, in about a minute

A line is `ok` inside its range and LOOK outside; ranges of time and memory are for an H100 and are not judged at toy
size. The exit code is the number of lines to look at. Models have random weights at published shapes.

exact     the fused loss in bf16 against float64; hidden states without an attention mask against those with one
streams   weights reach the engine's thread whole, on a stream of its own; what happens without the event
loss      head + loss + backward: milliseconds and gigabytes beside the dense form, compiled, Liger, and a floor
train     a micro-batch: milliseconds, MFU, host synchronisations, with and without a 7B teacher
sampler   tokens per second of the hf sampler
memory    bytes per parameter with DDP and Adam, before and after a step
teacher   the teacher in a process of its own: what its socket adds
run       torchrun with the evaluator's child on the same card, killed and resumed
"""

import contextlib
import functools
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

TINY = bool(os.environ.get("TINY"))
if TINY:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.functional import cosine_similarity  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config  # noqa: E402

import gold_buffer  # noqa: E402
import gold_data  # noqa: E402
import gold_loss  # noqa: E402
import gold_train  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE, BF16 = "cuda" if CUDA else "cpu", torch.bfloat16
DTYPE = BF16 if CUDA else torch.float32
PEAK, BANDWIDTH = 989e12, 3.0e12  # of an H100: dense bf16 operations, bytes per second
ROOT = Path(gold_train.__file__).parent
LINES: list[bool] = []  # whether each judged line was in its range


def shape(kind, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, tied: bool):
    """A configuration; at toy size a small one with the same ties."""
    if TINY:
        hidden, inner, layers, heads, kv, vocab = 64, 128, 2, 4, 2, 1000 + 64 * (vocab == 152_064)
    return kind(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=8192,
    )  # fmt: skip


SHAPES = {
    "qwen2.5-0.5b": shape(Qwen2Config, 896, 4864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": shape(Qwen2Config, 1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-7b": shape(Qwen2Config, 3584, 18_944, 28, 28, 4, 152_064, False),
    "llama3.2-1b": shape(LlamaConfig, 2048, 8192, 16, 32, 8, 128_256, True),
    "llama3.1-8b": shape(LlamaConfig, 4096, 14_336, 32, 32, 8, 128_256, False),
}


def line(part: str, what: str, value: float, low: float = -math.inf, high: float = math.inf, exact: bool = False):
    """Print one fact. Ranges are judged on a GPU, and everywhere if they are `exact`."""
    asked = (low, high) != (-math.inf, math.inf)
    judged = asked and (exact or CUDA)
    ok = low <= value <= high
    if judged:
        LINES.append(ok)
    verdict = ("ok" if ok else "LOOK") if judged else "-"
    expected = f"{low:g} .. {high:g}" if asked else ""
    print(f"| {part} | {what} | {value:.4g} | {expected} | {verdict} |", flush=True)


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def timed(function, repeats: int = 5, warm: int = 2) -> tuple[float, float]:
    """(median milliseconds, peak gigabytes above what was there)"""
    for _ in range(0 if TINY else warm):
        function()
    sync()
    free()
    before, times = torch.cuda.memory_allocated() if CUDA else 0, []
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if TINY else repeats):
        start = time.perf_counter()
        function()
        sync()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else 0.0


def make(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype)


def make_teacher():
    return make("qwen2.5-7b", DTYPE)


def some_samples(n: int, vocab: int) -> list[gold_data.Sample]:
    """Prompts of 200 and completions of 500, 470, .. tokens, every second one sampled."""
    prompt, new, shorter = (8, 12, 1) if TINY else (200, 500, 30)
    random = torch.Generator().manual_seed(0)
    ids = lambda k: torch.randint(0, vocab, (k,), generator=random).tolist()
    out = []
    for i in range(n):
        p, c = ids(prompt), ids(max(1, new - shorter * i))
        out.append(gold_data.Sample(p, c, True, i % 2 == 0, p, logprobs=[-1.0] * len(c) if i % 2 == 0 else None))
    return out


def build(name: str, teacher: str | None = None, **changes):
    """(configuration, student, parts of the loss) as a run has them."""
    cfg = gold_train.Config(student_model="x", teacher_model="y", **changes)
    student = make(name, torch.float32).train()
    backbone, head = gold_buffer.split_head(student)
    if cfg.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    model = gold_train.Student(student, torch.compile(backbone) if cfg.compile else backbone, DTYPE)
    autocast = torch.autocast("cuda", BF16) if CUDA else contextlib.nullcontext()
    known, other, pairing = None, None, None
    if teacher:
        known = gold_buffer.LocalTeacher(make(teacher, DTYPE))
        pairing = gold_train.Pairing("jsd", gold_train.jsd_pair(cfg, None, None, None))
        other = gold_loss.Head(**known.head)
    read_head = lambda: gold_loss.Head(**head)
    return cfg, student, gold_train.Parts(model, read_head, autocast, pairing, known, other)


# ----------------------------------------------------------------------------------------------------------------------
# parts


def exact() -> None:
    torch.manual_seed(0)
    n, v, h, d = (4, 50, 8, 8) if TINY else (64, 4096, 256, 512)
    hidden, weight = torch.randn(n, h, device=DEVICE, dtype=BF16), torch.randn(v, h, device=DEVICE) / h**0.5 * 3
    known = torch.randn(n, d, device=DEVICE, dtype=BF16)
    other = (torch.randn(v, d, device=DEVICE) / d**0.5 * 3).to(BF16)
    for beta in (0.0, 0.5, 1.0):
        a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        student, teacher = gold_loss.Side(a, gold_loss.Head(b)), gold_loss.Side(known, gold_loss.Head(other))
        loss = gold_loss.fused_jsd(student, teacher, beta, chunk=17).total
        loss.backward()
        x, y = hidden.double().requires_grad_(), weight.double().requires_grad_()
        true = gold_loss.jsd(x @ y.T, known.double() @ other.double().T, beta).sum()
        true.backward()
        line("exact", f"beta {beta}: relative error of the loss", abs(loss.item() / true.item() - 1), 0, 0.01, True)
        for name, got, want in (("hidden states", a.grad, x.grad), ("head", b.grad, y.grad)):
            cosine = cosine_similarity(got.double().flatten(), want.flatten(), 0).item()
            line("exact", f"beta {beta}: cosine of the gradient of the {name}", cosine, 0.999, 1.0001, True)
    model = make("qwen2.5-0.5b", DTYPE).eval()
    batch = gold_data.collate(some_samples(4, SHAPES["qwen2.5-0.5b"].vocab_size)).to(DEVICE)
    with torch.no_grad():
        inside = batch.student_mask.bool()
        without = model.base_model(input_ids=batch.student_ids).last_hidden_state[inside].float()
        masked = model.base_model(input_ids=batch.student_ids, attention_mask=batch.student_mask)
        masked = masked.last_hidden_state[inside].float()
    apart = ((without - masked).std() / masked.std()).item()
    line("exact", "hidden states without a mask, from those with one", apart, 0, 0.05 if CUDA else 0.0, True)


class Reader:
    """A sampler that keeps a copy of the weights it is given."""

    collective = False

    def load_weights(self, weights, version):
        self.seen = weights["w"].clone()

    def generate(self, requests, sampling, done):
        for i in range(len(requests)):
            done(i, gold_buffer.Rollout([5], [-1.0], False, int(self.seen.max().item())))

    def check(self):
        pass

    sleep = close = check


def streams() -> None:
    import conftest

    size = 1 << (10 if TINY else 26)
    weight, busy = (
        torch.zeros(size, device=DEVICE),
        torch.randn(64 if TINY else 8192, 64 if TINY else 8192, device=DEVICE),
    )
    vocabulary = gold_data.Vocabulary(conftest.byte_level(), (2,), len(conftest.byte_level()))
    rows = gold_buffer.RowStream([gold_data.Row(({"role": "user", "content": "?"},), "!")] * 9, 0)
    for lag in (0, 1):
        reader, torn, before = Reader(), 0, torch.cuda.current_stream() if CUDA else None
        encoder = gold_buffer.Encoder(vocabulary, vocabulary, 8, False, False)
        schedule = gold_buffer.Schedule(0, 1.0, 1, 1)
        sampling, weights_of = gold_buffer.Sampling(1), lambda: {"w": weight}
        buffer = gold_buffer.WindowBuffer(schedule, rows, encoder, reader, sampling, weights_of, 9, lag)
        for step in range(1 + lag, 9):
            for _ in range(20):
                busy @ busy
            weight.fill_(float(step))  # the optimizer step
            window = buffer.get(step - 1)
            torn += sum(s.version != step - lag * (step > 1 + lag) for s in window.samples)
            torn += int((reader.seen != reader.seen[0]).any())
        buffer.close()
        line("streams", f"lag {lag}: windows of other or torn weights", torn, 0, 0, True)
        if CUDA:
            line("streams", "the main thread's stream has changed", torch.cuda.current_stream() != before, 0, 0, True)
    if CUDA:  # a pool's stream here, the default one in a thread, and no event between them
        other, torn = torch.zeros_like(weight), 0
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(1, 6):
                for _ in range(20):
                    busy @ busy
                weight.fill_(float(i))
                read = threading.Thread(target=lambda: other.copy_(weight))
                read.start()
                read.join()
                torch.cuda.synchronize()
                torn += int((other != i).any())
        line("streams", "of 5 reads without the event, torn or stale", torn, 1, 5)


def loss() -> None:
    sizes = ((2048, 151_936, 896, 3584), (2048, 128_256, 2048, 4096), (2048, 256_000, 2304, 3584))
    for n, v, h, d in ((8, 100, 8, 8),) if TINY else sizes:
        free()
        random = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=DTYPE)
        hidden, weight = random(n, h).requires_grad_(), (random(v, h).float() * 0.02).requires_grad_()
        known, other, ids = random(n, d), random(v, d) * 0.02, torch.randint(0, v, (n,), device=DEVICE)
        student = gold_loss.Side(hidden, gold_loss.Head(weight), ids)
        teacher = gold_loss.Side(known, gold_loss.Head(other), ids)

        def ours(beta: float = 0.5) -> None:
            hidden.grad = weight.grad = None  # noqa: B023
            gold_loss.fused_jsd(student, teacher, beta).total.backward()  # noqa: B023

        def dense(jsd=gold_loss.jsd) -> None:
            hidden.grad = weight.grad = None  # noqa: B023
            jsd(hidden @ weight.to(DTYPE).t(), known @ other.t(), 0.5).sum().backward()  # noqa: B023

        who = {"gold": ours, "gold, beta 0": lambda: ours(0.0), "dense": dense}  # noqa: B023
        if CUDA:
            compiled = torch.compile(gold_loss.jsd)
            who["dense, compiled"] = lambda: dense(compiled)  # noqa: B023
        with contextlib.suppress(ImportError):
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=True)
            half = weight.detach().to(DTYPE).requires_grad_()
            who["Liger, bf16 head"] = lambda: liger(hidden, half, known, other, ids).backward()  # noqa: B023
        # matrix products at 70 % of the peak, and six passes over (n, v) in float32
        floor = 1e3 * (2 * n * v * (3 * h + d) / (0.7 * PEAK) + 6 * 4 * n * v / BANDWIDTH)
        line("loss", f"N {n} V {v} H {h}: floor, ms", floor)
        for name, function in who.items():
            try:
                ms, gb = timed(function)
            except torch.OutOfMemoryError:
                print(f"| loss | V {v}, {name} | out of memory | | - |", flush=True)
                continue
            limits = (floor, 6 * floor) if name == "gold" else ()
            line("loss", f"V {v}, {name}: ms", ms, *limits)
            line("loss", f"V {v}, {name}: GB", gb, *((0, 6.0) if name == "gold" else ()))


def train() -> None:
    cases = (  # student, teacher, rows, changes, least and most MFU
        ("qwen2.5-0.5b", None, 4, {"ce_weight": 1.0, "lmbda": 0.0}, 0.05, 0.3),
        ("qwen2.5-0.5b", "qwen2.5-7b", 4, {}, 0.05, 0.3),
        ("qwen2.5-0.5b", "qwen2.5-7b", 16, {}, 0.1, 0.4),
        ("qwen2.5-1.5b", "qwen2.5-7b", 4, {}, 0.15, 0.45),
        ("qwen2.5-1.5b", "qwen2.5-7b", 8, {"gradient_checkpointing": True}, 0.15, 0.45),
        ("qwen2.5-0.5b", "qwen2.5-7b", 4, {"compile": not TINY}, 0.05, 0.4),
        ("llama3.2-1b", "llama3.1-8b", 4, {}, 0.15, 0.45),
    )
    for name, teacher, rows, changes, low, high in cases[:4] if TINY else cases:
        free()
        title = f"{name} with {teacher or 'answers alone'}, {rows} rows{', ' if changes else ''}{'/'.join(changes)}"
        cfg, student, parts = build(name, teacher, per_device_train_batch_size=rows, **changes)
        samples = some_samples(rows, SHAPES[name].vocab_size)
        batch = gold_data.collate(samples, with_teacher=teacher is not None).to(DEVICE)
        optimizer = gold_train.open_optimizer(cfg, student)

        def micro() -> None:
            loss = gold_train.micro_batch_loss(cfg, parts, batch, (1000.0, 1000.0), gold_train.Stats())  # noqa: B023
            loss.backward()

        micro()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        ms, gb = timed(micro)
        asked = 0.0
        if teacher:
            asked, _ = timed(lambda: parts.teacher.hidden(batch.teacher_ids, batch.teacher_rows))  # noqa: B023
        lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in samples]
        c, head = student.config, parts.head.weight.numel()
        body = sum(p.numel() for p in student.parameters()) - head * (1 if c.tie_word_embeddings else 2)
        flops = 6 * body * sum(lengths) + 6 * head * sum(len(s.completion_ids) for s in samples)
        flops += 6 * c.num_hidden_layers * c.hidden_size * sum(n * n for n in lengths)  # causal: half of 12
        line("train", f"{title}: ms", ms)
        line("train", f"{title}: of it teacher, ms", asked)
        line("train", f"{title}: GB above weights and Adam", gb)
        line("train", f"{title}: MFU without the teacher", flops / (ms - asked + 1e-9) * 1e3 / PEAK, low, high)
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                micro()
            torch.cuda.set_sync_debug_mode("default")
            line("train", f"{title}: host synchronisations", len(seen), 0, 3)
        cfg = student = parts = optimizer = batch = None


def sampler() -> None:
    new, prompt, ranges = 64, 100, {1: (20, 120), 16: (300, 1800), 64: (1200, 7000), 256: (4000, 25_000)}
    if TINY:
        new, prompt, ranges = 4, 5, {2: (0, math.inf)}
    hf, how = gold_buffer.HFSampler(make("qwen2.5-0.5b", torch.float32), dtype=DTYPE), gold_buffer.Sampling(new)
    for size, limits in ranges.items():
        requests = [gold_buffer.Request([5 + i % 50] * prompt, i) for i in range(size)]
        hf.generate(requests[:1], how)
        start = time.perf_counter()
        written = sum(len(r.completion_ids) for r in hf.generate(requests, how))
        line("sampler", f"hf, {size} prompts: tokens/s", written / (time.perf_counter() - start), *limits)


def memory() -> None:
    """Under DDP with a world of one: its buckets are where a second copy of the gradients would be."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl" if CUDA else "gloo", f"file://{folder}/store", rank=0, world_size=1)
        try:
            config = gold_train.Config(student_model="x", teacher_model="y")
            path = Path(folder) / "student"
            make("qwen2.5-1.5b", torch.float32).save_pretrained(path)
            free()
            before = torch.cuda.memory_allocated() if CUDA else 0
            ranks = gold_train.Ranks(0, 0, 1, 1, torch.device(DEVICE, 0) if CUDA else torch.device("cpu"))
            cfg = gold_train.replace(config, student_model=str(path))
            student, _, model = gold_train.open_student(cfg, ranks, None)
            optimizer = gold_train.open_optimizer(cfg, student)
            count = sum(p.numel() for p in student.parameters())
            per_parameter = lambda: ((torch.cuda.memory_allocated() if CUDA else 0) - before) / count
            line(
                "memory",
                "bytes per parameter when the engine is sized: weights, Adam, gradients",
                per_parameter(),
                15.9,
                17,
            )
            ids, rows = torch.zeros(1, 4, dtype=torch.long, device=DEVICE), torch.arange(4, device=DEVICE)
            for _ in range(2):
                for last in (False, True):
                    model.require_backward_grad_sync = last
                    model(ids, rows).float().sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            line("memory", "bytes per parameter after two steps", per_parameter(), 15.9, 17)
            storages = {p.grad.untyped_storage().data_ptr() for p in student.parameters()}
            line("memory", "gradients with a storage of their own", len(storages), 1, count / 6e6 + 8, True)
        finally:
            dist.destroy_process_group()


def teacher() -> None:
    local = gold_buffer.LocalTeacher(make_teacher())
    batch = gold_data.collate(some_samples(4, SHAPES["qwen2.5-7b"].vocab_size)).to(DEVICE)
    args = (batch.teacher_ids, batch.teacher_rows)
    want, (ms, _) = local.hidden(*args).cpu(), timed(functools.partial(local.hidden, *args))
    del local
    free()
    shared = gold_buffer.SharedTeacher(make_teacher, 0, 1)
    try:
        through, _ = timed(lambda: shared.hidden(*args).to(DEVICE))
        line("teacher", "in this process, ms", ms)
        line("teacher", "what a process of its own adds, ms", through - ms, 0, 200)
        line("teacher", "hidden states that differ", (shared.hidden(*args).cpu() != want).any().item(), 0, 0, True)
    finally:
        shared.close()


def run() -> None:
    """A student of the embedded job; killed after its second checkpoint, and resumed to the end."""
    steps = 8 if TINY else 60
    with tempfile.TemporaryDirectory() as folder:
        rows = gold_data.make_countdown(200, mini=True)
        texts = [f"{row['prompt'][0]['content']}\n{row['completion']}" for row in rows]
        for name in ("student", "teacher"):
            gold_train.make_model(Path(folder) / name, texts, name == "teacher", hidden=64, layers=2, seed=0)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command += [str(ROOT / "gold_train.py"), "--output-dir", f"{folder}/run"]
        flags = f"--student-model {folder}/student --teacher-model {folder}/teacher --split train[:200] --sampler hf "
        flags += f"--max-steps {steps} --save-steps {steps // 4} --max-length 96 --max-completion-length 48 "
        flags += "--per-device-train-batch-size 8 --gradient-accumulation-steps 1 --learning-rate 3e-3 "
        flags += f"--eval-tasks countdown-mini --eval-steps {steps // 2} --eval-max-samples 16"
        log, start = (Path(folder) / "log.txt").open("w"), time.perf_counter()
        launched = subprocess.Popen([*command, *flags.split()], stdout=log, stderr=log, start_new_session=True)
        saved = Path(folder) / "run" / "checkpoints" / f"step-{2 * (steps // 4):06d}"
        while not saved.exists() and launched.poll() is None and time.perf_counter() - start < 300:
            time.sleep(0.05)
        os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()
        done = subprocess.run([*command, "--resume"], stdout=log, stderr=log, timeout=300)
        line("run", "exit code of the resumed run", done.returncode, 0, 0, True)
        line("run", "seconds, with the start of both", time.perf_counter() - start, 0, 300)
        if done.returncode:
            print(Path(log.name).read_text()[-3000:], file=sys.stderr)
            return
        metrics = [json.loads(x) for x in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [m["actor/loss"] for m in metrics]
        line("run", "steps logged, each once", len({m["step"] for m in metrics}), steps, len(metrics), True)
        line(
            "run", "loss of the last steps, share of the first's", sum(losses[-3:]) / sum(losses[:3]), 0, 1.0, not TINY
        )
        drift = max(m.get("gold/drift", 0.0) for m in metrics)
        line("run", "largest drift between sampler and trainer, nats", drift, 0, 0.05 if CUDA else 1e-4, True)
        evaluated = [json.loads(x) for x in (Path(folder) / "run" / "eval.jsonl").read_text().splitlines()]
        ended = {r["step"] for r in evaluated if r["status"] == "ok"}
        line("run", "evaluations of student and teacher that ended well", len(ended), 3, 4, True)


PARTS = {f.__name__: f for f in (exact, streams, loss, train, sampler, memory, teacher, run)}

if __name__ == "__main__":
    card = torch.cuda.get_device_name() if CUDA else "CPU, toy sizes" if TINY else "CPU"
    print(f"{card}, torch {torch.__version__}\n\n| part | what | value | expected | verdict |\n|---|---|---:|---|---|")
    if not CUDA and not TINY:
        sys.exit("bench_gpu.py: no GPU here; TINY=1 runs it at toy size")
    for part in sys.argv[1:] or PARTS:
        begun = time.perf_counter()
        try:
            PARTS[part]()
        except Exception:  # noqa: BLE001  the other parts are worth their minutes
            LINES.append(False)
            print(f"| {part} | failed | | | LOOK |\n{traceback.format_exc()[-2000:]}", flush=True)
        free()
        line(part, "all of it, seconds", time.perf_counter() - begun)
    sys.exit(min(100, len(LINES) - sum(LINES)))
