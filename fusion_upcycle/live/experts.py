"""The experts of a live model, found by the family's `Architecture`."""

from typing import TYPE_CHECKING

from torch import nn

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.routers import Routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_experts(model: "PreTrainedModel", routers: Routers) -> dict[int, nn.Module]:
    """MoE layer -> the module that holds its experts packed, as `gate_up_proj` and `down_proj`.

    None for a dense model.

    Raises:
        UpcyclingError: a layer that has a router and no such module, or the other way round (which
            is as it must be where routing is by hash).
    """
    family = routers.architecture
    if family is None:
        return {}
    found = family.layer_modules(model, family.experts_module)
    if list(found) != routers.layers:
        raise UpcyclingError(
            f"This {family.name} model has routers in layers {routers.layers} but experts, "
            f"as {family.experts_module}, in {list(found)}. Load it as transformers' own class."
        )
    return found


def expert_parameters(
    model: "PreTrainedModel", routers: Routers
) -> dict[int, dict[str, nn.Parameter]]:
    """MoE layer -> name -> parameter of all its routed experts, packed on the first axis.

    Raises:
        UpcyclingError: as `find_experts`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        layer: {names[id(parameter)]: parameter for parameter in module.parameters()}
        for layer, module in find_experts(model, routers).items()
    }
