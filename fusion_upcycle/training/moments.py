"""AdamW's moments: saved with a trained model, and carried from a dense run into its MoE.

An MoE made by sparse upcycling starts with the moments of its dense source: each expert has those
of the FFN it was made from, by the same plan as its weights; routers, gates and whatever else has
no source start fresh. Scales that weights get for exactness are not applied to moments.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checkpoint.tensors import StateDictSource
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.options import make_options
from fusion_upcycle.planning import plan_upcycling
from fusion_upcycle.rules import Carried, Joined, Repeated, RouterRows, Rule, Zeros
from fusion_upcycle.upcycling import Upcycling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: In the folder of a trained model. Not beside the weights, which are read by `*.safetensors`.
MOMENTS_FILE = "training/optimizer.safetensors"

#: Parameter name -> AdamW's state of it: `exp_avg`, `exp_avg_sq`, `step`.
Moments = dict[str, dict[str, Tensor]]

_KINDS = ("exp_avg", "exp_avg_sq")
_PREFIX = "model."  # of the model in the Lightning module


def save_moments(state: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write a checkpoint's optimizer state, by name, into the folder of a model."""
    write_moments({n.removeprefix(_PREFIX): dict(v) for n, v in state.items()}, folder)


def write_moments(moments: Moments, folder: Path) -> None:
    """Write moments into the folder of the model whose parameters they name."""
    path = folder / MOMENTS_FILE
    path.parent.mkdir(exist_ok=True)
    tensors = {
        f"{name}/{kind}": value.contiguous()
        for name, values in moments.items()
        for kind, value in values.items()
    }
    save_file(tensors, path)


def read_moments(folder: Path) -> Moments:
    """The moments in the folder of a trained model, as they were saved.

    Raises:
        UpcyclingError: none there.
    """
    reader = moments_reader(folder)
    saved: Moments = {}
    for key in reader.specs:
        name, _, kind = key.rpartition("/")
        saved.setdefault(name, {})[kind] = reader.tensor(key).clone()
    return saved


def moments_reader(folder: Path) -> CheckpointReader:
    """The file of moments in the folder of a trained model; its names are `PARAMETER/KIND`.

    Raises:
        UpcyclingError: none there, or a file that is damaged or not one of ours.
    """
    path = folder / MOMENTS_FILE
    if not path.is_file():
        raise UpcyclingError(
            f"optimizer_state={folder} has no {MOMENTS_FILE}: give the folder of a model that "
            "continued_pretraining saved, or null."
        )
    reader = CheckpointReader(path.parent, file=path.name)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, spec in reader.specs.items():
        name, _, kind = key.rpartition("/")
        shapes.setdefault(name, {})[kind] = spec.shape
    for name, kinds in shapes.items():
        whole = kinds.keys() == {*_KINDS, "step"} and kinds["step"] == ()
        if not whole or kinds["exp_avg"] != kinds["exp_avg_sq"]:
            raise UpcyclingError(
                f"{path}: {name} has {kinds}, which are not AdamW's moments of one parameter. Give "
                "the folder of a model that continued_pretraining saved, or null."
            )
    return reader


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
                "method=upcycle_and_train, or set optimizer_state=null."
            )
        config.dtype = None  # the moments' own counts
        saved = _carried(saved, config, upcycling)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, values in saved.items():
        if name not in shapes or values["exp_avg"].shape != shapes[name]:
            raise UpcyclingError(
                f"optimizer_state={folder}: {name} {list(values['exp_avg'].shape)} is not a "
                f"parameter of this {model.config.model_type} model. The moments are of another "
                "model; set optimizer_state=null."
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
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, parameter.dtype)


def _carried(saved: Moments, config: Any, upcycling: Mapping[str, Any]) -> Moments:
    """The dense moments, by the plan that made the MoE."""
    options = make_options(
        **{**upcycling, "expert_init": "copy", "router_init": "zeros", "dtype": "float32"}
    )
    result: Moments = {}
    for kind in _KINDS:
        source = StateDictSource({name: values[kind] for name, values in saved.items()})
        plan = _unscaled(plan_upcycling(source, config, options))
        for name, rule in plan.rules.items():
            if isinstance(rule, RouterRows | Zeros):
                continue
            parameter, index = plan.architecture.live_slot(name, plan.resolved.expert_size)
            tensor = plan.tensor(name).float()
            if not index:
                result.setdefault(parameter, {})[kind] = tensor.clone()
                continue
            whole = result.setdefault(parameter, {})
            if kind not in whole:
                whole[kind] = torch.zeros(_packed_shape(parameter, tensor, plan))
            whole[kind][index] = tensor
    step = max((values["step"] for values in saved.values()), key=float)
    for values in result.values():
        values["step"] = step.clone()
    return result


def _packed_shape(parameter: str, tensor: Tensor, plan: Upcycling) -> tuple[int, ...]:
    rows, columns = tensor.shape
    packed = 2 if parameter.endswith("gate_up_proj") else 1
    return plan.options.num_experts, packed * rows, columns


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
