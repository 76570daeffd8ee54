"""Sources of tensors, read one piece at a time: the contract, and the one for live models."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError, setting

#: Elements of one piece of a tensor on its way through: 8 MiB in bfloat16, enough for full disk
#: speed. Counted in elements, so that pieces of source and result correspond under a cast.
CHUNK_ELEMENTS = 4 * 2**20

#: The dtypes that can be upcycled, by their name in safetensors headers.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


#: Other dtypes, of tables and of buffers that every model computes.
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name may hold integers: what every quantised weight does, too."""
    return bool(_BUFFERS.search(name))


#: Causal masks and positions in old files, and the table of hash routing.
_BUFFERS = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|position_ids$|hash_table$"
)


class TensorSource(Protocol):
    """Named tensors that are read lazily: a checkpoint folder or a live model."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's dtype and shape, without reading any."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, to be read only."""
        ...

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The tensor, or a range of its elements, as flat pieces of at most `CHUNK_ELEMENTS`."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """Give back the memory behind these tensors, which must not be in use any more."""
        ...


class StateDictSource:
    """The tensors of a live model: `model.state_dict()`, tied tensors once.

    Raises:
        UpcyclingError: a tensor that is not loaded, or in a dtype that cannot be upcycled.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            if tensor.dtype not in DTYPES.values() and not is_buffer(name):
                raise UpcyclingError(
                    f"Tensor {name} of the model has dtype {tensor.dtype}, which cannot be "
                    f"upcycled. Load the model in one of: {', '.join(map(str, DTYPES.values()))}."
                )
            if tensor.is_meta:
                raise UpcyclingError(
                    f"Tensor {name} of the model is on the meta device (not loaded). Load the "
                    "model without device_map/offloading, or upcycle from its folder."
                )
            self._tensors[name] = tensor.detach()
        self.specs = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].cpu()

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        yield from self.tensor(name).reshape(-1)[start:stop].split(CHUNK_ELEMENTS)

    def release(self, names: Iterable[str]) -> None:
        """Nothing to give back: the model owns its memory."""


def aligned(a: Iterable[Tensor], b: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two flat tensors in pieces, cut at the same places.

    Raises:
        ValueError: they have different lengths.
    """
    left, right = (t for t in a if t.numel()), (t for t in b if t.numel())
    x, y = next(left, None), next(right, None)
    while x is not None and y is not None:
        count = min(x.numel(), y.numel())
        yield x[:count], y[:count]
        x = x[count:] if count < x.numel() else next(left, None)
        y = y[count:] if count < y.numel() else next(right, None)
    if x is not None or y is not None:
        raise ValueError("tensors of different lengths")


def cast(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; as it is where it has that dtype.

    Raises:
        UpcyclingError: values beyond the dtype's range, naming the tensor.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if result.isinf().any() and not tensor.isinf().any():
        raise UpcyclingError(
            f"Source tensor {name} has values up to {tensor.abs().max():.3g}, beyond the "
            f"range of {dtype}. Choose {setting('dtype', 'bfloat16')} or float32."
        )
    return result
