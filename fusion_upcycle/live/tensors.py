"""A live MoE model seen through the names of its checkpoint files: to read, and to fill."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

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
