"""The picture at the top of the README: the embedded job on several seeds, and how its numbers spread.

    for seed in 0 1 2; do python gold_train.py --seed $seed --output-dir out/seed$seed; done
    python tests/draw_embedded.py out/seed0 out/seed1 out/seed2

Prints the README's table as well, with the mean and standard error over seeds.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from matplotlib.figure import Figure

from gold_eval import headline, markdown, read_jsonl

NAMES = {"gold": ("GOLD: teacher of another tokenizer", "#1f5fa8"), "control": ("answers alone", "#d9822b")}


def scores(folder: Path) -> dict[int | None, tuple[float, float]]:
    """{step; None: the teacher's: (accuracy, standard error)} of a run folder."""
    records = [r for r in read_jsonl(folder / "eval.jsonl") if r["status"] == "ok"]
    return {r["step"]: (headline(r["results"])[1], next(iter(r["results"].values()))["se"]) for r in records}


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds (the first axis) and its standard error."""
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0 * values[0]


def draw(folders: list[Path], path: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (label, color) in NAMES.items():
        found = [scores(folder / name) for folder in folders]
        steps = sorted(step for step in found[0] if step is not None)
        mean, error = spread(np.array([[f[step][0] for step in steps] for f in found]))
        right.plot(steps, 100 * mean, "o-", color=color, label=label)
        right.fill_between(steps, 100 * (mean - error), 100 * (mean + error), color=color, alpha=0.25)
    teacher = np.mean([scores(folder / "gold")[None][0] for folder in folders])
    right.axhline(100 * teacher, color="#444444", ls="--", lw=1)
    right.text(0, 100 * teacher - 1.5, "teacher", va="top", fontsize=9)
    loss = np.array([[r["actor/loss"] for r in read_jsonl(f / "gold" / "metrics.jsonl")] for f in folders])
    loss = loss[:, : loss.shape[1] // 10 * 10].reshape(len(loss), -1, 10).mean(2)  # of ten steps
    mean, error = spread(loss)
    at = 10 * np.arange(1, loss.shape[1] + 1)
    left.plot(at, mean, color=NAMES["gold"][1])
    left.fill_between(at, mean - error, mean + error, color=NAMES["gold"][1], alpha=0.25)
    left.set(xlabel="optimizer step", ylabel="nats per token", yscale="log", title="Loss of GOLD")
    right.set(xlabel="optimizer step", ylabel="% of 512 held-out puzzles", ylim=(0, 100), title="Puzzles solved")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    folders, rows, shares = [Path(name) for name in sys.argv[1:]], [], []
    for folder in folders:
        gold, control = scores(folder / "gold"), scores(folder / "control")
        last = max(step for step in gold if step is not None)
        four = [gold[None], gold[0], gold[last], control[last]]
        closed = [(x[0] - gold[0][0]) / (gold[None][0] - gold[0][0]) for x in four[2:]]
        shares.append([*(x[0] for x in four), *closed])
        seed = json.loads((folder / "config.json").read_text())["seed"]
        rows.append([str(seed), *(f"{x:.1%} ± {e:.1%}" for x, e in four), *(f"{x:.0%}" for x in closed)])
    mean, error = spread(np.array(shares))
    rows.append(["mean", *(f"{x:.1%} ± {e:.1%}" for x, e in zip(mean, error))])
    head = [
        "seed",
        "teacher",
        "student before",
        "after GOLD",
        "answers alone",
        "gap closed by GOLD",
        "by answers alone",
    ]
    print(markdown([head, *rows]))
    draw(folders, Path(__file__).parent.parent / "assets" / "embedded.png")


if __name__ == "__main__":
    main()
