"""Fork: distillation plus a reward. What a grader calls right gets likelier than other samples of its prompt.

    python forks/reward.py --num-generations 4 --split "train[:500]" --no-seq-kd      any flag of gold_train.py

Expected: 61.1 ± 2.2 % of 512 held-out puzzles, no gain: distillation alone solves 60.9 ± 2.2 % with four samples of a
prompt (COEFFICIENT 0), 63.3 ± 2.1 % with one. Of the student's samples 68 % are right in the end. Seed
0, 2 shared CPU cores, 8 minutes for the last stage, 2026-11-26.

The on-policy samples of one prompt are a group. A sample's advantage is its reward, 1 if gold_eval's grader says ok
and else 0, less the mean of its group (not divided by the spread: arXiv 2503.20783), and the loss of each of its tokens
is the distillation loss - COEFFICIENT x advantage x log probability. Without --lag these are samples of the weights
that are trained: there is no ratio to clip. A teacher tells how, a reward tells what for (KDRL, arXiv 2506.02208).
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import gold_buffer
import gold_data
import gold_eval
import gold_loss
import gold_train

TASK = "countdown-mini"  # of gold_eval.TASKS, whose grader reads the rows' own answers; none that asks for perplexity
COEFFICIENT = 0.5  # of the reward; 0: distillation alone


@dataclass
class Sample(gold_data.Sample):
    reward: float = 0.0
    advantage: float = 0.0


@dataclass
class Batch(gold_data.Batch):
    reward: Tensor | None = None  # (B,)
    advantage: Tensor | None = None  # (B,) 0 for answers of the data set


class Graded(gold_buffer.WindowBuffer):
    def get(self, step: int) -> gold_buffer.Window:
        """The window, graded: here and not where it is made, since mathematics is graded in the main thread only."""
        window, groups = super().get(step), defaultdict(list)
        for sample in (s for s in window.samples if s.on_policy):
            text = self.encoder.student.join(sample.completion_ids).decode(errors="replace")
            grade = gold_eval.TASKS[TASK].grade(text, self.rows.rows[sample.row])
            sample.reward = float(grade.reason == "ok")
            groups[sample.row].append(sample)
        for group in groups.values():
            mean = sum(s.reward for s in group) / len(group)
            for sample in group:
                sample.advantage = sample.reward - mean
        return window


def collate(samples: list[Sample], with_teacher: bool = True, plain=gold_data.collate) -> Batch:
    batch = plain(samples, with_teacher)
    batch.reward = torch.tensor([s.reward for s in samples])
    batch.advantage = torch.tensor([s.advantage for s in samples])
    return batch


def distill(cfg, parts, student, batch, stats, plain=gold_train.distill) -> tuple[gold_loss.Loss, Tensor]:
    """gold_train.distill; the policy gradient is in the total only, so the logged loss stays the distillation loss."""
    loss, sample = plain(cfg, parts, student, batch, stats)
    stats.mean("reward/mean", batch.reward, batch.on_policy)
    stats.mean(
        "reward/spread", batch.advantage.abs(), batch.on_policy
    )  # 0: the groups agree, there is nothing to learn
    logp, _ = gold_loss.token_logprobs(gold_loss.Side(student.hidden, student.head, student.ids))
    advantage = batch.advantage[batch.student_sample[batch.scored]]
    return loss._replace(total=loss.total - COEFFICIENT * (advantage * logp).sum().to(loss.total.dtype)), sample


def setup(cfg, ranks, say, plain=gold_train.setup) -> gold_train.Run:
    """gold_train.setup. Raises ValueError for samples without others to compare them with, or a row without answer."""
    if cfg.lmbda > 0 and cfg.num_generations == 1:
        raise ValueError("the reward of a sample is compared with others of its prompt: --num-generations 4")
    run, task = plain(cfg, ranks, say), gold_eval.TASKS[TASK]
    for row in run.buffer.rows.rows if cfg.lmbda > 0 else ():
        has = row.meta | {"answer": row.answer, "completion": row.completion}
        if lacks := [name for name in task.needs if has.get(name) is None]:
            raise ValueError(f"the grader of {TASK} needs {lacks} of every row: {row.prompt[-1]['content'][:80]!r}")
    return run


gold_data.Sample = gold_buffer.Sample = gold_train.Sample = Sample
gold_data.Batch = Batch
gold_data.collate = collate
gold_buffer.WindowBuffer = Graded
gold_train.setup = setup
gold_train.distill = distill

if __name__ == "__main__":
    gold_train.main()
