"""Fork: the on-policy share grows from 0 to lmbda over the first WARMUP steps, then stays.

    python forks/lmbda_warmup.py --lmbda 1.0 --output-dir out/warmup      any flag of gold_train.py

A student that is far from its teacher writes text on which the teacher has little to say; data set answers carry it
through the beginning. One method of the schedule decides this: everything else, resume included, stays as it is.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gold_buffer
import gold_train

WARMUP = 200  # optimizer steps


class Warmup(gold_buffer.Schedule):
    def _on_policy_before(self, slot: int) -> int:
        """Integral of a share that rises linearly over the first `ramp` slots."""
        ramp = WARMUP * self.slots * self.world_size
        total = slot**2 / (2 * ramp) if slot < ramp else slot - ramp / 2
        return math.floor(self.lmbda * total + self.phase)


gold_buffer.Schedule = Warmup

if __name__ == "__main__":
    gold_train.main()
