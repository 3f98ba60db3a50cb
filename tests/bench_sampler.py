"""How fast windows are made: python tests/bench_sampler.py  (about three minutes on two cores; prints Markdown)

    python tests/bench_sampler.py --before REVISION     the hf sampler and whole windows against gold_buffer as it was

Tokens per second of both samplers for windows of 1, 4, 16 and 64 prompts, the time of a weight sync, and the share of
each phase of a training step with lag 0, 1 and 2. All ratios are of one run on one machine; --hidden and --layers make
the model larger. On a GPU the same commands measure the GPU.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning OpenMP teams of the CPU engine cost 40x on shared cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the CPU engine would compile one function for 15 seconds
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_align
import conftest
import torch

import gold_buffer
import gold_data
import gold_train
from gold_buffer import HFSampler, Request, Sampling, VLLMSampler

WINDOWS, PROMPT, NEW, MEMORY = (1, 4, 16, 64), 64, 64, 2**28


def save(folder: Path, tokenizer, hidden: int, layers: int, seed: int):
    model = conftest.tiny_qwen(len(tokenizer), hidden=hidden, layers=layers, seed=seed)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def fastest(functions: dict, repeats: int = 5) -> dict[object, float]:
    """Least seconds of each function, all taking turns: other work on the machine only ever adds time."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def speeds(sampler, sampling: Sampling) -> dict[int, float]:
    """Tokens per second by window size; every completion has NEW tokens. A window of 1 is timed as 16 calls."""
    requests = [Request([(7 * i + j) % 500 + 5 for j in range(PROMPT)], i) for i in range(max(WINDOWS))]
    calls = {n: [[r] for r in requests[:16]] if n == 1 else [requests[:n]] for n in WINDOWS}
    sampler.generate(requests[:1], sampling)
    times = fastest({n: lambda n=n: [sampler.generate(call, sampling) for call in calls[n]] for n in WINDOWS})
    return {n: sum(map(len, calls[n])) * NEW / times[n] for n in WINDOWS}


def phases(name: str, lag: int, student: Path, teacher: Path, folder: Path) -> dict[str, float]:
    """Median seconds of the parts of a step of the real loop, all prompts on-policy."""
    rows = [{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a in range(30) for b in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = gold_train.Config(
        student_model=str(student), teacher_model=str(teacher), dataset=str(folder / "data.jsonl"), sampler=name,
        lag=lag, lmbda=1.0, max_steps=10, per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=160,
        max_completion_length=NEW, vllm_memory=MEMORY,
        output_dir=str(folder / f"{name}-{lag}"),
    )  # fmt: skip
    gold_train.train(cfg, gold_train.setup_ranks())
    lines = (folder / f"{name}-{lag}" / "metrics.jsonl").read_text().splitlines()[3:]  # the first steps warm up
    steps, parts = [json.loads(line) for line in lines], ("sync", "generate", "wait", "teacher", "step")
    return {part: statistics.median(step[f"timing/{part}"] for step in steps) for part in parts}


def against(revision: str) -> None:
    """Milliseconds before and after, alternating, by size of the model and of the window."""
    before = bench_align.module_at(revision, "gold_buffer")
    print("| model | prompts | work | before, ms | now, ms | speed |\n|---|---:|---|---:|---:|---:|")
    rows = [gold_data.Row(({"role": "user", "content": f"What is {i}?"},), "so " * 99) for i in range(64)]
    vocabularies = [
        gold_data.Vocabulary(t, (t.eos_token_id,), len(t)) for t in (conftest.byte_level(), conftest.metaspace())
    ]
    for size, hidden, new in ((400, 96, 32), (32_000, 96, 32), (600, 96, 256), (600, 512, 256)):
        model = conftest.tiny_llama(size, hidden=hidden, layers=3)
        samplers = {m: m.HFSampler(model) for m in (before, gold_buffer)}
        for n in (16,) if new > 32 else (16, 64):
            functions = {}
            for m, sampler in samplers.items():
                requests = [m.Request([(7 * i + j) % 300 + 5 for j in range(11 + i % 2)], i) for i in range(n)]
                functions[m] = lambda m=m, s=sampler, r=requests: s.generate(r, m.Sampling(new))  # noqa: B023
                if new > 32:
                    encoder = m.Encoder(*vocabularies, new, True, True)
                    schedule, stream = m.Schedule(0, 0.5, n, 1), m.RowStream(rows, 0)
                    buffer = m.WindowBuffer(schedule, stream, encoder, sampler, m.Sampling(new), model.state_dict, 1)
                    functions[m] = lambda b=buffer: b.make(0, None, 0)
            best, work = fastest(functions), f"{new} tokens" if new == 32 else f"window of {new} tokens, prefix"
            old, now = 1e3 * best[before], 1e3 * best[gold_buffer]
            print(f"| V {size:,}, H {hidden} | {n} | {work} | {old:.1f} | {now:.1f} | {old / now:.2f}x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--before", metavar="REVISION")
    args = parser.parse_args()
    if args.before:
        return against(args.before)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        student, teacher = folder / "student", folder / "teacher"
        model = save(student, conftest.byte_level(), args.hidden, args.layers, 0).to(device)
        save(teacher, conftest.byte_level(), args.hidden, args.layers, 1)
        sampling = Sampling(NEW, 1.0)  # no end: all completions are equally long
        samplers = {"hf": lambda: HFSampler(model, dtype=dtype)}
        if importlib.util.find_spec("vllm"):
            samplers["vllm"] = lambda: VLLMSampler(str(student), 256, str(dtype)[6:], MEMORY)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"\n{parameters:.1f} M parameters, {PROMPT} + {NEW} tokens, {device}; tokens/s by prompts in a window\n")
        print("| sampler | " + " | ".join(map(str, WINDOWS)) + " | 16 against 16 x 1 | sync, ms |")
        print("|---|" + "---:|" * (len(WINDOWS) + 2))
        for name, start in samplers.items():
            sampler = start()
            sampler.load_weights(model.state_dict(), 0)
            sync = fastest({0: lambda: sampler.load_weights(model.state_dict(), 1)})[0]  # noqa: B023
            found = speeds(sampler, sampling)
            cells = [f"{found[n]:,.0f}" for n in WINDOWS] + [f"{found[16] / found[1]:.1f}x", f"{1000 * sync:.1f}"]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
            sampler.close()
        results = {(n, lag): phases(n, lag, student, teacher, folder) for n in samplers for lag in (0, 1, 2)}
        print("\n| sampler | lag | step, s | speed | waits for window | teacher | training | window is made in, s |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for (name, lag), t in results.items():
            step, rest = t["step"], t["step"] - t["wait"] - t["teacher"]
            shares = " | ".join(f"{x / step:.0%}" for x in (t["wait"], t["teacher"], rest))
            speedup, made = results[name, 0]["step"] / step, t["sync"] + t["generate"]
            print(f"| {name} | {lag} | {step:.2f} | {speedup:.2f}x | {shares} | {made:.2f} |")


if __name__ == "__main__":
    main()
