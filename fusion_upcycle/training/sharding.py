"""A model of a folder in parts, one for each process: by FSDP2 and expert parallelism.

transformers loads the parts itself (`DistributedConfig`): each process reads from the files what is
its own, and nobody holds the whole. What is whose is decided in `part_layout`; what was loaded is
compared with the files in `part_check`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn

from fusion_upcycle.architectures import known_family
from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import (
    built,
    class_name,
    model_class,
    tied_names,
)
from fusion_upcycle.checkpoint.source import locate, read_config
from fusion_upcycle.live.loading import load_folder
from fusion_upcycle.training import launching
from fusion_upcycle.training.options import TrainingOptions
from fusion_upcycle.training.part_check import check_part
from fusion_upcycle.training.part_layout import Layout, packed_experts, plan_layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Part:
    """This process's part of the model of a folder.

    Attributes:
        model: whose parameters are sharded, in evaluation mode.
        dtypes: live name -> dtype in the files.
    """

    model: "PreTrainedModel"
    dtypes: dict[str, torch.dtype]


def load_part(
    source: str | Path, options: TrainingOptions, *, auto_class: Any = None, **kwargs: Any
) -> Part:
    """What this process trains of a model with `strategy=fsdp`; every process calls it.

    Args:
        source: folder or Hub id.
        auto_class: of transformers, by which to load; None is the class that the config names.
        kwargs: of `from_pretrained`; `dtype` says nothing here.

    Raises:
        UpcyclingError: processes that were not started, or whose number does not fit the model; as
            `fusion_upcycle.live.loading.load_folder`.
        ProofError: a tensor that is not the files'.
    """
    launching.start(options.devices, options.num_nodes, options.accelerator)
    with launching.first_alone():
        folder = locate(source)
    config = config_of(folder, auto_class)
    processes = options.devices * options.num_nodes
    layout = plan_layout(config, processes, options.expert_parallel)
    kwargs["dtype"] = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    kwargs.pop("torch_dtype", None)
    mixed = options.precision == "bf16-mixed"
    return load_sharded(folder, layout, auto_class=auto_class, mixed=mixed, **kwargs)


def selection_bias_parameters(
    model: nn.Module, architecture: Architecture | None
) -> set[nn.Parameter]:
    """Selection biases that are parameters: moved by hand, so never sharded."""
    if architecture is None or architecture.live_bias_name is None:
        return set()
    owner, _, name = architecture.live_bias_name.rpartition(".")
    owners = architecture.layer_modules(model, owner)
    layers = architecture.layer_modules(model, architecture.experts_module)
    found = [getattr(owners[layer], name) for layer in layers]
    return {bias for bias in found if isinstance(bias, nn.Parameter)}


def load_sharded(
    folder: Path, layout: Layout, *, auto_class: Any = None, mixed: bool = False, **kwargs: Any
) -> Part:
    """This process's part of the model of a folder, in a given layout.

    Every process calls this, after `launching.start`. What was loaded is compared with the files.

    Args:
        auto_class: of transformers, by which to load; None is the class that the config names.
        mixed: compute in bfloat16, with float32 weights, gradients reduced in float32.
        kwargs: of `from_pretrained`, as `dtype`.

    Raises:
        UpcyclingError: as `fusion_upcycle.live.loading.load_folder`.
        ProofError: a tensor that is not the files'.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    config = config_of(folder, auto_class)
    plan = _fsdp_plan(built(config))
    # Which every model inside would take for its own.
    config.base_model_fsdp_plan = {}  # type: ignore[misc]
    distributed = DistributedConfig(
        fsdp_size=layout.processes,
        fsdp_plan=plan,
        ep_size=layout.expert_parallel,
        fsdp_mixed_precision=mixed,
    )
    with _placed(layout):
        model: PreTrainedModel = load_folder(
            model_class(class_name(config)),
            folder,
            config=config,
            distributed_config=distributed,
            **kwargs,
        )
    if layout.processes == 1:
        _shard_alone(model, distributed)
    del model.config.base_model_fsdp_plan, model.config.distributed_config
    model.config.dtype = config.dtype  # of the files, as where a model is loaded whole
    return Part(model, check_part(model, folder))


def config_of(folder: Path, auto_class: Any = None) -> "PreTrainedConfig":
    """The config of the model in a folder; of CLIP its vision tower's, which alone is trained."""
    config = read_config(folder)
    wanted = getattr(auto_class, "config_class", None)
    if config.model_type == "clip" and auto_class is None:
        wanted = model_class("CLIPVisionModel").config_class
    part = getattr(config, getattr(wanted, "base_config_key", "") or "", None)
    if wanted is not None and isinstance(part, wanted):
        part.architectures = ["CLIPVisionModel" if auto_class is None else auto_class.__name__]
        return part
    return config


def _fsdp_plan(model: "PreTrainedModel") -> dict[str, str]:
    """What is gathered at a time: transformers' default where it fits, and every layer."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    kinds = {replace_layer_number_by_wildcard(name): m for name, m in model.named_modules()}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    usual = type(model.config).base_model_fsdp_plan or {}
    found = {f"{prefix}{rule}": style for rule, style in usual.items()}
    layers = {*(model._no_split_modules or ())}
    return {rule: style for rule, style in found.items() if rule in kinds} | {
        name: "free_full_weight" for name, m in kinds.items() if type(m).__name__ in layers
    }


@contextmanager
def _placed(layout: Layout) -> Iterator[None]:
    """Within the block transformers shards experts on the layout's axis, and no selection bias.

    It has no option for that: what it calls is handed more arguments.
    """
    from transformers.distributed import fsdp, mixin

    apply = fsdp.apply_fully_sharded_data_parallelism

    def applied(model: Any, mesh: Any, fsdp_plan: dict[str, str], ep_plan: dict[str, str]) -> Any:
        # Tied weights are one parameter to FSDP2 only within one group, here the model's own; in
        # two, as transformers has them, one of their gradients is lost.
        tied = {name.rpartition(".")[0] for pair in tied_names(model).items() for name in pair}
        model.tie_weights()
        apart = {name: style for name, style in fsdp_plan.items() if name not in tied}
        with patch.object(fsdp, "fully_shard", _shard(model, layout.axis)):
            return apply(model, mesh, apart, ep_plan)

    with patch.object(mixin, "apply_fully_sharded_data_parallelism", applied):
        yield


def _shard(model: "PreTrainedModel", axis: int) -> Any:
    """`fully_shard`, told where experts are cut."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    architecture = known_family(model.config.get_text_config())
    # By module: convolutions have three axes, too.
    experts = {id(parameter) for parameter in packed_experts(model, architecture)}
    return partial(
        fully_shard,
        shard_placement_fn=lambda p: Shard(axis) if axis and id(p) in experts else None,
        ignored_params=selection_bias_parameters(model, architecture),
    )


def _shard_alone(model: "PreTrainedModel", distributed: Any) -> None:
    """Of one process, which transformers does not shard: that it computes as many do."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.fsdp import _get_fsdp_policy_kwargs

    policy = _get_fsdp_policy_kwargs(distributed)
    mesh = init_device_mesh(next(model.parameters()).device.type, (1,), mesh_dim_names=("fsdp",))
    shard = _shard(model, 0)
    layers = model._no_split_modules or ()
    for module in [m for m in model.modules() if type(m).__name__ in layers]:
        shard(module, mesh=mesh, **policy)
    shard(model, mesh=mesh, **policy)
