"""The unit of every operation: one expert; and the plan that says where each new one comes from.

Shape suffixes: E experts, F intermediate size (neurons), D hidden size.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError


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

    In the plan of an expansion the source's experts come first, in their order: the originals.
    What follows are copies.

    Attributes:
        source_experts: layer index -> source expert index of each new expert.
    """

    source_experts: Mapping[int, tuple[int, ...]]

    @classmethod
    def from_dense(cls, layers: Iterable[int], num_experts: int) -> "DuplicationPlan":
        """The plan that copies the dense FFN of each of `layers` into `num_experts` experts."""
        return cls({layer: (0,) * num_experts for layer in layers})

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[int]]) -> "DuplicationPlan":
        """The plan of a record, which may be damaged.

        Raises:
            UpcyclingError: not layer index (as text) -> source experts.
        """
        try:
            plan = {int(layer): tuple(experts) for layer, experts in data.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UpcyclingError(f"The duplication plan {data!r} is damaged: {error!r}.") from error
        for layer, experts in plan.items():
            if layer < 0 or any(type(expert) is not int or expert < 0 for expert in experts):
                raise UpcyclingError(
                    f"The duplication plan is damaged: layer {layer} has source experts {experts}."
                )
        return cls(plan)

    def to_json(self) -> dict[str, list[int]]:
        """JSON form, layer index (as text) -> source experts."""
        return {str(layer): list(experts) for layer, experts in self.source_experts.items()}

    def copy_index(self, layer: int) -> tuple[int, ...]:
        """For each new expert of a layer, which copy of its source it is; 0 for the original."""
        seen: Counter[int] = Counter()
        index = []
        for expert in self.source_experts[layer]:
            index.append(seen[expert])
            seen[expert] += 1
        return tuple(index)

    def check_expansion(self, layers: Iterable[int], num_experts: int) -> None:
        """Check that the plan expands an MoE of `num_experts` experts in each of `layers`.

        Raises:
            UpcyclingError: other layers, layers of different sizes, or a layer that does not begin
                with all source experts in their order.
        """
        if sorted(self.source_experts) != sorted(layers):
            raise UpcyclingError(
                f"The duplication plan is of layers {sorted(self.source_experts)}, but the model's "
                f"MoE layers are {sorted(layers)}: it belongs to another model."
            )
        sizes = {len(experts) for experts in self.source_experts.values()}
        if len(sizes) > 1:
            raise UpcyclingError(
                f"The duplication plan has layers of different sizes ({sorted(sizes)} experts), "
                "which no config can say. Give every layer as many."
            )
        for layer, experts in self.source_experts.items():
            originals = tuple(range(num_experts))
            if experts[:num_experts] != originals or max(experts) >= num_experts:
                raise UpcyclingError(
                    f"The duplication plan of layer {layer} is {list(experts)}: it must begin with "
                    f"the source's experts 0 to {num_experts - 1}, and copies of them follow."
                )


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
