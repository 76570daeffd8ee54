"""AdamW's moments of an MoE, expanded by the plan of its parameters: training goes on where it was.

Moments lie as the live model has its parameters: the experts of a layer packed along one axis.

Shape suffixes: E source experts, M experts of the result.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle import expert_init
from fusion_upcycle.architectures.layout import empty_model
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.initialisers import bare_function
from fusion_upcycle.planning import layer_prefix
from fusion_upcycle.training.moments import Moments, read_moments

#: What new experts and router rows begin with.
NEW_MOMENTS = ("copy", "reset", "scale")


def expanded_state(folder: Path, expansion: Expansion, new: str) -> tuple[Moments, dict[str, Any]]:
    """The moments in the folder of a trained model, expanded; and what the record says.

    Raises:
        UpcyclingError: as `expand_moments` and `check_moments`; none there.
    """
    check_new_moments(expansion, new)
    moments = expand_moments(read_moments(folder), expansion, new)
    check_moments(moments, expansion)
    return moments, {"source": str(folder), "new_moments": new}


def expand_moments(moments: Moments, expansion: Expansion, new: str = "copy") -> Moments:
    """The moments of the result's parameters; all that is no expert and no router row stays.

    Args:
        moments: of the source's parameters, by live name.
        new: what the new copies begin with. `copy`: their source expert's moments. `reset`: zero;
            AdamW counts its steps per parameter, not per expert, so that their first steps are
            about three times as long (betas 0.9 and 0.999). `scale`: `exp_avg` / c and
            `exp_avg_sq` / c^2 for a source expert that now has c places, among which its tokens
            are shared; the length of the first step is that of `copy`.

    Raises:
        UpcyclingError: moments of another model, an unknown choice, or one that the initialiser of
            the new experts makes meaningless.
    """
    check_new_moments(expansion, new)
    result = dict(moments)
    for layer, plan in expansion.plan.source_experts.items():
        for name in _expert_parameters(expansion, layer):
            if name in moments:
                result[name] = {
                    kind: value
                    if value.ndim == 0
                    else _expanded(name, kind, value, plan, expansion.num_experts, new)
                    for kind, value in moments[name].items()
                }
    return result


def check_new_moments(expansion: Expansion, new: str) -> None:
    """Check the choice for an expansion.

    Raises:
        UpcyclingError: as `expand_moments`.
    """
    check_new_moments_name(new)
    permuted = bare_function(expansion.options.initialise_copy) is expert_init.permute
    if permuted and new != "reset":
        raise UpcyclingError(
            f"new_moments={new}: with expert_init=permute the neurons of a new expert are in "
            "another order than their moments. Choose new_moments=reset, or another expert_init."
        )


def check_new_moments_name(new: str) -> None:
    """Check the choice where there is no expansion yet.

    Raises:
        UpcyclingError: an unknown one.
    """
    if new not in NEW_MOMENTS:
        raise unknown("new_moments", str(new), NEW_MOMENTS)


def check_moments(moments: Moments, expansion: Expansion) -> None:
    """Every moment is of a parameter of the result, and has its shape.

    Raises:
        UpcyclingError: names one that is not.
    """
    shapes = {
        name: tensor.shape for name, tensor in empty_model(expansion.config).named_parameters()
    }
    for name, values in moments.items():
        if name not in shapes or values["exp_avg"].shape != shapes[name]:
            raise UpcyclingError(
                f"optimizer_state: {name} {list(values['exp_avg'].shape)} is not a parameter of "
                f"the {expansion.architecture.name} source. The moments are of another model."
            )


def _expert_parameters(expansion: Expansion, layer: int) -> list[str]:
    """Live names of a layer's parameters that have one entry for each expert."""
    family = expansion.architecture
    router = family.live_names.get(family.router_name, family.router_name)
    names = [f"{family.experts_module}.{part}" for part in ("gate_up_proj", "down_proj")]
    return [layer_prefix(expansion.config, layer) + name for name in (*names, router)]


def _expanded(
    name: str, kind: str, value: Tensor, plan: tuple[int, ...], num_experts: int, new: str
) -> Tensor:
    """The moment [M, ...] of a parameter from that of [E, ...]."""
    if len(value) != num_experts:
        raise UpcyclingError(
            f"optimizer_state: {name} {list(value.shape)} is of {len(value)} experts, and the "
            f"source has {num_experts}. The moments are of another model."
        )
    result = value[list(plan)]
    if new == "reset":
        result[num_experts:] = 0
    elif new == "scale":
        places = torch.bincount(torch.tensor(plan))[list(plan[num_experts:])]
        power = 2 if kind == "exp_avg_sq" else 1
        factor = (1 / places.double() ** power).to(value.dtype)
        result[num_experts:] *= factor.view(-1, *[1] * (value.ndim - 1))
    return result
