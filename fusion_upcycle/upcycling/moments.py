"""A dense model's AdamW moments for the MoE that is made of it.

Each expert has those of the FFN it was made from, by the same plan as its weights; routers, gates
and whatever else has no source start fresh. Scales that weights get for exactness are not applied
to moments.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fusion_upcycle.architectures.layout import empty_model, tied_names
from fusion_upcycle.checkpoint.moments import KINDS, Moments
from fusion_upcycle.checkpoint.tensors import StateDictSource
from fusion_upcycle.conversion.rules import (
    Carried,
    HashTable,
    Joined,
    Repeated,
    RouterRows,
    Rule,
    Zeros,
)
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.plan import plan_upcycling
from fusion_upcycle.upcycling.upcycling import Upcycling


def carried_moments(saved: Moments, config: Any, upcycling: Mapping[str, Any]) -> Moments:
    """The dense moments, by the plan that made the MoE."""
    options = make_options(
        **{**upcycling, "expert_init": "copy", "router_init": "zeros", "dtype": "float32"}
    )
    result: Moments = {}
    # Buffers and what was frozen have none: they are not a number, and so is what is made of them.
    dense = empty_model(config)
    absent = {
        name: torch.full(tensor.shape, torch.nan)
        for name, tensor in dense.state_dict().items()
        if name not in saved and name not in tied_names(dense)
    }
    shapes: dict[str, torch.Size] = {}
    for kind in KINDS:
        moments = {name: values[kind] for name, values in saved.items()}
        source = StateDictSource(absent | moments)
        plan = _unscaled(plan_upcycling(source, config, options))
        for name, rule in plan.rules.items():
            if isinstance(rule, HashTable | RouterRows | Zeros):
                continue
            if not shapes:
                made = empty_model(plan.config).state_dict()
                shapes = {live: tensor.shape for live, tensor in made.items()}
            parameter, index = plan.architecture.live_slot(name, plan.resolved.expert_size)
            tensor = plan.tensor(name).float()
            if not index:
                result.setdefault(parameter, {})[kind] = tensor.clone()
                continue
            whole = result.setdefault(parameter, {})
            if kind not in whole:
                whole[kind] = torch.zeros(shapes[parameter])
            whole[kind][index] = tensor
    result = {
        name: values
        for name, values in result.items()
        if not any(value.isnan().any() for value in values.values())
    }
    step = max((values["step"] for values in saved.values()), key=float)
    for values in result.values():
        values["step"] = step.clone()
    return result


def _unscaled(plan: Upcycling) -> Upcycling:
    return replace(
        plan,
        rules={name: _without_scale(rule) for name, rule in plan.rules.items()},
        resolved=replace(plan.resolved, scales=dict.fromkeys(plan.resolved.scales, 1.0)),
    )


def _without_scale(rule: Rule) -> Rule:
    if isinstance(rule, Carried | Repeated):
        return replace(rule, scale=1.0)
    if isinstance(rule, Joined):
        return Joined([_without_scale(part) for part in rule.rules])
    return rule
