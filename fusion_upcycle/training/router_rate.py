"""The routers' learning rate: by default one that is small against their rows.

AdamW moves each weight by about the learning rate at each step. Rows that are moved by their own
size within tens of steps send tokens to other experts all the time, and no expert gets to learn.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fusion_upcycle.live.routers import Routers
from fusion_upcycle.live.tensors import whole
from fusion_upcycle.training.options import TrainingOptions

#: Largest ratio of the routers' learning rate to the root mean square of a router's weights at
#: step 0.
LARGEST_RATIO = 0.005


def fitting_rate(learning_rate: float, row_std: float) -> float:
    """The routers' learning rate by the rule: at most `LARGEST_RATIO` of the size of their rows.

    Args:
        learning_rate: of all else, which it never exceeds.
        row_std: root mean square of the routers' weights at step 0, see `row_std`. Zero rows have
            no size that could bound it: then it is `learning_rate`.
    """
    return min(learning_rate, LARGEST_RATIO * row_std) if row_std else learning_rate


def row_std(routers: Routers) -> float:
    """Root mean square of the router weights of a model.

    That of the layer where it is smallest, as one rate has to fit all; layers of zeros have none.
    """
    weights = [whole(routers.weight(layer)) for layer in routers.modules]
    sizes = [math.sqrt(float(weight.detach().double().square().mean())) for weight in weights]
    return min((size for size in sizes if size), default=0.0)


@dataclass(frozen=True)
class RouterRate:
    """What the routers of a run are trained with.

    Attributes:
        value: the largest learning rate, which the schedule multiplies.
        row_std: root mean square of the routers' weights at step 0.
        given: whether `value` was asked for.
    """

    value: float
    row_std: float
    given: bool

    @classmethod
    def of(cls, routers: Routers, options: TrainingOptions) -> "RouterRate | None":
        """Of the model before its first step; None where no router is trained."""
        if not routers or "routers" in options.freeze:
            return None
        with torch.no_grad():
            size = row_std(routers)
        given = options.router_learning_rate
        value = fitting_rate(options.learning_rate, size) if given is None else given
        return cls(value, size, given is not None)

    @property
    def in_words(self) -> str:
        """One line for the screen."""
        chosen = "as asked for" if self.given else f"by the rule, at most {LARGEST_RATIO} of it"
        rows = f"with rows of std {self.row_std:.3g}"
        return f"Router learning rate: {self.value:.3g}, {rows} ({chosen})"

    @property
    def warning(self) -> str | None:
        """What is wrong with a rate that was asked for, if anything, and what would be right."""
        largest = LARGEST_RATIO * self.row_std
        if not self.given or not largest or self.value <= largest:
            return None
        ratio = self.value / self.row_std
        return (
            f"router_learning_rate={self.value:g} is {ratio:.3g} of the std of the router's rows, "
            f"{self.row_std:.3g}: above {LARGEST_RATIO} tokens change experts all the time. Set it "
            f"to {largest:.3g} or less, leave it out, or upcycle with a "
            f"logit_std {ratio / LARGEST_RATIO:.3g} times as large."
        )

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "row_std": self.row_std, "largest_ratio": LARGEST_RATIO}
