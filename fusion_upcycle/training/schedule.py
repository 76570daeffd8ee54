"""Schedules: the share of the token budget that is done -> factors of rate and loss weights.

Pure functions of tokens, so that a resumed run, another batch size or another number of devices
follows the same curve.
"""

import math
from dataclasses import dataclass

#: Three-phase schedule: (done up to this share of the budget, factors of rate, balance, z).
_PHASES = (
    (0.05, (0.1, 5.0, 2.0)),  # warm-up: spread the tokens first
    (0.75, (1.0, 1.0, 1.0)),  # specialisation
    (1.00, (0.1, 0.5, 0.5)),  # refinement
)

SCHEDULES = ("three_phase", "cosine", "wsd", "constant")


@dataclass(frozen=True)
class Factors:
    """What the options' values are multiplied with at one step."""

    learning_rate: float
    balance: float = 1.0
    z: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """A named curve.

    Attributes:
        name: `schedule` of `TrainingOptions`, which explains them all.
        warmup_share, decay_share, final_share: likewise.
    """

    name: str
    warmup_share: float = 0.05
    decay_share: float = 0.2
    final_share: float = 0.1

    def factors(self, tokens_done: int, budget: int) -> Factors:
        """Factors of the step that brings the tokens seen to `tokens_done`, 1 to `budget`."""
        done = tokens_done / budget
        if self.name == "three_phase":
            return next(Factors(*factors) for end, factors in _PHASES if done <= end)
        if self.name == "constant":
            return Factors(1.0)
        if done < self.warmup_share:
            return Factors(done / self.warmup_share)
        if self.name == "cosine":
            left = (1 - self.warmup_share) or 1.0
            fallen = (1 - math.cos(math.pi * (done - self.warmup_share) / left)) / 2
        else:
            fallen = max(0.0, 1 - (1 - done) / self.decay_share) if self.decay_share else 0.0
        return Factors(1 - (1 - self.final_share) * fallen)
