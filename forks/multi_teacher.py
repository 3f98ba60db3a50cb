"""Fork: several teachers. A row names its own in the column `teacher_id`, a directory or Hub id.

    python gold_train.py && python forks/multi_teacher.py     the embedded job, then its teacher and one that adds
    python forks/multi_teacher.py --student-model S --teacher-model T --dataset rows.jsonl    T: of rows that name none

Expected, of 512 puzzles and 512 sums: the teachers solve 89.5 and 0.2 %, and 0.0 and 22.7 %; the student 0.4 and 0.2 %
before and 38.5 ± 2.2 and 10.0 ± 1.3 % after 400 steps, some of both. Seed 0, 2 shared CPU cores, 3.4 minutes of one
after the embedded job, 2026-11-26.

The student reads a micro-batch once, each teacher its own rows of it, by its own chat template and in its own tokens.
One divisor for the whole window, as ever: how rows meet in micro-batches does not matter. If any tokenizer differs from
the student's, all teachers are compared by --cross-tokenizer-loss. Every row is encoded once at the start. Named
teachers are loaded beside the student on each rank; T may be shared or served.
"""

import json
import random
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor

import gold_buffer
import gold_data
import gold_eval
import gold_loss
import gold_train


@dataclass
class Sample(gold_data.Sample):
    teacher: str = ""


@dataclass
class Batch(gold_data.Batch):
    members: dict[str, Tensor] | None = None  # teacher -> which of the samples are its own
    theirs: dict[str, gold_data.Batch] | None = None  # teacher -> these, as a batch


@dataclass
class Encoders(gold_buffer.Encoder):
    """Each row by the encoder of its teacher."""

    default: str = ""  # teacher of rows that name none
    each: dict[str, gold_buffer.Encoder] | None = None
    names: list[str] | None = None  # teacher of each row of the data set

    def prompts(self, row: gold_data.Row) -> tuple[list[int], list[int], str | None]:
        return self.each[row.columns.get("teacher_id") or self.default].prompts(row)

    def known(self, ids: list[int]) -> list[int]:
        return min((encoder.known(ids) for encoder in self.each.values()), key=len)

    def align(self, sample: Sample) -> Sample:
        sample.teacher = self.names[sample.row]
        return self.each[sample.teacher].align(sample)


class Teachers:
    """In the place of one teacher: what a loss is computed with, for each."""

    def __init__(self, parts: dict[str, gold_train.Parts]):
        self.parts = parts

    ahead = lambda self, asked: None  # each teacher reads its own rows

    def close(self) -> None:
        for parts in self.parts.values():
            parts.teacher.close()


def setup(cfg, ranks, say, plain=gold_train.setup) -> gold_train.Run:
    """gold_train.setup, and then all teachers that rows name. Raises ValueError for a row that its teacher refuses."""
    run = plain(cfg, ranks, say)
    if cfg.teacher_model is None:
        return run
    if cfg.lag or cfg.seq_kd or cfg.eval_ratio or cfg.loss_temperature != 1:
        raise ValueError("several teachers have no --lag, no --seq-kd, no --eval-ratio and --loss-temperature 1")
    rows, options, day = run.buffer.rows.rows, json.loads(cfg.template_options or "{}"), run.identity["day"]
    names = [row.columns.get("teacher_id") or cfg.teacher_model for row in rows]
    read = lambda name, who: gold_data.load_vocabulary(*gold_data.hub_name(name), options.get(who), day)
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(ranks.device)
    low = cfg.dtype == "bf16" or cfg.dtype == "auto" and ranks.device.type == "cuda"
    asked, each, parts = dict.fromkeys([cfg.teacher_model, *names]), {}, {}
    both = {name: (read(cfg.student_model, "student"), read(name, "teacher")) for name in asked}
    cross = not all(gold_data.same_vocabulary(*pair) for pair in both.values())
    if cross and cfg.cross_tokenizer_loss == "none":
        raise ValueError("some teacher has another tokenizer: choose a --cross-tokenizer-loss, like prefix")
    for name, (student, teacher) in both.items():
        model, head, pairing = run.parts.teacher, run.parts.teacher_head, run.parts.pairing
        if name != cfg.teacher_model:
            dtype = torch.bfloat16 if low else torch.float32
            model = gold_buffer.LocalTeacher(gold_buffer.load_model(*gold_data.hub_name(name), dtype, ranks.device))
            head = gold_loss.Head(**model.head)
        if cross:
            gold_data.share_markers(student, teacher)
            compare = gold_train.CROSS_LOSSES[cfg.cross_tokenizer_loss](cfg, student, teacher, put)
            pairing = pairing._replace(loss=cfg.cross_tokenizer_loss, compare=compare)
        parts[name] = run.parts._replace(pairing=pairing, teacher=model, teacher_head=head)
        how = {"cross_tokenizer": cross, "prefix": pairing.loss == "prefix"}
        each[name] = replace(run.buffer.encoder, student=student, teacher=teacher, **how)
        say(f"teacher of {names.count(name)} rows: {name}")
    run.buffer.encoder = Encoders(**vars(run.buffer.encoder), default=cfg.teacher_model, each=each, names=names)
    for row in rows:
        run.buffer.encoder.prompts(row)
    run.parts = run.parts._replace(teacher=Teachers(parts))
    return run


def collate(samples: list[Sample], with_teacher: bool = True, plain=gold_data.collate) -> Batch:
    """One batch for the student, with one for each teacher inside."""
    if not with_teacher:
        return plain(samples, False)
    batch, names = plain(samples, False), [s.teacher for s in samples]
    of = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    batch.members = {name: torch.tensor(indices) for name, indices in of.items()}
    batch.theirs = {name: plain([samples[i] for i in indices]) for name, indices in of.items()}
    return batch


def distill(cfg, parts, student, batch, stats, plain=gold_train.distill) -> tuple[gold_loss.Loss, Tensor]:
    """gold_train.distill, teacher by teacher, of one forward pass of the student."""
    of, losses, samples, rows = batch.student_sample[batch.scored], [], [], []
    for name, members in batch.members.items():
        here, theirs = torch.isin(of, members).nonzero()[:, 0], batch.theirs[name]
        side = replace(student.at(here), span=theirs.student_span)
        loss, sample = plain(cfg, parts.teacher.parts[name], side, theirs, stats)
        losses.append(loss)
        samples.append(members[sample])
        rows.append(here if loss.rows is None else here[loss.rows])
    stats_of = {key: torch.cat([loss.stats[key] for loss in losses]) for key in losses[0].stats}
    values = torch.cat([loss.values for loss in losses])
    return gold_loss.Loss(sum(loss.total for loss in losses), values, stats_of, torch.cat(rows)), torch.cat(samples)


gold_data.Sample = gold_buffer.Sample = gold_train.Sample = Sample
gold_data.Batch = Batch
gold_data.collate = collate
gold_train.setup = setup
gold_train.distill = distill

# ----------------------------------------------------------------------------------------------------------------------
# the embedded job's puzzles, and sums

RUN, ROWS, SCHOOL_STEPS, STEPS, QUESTIONS = "out/embedded", 500, 300, 400, 512  # where gold_train.py left its models
DEMO = gold_train.Config(
    max_length=112, max_completion_length=64, per_device_train_batch_size=64, gradient_accumulation_steps=1,
    learning_rate=3e-3, weight_decay=0.01, beta=0.0, save_steps=100, save_total_limit=1,
    output_dir="out/multi_teacher",
)  # fmt: skip


def sums(n: int, test: bool = False) -> list[dict]:
    """Three numbers to add, in the shape of GSM8K; a tenth of them are in the test split only."""
    rng, rows = random.Random(f"sums {test}"), {}
    while len(rows) < n:
        a, b, c = (rng.randint(1, 40) for _ in range(3))
        if (zlib.crc32(f"{a} {b} {c}".encode()) % 10 == 0) == test:
            rows[f"Add {a}, {b} and {c}."] = f"{a} + {b} = {a + b} + {c} = {a + b + c}\n#### {a + b + c}"
    return [{"question": asked, "answer": answer} for asked, answer in rows.items()]


def demo(cfg: gold_train.Config) -> dict[str, list[float]]:
    """Shares of puzzles and of sums that the teachers solve, and the student before and after."""
    ranks, out = gold_train.setup_ranks(), Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    places = {"puzzler": f"{RUN}/teacher", "adder": out / "adder", "before": f"{RUN}/student", "after": out / "after"}
    end = {name: f"{place}/checkpoints/latest" for name, place in places.items()}
    rows = {"sums": sums(16 * ROWS), "test-sums": sums(QUESTIONS, test=True)}
    rows["test-puzzles"] = gold_data.make_countdown(QUESTIONS, mini=True, test=True)
    rows["both"] = gold_data.make_countdown(ROWS, mini=True)  # they name none: the puzzler's
    rows["both"] += [row | {"teacher_id": end["adder"]} for row in rows["sums"][:ROWS]]
    for name, part in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    file = lambda name: str(out / f"{name}.jsonl")
    school = replace(cfg, student_model=f"{RUN}/teacher-init", dataset=file("sums"), lmbda=0.0, ce_weight=1.0)
    school = replace(school, max_steps=SCHOOL_STEPS, output_dir=str(out / "adder"))
    gold_train.train(school, ranks, last=False)
    cfg = replace(cfg, student_model=end["before"], teacher_model=end["puzzler"], dataset=file("both"), max_steps=STEPS)
    gold_train.train(replace(cfg, output_dir=str(out / "after")), ranks)
    found = {}
    for name, folder in end.items():
        tokenizer = gold_data.load_vocabulary(folder).tokenizer
        model = gold_buffer.load_model(folder, None, torch.float32, "cpu").eval()
        tasks = [f"countdown-mini={file('test-puzzles')}", f"gsm8k={file('test-sums')}"]
        results = gold_eval.evaluate(model, tokenizer, tasks, few_shot=0, max_new_tokens=64)
        found[name] = [result["accuracy"] for result in results.values()]
        print(f"{name:8} {found[name][0]:7.1%} of the puzzles, {found[name][1]:7.1%} of the sums")
    return found


def main() -> None:
    cfg = gold_train.parse(gold_train.Config())
    if cfg.student_model or cfg.resume:
        return gold_train.main()
    demo(gold_train.parse(DEMO))


if __name__ == "__main__":
    main()
