"""Expert choice: which tokens the experts of a layer take, and how many get nothing.

Shapes: N tokens, E experts, C tokens per expert.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fusion_upcycle.models.modeling_sparse import SparseRouter


@dataclass(frozen=True)
class Taken:
    """What the experts of one layer took.

    Attributes:
        tokens_N: whether an expert took each token.
        smallest_capacity: the least capacity factor at which every token is taken, by 0.01.
    """

    tokens_N: Tensor
    smallest_capacity: float

    @property
    def unchosen(self) -> float:
        """Share of the tokens that no expert took."""
        return 1 - self.tokens_N.double().mean().item()


def watch(block: nn.Module) -> list[Taken]:
    """A list that gets what the block's experts take in each forward pass; empty for others."""
    seen: list[Taken] = []
    router = getattr(block, "gate", None)
    if isinstance(router, SparseRouter) and router.routing == "expert_choice":

        def hear(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_NE, _, tokens_EC = output
            taken_N = logits_NE.new_zeros(len(logits_NE)).bool()
            taken_N[tokens_EC.flatten()] = True
            seen.append(Taken(taken_N, _smallest_capacity(logits_NE, router, args[0].shape[0])))

        router.register_forward_hook(hear)
    return seen


def _smallest_capacity(logits_NE: Tensor, router: SparseRouter, rows: int) -> float:
    """By how early each token stands in the list of the expert that likes it best."""
    scores_NE = logits_NE.softmax(-1) if router.scores == "softmax" else logits_NE.sigmoid()
    groups = rows if router.group == "sequence" else 1
    by_group = scores_NE.view(groups, -1, router.num_experts)
    places = by_group.argsort(1, descending=True).argsort(1)
    last = int(places.amin(-1).max())
    # An expert takes ceil(C * N / E) tokens, and has to take more than `last`.
    return math.floor(100 * last * router.num_experts / by_group.shape[1] + 1) / 100
