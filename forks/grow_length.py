"""Fork: rollouts start short and grow. Completions the student writes have START tokens at first, all after GROW steps.

    python forks/grow_length.py --split "train[:500]" --no-seq-kd --output-dir out/grow      any flag of gold_train.py

Expected: 60.6 ± 2.2 % of 512 held-out puzzles where gold_train.py reaches 63.3 ± 2.1 % with these flags, no difference
that one seed can tell, with 7 % fewer sampled tokens: answers of 29 tokens leave little to save. Seed 0, 2 shared CPU
cores, 9 minutes for the last stage, 2026-11-26.

For long answers: the first tokens carry most of what a teacher says about a sample (arXiv 2602.15260, 2606.22600).
Answers of the data set stay whole: from them the student learns how texts end. The length is a function of the step: a
resumed run goes on as it was. A note that completions were cut is expected.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gold_buffer
import gold_train

START, GROW = 8, 300  # tokens of the first window's rollouts; optimizer steps until they may be whole


def length(step: int, most: int) -> int:
    """Tokens that a rollout for this window may have, of at most `most`."""
    return min(most, START + (most - START) * step // GROW)


class Growing(gold_buffer.WindowBuffer):
    def make(self, step, *args):
        """Called in the order of the steps, by one thread."""
        most = self.encoder.max_completion_length
        self.sampling = replace(self.sampling, max_new_tokens=length(step, most))
        return super().make(step, *args)


gold_buffer.WindowBuffer = Growing

if __name__ == "__main__":
    gold_train.main()
