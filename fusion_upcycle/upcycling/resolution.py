"""What the options mean for one dense model and one family: every `auto` and default decided."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.shape import MoEShape
from fusion_upcycle.checks import AUTO
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.upcycling.shards import Sharding, part_scales

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
        hidden_size: D.
        router_scores: `softmax` or `sigmoid`.
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
    hidden_size: int
    router_scores: str
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
            routing=self.asked.routing,
            router_scores=self.router_scores,
            capacity_factor=self.asked.capacity_factor,
            routing_group=self.asked.routing_group,
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
                "(grouped_mm) needs a multiple of 16. Choose an "
                f"{setting('expert_intermediate_size')} or {setting('granularity')} that gives a "
                f"multiple of {16 // dtype.itemsize}."
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
            f"their sum. Leave it at true, or choose another {setting('target')}."
        )
    scores = _router_scores(asked, architecture)
    sharding = _sharding(asked, architecture.ffn_size(source))
    shared, shared_size = _shared_expert(asked, architecture, sharding)
    _check_routing(asked, architecture, sharding)
    return ResolvedOptions(
        asked=asked,
        sharding=sharding,
        moe_layers=chosen_layers(asked.moe_layers, architecture, source),
        num_layers=architecture.num_layers(source),
        shared_expert=shared,
        shared_size=shared_size,
        hidden_size=architecture.hidden_size(source),
        router_scores=scores,
        scales=part_scales(
            architecture.parts,
            sharding,
            weights_sum=_weights_sum(asked, scores),
            # A copy takes half of the function, the routed experts the other half.
            share=0.5 if shared == "copy" else 1.0,
        ),
        exact=_exact(asked, sharding, softmax=scores == "softmax"),
    )


def _weights_sum(asked: UpcyclingOptions, scores: str) -> float:
    """Of the weights that a token's experts have, as a zero router gives them."""
    if asked.normalize_topk_prob or asked.routing == "hash":
        return 1.0
    chosen: float = asked.experts_per_token
    if asked.routing == "expert_choice":  # on average
        chosen = min(asked.capacity_factor, asked.num_experts)
    return chosen * (1 / asked.num_experts if scores == "softmax" else 1 / 2)


def _router_scores(asked: UpcyclingOptions, architecture: Architecture) -> str:
    scores = architecture.routing.scores if asked.router_scores == AUTO else asked.router_scores
    if scores != architecture.routing.scores and architecture.hash_name is None:
        raise UpcyclingError(
            f"router_scores={scores}: {architecture.name} has {architecture.routing.scores}. Leave "
            f"it at auto, or choose {own_class()}."
        )
    return scores


def own_class() -> str:
    """The remedy where a family of transformers cannot say what was asked for."""
    return f"{setting('target', 'sparse')}, our own class for any dense model"


def _check_routing(asked: UpcyclingOptions, architecture: Architecture, sharding: Sharding) -> None:
    """Refuse a routing that this family cannot do."""
    if asked.routing == "token_choice":
        return
    if architecture.hash_name is None:
        raise UpcyclingError(
            f"routing={asked.routing}: {architecture.name} knows token_choice alone. Choose "
            f"{own_class()}."
        )
    if asked.routing == "hash" and sharding.granularity > 1:
        raise UpcyclingError(
            f"routing=hash sends tokens to single experts, and here {sharding.granularity} shards "
            f"make one FFN. Pass {setting('granularity', 1)} and leave "
            f"{setting('expert_intermediate_size')} out."
        )


def _exact(asked: UpcyclingOptions, sharding: Sharding, *, softmax: bool) -> bool:
    """Whether the weighted sum of the chosen experts is the FFN, whatever the router says."""
    if sharding.shuffled:
        return False
    if asked.routing == "hash":
        return True
    if asked.routing == "expert_choice":  # exact where every expert takes all tokens
        takes_all = asked.capacity_factor >= asked.num_experts
        return takes_all and (asked.normalize_topk_prob or asked.zero_router or softmax)
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
                f"shards: say their width with {setting('expert_intermediate_size')}, and leave "
                f"{setting('granularity')} at 1."
            )
        return Sharding(dense_size, size, asked.num_experts, shuffled=True)
    if size == 0 or dense_size % size or asked.granularity not in (1, dense_size // size):
        raise UpcyclingError(
            f"The dense FFN has {dense_size} neurons: granularity={asked.granularity}, "
            f"expert_intermediate_size={asked.expert_intermediate_size} do not cut it into equal "
            "shards. Choose a divisor (one of the two options is enough), or "
            f"{setting('expert_init', 'qwen2')}, which takes any width."
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
            f"Leave it at auto, or choose another {setting('target')}."
        )
    size = asked.shared_expert_intermediate_size
    if architecture.shared is not None and architecture.shared.as_routed and kind != "copy":
        kind, size = "zero", size or sharding.expert_size
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
            f"({sharding.dense_size} neurons). Choose a larger one, or "
            f"{setting('shared_expert', 'zero')}."
        )
    assert architecture.shared is not None
    if architecture.shared.in_experts and size % sharding.expert_size:
        raise UpcyclingError(
            f"{architecture.name} says the width of its shared expert as a number of experts of "
            f"width {sharding.expert_size}, and {size} is no multiple of that. Set "
            f"{setting('shared_expert_intermediate_size')}, or {setting('shared_expert', 'none')}."
        )
    return kind, size


def chosen_layers(
    asked: str | Sequence[int] | Mapping[str, str | Sequence[int]],
    architecture: Architecture,
    source: "PreTrainedConfig",
) -> tuple[int, ...]:
    """The indices of the layers that become MoE layers, ascending.

    Raises:
        UpcyclingError: layers that are not there, or that the family's config cannot say.
    """
    stacks, count = architecture.stacks(source), architecture.num_layers(source)
    if isinstance(asked, Mapping):
        if asked.keys() != stacks.keys():
            raise UpcyclingError(
                f"moe_layers={dict(asked)}: "
                + (
                    f"say layers for each of {', '.join(stacks)}, and nothing else."
                    if len(stacks) > 1
                    else "this model has one stack of layers. Give all, every_N, last_N or a list."
                )
            )
        by_stack = dict(asked)
    elif isinstance(asked, str) or len(stacks) == 1:
        by_stack = dict.fromkeys(stacks, asked)
    else:
        raise UpcyclingError(
            f"moe_layers={list(asked)}: this model has layers in {' and '.join(stacks)}. Give "
            f"{setting('moe_layers', {name: list(asked) for name in stacks})}."
        )
    chosen = sorted(x for name, layers in stacks.items() for x in _of_stack(by_stack[name], layers))
    if not chosen:
        raise UpcyclingError(f"moe_layers={asked} must name layers, and names none.")
    if len(chosen) < count:
        fields = architecture.moe_layer_fields
        if fields is None or fields(chosen, count) is None:
            raise UpcyclingError(
                f"moe_layers={asked}: {architecture.name} "
                + ("makes every layer an MoE layer." if fields is None else "cannot say these.")
                + f" Choose others, another target, or {own_class()}."
            )
    return tuple(chosen)


def _of_stack(asked: str | Sequence[int], layers: Sequence[int]) -> Sequence[int]:
    """The chosen ones of one stack of layers."""
    if not isinstance(asked, str):
        if len(set(asked)) < len(asked) or not set(asked) <= set(range(len(layers))):
            raise UpcyclingError(
                f"moe_layers={list(asked)} must name layers 0 to {len(layers) - 1}, each once."
            )
        return [layers[index] for index in asked]
    match = re.fullmatch(r"all|(every|last)_([1-9]\d*)", asked)
    if match is None:
        raise UpcyclingError(
            f"moe_layers={asked!r} must be all, every_N, last_N or a list of layer indices."
        )
    kind, count = match[1], int(match[2] or 1)
    if count > len(layers):
        raise UpcyclingError(f"moe_layers={asked}: the model has {len(layers)} layers only.")
    return layers[count - 1 :: count] if kind != "last" else layers[-count:]
