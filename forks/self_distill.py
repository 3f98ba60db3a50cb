"""Fork: a model teaches itself. The teacher is a frozen copy of the student that reads a worked hint (SDFT, OPSD).

    python forks/self_distill.py          about 6 minutes of CPU, into out/self_distill; flags of gold_train.py as well

Expected, of 512 held-out puzzles: before 16.0 %, after 40.6 %, the copy with the hint 87.9 %, answers alone (the same
1,000 puzzles and 300 steps, but trained on what stands in the data set) 61.1 %. Seed 0, 2 shared CPU cores, 3.2 minutes
of one, 2026-11-26. So hints do teach what the student cannot do without them, and where good answers exist, they teach
more; with PRACTICE = 8000 puzzles the student reaches 51.6 %.

Taught by another model with another tokenizer that reads the hint (97.3 %), the student reaches 36.9 %.

The recipe for your own models needs no fork: --teacher-model is the --student-model's directory, --lmbda 1, and
--teacher-prompt-template names the column with the hint. What to copy here: the stages, each a Config for
gold_train.train, and the table of the same model with and without the hint. The first stage only makes a model that can
use hints, as any instruction-tuned model can.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import gold_buffer
import gold_data
import gold_eval
import gold_train

TEMPLATE = "{prompt} Hint: {hint}"
SCHOOL_STEPS, STEPS = 400, 300
HINTED, PLAIN, PRACTICE, QUESTIONS = 8000, 1000, 1000, 512  # puzzles: at school, to teach itself with, held out
SCHOOL = gold_train.Config(
    max_length=128, max_completion_length=64, per_device_train_batch_size=64, gradient_accumulation_steps=1,
    lmbda=0.0, ce_weight=1.0, learning_rate=3e-3, weight_decay=0.01, beta=0.0, save_steps=100,
    save_total_limit=1, output_dir="out/self_distill",
)  # fmt: skip


def puzzles(n: int, test: bool = False) -> list[dict]:
    """countdown-mini with one more column: the expression that is wanted."""
    rows = gold_data.make_countdown(n, mini=True, test=test)
    return [row | {"hint": row["completion"].split("<answer> ")[1].split(" =")[0]} for row in rows]


def with_hint(row: dict) -> dict:
    messages = gold_data.privileged(gold_data.to_row(row), TEMPLATE)
    return row | {"prompt": list(messages)}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def accuracy(model: str, rows: str) -> float:
    """Share of puzzles that a model directory solves, greedily."""
    vocabulary = gold_data.load_vocabulary(model)
    model = gold_buffer.load_model(model, None, torch.float32, "cpu").eval()
    return gold_eval.evaluate(model, vocabulary.tokenizer, [f"countdown-mini={rows}"])["countdown-mini"]["accuracy"]


def main() -> dict[str, float]:
    """The share of held-out puzzles solved before and after, with the hint, and by answers alone."""
    cfg, ranks = gold_train.parse(SCHOOL), gold_train.setup_ranks()
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows, test = puzzles(HINTED + PRACTICE), puzzles(QUESTIONS, test=True)
    texts = [f"{with_hint(row)['prompt'][0]['content']}\n{row['completion']}" for row in rows[:2000]]
    for i, name in enumerate(("init", "other-init")):  # two kinds of tokenizers
        gold_train.make_model(out / name, texts, i == 0, hidden=96, layers=3, seed=cfg.seed + i)
    school = write(out / "school.jsonl", [*map(with_hint, rows[:HINTED]), *rows[:PLAIN]])
    practice = write(out / "practice.jsonl", rows[HINTED:])
    plain, hinted = write(out / "test.jsonl", test), write(out / "test_hint.jsonl", list(map(with_hint, test)))
    end = lambda name: str(out / name / "checkpoints" / "latest")
    pupil = replace(cfg, dataset=school, max_steps=SCHOOL_STEPS)
    alone = replace(cfg, student_model=end("school"), dataset=practice, max_steps=STEPS)
    hints = {"teacher_prompt_template": TEMPLATE, "lmbda": 1.0, "ce_weight": 0.0, "temperature": 0.5}
    stages = {
        "school": replace(pupil, student_model=str(out / "init")),
        "other": replace(pupil, student_model=str(out / "other-init")),
        "answers": alone,
        "self": replace(alone, teacher_model=end("school"), **hints),
        "taught": replace(alone, teacher_model=end("other"), **hints),
    }
    for name, stage in stages.items():
        gold_train.train(replace(stage, output_dir=str(out / name)), ranks, last=name == "taught")
    found = {
        "before": accuracy(end("school"), plain), "after": accuracy(end("self"), plain),
        "before, with the hint": accuracy(end("school"), hinted), "answers alone": accuracy(end("answers"), plain),
        "after the other": accuracy(end("taught"), plain), "other, with the hint": accuracy(end("other"), hinted),
    }  # fmt: skip
    for name, share in found.items():
        print(f"{name:24}{share:7.1%}")
    return found


if __name__ == "__main__":
    main()
