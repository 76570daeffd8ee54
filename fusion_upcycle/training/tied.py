"""Granular experts: the router rows of a group stay equal, so that top-k goes on to take groups.

The G experts of a group are shards of one FFN and begin with one router row. Each shard's own
gradient would draw the rows apart within some steps, and a token would get shards that do not
belong together. With the mean of the group's gradients they stay one row (docs/studies has what
that is worth).

Shapes: E experts, D hidden size.
"""

from itertools import pairwise
from typing import Any

import torch

from fusion_upcycle.live.routers import Routers
from fusion_upcycle.live.tensors import whole


class TiedRows:
    """The routers of a model whose rows are equal within groups, as granular upcycling makes them.

    Args:
        routers: as at step 0, not sharded yet; those without such groups are left alone.
    """

    def __init__(self, routers: Routers):
        self._routers = routers
        sizes = {layer: group_size(module.weight) for layer, module in routers.modules.items()}
        self._sizes = {layer: size for layer, size in sizes.items() if size > 1}

    def average_gradients(self) -> None:
        """Give each row the mean gradient of its group."""
        for layer, size in self._sizes.items():
            weight: Any = self._routers.modules[layer].weight
            if weight.grad is None:  # a frozen router
                continue
            groups_GSD = whole(weight.grad).unflatten(0, (-1, size))
            mean_ED = groups_GSD.mean(1, keepdim=True).expand_as(groups_GSD).flatten(0, 1)
            weight.grad.copy_(_like(mean_ED, weight.grad))


@torch.no_grad()
def group_size(weight_ED: Any) -> int:
    """How many neighbouring rows are the same; 1 where groups differ in size or there is but one.

    A router of zeros is one group, and would never tell its experts apart.
    """
    starts = (weight_ED[1:] != weight_ED[:-1]).any(1).nonzero().flatten() + 1
    bounds = [0, *starts.tolist(), len(weight_ED)]
    sizes = {end - start for start, end in pairwise(bounds)}
    return sizes.pop() if len(sizes) == 1 and len(bounds) > 2 else 1


def _like(tensor: torch.Tensor, sharded: Any) -> torch.Tensor:
    """Sharded as another one is."""
    if not hasattr(sharded, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)
