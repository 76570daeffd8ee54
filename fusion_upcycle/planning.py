"""Planning: where each target tensor comes from, and the proof that nothing is left over.

Decided from names and shapes alone; nothing is read but what may be tied. Completeness is not
optional: every source tensor is used or refused by name, every target tensor is made exactly once.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fusion_upcycle import expert_init
from fusion_upcycle.architectures import architecture_for
from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import class_name, file_layout, target_class
from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import EXPERT_PARTS, DuplicationPlan
from fusion_upcycle.options import UpcyclingOptions, parse_dtype
from fusion_upcycle.upcycling import Carried, Initialised, RouterRows, Rule, Upcycling, Zeros

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
    options = replace(options, shared_expert=_shared_expert(architecture, options))
    config = architecture.convert_config(source_config, options)
    config.architectures = [target_class(source_config, config)]
    dtype = parse_dtype(options.dtype) or source_dtype(source, source_config)
    config.dtype = dtype
    plan = DuplicationPlan.from_dense(config.num_hidden_layers, options.num_experts)

    ffn_names, rules = _ffn_rules(source, source_config, architecture, options)
    used = {name for names in ffn_names.values() for name in names.values()}
    derived = architecture.dense[source_config.model_type].derived
    used |= {name for name in source.specs if name.endswith(derived)}
    layout = file_layout(config)
    used |= _check_tied(source, layout.tied)
    for name in source.specs:
        if name not in used:
            if name not in layout.shapes:
                raise UpcyclingError(
                    f"Source tensor {name} {list(source.specs[name].shape)} has no place in "
                    f"{class_name(config)}: the model has something that config.json does not "
                    "say. Remove the tensor if it is unused; otherwise this model cannot be "
                    "upcycled without changing what it computes."
                )
            rules[name] = Carried(name)
    specs = _check_complete(source, rules, layout.shapes, dtype, ffn_names)
    return Upcycling(
        source=source,
        source_config=source_config,
        config=config,
        architecture=architecture,
        options=options,
        plan=plan,
        dtype=dtype,
        rules={name: rules[name] for name in specs},
        specs=specs,
        _ffn_names=ffn_names,
    )


def _ffn_rules(
    source: TensorSource,
    source_config: "PreTrainedConfig",
    architecture: Architecture,
    options: UpcyclingOptions,
) -> tuple[dict[int, dict[str, str]], dict[str, Rule]]:
    """The dense FFN tensors of each layer, and the rules of what is made of them."""
    layout = architecture.dense[source_config.model_type]
    prefix = "model." if class_name(source_config).endswith("ForCausalLM") else ""
    # A shared copy behind a sigmoid gate at zero computes half of the function.
    routed_scale = 0.5 if options.shared_expert == "copy" else 1.0
    ffn_names: dict[int, dict[str, str]] = {}
    rules: dict[str, Rule] = {}
    for layer in range(source_config.num_hidden_layers):
        at = f"{prefix}layers.{layer}."
        ffn_names[layer] = {part: at + name for part, name in layout.ffn.items()}
        for part, name in ffn_names[layer].items():
            if name not in source.specs:
                raise UpcyclingError(
                    f"The source lacks tensor {name}: its config.json says "
                    f"{source_config.num_hidden_layers} layers of {source_config.model_type}. "
                    "The checkpoint is incomplete, or the config belongs to another model."
                )
            scale = routed_scale if part == "down_proj_DF" else 1.0
            for expert in range(options.num_experts):
                target = at + architecture.expert_names[part].format(expert=expert)
                # A plain copy is carried straight through, without holding an expert in memory.
                rules[target] = (
                    Carried(name, scale)
                    if options.initialise_expert is expert_init.copy
                    else Initialised(layer, expert, part, scale)
                )
        if architecture.shared is not None:
            empty = {"copy": (), "zero": ("down_proj_DF",), "none": EXPERT_PARTS}
            for part, name in architecture.shared.names.items():
                zero = part in empty[options.shared_expert]
                rules[at + name] = Zeros() if zero else Carried(ffn_names[layer][part])
            rules[at + architecture.shared.gate_name] = Zeros()
        rules[at + architecture.router_name] = RouterRows(layer)
    return ffn_names, rules


def _shared_expert(architecture: Architecture, options: UpcyclingOptions) -> str:
    """What `shared_expert=auto` means for the family."""
    has_one = architecture.shared is not None
    if options.shared_expert == "auto":
        return "copy" if has_one else "none"
    if options.shared_expert != "none" and not has_one:
        raise UpcyclingError(
            f"shared_expert={options.shared_expert}: {architecture.name} has no shared expert. "
            "Leave it at auto, or choose another target."
        )
    return options.shared_expert


def _check_tied(source: TensorSource, tied: Mapping[str, str]) -> set[str]:
    """Tied tensors that the source holds a second time: fine when equal, refused when not."""
    used = set()
    for name, twin in tied.items():
        if name not in source.specs or twin not in source.specs:
            continue
        same = source.specs[name].shape == source.specs[twin].shape and all(
            torch.equal(a, b) for a, b in zip(source.chunks(name), source.chunks(twin), strict=True)
        )
        if not same:
            raise UpcyclingError(
                f"config.json says tie_word_embeddings=true, but {name} differs from {twin}. "
                "Set it to false to keep both, or remove the tensor that is not used."
            )
        used.add(name)
    return used


def _check_complete(
    source: TensorSource,
    rules: Mapping[str, Rule],
    expected: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    ffn_names: Mapping[int, Mapping[str, str]],
) -> dict[str, TensorSpec]:
    """Every expected tensor has one rule and the right shape; returns specs in writing order."""
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
    specs = {}
    for name in sorted(expected, key=_writing_order):
        rule = rules[name]
        if isinstance(rule, Carried | Initialised):
            origin = rule.source if isinstance(rule, Carried) else ffn_names[rule.layer][rule.part]
            if source.specs[origin].shape != expected[name]:
                raise UpcyclingError(
                    f"Source tensor {origin} has shape {list(source.specs[origin].shape)}, but "
                    f"its config.json calls for {list(expected[name])}: the config belongs to "
                    "another model."
                )
        specs[name] = TensorSpec(dtype, expected[name])
    return specs


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
