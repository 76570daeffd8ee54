"""The unit of every operation: one expert; and the plan that says where each new one comes from.

Shape suffixes: E experts, F intermediate size (neurons), D hidden size.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError

#: The three matrices of a gated FFN.
EXPERT_PARTS = ("gate_proj_FD", "up_proj_FD", "down_proj_DF")

#: Every part that an expert may have, in the order in which random draws are made for them.
ALL_PARTS = (*EXPERT_PARTS, "gate_bias_F", "up_bias_F", "down_bias_D")


@dataclass(frozen=True)
class Expert:
    """All tensors of one FFN, on named axes.

    With a gate it is `down(act(gate x) * (up x))`, without one `down(act(up x))`, each of the three
    with a bias or not. What an expert does not have is None.

    Neuron i is row i of `gate_proj_FD` and `up_proj_FD`, column i of `down_proj_DF` and value i of
    `gate_bias_F` and `up_bias_F`: what is done to a neuron must be done in all of these, which is
    why initialisers see whole experts. `down_bias_D` belongs to no neuron.

    Raises:
        UpcyclingError: a bias of a gate that is not there.
    """

    gate_proj_FD: Tensor | None
    up_proj_FD: Tensor
    down_proj_DF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    def __post_init__(self) -> None:
        if self.gate_proj_FD is None and self.gate_bias_F is not None:
            raise UpcyclingError(
                "An Expert has gate_bias_F, but no gate_proj_FD: without a gate the bias is that "
                "of up. Give it as up_bias_F."
            )

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> "Expert":
        """The expert with these parts, by the names in `ALL_PARTS`, and no others."""
        return cls(**{"gate_proj_FD": None, **parts})  # type: ignore[arg-type]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts that this expert has, in the order of `ALL_PARTS`."""
        return {part: weight for part in ALL_PARTS if (weight := getattr(self, part)) is not None}

    def map(
        self, function: Callable[[Tensor], Tensor], parts: Collection[str] = ALL_PARTS
    ) -> "Expert":
        """Apply `function` to each of `parts` that this expert has; the others stay."""
        return Expert.from_parts(
            {
                part: function(weight) if part in parts else weight
                for part, weight in self.parts.items()
            }
        )


def part_shape(part: str, neurons: int, hidden_size: int) -> tuple[int, ...]:
    """Shape of one of `ALL_PARTS`, whose axes its name ends in, in an expert of F neurons."""
    sizes = {"F": neurons, "D": hidden_size}
    return tuple(sizes[axis] for axis in _axes(part))


def neuron_axis(part: str) -> int | None:
    """The axis of one of `ALL_PARTS` that counts neurons; None for `down_bias_D`, without one."""
    axes = _axes(part)
    return axes.index("F") if "F" in axes else None


def _axes(part: str) -> str:
    return part.rpartition("_")[2]


def take_neurons(expert: Expert, neurons: slice | Tensor) -> Expert:
    """The expert made of these neurons, by index: `down_bias_D` stays as it is."""

    def take(part: str, weight: Tensor) -> Tensor:
        match neuron_axis(part):
            case 0:
                return weight[neurons]
            case 1:
                return weight[:, neurons]
        return weight

    return Expert.from_parts({part: take(part, weight) for part, weight in expert.parts.items()})


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
