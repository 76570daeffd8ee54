"""Planning: where each target tensor comes from, and the proof that nothing is left over.

Decided from names and shapes alone; nothing is read but what may be tied. Completeness is not
optional: every source tensor is used or refused by name, every target tensor is made exactly once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from fusion_upcycle import expert_init
from fusion_upcycle.architectures.base import DenseLayout, SharedExpert
from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.split import SplitSource
from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec
from fusion_upcycle.checkpoint.view import TurnedSource
from fusion_upcycle.conversion.completeness import (
    check_complete,
    check_shape,
    check_tied,
    held_twice,
)
from fusion_upcycle.conversion.rules import (
    Carried,
    HashTable,
    Initialised,
    Joined,
    Repeated,
    RouterRows,
    Rule,
    Zeros,
)
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import ALL_PARTS, DuplicationPlan, part_shape
from fusion_upcycle.upcycling.frame import Frame, plan_frame
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.upcycling.resolution import ResolvedOptions
from fusion_upcycle.upcycling.upcycling import Upcycling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


Made = TypeVar("Made", bound=Upcycling)


def plan_upcycling(
    source: TensorSource,
    source_config: "PreTrainedConfig",
    options: UpcyclingOptions,
) -> Upcycling:
    """Decide every target tensor's origin; refuse, by name, whatever cannot be carried over.

    Args:
        source: the dense model's tensors.
        source_config: its config; `architectures[0]` says causal LM or backbone.
        options: what to make of it.

    Raises:
        UpcyclingError: unsupported family, config field, tensor, shape or dtype.
    """
    frame = plan_frame(source, source_config, options)
    source = frame.architecture.view(source, source_config)
    plan = DuplicationPlan.from_dense(frame.resolved.moe_layers, options.num_experts)
    return plan_tensors(frame, source, plan, lambda name: [name], Upcycling)


def plan_tensors(
    frame: Frame,
    source: TensorSource,
    plan: DuplicationPlan,
    expert_sources: Callable[[str], Sequence[str]],
    make: Callable[..., Made],
) -> Made:
    """Decide every target tensor's origin, given which source expert each expert comes from.

    Args:
        source: tensors of the dense model, or of several.
        plan: of the MoE layers.
        expert_sources: name of a tensor of an MoE layer's FFN, as in a dense model -> its name in
            `source` for each source expert of the plan.
        make: of the fields of an `Upcycling`.

    Raises:
        UpcyclingError: a tensor that is missing, left over, or of another shape.
    """
    config, dense, family = frame.source_config, frame.dense, frame.architecture
    source = _as_ffns(source, frame, plan)
    known = getattr(source, "has_data", True)
    if dense.zeroed_padding and config.pad_token_id is not None and known:
        _check_padding(source, config.pad_token_id)
    ffn_names: dict[int, list[dict[str, str]]] = {}
    rules: dict[str, Rule] = {}
    for layer in range(family.num_layers(config)):
        prefix, before = family.layer_prefix(config, layer), family.live_prefix(config, layer)
        names = {part: [before + name] for part, name in dense.ffn.items()}
        if is_moe := layer in plan.source_experts:
            _check_router_norm(source, config, before, dense)
            names = {part: list(expert_sources(name)) for part, (name,) in names.items()}
        elif dense.kept_whole:
            continue
        experts = zip(*names.values(), strict=True)
        ffn_names[layer] = [dict(zip(names, expert, strict=True)) for expert in experts]
        for expert in ffn_names[layer]:
            _check_ffn(source, frame, expert)
        made = (
            _moe_rules(frame, layer, plan.source_experts[layer], ffn_names[layer])
            if is_moe
            else {dense.ffn[part]: Carried(name) for part, (name,) in names.items()}
        )
        rules |= {prefix + name: rule for name, rule in made.items()}
        rules |= {prefix + name: Zeros() for name in dense.zeros}
    used = {name for layer in ffn_names.values() for names in layer for name in names.values()}
    used |= {name for name in source.specs if name.endswith(dense.derived)}
    expected = dict(frame.layout.specs)
    used |= _twins(source, frame, expected)
    for name in source.specs:
        if name not in used:
            target = family.file_name(name)
            if target not in expected:
                raise UpcyclingError(
                    f"Source tensor {name} {list(source.specs[name].shape)} has no place in "
                    f"{class_name(frame.config)}: the model has something that config.json does "
                    "not say. Remove the tensor if it is unused; otherwise this model cannot be "
                    "upcycled without changing what it computes."
                )
            rules[target] = Carried(name)
    return make(
        source=source,
        source_config=config,
        config=frame.config,
        architecture=frame.architecture,
        options=frame.options,
        resolved=frame.resolved,
        plan=plan,
        dtype=frame.dtype,
        rules=(ordered := check_complete(source, rules, expected)),
        specs={name: expected[name] for name in ordered},
        ffn_names={layer: ffn_names[layer] for layer in plan.source_experts},
    )


def _twins(source: TensorSource, frame: Frame, expected: dict[str, TensorSpec]) -> set[str]:
    """Second names of tied tensors that need no place in the result.

    Where transformers' class keeps a second tensor that differs, as T5's does, it is expected.
    """
    family = frame.architecture
    tied = {
        family.live_slot(name, 1)[0]: family.live_slot(twin, 1)[0]
        for name, twin in frame.layout.tied.items()
    }
    if not family.may_untie:
        return check_tied(source, tied)
    equal, different = held_twice(source, tied)
    for name in different:
        expected[family.file_name(name)] = expected[family.file_name(tied[name])]
    return equal


def _as_ffns(source: TensorSource, frame: Frame, plan: DuplicationPlan) -> TensorSource:
    """The source as `DenseLayout.ffn` names it: fused matrices split, transposed ones turned."""
    config, dense, family = frame.source_config, frame.dense, frame.architecture
    layers = plan.source_experts if dense.kept_whole else [None]
    starts = ["" if x is None else family.live_prefix(config, x) for x in layers]
    if dense.turned:
        source = TurnedSource(source, [start + name for start in starts for name in dense.turned])
    if dense.splits is None:
        return source
    splits = dense.splits(config)
    return SplitSource(
        source, {start + name: _whole(start, splits[name]) for start in starts for name in splits}
    )


def _whole(start: str, parts: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    return [(start + name, rows) for name, rows in parts]


def _check_ffn(source: TensorSource, frame: Frame, names: Mapping[str, str]) -> None:
    """Part of `Expert` -> the source's tensor: they exist, with the shape that the config says."""
    config, family = frame.source_config, frame.architecture
    wide, narrow = family.ffn_size(config), family.hidden_size(config)
    for part, name in names.items():
        if name not in source.specs:
            raise UpcyclingError(
                f"The source lacks tensor {name}: its config.json says "
                f"{family.num_layers(config)} layers of {config.model_type}. "
                "The checkpoint is incomplete, or the config belongs to another model."
            )
        check_shape(name, source.specs[name].shape, part_shape(part, wide, narrow))


def _check_router_norm(
    source: TensorSource, config: "PreTrainedConfig", prefix: str, dense: DenseLayout
) -> None:
    """The norm that tells the size of the router's inputs is there."""
    if dense.router_norm is None:
        return
    if (name := prefix + dense.router_norm) not in source.specs:
        raise UpcyclingError(
            f"The source lacks tensor {name}, the norm before the router. The checkpoint is "
            f"incomplete, or the DenseLayout of {config.model_type} has another router_norm."
        )


def _moe_rules(
    frame: Frame,
    layer: int,
    source_experts: Sequence[int],
    ffn_names: Sequence[Mapping[str, str]],
) -> dict[str, Rule]:
    """The rules of one MoE layer, by target name relative to the layer."""
    architecture, resolved = frame.architecture, frame.resolved
    # A plain copy is carried straight through, without holding an expert in memory.
    straight = resolved.asked.expert_init is expert_init.copy and resolved.sharding.whole
    sizes = resolved.expert_size, resolved.hidden_size
    made: dict[str, dict[int, Rule]] = {}
    for expert, origin in enumerate(source_experts):
        for part, source in ffn_names[origin].items():
            place = architecture.place(expert, part, math.prod(part_shape(part, *sizes)))
            made.setdefault(place.name, {})[place.start] = (
                Carried(source, resolved.scales[part])
                if straight
                else Initialised(layer, expert, part)
            )
    rules: dict[str, Rule] = {}
    for name, parts in made.items():
        in_order = [rule for _, rule in sorted(parts.items())]
        rules[name] = Joined(in_order) if len(in_order) > 1 else in_order[0]
    if resolved.asked.routing == "hash":
        assert architecture.hash_name is not None
        rules[architecture.hash_name] = HashTable(layer)
    else:
        rules[architecture.router_name] = RouterRows(layer)
    if architecture.routing.selection_bias is not None:
        rules[architecture.routing.selection_bias] = Zeros()
    if architecture.shared is not None and (
        resolved.shared_size or not architecture.shared.optional
    ):
        rules |= _shared_rules(architecture.shared, resolved, ffn_names[0])
    return rules


def _shared_rules(
    shared: SharedExpert, resolved: ResolvedOptions, names: Mapping[str, str]
) -> dict[str, Rule]:
    """The rules of a layer's shared expert."""
    outputs = ("down_proj_DF", "down_bias_D")
    empty: dict[str, Sequence[str]] = {"copy": (), "zero": outputs, "none": ALL_PARTS}
    rules: dict[str, Rule] = {}
    for part, name in shared.names.items():
        # Half of the function, by the gate at sigmoid(0) or else by the scale.
        halved = part in outputs and shared.gate_name is None
        scale = 0.5 if halved else 1.0
        if part in empty[resolved.shared_expert]:
            rules[name] = Zeros()
        elif resolved.shared_size == resolved.sharding.dense_size:
            rules[name] = Carried(names[part], scale)
        else:
            rules[name] = Repeated(names[part], part, resolved.shared_size, scale)
    if shared.gate_name is not None:
        rules[shared.gate_name] = Zeros()
    return rules


def _check_padding(source: TensorSource, token: int) -> None:
    """The embedding of the padding token is zero in the file, as transformers makes it."""
    name = next(name for name in source.specs if name.endswith("embed_tokens.weight"))
    if source.tensor(name)[token].any():
        raise UpcyclingError(
            f"Row {token} (pad_token_id) of source tensor {name} is not zero, but "
            "transformers loads this family with zeros there, so that file and model differ. Zero "
            "it in the file, or set pad_token_id to null in config.json."
        )
