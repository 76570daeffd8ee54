"""Whether one layer's experts are used evenly: the limits, by torch alone.

Shapes: E experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Limits of the design page, for 8 experts; shares are scaled to other numbers.
_LARGEST_CV = 0.3
_SMALLEST_SHARE = 0.02
_DEAD_SHARE = 0.01


@dataclass(frozen=True)
class LayerHealth:
    """One layer over one interval.

    Attributes:
        cv: standard deviation of the loads over their mean; 0 is even.
        dead: experts with less than a twelfth of an even share (0.01 of 8 experts).
        smallest_share: load of the least used expert.
        balance: entropy of the loads over its maximum; 1 is even, 0 a single expert.
    """

    cv: float
    dead: int
    smallest_share: float
    balance: float

    @classmethod
    def of(cls, load_E: Tensor) -> "LayerHealth":
        mean = 1 / len(load_E)
        return cls(
            cv=float(load_E.std(correction=0)) / mean,
            dead=int((load_E < _DEAD_SHARE * 8 / len(load_E)).sum()),
            smallest_share=float(load_E.min()),
            balance=float(torch.special.entr(load_E).sum()) / math.log(len(load_E)),
        )

    def broken(self, num_experts: int) -> str | None:
        """Which limit is broken, in words."""
        smallest = _SMALLEST_SHARE * 8 / num_experts
        if self.cv >= _LARGEST_CV:
            return f"load CV {self.cv:.2f} (limit {_LARGEST_CV})"
        if self.smallest_share <= smallest:
            return f"an expert with {self.smallest_share:.2%} of the tokens (limit {smallest:.2%})"
        return None
