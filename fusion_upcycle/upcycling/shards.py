"""Which neurons of the dense FFN each expert is made of, and with which scale.

N experts of width H from an FFN of F neurons. With H = F every expert is the whole FFN.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_upcycle.experts import generator_for, neuron_axis
from fusion_upcycle.experts import take_neurons as take_neurons  # for upcycling.py


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


def repeat_neurons(part: str, weight: Tensor, size: int) -> Tensor:
    """One part of an FFN widened (or cut) to `size` neurons, in their order, again and again.

    Columns of `down_proj` are divided by how often their neuron is there: with all neurons there
    (size >= F) the function is kept. `down_bias_D` belongs to no neuron, and stays.
    """
    if (axis := neuron_axis(part)) is None:
        return weight
    dense_size = weight.shape[axis]
    order = torch.arange(size) % dense_size
    result = weight.index_select(axis, order)
    if part == "down_proj_DF":
        result = result / torch.bincount(order, minlength=dense_size)[order].to(result.dtype)
    return result


def part_scales(
    parts: Iterable[str], sharding: Sharding, *, weights_sum: float = 1.0, share: float = 1.0
) -> dict[str, float]:
    """Part of `Expert` -> factor of every routed expert, so that the chosen ones give the FFN.

    With factors s and c of `down_proj` and its bias b, they give the sum over the chosen of
    weight * (s * down_proj h + c * b). Each neuron is in one of the G = F/H experts of a group,
    whose weights are equal, but b is in all of them: s = G * share / weights_sum, without G for c.

    Args:
        parts: those that experts have.
        weights_sum: of the weights of all chosen experts; 1 where they are normalised.
        share: of the function, that the routed experts are to give.
    """
    # On `down_proj` alone. Megatron-Core gives each matrix the cube root, but the gate's goes
    # through SiLU: 3.3 % (G = 2) to 7.2 % (G = 8) off an FFN's largest output (at 843da5f).
    factors = {
        "down_proj_DF": sharding.dense_size / sharding.expert_size / weights_sum * share,
        "down_bias_D": 1.0 / weights_sum * share,
    }
    return {part: factors.get(part, 1.0) for part in parts}
