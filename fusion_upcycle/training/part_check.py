"""A process's part of a model against the files that it was loaded from."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.architectures import known_family
from fusion_upcycle.architectures.base import LiveSlot
from fusion_upcycle.architectures.introspection import as_renamed, file_slots
from fusion_upcycle.architectures.layout import built, file_layout
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import ProofError, setting
from fusion_upcycle.live.tensors import own_part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Rows of each tensor in a process's part that are compared.
_ROWS = 16


def slots(config: "PreTrainedConfig") -> Mapping[str, LiveSlot]:
    """Name of each tensor in the files -> where it is in the live model, tied ones once."""
    names = file_layout(config).specs
    architecture = known_family(config.get_text_config())
    if architecture is None:
        return {name: slot for name, slot in file_slots(config).items() if name in names}
    state = built(config).state_dict()
    inside = architecture.packed_names[0]
    rows = next(tensor.shape[1] for name, tensor in state.items() if name.endswith(inside))
    return {name: architecture.live_slot(name, rows // 2) for name in names}


def check_part(model: "PreTrainedModel", folder: Path) -> dict[str, torch.dtype]:
    """Compare this process's part with the files: rows of every tensor, bit for bit.

    Returns:
        live name -> dtype of the tensor in the files; of selection biases float32, as they are
        loaded whatever the files have.

    Raises:
        ProofError: a tensor that is not the files', or that the files do not have.
    """
    config = copy.deepcopy(model.config)
    files: TensorSource = CheckpointReader(folder)
    state, places = model.state_dict(), slots(config)
    if not places.keys() <= files.specs.keys():
        files = as_renamed(files, config)
    family, dtypes = known_family(config.get_text_config()), {}
    bias = None if family is None else family.live_bias_name
    for name, (live, index) in places.items():
        if name not in files.specs:
            raise ProofError(
                f"{folder} has no tensor {name}, by which the loaded {live} could be checked. Save "
                "the model again with transformers (save_pretrained)."
            )
        moved = bias is not None and live.endswith(bias)
        dtypes[live] = torch.float32 if moved else files.specs[name].dtype
        found, place = _own_part(state[live], index)
        if not found.numel():
            continue
        expected = files.tensor(name)[place].to(found.dtype)
        if not torch.equal(_some_rows(found).cpu(), _some_rows(expected)):
            raise ProofError(
                f"{live} was not loaded as {folder} has it ({name}). transformers shards this "
                f"{config.model_type} model wrongly; train it with {setting('strategy', 'ddp')}."
            )
        files.release([name])
    return dtypes


def _own_part(tensor: Any, index: tuple[Any, ...]) -> tuple[Tensor, tuple[slice, ...]]:
    """What this process has of `tensor[index]`, and where that is in `tensor[index]`."""
    local, starts = own_part(tensor)
    inner: list[Any] = []
    place: list[slice] = []
    for axis, size in enumerate(tensor.shape):
        wanted = index[axis] if axis < len(index) else slice(0, size)
        first, last = (
            (wanted, wanted + 1) if isinstance(wanted, int) else (wanted.start, wanted.stop)
        )
        begin = max(first, starts[axis])
        end = max(begin, min(last, starts[axis] + local.shape[axis]))
        own = slice(begin - starts[axis], end - starts[axis])
        if not isinstance(wanted, int):
            inner.append(own)
            place.append(slice(begin - first, end - first))
        elif begin == end:
            return local.new_empty(0), ()
        else:
            inner.append(own.start)
    return local[tuple(inner)], tuple(place)


def _some_rows(tensor: Tensor) -> Tensor:
    """Up to `_ROWS` rows, from the first to the last."""
    if tensor.ndim < 2:
        return tensor
    rows = tensor.flatten(0, -2)
    chosen = torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long().unique()
    return rows[chosen.to(rows.device)]
