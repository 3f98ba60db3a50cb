"""How fast a data set is opened: this checkout against an earlier one, each start in a process of its own.

python tests/bench_rows.py                      100,000 rows of three kinds, before and after, alternating
python tests/bench_rows.py --rows 1000000 --kinds puzzles --before none

A start is everything between the tokenizers and the first window: reading, checking, held-out rows, what is dropped.
`first` is with an empty cache, `again` with what the first start has left. Memory is what the process itself holds
(not pages of files, which the system can take back at any time): its peak over what it held before.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
START = """
import os, sys, threading, time
import torch, transformers, datasets, gold_data, gold_train
from gold_train import Config

student, teacher = (gold_data.load_vocabulary(name) for name in sys.argv[2:4])
student.tokenizer("a"), teacher.tokenizer("a")
cfg = Config(dataset=sys.argv[1], eval_ratio=0.001)
datasets.disable_progress_bars()

def held():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, most, going = held(), [0.0], True

def watch():
    while going:
        most[0] = max(most[0], held())
        time.sleep(0.02)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
args = (cfg, student, teacher) if gold_train.load_data.__code__.co_argcount == 4 else (cfg, student)
found = gold_train.load_data(*args, lambda text: print(text[:150], file=sys.stderr))
seconds, now = time.perf_counter() - start, held()
going = False
watcher.join()
print(seconds, most[0] - before, now - before)
"""


@dataclass(frozen=True)
class Options:
    rows: int = 100_000
    kinds: tuple[str, ...] = ("puzzles", "questions", "chats")
    before: str = "201f189"  # a commit, or none
    repeats: int = 2


def row(kind: str, i: int, rng: random.Random) -> dict:
    if kind == "puzzles":  # short enough to fit, whatever their tokens
        return {
            "prompt": f"Make {i % 97} from {i}, {rng.randint(1, 99)}.",
            "completion": f"<think> {i} </think> {i % 97}",
        }
    words = [
        "number",
        "of",
        "the",
        "apples",
        "is",
        "twice",
        "as",
        "many",
        "12",
        "and",
        "3.5",
        "how",
        "does",
        "it",
        "go",
    ]
    text = lambda n: " ".join(rng.choices(words, k=n))
    if kind == "questions":  # as OpenMathInstruct-2: a question of 50 words, a solution of 150
        return {"problem": f"{i} {text(50)}?", "generated_solution": text(150), "expected_answer": "7"}
    return {"messages": [  # 160 words of prompt: over the bound of 512 bytes, so they are encoded
        {"role": "system", "content": text(20)}, {"role": "user", "content": f"{i} {text(140)}"},
        {"role": "assistant", "content": text(150)},
    ]}  # fmt: skip


def start(code: Path, data: Path, models: list[str], cache: Path) -> list[float]:
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", START, str(data), *models]
    done = subprocess.run(command, env=environment, cwd=code, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [float(x) for x in done.stdout.split()[-3:]]


def main(options: Options) -> None:
    from conftest import byte_level, metaspace, tiny_llama, tiny_qwen

    with tempfile.TemporaryDirectory() as folder:
        folder, models, codes = Path(folder), [], {"now": ROOT}
        for name, tokenizer, model in (("s", byte_level(4000), tiny_qwen), ("t", metaspace(4000), tiny_llama)):
            models.append(str(folder / name))
            model(len(tokenizer)).save_pretrained(models[-1])
            tokenizer.save_pretrained(models[-1])
        if options.before != "none":
            codes = {options.before: folder / "before"} | codes
            codes[options.before].mkdir()
            for file in ("train", "data", "buffer", "eval", "loss"):
                show = ["git", "show", f"{options.before}:gold_{file}.py"]
                text = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
                (codes[options.before] / f"gold_{file}.py").write_text(text)
        print(f"| {options.rows:,} rows | start | seconds | peak MB | MB kept |\n| --- | --- | --- | --- | --- |")
        for kind in options.kinds:
            rng, data, results = random.Random(0), folder / f"{kind}.jsonl", {}
            with data.open("w") as file:
                file.writelines(json.dumps(row(kind, i, rng)) + "\n" for i in range(options.rows))
            for _ in range(options.repeats):
                for name, code in codes.items():
                    cache = folder / "cache" / name
                    shutil.rmtree(cache, ignore_errors=True)
                    for when in ("first", "again"):
                        results.setdefault((name, when), []).append(start(code, data, models, cache))
            best = {key: min(runs) for key, runs in results.items()}
            for (name, when), (seconds, peak, kept) in best.items():
                print(f"| {kind}, {name} | {when} | {seconds:.1f} | {peak:.0f} | {kept:.0f} |")
            if options.before != "none":
                ratios = [best[options.before, "first"][0] / best["now", when][0] for when in ("first", "again")]
                print(f"| {kind} | before / now | {ratios[0]:.1f}x first, {ratios[1]:.0f}x again | | |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
