"""AdamW's moments of an earlier run, for the parameters of the model that goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.moments import Moments, read_moments
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.upcycling.moments import carried_moments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_moments(
    folder: Path, model: "PreTrainedModel", upcycling: Mapping[str, Any] | None
) -> Moments:
    """Moments for `model`'s parameters from an earlier run.

    Args:
        folder: of a trained model: the same one as `model`, or the dense source of it.
        upcycling: options by which `model` was made of that source, as `upcycling.json` has them;
            None where it is the same model.

    Raises:
        UpcyclingError: no moments there, or they are of another model.
    """
    saved = read_moments(folder)
    config = read_config(folder)
    if config.model_type != model.config.model_type:
        if upcycling is None:
            raise UpcyclingError(
                f"optimizer_state={folder} is of a {config.model_type} model, and how this "
                f"{model.config.model_type} model was made of it is not known: it has no "
                "upcycling.json. Train the folder that sparse_upcycling wrote, use "
                f"method=upcycle_and_train, or pass {setting('optimizer_state', None)}."
            )
        config.dtype = None  # the moments' own counts
        saved = carried_moments(saved, config, upcycling)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, values in saved.items():
        if name not in shapes or values["exp_avg"].shape != shapes[name]:
            raise UpcyclingError(
                f"optimizer_state={folder}: {name} {list(values['exp_avg'].shape)} is not a "
                f"parameter of this {model.config.model_type} model. The moments are of another "
                f"model; pass {setting('optimizer_state', None)}."
            )
    return saved


def place_moments(optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Begin with these; parameters that are not among them start fresh.

    Args:
        optimizer: made with the `names` of its parameters in each group.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in moments:
                optimizer.state[parameter] = {
                    kind: _placed_like(parameter, value) for kind, value in moments[name].items()
                }


def _placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """AdamW state on the parameter's device; sharded as it is, but for the step count."""
    value = value.float()
    if value.ndim == 0:
        return value.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        # Each process has read the value itself.
        mesh, places = parameter.device_mesh, parameter.placements
        return distribute_tensor(value, mesh, places, src_data_rank=None)
    return value.to(parameter.device, parameter.dtype)
