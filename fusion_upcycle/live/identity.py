"""Which model is it? The same answer for a checkpoint folder and for the model it was loaded to."""

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.layout import file_layout, own_class_name
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.tensors import LiveTensors, first_elements, whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ELEMENTS = 64  # of each tensor: enough to tell models apart, and quick to read


def model_identity(source: TensorSource, config: "PreTrainedConfig") -> dict[str, Any]:
    """The identity of an MoE model: `sha256`, top-k, and what a reader recognises it by.

    The digest is of names and shapes of all tensors and of the first 64 elements of each, rounded
    to bfloat16: a folder in float32 is the same model as what was loaded of it in bfloat16.

    Args:
        source: tensors in the file layout.
        config: with the model's class in `architectures`.

    Raises:
        UpcyclingError: a family that is not known, or a tensor that the source lacks.
    """
    text = config.get_text_config()
    architecture = moe_family(text)
    expected = file_layout(config).specs
    for name in sorted(expected):
        if name not in source.specs:
            raise UpcyclingError(
                f"The model has no tensor {name}, which its config.json calls for. Save it again "
                "with transformers."
            )
    first = {
        name: torch.cat([*source.chunks(name, 0, min(_ELEMENTS, spec.numel))])
        for name, spec in expected.items()
    }
    shapes = {name: source.specs[name].shape for name in expected}
    return {
        "sha256": _digest(text.model_type, shapes, first),
        "model_type": text.model_type,
        "num_layers": text.num_hidden_layers,
        "num_experts": getattr(text, architecture.experts_field),
        "experts_per_token": text.num_experts_per_tok,
        "hidden_size": text.hidden_size,
        "parameters": sum(spec.numel for spec in expected.values()),
    }


def state_sha256(model: "PreTrainedModel", setting: str) -> str:
    """The same digest of a live model of any kind, by its own names of tensors.

    Of one that is sharded, called by every process; nothing is gathered but these elements.

    Args:
        setting: what must be the same beside the weights.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _digest(setting, shapes, first_elements(tensors, _ELEMENTS))


def _digest(
    setting: str, shapes: Mapping[str, tuple[int, ...]], first: Mapping[str, Tensor]
) -> str:
    digest = hashlib.sha256(setting.encode())
    for name in sorted(shapes):
        values = whole(first[name]).to(torch.bfloat16).float()
        digest.update(f"{name} {list(shapes[name])} {values.tolist()}".encode())
    return digest.hexdigest()


def folder_identity(folder: Path) -> dict[str, Any]:
    """`model_identity` of a checkpoint folder."""
    return model_identity(CheckpointReader(folder), read_config(folder))


def live_identity(model: "PreTrainedModel") -> dict[str, Any]:
    """`model_identity` of a live model; of one sharded by FSDP2, called by every process."""
    config = copy.deepcopy(model.config)
    config.architectures = [own_class_name(model)]
    architecture = moe_family(config.get_text_config())
    source = LiveTensors(model, architecture, file_layout(config).specs)
    return model_identity(source, config)


def describe(identity: Mapping[str, Any]) -> str:
    """An identity in words, for errors."""
    chosen = identity.get("experts_per_token")  # older files do not say it
    top = "" if chosen is None else f", top-{chosen}"
    return (
        f"a {identity['model_type']} of {identity['num_layers']} layers, "
        f"{identity['num_experts']} experts{top} and {identity['parameters']:,} parameters "
        f"(sha256 {identity['sha256'][:12]})"
    )
