"""Planning: where each target tensor comes from, and the proof that nothing is left over.

Decided from names and shapes alone; nothing is read but what may be tied. Completeness is not
optional: every source tensor is used or refused by name, every target tensor is made exactly once.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fusion_upcycle import expert_init
from fusion_upcycle.architectures import architecture_for
from fusion_upcycle.architectures.base import LLAMA_FFN, Architecture, SharedExpert
from fusion_upcycle.architectures.layout import class_name, file_layout, target_class
from fusion_upcycle.checkpoint.split import SplitSource
from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec, aligned
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import EXPERT_PARTS, DuplicationPlan
from fusion_upcycle.options import UpcyclingOptions, parse_dtype
from fusion_upcycle.resolution import ResolvedOptions, resolve
from fusion_upcycle.upcycling import (
    Carried,
    Initialised,
    Joined,
    Repeated,
    RouterRows,
    Rule,
    Upcycling,
    Zeros,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
    architecture = architecture_for(source_config.model_type, options.target)
    resolved = resolve(options, architecture, source_config)
    config = architecture.convert_config(source_config, resolved)
    config.architectures = [target_class(source_config, config)]
    dtype = parse_dtype(options.dtype) or source_dtype(source, source_config)
    config.dtype = dtype
    resolved.check_rows(dtype)
    plan = DuplicationPlan.from_dense(resolved.moe_layers, options.num_experts)
    dense = architecture.dense[source_config.model_type]
    if dense.splits is not None:
        source = SplitSource(source, dense.splits(source_config))

    ffn_names = _ffn_names(source, source_config, dense.ffn)
    rules: dict[str, Rule] = {}
    for layer, names in ffn_names.items():
        prefix = names[EXPERT_PARTS[0]].removesuffix(dense.ffn[EXPERT_PARTS[0]])
        made = (
            _moe_rules(architecture, resolved, source_config.hidden_size, layer, names)
            if layer in plan.source_experts
            else {LLAMA_FFN[part]: Carried(name) for part, name in names.items()}
        )
        rules |= {prefix + name: rule for name, rule in made.items()}
    used = {name for names in ffn_names.values() for name in names.values()}
    used |= {name for name in source.specs if name.endswith(dense.derived)}
    layout = file_layout(config)
    used |= _check_tied(source, layout.tied)
    for name in source.specs:
        if name not in used:
            if name not in layout.specs:
                raise UpcyclingError(
                    f"Source tensor {name} {list(source.specs[name].shape)} has no place in "
                    f"{class_name(config)}: the model has something that config.json does not "
                    "say. Remove the tensor if it is unused; otherwise this model cannot be "
                    "upcycled without changing what it computes."
                )
            rules[name] = Carried(name)
    return Upcycling(
        source=source,
        source_config=source_config,
        config=config,
        architecture=architecture,
        options=options,
        resolved=resolved,
        plan=plan,
        dtype=dtype,
        rules=(ordered := _check_complete(source, rules, layout.specs)),
        specs={name: layout.specs[name] for name in ordered},
        ffn_names={layer: [ffn_names[layer]] for layer in plan.source_experts},
    )


def _ffn_names(
    source: TensorSource, config: "PreTrainedConfig", ffn: Mapping[str, str]
) -> dict[int, dict[str, str]]:
    """Layer -> part of `Expert` -> the source's tensor, with the shape that the config says."""
    prefix = "model." if class_name(config).endswith("ForCausalLM") else ""
    names: dict[int, dict[str, str]] = {}
    for layer in range(config.num_hidden_layers):
        names[layer] = {part: f"{prefix}layers.{layer}.{name}" for part, name in ffn.items()}
        for part, name in names[layer].items():
            if name not in source.specs:
                raise UpcyclingError(
                    f"The source lacks tensor {name}: its config.json says "
                    f"{config.num_hidden_layers} layers of {config.model_type}. "
                    "The checkpoint is incomplete, or the config belongs to another model."
                )
            wide, narrow = config.intermediate_size, config.hidden_size
            shape = (narrow, wide) if part == "down_proj_DF" else (wide, narrow)
            _check_shape(name, source.specs[name].shape, shape)
    return names


def _moe_rules(
    architecture: Architecture,
    resolved: ResolvedOptions,
    hidden_size: int,
    layer: int,
    names: Mapping[str, str],
) -> dict[str, Rule]:
    """The rules of one MoE layer, by target name relative to the layer."""
    # A plain copy is carried straight through, without holding an expert in memory.
    straight = resolved.asked.expert_init is expert_init.copy and resolved.sharding.whole
    elements = resolved.expert_size * hidden_size
    made: dict[str, dict[int, Rule]] = {}
    for expert in range(resolved.asked.num_experts):
        for part, source in names.items():
            place = architecture.place(expert, part, elements)
            made.setdefault(place.name, {})[place.start] = (
                Carried(source, resolved.scales[part])
                if straight
                else Initialised(layer, expert, part)
            )
    rules: dict[str, Rule] = {}
    for name, parts in made.items():
        in_order = [rule for _, rule in sorted(parts.items())]
        rules[name] = Joined(in_order) if len(in_order) > 1 else in_order[0]
    rules[architecture.router_name] = RouterRows(layer)
    if architecture.routing.selection_bias is not None:
        rules[architecture.routing.selection_bias] = Zeros()
    if architecture.shared is not None and (
        resolved.shared_size or not architecture.shared.optional
    ):
        rules |= _shared_rules(architecture.shared, resolved, names)
    return rules


def _shared_rules(
    shared: SharedExpert, resolved: ResolvedOptions, names: Mapping[str, str]
) -> dict[str, Rule]:
    """The rules of a layer's shared expert."""
    empty: dict[str, Sequence[str]] = {"copy": (), "zero": ("down_proj_DF",), "none": EXPERT_PARTS}
    rules: dict[str, Rule] = {}
    for part, name in shared.names.items():
        # Half of the function, by the gate at sigmoid(0) or else by the scale.
        halved = part == "down_proj_DF" and shared.gate_name is None
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


def _check_tied(source: TensorSource, tied: Mapping[str, str]) -> set[str]:
    """Tied tensors that the source holds a second time: fine when equal, refused when not."""
    used = set()
    for name, twin in tied.items():
        if name not in source.specs or twin not in source.specs:
            continue
        same = source.specs[name].shape == source.specs[twin].shape and all(
            torch.equal(a, b) for a, b in aligned(source.chunks(name), source.chunks(twin))
        )
        if not same:
            raise UpcyclingError(
                f"config.json says tie_word_embeddings=true, but {name} differs from {twin}. "
                "Set it to false to keep both, or remove the tensor that is not used."
            )
        used.add(name)
    return used


def _check_complete(
    source: TensorSource, rules: Mapping[str, Rule], expected: Mapping[str, TensorSpec]
) -> dict[str, Rule]:
    """Every expected tensor has one rule, and the right shape; returns them in writing order."""
    for name in expected:
        if name not in rules:
            raise UpcyclingError(
                f"The source lacks tensor {name}, which its config.json calls for. The checkpoint "
                "is incomplete"
                + (
                    " (or its embeddings are tied: set tie_word_embeddings=true)."
                    if "lm_head" in name
                    else "."
                )
            )
    assert rules.keys() <= expected.keys(), sorted(rules.keys() - expected.keys())[:3]
    for name, rule in rules.items():
        if isinstance(rule, Carried):
            _check_shape(rule.source, source.specs[rule.source].shape, expected[name].shape)
    return {name: rules[name] for name in sorted(expected, key=_writing_order)}


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise UpcyclingError(
            f"Source tensor {name} has shape {list(found)}, but its config.json calls for "
            f"{list(expected)}: the config belongs to another model."
        )


def _writing_order(name: str) -> tuple[int, list[int], str]:
    """Embeddings, then layer by layer and expert by expert, then the rest."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    section = 1 if numbers else 0 if "embed" in name else 2
    return section, numbers, name


def source_dtype(source: TensorSource, config: "PreTrainedConfig") -> torch.dtype:
    """The dtype in which transformers would load the source: its config's, else its tensors'."""
    if config.dtype is not None:
        try:
            dtype = parse_dtype(config.dtype)
        except UpcyclingError as error:
            raise UpcyclingError(f"config.json of the source, dtype: {error}") from error
        assert dtype is not None
        return dtype
    dtypes = {spec.dtype for spec in source.specs.values()}
    if len(dtypes) > 1:
        raise UpcyclingError(
            f"The source mixes dtypes ({', '.join(sorted(map(str, dtypes)))}) and its config.json "
            "names none. Choose one with dtype=."
        )
    return dtypes.pop()
