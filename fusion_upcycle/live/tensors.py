"""A live MoE model seen through the names of its checkpoint files: to read, and to fill."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LiveTensors:
    """The parameters of a live model as a `TensorSource` in the file layout.

    Tensors are views of the parameters: writing to them fills the model.
    """

    def __init__(self, model: "PreTrainedModel", architecture: Architecture, names: Iterable[str]):
        self._architecture = architecture
        self._parameters = model.state_dict(keep_vars=True)
        packed = next(n for n in self._parameters if n.endswith(architecture.packed_names[0]))
        self._intermediate_size = self._parameters[packed].shape[1] // 2
        self.specs: dict[str, TensorSpec] = {}
        for name in names:
            tensor = self.tensor(name)
            self.specs[name] = TensorSpec(tensor.dtype, tuple(tensor.shape))

    def tensor(self, name: str) -> Tensor:
        parameter, index = self._architecture.live_slot(name, self._intermediate_size)
        whole = self._parameters[parameter].detach()
        return whole[index] if index else whole

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        yield from self.tensor(name).view(-1)[start:stop].split(CHUNK_ELEMENTS)

    def release(self, names: Iterable[str]) -> None:
        """Nothing to give back: the model owns its memory."""


class LiveTensorsOnCPU(LiveTensors):
    """A live model to be read, wherever it is; what is read is on the CPU."""

    def tensor(self, name: str) -> Tensor:
        return super().tensor(name).cpu()

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        for piece in super().tensor(name).reshape(-1)[start:stop].split(CHUNK_ELEMENTS):
            yield piece.cpu()


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is; one that FSDP2 shards, gathered, which every process must ask for."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Any) -> tuple[Tensor, tuple[int, ...]]:
    """What of a tensor is in this process, and where it begins on each axis of the whole."""
    if not hasattr(tensor, "to_local"):
        return tensor, (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), starts


def first_elements(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The first elements of each tensor, flat; nothing is gathered but these.

    Where tensors are sharded, every process must ask.
    """
    found = {name: tensor for name, tensor in tensors.items() if not hasattr(tensor, "to_local")}
    firsts = {name: tensor.flatten()[:count] for name, tensor in found.items()}
    sharded = {name: tensor for name, tensor in tensors.items() if name not in found}
    if not sharded:
        return firsts
    # Each element as the largest that any process has: where none is, that is minus infinity.
    own = {name: _own_first(tensor, count) for name, tensor in sharded.items()}
    together = torch.cat(list(own.values()))
    torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    sizes = [len(each) for each in own.values()]
    return firsts | dict(zip(own, together.split(sizes), strict=True))


def _own_first(tensor: Tensor, count: int) -> Tensor:
    local, starts = own_part(tensor)
    numbers = torch.arange(min(count, tensor.numel()))
    places = torch.stack(torch.unravel_index(numbers, tensor.shape), 1) - torch.tensor(starts)
    here = ((places >= 0) & (places < torch.tensor(local.shape))).all(1)
    found = torch.full((len(numbers),), -torch.inf, device=local.device)
    found[here.to(local.device)] = local[tuple(places[here].to(local.device).T)].float()
    return found
