"""What a step costs a rank, and what it holds, with 1, 2 and 4 ranks that keep everything or share one student.

python tests/bench_scale.py

The work of a rank is fixed (8 completions), so each number that grows downwards grows with the ranks. Both kinds of
runs alternate within one start of the ranks. Seconds are those of a process, not of the clock: cores are shared.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "forks"))

import torch
from conftest import byte_level, tiny_llama
from test_scale import ENVIRONMENT, LAUNCHER, held_bytes
from test_train import config, save, write_rows

import gold_train

STEPS, ROUNDS = 6, 2


def bench_rank(folder: Path) -> None:
    """Alternating runs; this rank's numbers go into a file."""
    ranks, found = gold_train.setup_ranks(), {"none": [], "all": []}
    setup, log_row, checkpoint = gold_train.setup, gold_train.log_row, gold_train.checkpoint
    models = {name: str(folder / name) for name in ("student", "same")}
    for number, over in enumerate(["none", "all"] * ROUNDS):
        stamps, opened, saving = [], [], []

        def remembered(*args, into=opened):
            into.append(setup(*args))
            return into[0]

        def stamped(*args, into=stamps):
            into.append(time.process_time())
            return log_row(*args)

        def timed(*args, into=saving):
            start = time.process_time()
            checkpoint(*args)
            into.append(time.process_time() - start)

        gold_train.setup, gold_train.log_row, gold_train.checkpoint = remembered, stamped, timed
        out = folder / f"{ranks.world_size}-{number}"
        cfg = config(models, str(folder / "rows.jsonl"), out, "same", max_steps=STEPS, max_completion_length=24)
        alone = ranks.world_size == 1
        gold_train.train(dataclasses.replace(cfg, shard="none" if alone else over), ranks, last=False)
        run = opened[0]
        moments = [x for s in run.optimizer.state.values() for name, x in s.items() if name != "step"]
        found[over].append({
            "step": statistics.median(b - a for a, b in zip(stamps, stamps[1:])),
            "parameters": held_bytes(run.student.parameters()) / 2**20, "optimizer": held_bytes(moments) / 2**20,
            "checkpoint": saving[0],
        })  # fmt: skip
    (folder / f"{ranks.world_size}.rank-{ranks.rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="gold-bench-scale-"))
    save(folder / "student", tiny_llama(len(byte_level()), hidden=128, layers=4), byte_level())
    save(folder / "same", tiny_llama(len(byte_level()), hidden=128, layers=4, seed=1), byte_level())
    write_rows(folder / "rows.jsonl", lambda a: f"It is {2 * a + 3}." + " Let us count again." * (a % 5))
    print("| ranks | shard | s per step | parameters, MiB | optimizer, MiB | checkpoint on rank 0, s |")
    print("|---|---|---|---|---|---|")
    for ranks in (1, 2, 4):
        launch = [*LAUNCHER, "--standalone", "--nproc-per-node", str(ranks), __file__, str(folder)]
        subprocess.run(launch, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
        files = sorted(folder.glob(f"{ranks}.rank-*.json"))
        for over in ("none", "all") if ranks > 1 else ("none",):
            rows = [row for path in files for row in json.loads(path.read_text())[over]]
            first = json.loads(files[0].read_text())[over]
            most = {name: max(row[name] for row in rows) for name in ("parameters", "optimizer")}
            step, saving = statistics.median(row["step"] for row in rows), min(row["checkpoint"] for row in first)
            held = f"{most['parameters']:.2f} | {most['optimizer']:.2f}"
            print(f"| {ranks} | {over} | {step:.3f} | {held} | {saving:.3f} |", flush=True)


if __name__ == "__main__":
    bench_rank(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
