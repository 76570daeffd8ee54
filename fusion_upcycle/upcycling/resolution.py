"""What the options mean for one dense model and one family: every `auto` and default decided."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.shape import MoEShape
from fusion_upcycle.checks import AUTO
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import EXPERT_PARTS
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.upcycling.shards import Sharding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ResolvedOptions:
    """The MoE that was asked for, in numbers.

    Attributes:
        asked: the options.
        sharding: how experts are cut from the FFN.
        moe_layers: indices of the layers that become MoE layers, ascending.
        num_layers: of the model.
        shared_expert: `copy`, `zero` or `none`.
        shared_size: width of the shared expert, 0 for none.
        scales: part of `Expert` -> factor of every routed expert.
        exact: whether the MoE computes the dense function at step 0, given initialisers that keep
            it.
    """

    asked: UpcyclingOptions
    sharding: Sharding
    moe_layers: tuple[int, ...]
    num_layers: int
    shared_expert: str
    shared_size: int
    scales: dict[str, float]
    exact: bool

    @property
    def expert_size(self) -> int:
        """Width of a routed expert."""
        return self.sharding.expert_size

    @property
    def scales_are_powers_of_two(self) -> bool:
        """Whether scaling rounds nothing, in any dtype."""
        factors = list(self.scales.values())
        if self.shared_expert == "copy":  # neurons there once or twice, or twice or thrice, ...
            dense = self.sharding.dense_size
            factors += [self.shared_size // dense, -(-self.shared_size // dense)]
        return all(math.frexp(factor)[0] == 0.5 for factor in factors)

    @property
    def shape(self) -> MoEShape:
        """What the family's config says of it."""
        return MoEShape(
            num_experts=self.asked.num_experts,
            experts_per_token=self.asked.experts_per_token,
            expert_size=self.expert_size,
            shared_size=self.shared_size,
            moe_layers=self.moe_layers,
            num_layers=self.num_layers,
            normalize_topk_prob=self.asked.normalize_topk_prob,
            ignored=self.asked.ignore_config_fields,
        )

    def check_rows(self, dtype: torch.dtype) -> None:
        """Refuse experts of a chosen width that torch's grouped matrix product cannot run.

        Raises:
            UpcyclingError: rows of `down_proj` are no multiple of 16 bytes.
        """
        if not self.sharding.whole and self.expert_size * dtype.itemsize % 16:
            raise UpcyclingError(
                f"Experts of width {self.expert_size} in {dtype} have rows of "
                f"{self.expert_size * dtype.itemsize} bytes; transformers' default experts code "
                "(grouped_mm) needs a multiple of 16. Choose an expert_intermediate_size or "
                f"granularity that gives a multiple of {16 // dtype.itemsize}."
            )


def resolve(
    asked: UpcyclingOptions, architecture: Architecture, source: "PreTrainedConfig"
) -> ResolvedOptions:
    """Decide what `asked` means for a dense model.

    Raises:
        UpcyclingError: an option that this family or this model cannot honour.
    """
    routing = architecture.routing
    if routing.normalised == "always" and not asked.normalize_topk_prob:
        raise UpcyclingError(
            f"normalize_topk_prob=false: {architecture.name} always divides the top-k weights by "
            "their sum. Leave it at true, or choose another target."
        )
    sharding = _sharding(asked, source.intermediate_size)
    shared, shared_size = _shared_expert(asked, architecture, sharding)
    n, k = asked.num_experts, asked.experts_per_token
    scale = sharding.dense_size / sharding.expert_size
    if not asked.normalize_topk_prob:
        # The weights that a zero router gives: 1/N each after a softmax, 1/2 after a sigmoid.
        scale /= k * (1 / n if routing.scores == "softmax" else 1 / 2)
    # On `down_proj` alone. Megatron-Core gives each matrix the cube root, but the gate's goes
    # through SiLU: 3.3 % (G = 2) to 7.2 % (G = 8) off an FFN's largest output (at 843da5f).
    scales = dict.fromkeys(EXPERT_PARTS, 1.0) | {"down_proj_DF": scale}
    if shared == "copy":  # it takes half of the function, the routed experts the other half
        scales["down_proj_DF"] *= 0.5
    return ResolvedOptions(
        asked=asked,
        sharding=sharding,
        moe_layers=_moe_layers(asked.moe_layers, architecture, source.num_hidden_layers),
        num_layers=source.num_hidden_layers,
        shared_expert=shared,
        shared_size=shared_size,
        scales=scales,
        exact=_exact(asked, sharding, softmax=routing.scores == "softmax"),
    )


def _exact(asked: UpcyclingOptions, sharding: Sharding, *, softmax: bool) -> bool:
    """Whether the weighted sum of the chosen experts is the FFN, whatever the router says."""
    if sharding.shuffled:
        return False
    if sharding.granularity > 1:
        # A zero router ties all experts, and which of them top-k takes is nobody's promise.
        whole_groups = asked.experts_per_token % sharding.granularity == 0
        all_experts = asked.experts_per_token == asked.num_experts
        return whole_groups and asked.normalize_topk_prob and (all_experts or not asked.zero_router)
    all_experts = softmax and asked.experts_per_token == asked.num_experts
    return asked.normalize_topk_prob or asked.zero_router or all_experts


def _sharding(asked: UpcyclingOptions, dense_size: int) -> Sharding:
    size = asked.expert_intermediate_size or dense_size // asked.granularity
    if asked.shuffles_shards:
        if asked.granularity != 1:
            raise UpcyclingError(
                "expert_init=qwen2 cuts experts from shuffled copies of the FFN, not from its "
                "shards: say their width with expert_intermediate_size, and leave granularity at 1."
            )
        return Sharding(dense_size, size, asked.num_experts, shuffled=True)
    if size == 0 or dense_size % size or asked.granularity not in (1, dense_size // size):
        raise UpcyclingError(
            f"The dense FFN has {dense_size} neurons: granularity={asked.granularity}, "
            f"expert_intermediate_size={asked.expert_intermediate_size} do not cut it into equal "
            "shards. Choose a divisor (one of the two options is enough), or expert_init=qwen2, "
            "which takes any width."
        )
    if asked.num_experts % (dense_size // size):
        raise UpcyclingError(
            f"num_experts={asked.num_experts} must be a multiple of {dense_size // size}, the "
            f"number of shards of width {size} in an FFN of {dense_size} neurons."
        )
    return Sharding(dense_size, size, asked.num_experts)


def _shared_expert(
    asked: UpcyclingOptions, architecture: Architecture, sharding: Sharding
) -> tuple[str, int]:
    """Kind and width of the shared expert."""
    kind = asked.shared_expert
    if kind == AUTO:
        kind = "none" if architecture.shared is None else architecture.shared.default
    if kind != "none" and architecture.shared is None:
        raise UpcyclingError(
            f"shared_expert={kind}: {architecture.name} has no shared expert. "
            "Leave it at auto, or choose another target."
        )
    size = asked.shared_expert_intermediate_size
    if kind == "none":
        if size is not None:
            raise UpcyclingError(
                f"shared_expert_intermediate_size={size}, but there is no shared expert "
                f"(shared_expert={asked.shared_expert}, {architecture.name})."
            )
        return kind, 0
    size = size or sharding.dense_size
    if kind == "copy" and size < sharding.dense_size:
        raise UpcyclingError(
            f"shared_expert_intermediate_size={size} has no room for a copy of the dense FFN "
            f"({sharding.dense_size} neurons). Choose a larger one, or shared_expert=zero."
        )
    assert architecture.shared is not None
    if architecture.shared.in_experts and size % sharding.expert_size:
        raise UpcyclingError(
            f"{architecture.name} says the width of its shared expert as a number of experts of "
            f"width {sharding.expert_size}, and {size} is no multiple of that. Set "
            "shared_expert_intermediate_size, or shared_expert=none."
        )
    return kind, size


def _moe_layers(
    asked: str | Sequence[int], architecture: Architecture, num_layers: int
) -> tuple[int, ...]:
    layers = tuple(range(num_layers))
    if isinstance(asked, str):
        match = re.fullmatch(r"all|(every|last)_([1-9]\d*)", asked)
        if match is None:
            raise UpcyclingError(
                f"moe_layers={asked!r} must be all, every_N, last_N or a list of layer indices."
            )
        kind, count = match[1], int(match[2] or 1)
        chosen = layers[count - 1 :: count] if kind != "last" else layers[-count:]
        if count > num_layers:
            raise UpcyclingError(f"moe_layers={asked}: the model has {num_layers} layers only.")
    else:
        chosen = tuple(sorted(set(asked)))
        if not chosen or len(chosen) < len(asked) or not set(chosen) <= set(layers):
            raise UpcyclingError(
                f"moe_layers={list(asked)} must name layers 0 to {num_layers - 1}, each once."
            )
    if chosen != layers:
        fields = architecture.moe_layer_fields
        if fields is None or fields(chosen, num_layers) is None:
            raise UpcyclingError(
                f"moe_layers={asked}: {architecture.name} "
                + ("makes every layer an MoE layer." if fields is None else "cannot say these.")
                + " Choose others, or another target."
            )
    return chosen
