"""Granular experts: the router rows of a group stay equal, so that top-k goes on to take groups.

The G experts of a group are shards of one FFN and begin with one router row. Each shard's own
gradient would draw the rows apart within some steps, and a token would get shards that do not
belong together. With the mean of the group's gradients they stay one row (docs/studies has what
that is worth).

Shapes: E experts, D hidden size.
"""

from typing import Any

import torch

from fusion_upcycle.live.routers import Routers
from fusion_upcycle.live.tensors import whole


class TiedRows:
    """The routers of a model whose rows are equal within groups.

    Args:
        routers: as at step 0, not sharded yet. A router whose rows differ within a group, or are
            all the same, is left alone.
        granularity: G, experts of a group, as the model was upcycled; 1 ties nothing.
    """

    def __init__(self, routers: Routers, granularity: int):
        self._size = granularity
        self._layers = [
            layer
            for layer, module in routers.modules.items()
            if granularity > 1 and _tied(module.weight.detach(), granularity)
        ]
        self._routers = routers

    def average_gradients(self) -> None:
        """Give each row the mean gradient of its group."""
        for layer in self._layers:
            weight: Any = self._routers.modules[layer].weight
            if weight.grad is None:  # a frozen router
                continue
            groups_GSD = whole(weight.grad).unflatten(0, (-1, self._size))
            mean_ED = groups_GSD.mean(1, keepdim=True).expand_as(groups_GSD).flatten(0, 1)
            weight.grad.copy_(_like(mean_ED, weight.grad))


def _tied(weight_ED: torch.Tensor, size: int) -> bool:
    groups = weight_ED.unflatten(0, (-1, size))
    return bool((groups == groups[:, :1]).all()) and bool((weight_ED != weight_ED[0]).any())


def _like(tensor: torch.Tensor, sharded: Any) -> torch.Tensor:
    """Sharded as another one is."""
    if not hasattr(sharded, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)
