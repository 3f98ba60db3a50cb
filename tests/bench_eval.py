"""How much slower does training become while it is evaluated: in the evaluator's child, and in a thread for comparison.

python tests/bench_eval.py [--seconds 15]

Prints, for two kinds of evaluation, the step time of a small training loop as a ratio to the same loop alone. "Busy"
leaves out what a step spent in the run queue, waiting for a CPU (Linux tells in /proc/self/schedstat). "Beside a
process" is the control: a process of the child's priority that has nothing to do with training and counts to infinity.
What that costs is contention for cores, caches and power, which no design of an evaluator removes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import gold_data
import gold_eval
import gold_train


def grade_with_sympy(text: str, row: gold_data.Row) -> gold_eval.Grade:
    """Python work without end, as graders of mathematics are; no time limits, for those need the main thread."""
    from math_verify import parse, verify

    for i in range(20):
        gold = parse(f"\\boxed{{\\frac{{{i}x^2+1}}{{3}}}}", parsing_timeout=None)
        verify(
            gold, parse(f"So $\\frac{{1}}{{3}} + \\frac{{{i}}}{{3}}x^2$.", parsing_timeout=None), timeout_seconds=None
        )
    return gold_eval.Grade("ok")


gold_eval.TASKS["sympy"] = gold_eval.Task("countdown-mini", grade_with_sympy, classes=("ok",), needs=())
OPTIONS = {"max_new_tokens": 32, "max_samples": 24}


def make_student():
    from conftest import byte_level, tiny_llama

    model = tiny_llama(len(byte_level()), hidden=128, layers=4)
    model.config.eos_token_id = byte_level().eos_token_id
    return model


class Loop:
    """A training loop that counts its steps, their time and their time in the run queue."""

    def __init__(self, model):
        self.model, self.optimizer = model.train(), torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.ids = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(0))

    def run(self, until, each=lambda step: None) -> tuple[float, float, float]:
        """(ms per step, ms per step without the run queue, longest step in ms)"""
        queued, start, longest, step = run_queue(), time.perf_counter(), 0.0, 0
        while not until(time.perf_counter() - start):
            before = time.perf_counter()
            self.model(self.ids, labels=self.ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            step += 1
            each(step)
            longest = max(longest, time.perf_counter() - before)
        wall, waited = time.perf_counter() - start, run_queue() - queued
        return 1000 * wall / step, 1000 * (wall - waited) / step, 1000 * longest


def run_queue() -> float:
    """Seconds that this process's main thread has been ready to run but was not running."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def in_a_child(loop: Loop, folder: str, task: str, seconds: float) -> tuple[tuple, int]:
    """Every 20 steps the loop writes a model directory, as the trainer does, and has it scored; both are its time."""
    from conftest import byte_level

    evaluator = gold_eval.Evaluator([task], folder, **OPTIONS)

    def submit(step: int) -> None:
        if step % 20 == 1:
            gold_train.save_model(Path(folder) / f"{task}-{step}", loop.model, byte_level())
            evaluator.submit(step, Path(folder) / f"{task}-{step}")
        for record in evaluator.poll():
            shutil.rmtree(Path(folder) / f"{task}-{record['step']}")

    submit(1)
    loop.run(lambda elapsed: evaluator.counts.total() > 0, lambda step: None)  # the child has started
    submit(2)
    before = evaluator.counts["ok"]
    times = loop.run(lambda elapsed: elapsed > seconds, submit)
    done = evaluator.counts["ok"] - before
    evaluator.close(0)
    return times, done


def beside_a_process(loop: Loop, folder: str, task: str, seconds: float) -> tuple[tuple, int]:
    process = subprocess.Popen([sys.executable, "-c", "import os\nos.nice(10)\nwhile True: pass"])
    times = loop.run(lambda elapsed: elapsed > seconds)
    process.kill()
    process.wait()
    return times, 0


def in_a_thread(loop: Loop, folder: str, task: str, seconds: float) -> tuple[tuple, int]:
    import copy

    from conftest import byte_level

    model, stop, done = copy.deepcopy(loop.model).eval(), [], []

    def work():
        while not stop:
            gold_eval.evaluate(model, byte_level(), [task], **OPTIONS)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    times = loop.run(lambda elapsed: elapsed > seconds)
    stop.append(1)
    thread.join()
    return times, len(done)


PLACES = (beside_a_process, in_a_child, in_a_thread)


def main() -> None:
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    gold_eval.Evaluator.script = __file__
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    disable_progress_bar()
    loop = Loop(make_student())
    loop.run(lambda elapsed: elapsed > 2)
    rows = [["evaluation", "where", "step", "x alone", "x alone, busy", "longest step", "evaluations done"]]
    for task in ("countdown-mini", "sympy"):
        alone = loop.run(lambda elapsed: elapsed > seconds)
        found = {"alone": (alone, 0)}
        found |= {f.__name__.replace("_", " "): f(loop, folder, task, seconds) for f in PLACES}
        again = loop.run(lambda elapsed: elapsed > seconds / 2)
        alone = [(a + b) / 2 for a, b in zip(alone, again)]  # before and after: other processes come and go
        for where, (times, done) in found.items():
            ratios = [f"{times[i] / alone[i]:.2f}" for i in (0, 1)]
            rows.append([task, where, f"{times[0]:.1f} ms", *ratios, f"{times[2]:.0f} ms", str(done)])
    print(gold_eval.markdown(rows))
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        gold_eval.serve(sys.argv[2])
    else:
        main()
