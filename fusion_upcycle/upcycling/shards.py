"""Which neurons of the dense FFN each expert is made of, and with which scale.

N experts of width H from an FFN of F neurons. With H = F every expert is the whole FFN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_upcycle.experts import Expert, generator_for


@dataclass(frozen=True)
class Sharding:
    """How experts are cut from the dense FFN.

    Attributes:
        dense_size: F.
        expert_size: H.
        num_experts: N.
        shuffled: False: expert e is the slice `e mod (F/H)` (virtual groups, arXiv 2410.07524).
            True: the FFN is copied `ceil(N*H/F)` times, each copy shuffled along its neurons, and
            expert e takes the next H neurons (Qwen2, arXiv 2407.10671).
    """

    dense_size: int
    expert_size: int
    num_experts: int
    shuffled: bool = False

    @property
    def whole(self) -> bool:
        """Whether each expert is the FFN as it stands."""
        return self.expert_size == self.dense_size and not self.shuffled

    @property
    def granularity(self) -> int:
        """G, the experts of one virtual group, whose shards together are the FFN."""
        return 1 if self.shuffled else self.dense_size // self.expert_size

    def neurons(self, seed: int, layer: int, expert: int) -> slice | Tensor:
        """Indices of the expert's neurons in the dense FFN."""
        first = expert * self.expert_size
        if not self.shuffled:
            first %= self.dense_size
            return slice(first, first + self.expert_size)
        last = first + self.expert_size
        copies = range(first // self.dense_size, -(-last // self.dense_size))
        shuffled = torch.cat(
            [
                torch.randperm(self.dense_size, generator=generator_for(seed, layer, c, "shuffle"))
                for c in copies
            ]
        )
        start = first - copies.start * self.dense_size
        return shuffled[start : start + self.expert_size]


def take_neurons(expert: Expert, neurons: slice | Tensor) -> Expert:
    """The expert made of these neurons: rows of gate and up, columns of down."""
    return Expert(
        expert.gate_proj_FD[neurons], expert.up_proj_FD[neurons], expert.down_proj_DF[:, neurons]
    )


def repeat_neurons(part: str, weight: Tensor, size: int) -> Tensor:
    """One matrix of an FFN widened (or cut) to `size` neurons, in their order, again and again.

    Columns of `down_proj` are divided by how often their neuron is there: with all neurons there
    (size >= F) the function is kept.
    """
    axis = 1 if part == "down_proj_DF" else 0
    dense_size = weight.shape[axis]
    order = torch.arange(size) % dense_size
    result = weight.index_select(axis, order)
    if part == "down_proj_DF":
        result = result / torch.bincount(order, minlength=dense_size)[order].to(result.dtype)
    return result
