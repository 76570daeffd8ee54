"""Planning an expansion: where each tensor of the larger MoE comes from.

Decided from names and shapes alone. Completeness is not optional: every source tensor is used or
refused by name, every target tensor is made exactly once.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fusion_upcycle import expert_init
from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.base import LLAMA_LAYOUT, Architecture
from fusion_upcycle.architectures.layout import (
    FileLayout,
    class_name,
    file_layout,
)
from fusion_upcycle.architectures.moe_config import checked_config
from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec
from fusion_upcycle.conversion.completeness import (
    check_shape,
    check_tied,
    held_twice,
    writing_order,
)
from fusion_upcycle.conversion.rules import (
    Carried,
    Initialised,
    Joined,
    RouterRows,
    Rule,
    SelectionBias,
)
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.experts import DuplicationPlan, part_shape
from fusion_upcycle.selection import select
from fusion_upcycle.upcycling.frame import source_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


#: What seeds of random draws can tell apart.
_MOST_EXPERTS = 2**16


def plan_expansion(
    source: TensorSource,
    source_config: "PreTrainedConfig",
    options: ExpansionOptions,
    *,
    scores: Mapping[int, Sequence[float]] | None = None,
    plan: DuplicationPlan | None = None,
) -> Expansion:
    """Decide every target tensor's origin; refuse, by name, whatever cannot be carried over.

    Args:
        source: the MoE's tensors, in the file layout.
        source_config: its config; `architectures[0]` says causal LM or backbone.
        options: what to make of it.
        scores: MoE layer -> importance of each expert, where `options.selection` needs it.
        plan: instead of what `options` and `scores` choose.

    Raises:
        UpcyclingError: a dense model, an unsupported family, config field, tensor or shape; fewer
            experts than there are; scores or a plan of another model.
    """
    architecture = moe_family(source_config)
    source_config = checked_config(source_config)
    num_experts: int = getattr(source_config, architecture.experts_field)
    before = file_layout(source_config)
    routers = {
        layer: architecture.layer_prefix(source_config, layer) + architecture.router_name
        for layer in range(architecture.num_layers(source_config))
    }
    layers = [layer for layer, router in routers.items() if router in before.specs]
    if not layers:
        raise UpcyclingError(
            f"config.json of the {architecture.name} source makes every layer dense: there are no "
            "experts to duplicate."
        )
    untied = _check_source(source, source_config, before, may_untie=architecture.may_untie)
    plan = plan or _choose(options, layers, num_experts, scores)
    plan.check_expansion(layers, num_experts)
    _check_number(len(plan.source_experts[layers[0]]))
    config = _target_config(source_config, architecture, plan, num_experts, options)
    after = architecture.for_config(config)
    said = source_config.dtype is not None
    dtype = source_dtype(source, source_config) if said else _main_dtype(source)
    source_config.dtype = config.dtype = dtype
    down = architecture.place(0, "down_proj_DF", 0).name
    first = architecture.layer_prefix(source_config, layers[0])
    hidden, size = source.specs[first + down].shape[-2:]
    expansion = Expansion(
        source=source,
        source_config=source_config,
        config=config,
        architecture=after,
        options=options,
        plan=plan,
        dtype=dtype,
        rules={},
        specs={},
        num_experts=num_experts,
        expert_shape=(size, hidden),
        source_parameters=sum(spec.numel for spec in before.specs.values()),
    )
    _fill(expansion, untied)
    if options.extends_by_bias and not expansion.is_identity:
        _rehearse_bias(expansion)
    return expansion


def _target_config(
    source: "PreTrainedConfig",
    architecture: Architecture,
    plan: DuplicationPlan,
    num_experts: int,
    options: ExpansionOptions,
) -> "PreTrainedConfig":
    """The source's config with another number of experts, and top-k if that was asked for."""
    config = copy.deepcopy(source)
    total = len(next(iter(plan.source_experts.values())))
    groups = getattr(source, "n_group", None) or 1
    if groups > 1 and total > num_experts:
        raise UpcyclingError(
            f"config.json of the {architecture.name} source: n_group={groups}. Its router chooses "
            "among groups of neighbouring experts, and new experts would make other groups of "
            "them: what it computes would change beyond what can be said. No remedy is known; "
            "models with n_group=1 can be expanded."
        )
    setattr(config, architecture.experts_field, total)
    if options.experts_per_token is not None:
        if options.experts_per_token > total:
            raise UpcyclingError(
                f"experts_per_token={options.experts_per_token} is more than the {total} experts "
                "of the result. Choose fewer."
            )
        config.num_experts_per_tok = options.experts_per_token
    return config


def _main_dtype(source: TensorSource) -> torch.dtype:
    """The dtype that most elements have."""
    counts: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.numel
    return max(counts, key=lambda dtype: counts[dtype])


def _choose(
    options: ExpansionOptions,
    layers: Sequence[int],
    num_experts: int,
    scores: Mapping[int, Sequence[float]] | None,
) -> DuplicationPlan:
    total = options.total_experts(num_experts)
    _check_number(total)
    if total < num_experts:
        raise UpcyclingError(
            f"num_experts={total} is less than the {num_experts} experts that the source has: "
            f"expanding never removes one. Choose {setting('num_experts', num_experts)} or more."
        )
    if options.needs_scores and scores is None:
        raise UpcyclingError(
            f"selection={options.selection} goes by importance scores, and there are none. Measure "
            "them first and give their importance.json as "
            f"{setting('scores')}, or choose {setting('selection', 'uniform')}."
        )
    if not options.needs_scores:
        scores = {layer: [0.0] * num_experts for layer in layers}
    assert scores is not None
    sizes = {layer: len(values) for layer, values in scores.items()}
    if sizes != dict.fromkeys(layers, num_experts):
        raise UpcyclingError(
            f"The importance scores are of layers and experts {sizes}, but the source has "
            f"{num_experts} experts in layers {layers}: they are of another model."
        )
    return select(
        dict(sorted(scores.items())),
        total,
        selection=options.selection,
        max_copies=options.max_copies,
        seed=options.seed,
    )


def _check_number(total: int) -> None:
    if total > _MOST_EXPERTS:
        raise UpcyclingError(f"num_experts={total} is more than the {_MOST_EXPERTS:,} possible.")


def _check_source(
    source: TensorSource, config: "PreTrainedConfig", layout: FileLayout, *, may_untie: bool
) -> set[str]:
    """The source has all tensors that its config calls for, and no other.

    Returns:
        Names of tensors that its config says are tied, and that are not.
    """
    for name, spec in layout.specs.items():
        if name not in source.specs:
            raise UpcyclingError(
                f"The source lacks tensor {name}, which its config.json calls for. The checkpoint "
                "is incomplete, or its tensors have other names: load it with transformers and "
                "save it again (save_pretrained)."
            )
        check_shape(name, source.specs[name].shape, spec.shape)
    equal, different = held_twice(source, layout.tied)
    if not may_untie:
        check_tied(source, layout.tied)
    allowed = layout.specs.keys() | equal | different
    for name in source.specs:
        if name not in allowed and not name.endswith(LLAMA_LAYOUT.derived):
            raise UpcyclingError(
                f"Source tensor {name} {list(source.specs[name].shape)} has no place in "
                f"{class_name(config)}: it is left over, or of a part that transformers does not "
                "run (multi-token prediction). Load the model with transformers and save it again "
                "(save_pretrained): that leaves such tensors out."
            )
    return different


def _fill(expansion: Expansion, untied: Collection[str]) -> None:
    """Give the expansion the rules and specs of all tensors."""
    after = file_layout(expansion.config).specs
    after |= {name: expansion.source.specs[name] for name in untied}
    made: dict[str, Rule] = {}
    for layer, origins in expansion.plan.source_experts.items():
        made |= _expert_rules(expansion, layer, origins)
        if not expansion.is_identity:
            made[expansion.router_name(layer)] = RouterRows(layer)
            if (bias := expansion.bias_name(layer)) is not None:
                made[bias] = SelectionBias(layer)
    assert made.keys() <= after.keys(), sorted(made.keys() - after.keys())[:3]
    for name in sorted(after, key=writing_order):
        rule = expansion.rules[name] = made.get(name, Carried(name))
        origin = expansion.source.specs[_origin(expansion, name, rule)]
        if isinstance(rule, Carried):
            check_shape(name, origin.shape, after[name].shape)
        # Every tensor keeps its dtype, also where transformers would have made it in another.
        expansion.specs[name] = TensorSpec(origin.dtype, after[name].shape)


def _expert_rules(expansion: Expansion, layer: int, origins: Sequence[int]) -> dict[str, Rule]:
    """The rules of one layer's experts, by target name."""
    place = expansion.architecture.place
    prefix = expansion.architecture.layer_prefix(expansion.config, layer)
    # A plain copy is carried straight through, without holding an expert in memory.
    straight = expansion.options.expert_init is expert_init.copy
    made: dict[str, dict[int, Rule]] = {}
    for expert, origin in enumerate(origins):
        for part in expansion.architecture.parts:
            elements = math.prod(part_shape(part, *expansion.expert_shape))
            new, old = place(expert, part, elements), place(origin, part, elements)
            made.setdefault(prefix + new.name, {})[new.start] = (
                Carried(prefix + old.name, start=old.start)
                if straight or expert < expansion.num_experts
                else Initialised(layer, expert, part)
            )
    in_order = {name: [rule for _, rule in sorted(parts.items())] for name, parts in made.items()}
    return {name: Joined(rules) if len(rules) > 1 else rules[0] for name, rules in in_order.items()}


def _origin(expansion: Expansion, name: str, rule: Rule) -> str:
    """The source tensor that one of the target is made from."""
    match rule:
        case Carried():
            return rule.source
        case Joined():
            return _origin(expansion, name, rule.rules[0])
        case Initialised():
            origin = expansion.plan.source_experts[rule.layer][rule.expert]
            place = expansion.architecture.place(origin, rule.part, 0)
            return expansion.architecture.layer_prefix(expansion.config, rule.layer) + place.name
    return name


def _rehearse_bias(expansion: Expansion) -> None:
    """Extend all selection biases once: what stands in the way is said before anything is made."""
    for layer in expansion.layers:
        name = expansion.bias_name(layer)
        if name is None:
            raise UpcyclingError(
                f"router_extension=bias: {expansion.architecture.name} has no selection bias. "
                f"Choose {setting('router_extension', 'noise')}."
            )
        expansion.tensor(name)
