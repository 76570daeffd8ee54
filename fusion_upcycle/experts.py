"""The unit of every operation: one expert; and the plan that says where each new one comes from.

Shape suffixes: E experts, F intermediate size (neurons), D hidden size.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expert:
    """All matrices of one gated FFN, `down(act(gate x) * (up x))`, on named axes.

    Neuron i is row i of `gate_proj_FD` and `up_proj_FD` and column i of `down_proj_DF`: what is
    done to a neuron must be done in all three, which is why initialisers see whole experts.
    """

    gate_proj_FD: Tensor
    up_proj_FD: Tensor
    down_proj_DF: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Expert":
        """Apply `function` to each matrix."""
        return Expert(*(function(getattr(self, part)) for part in EXPERT_PARTS))


EXPERT_PARTS = ("gate_proj_FD", "up_proj_FD", "down_proj_DF")


@dataclass(frozen=True)
class DuplicationPlan:
    """For each MoE layer, the source expert of each new expert.

    A dense layer is an MoE layer with one expert, so sparse upcycling is `[0] * E` in each layer.
    Experts and router rows follow the same plan.

    Attributes:
        source_experts: layer index -> source expert index of each new expert.
    """

    source_experts: Mapping[int, tuple[int, ...]]

    @classmethod
    def from_dense(cls, layers: Iterable[int], num_experts: int) -> "DuplicationPlan":
        """The plan that copies the dense FFN of each of `layers` into `num_experts` experts."""
        return cls({layer: (0,) * num_experts for layer in layers})

    def to_json(self) -> dict[str, list[int]]:
        """JSON form, layer index (as text) -> source experts."""
        return {str(layer): list(experts) for layer, experts in self.source_experts.items()}


def generator_for(seed: int, layer: int, expert: int, role: str) -> torch.Generator:
    """The random generator of one (seed, layer, expert, role), the only source of randomness.

    Draws do not depend on the order of conversion, shard size, resume or number of workers.
    torch's CPU generator keeps 32 bits of its seed, few enough that hashed seeds of a large MoE
    would collide: so only (seed, role) is hashed, and (layer, expert) enters one-to-one.
    """
    assert 0 <= layer < 2**16 and 0 <= expert < 2**16, (layer, expert)
    digest = hashlib.blake2b(f"{seed}/{role}".encode(), digest_size=4).digest()
    mixed = int.from_bytes(digest, "little") ^ (layer << 16 | expert)
    # A bijection on 32 bits (MurmurHash3's finaliser), so that neighbours get unrelated seeds.
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        mixed = ((mixed ^ (mixed >> 15)) * multiplier) % 2**32
    return torch.Generator().manual_seed(mixed ^ (mixed >> 16))
