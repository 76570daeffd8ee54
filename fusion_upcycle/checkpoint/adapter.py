"""A base model with a LoRA adapter on top of it, as one source of tensors."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource
from fusion_upcycle.errors import UpcyclingError


@dataclass(frozen=True)
class Pair:
    """What changes one matrix W [out, in] of the base; names are those in the adapter's file.

    Attributes:
        a: of A [r, in].
        b: of B [out, r].
        scale: W becomes W + scale * B A.
        turned: the base has W as [in, out].
        magnitude: of DoRA's m [out]: each row of the sum gets this length.
    """

    a: str
    b: str
    scale: float
    turned: bool = False
    magnitude: str | None = None


@dataclass(frozen=True)
class BiasPair:
    """What changes a bias of the base: it becomes bias + scale * b."""

    b: str
    scale: float


class AdapterSource:
    """`base` with an adapter on top of it, computed when a tensor is asked for.

    W + scale * B A is computed in float64, in blocks of rows that do not depend on what is asked
    for, and rounded once to the dtype that the base has W in (arXiv 2106.09685; with a magnitude
    arXiv 2402.09353). So the same bits come whatever is asked for, and in whatever pieces.

    Args:
        base: tensors of the base model.
        adapter: tensors of the adapter's file.
        pairs: name of a matrix or bias of the base -> what changes it.
        whole: name of a tensor of the base -> the one in the file that takes its place, in the
            base's dtype.
    """

    def __init__(
        self,
        base: TensorSource,
        adapter: TensorSource,
        pairs: Mapping[str, Pair | BiasPair],
        whole: Mapping[str, str],
    ):
        self._base, self._adapter = base, adapter
        self._pairs, self._whole = pairs, whole
        self.has_data = getattr(base, "has_data", True)
        self.specs = base.specs
        self._last: tuple[str, int, Tensor] | None = None
        self._lengths: tuple[str, Tensor] | None = None

    @property
    def trained(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return frozenset(self._pairs) | frozenset(self._whole)

    def tensor(self, name: str) -> Tensor:
        if name not in self.trained:
            return self._base.tensor(name)
        spec = self.specs[name]
        whole = torch.empty(spec.numel, dtype=spec.dtype)
        filled = 0
        for piece in self.chunks(name):
            whole[filled : filled + piece.numel()] = piece
            filled += piece.numel()
        return whole.view(spec.shape)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        if name not in self.trained:
            yield from self._base.chunks(name, start, stop)
            return
        numel = self.specs[name].numel
        end = numel if stop is None else min(stop, numel)
        size = self._rows(name) * self._columns(name)
        for at in range(start, max(start + 1, end), CHUNK_ELEMENTS):
            last = min(at + CHUNK_ELEMENTS, end)
            pieces = []
            while at < last:
                block, inside = divmod(at, size)
                pieces.append(self._block(name, block)[inside : inside + last - at])
                at += pieces[-1].numel()
            yield torch.cat(pieces) if pieces else torch.empty(0, dtype=self.specs[name].dtype)
        self._last = None

    def release(self, names: Iterable[str]) -> None:
        names = list(names)
        self._base.release(names)
        if self._last is not None and self._last[0] in names:
            self._last = None

    def _columns(self, name: str) -> int:
        """Of a tensor as a matrix; a vector is one row."""
        return max(1, *self.specs[name].shape[-1:])

    def _rows(self, name: str) -> int:
        """Of one block."""
        return max(1, CHUNK_ELEMENTS // self._columns(name))

    def _block(self, name: str, index: int) -> Tensor:
        """The block of this index, flat; the last one is kept, as pieces begin within it."""
        if self._last is None or self._last[:2] != (name, index):
            self._last = name, index, self._made(name, index)
        return self._last[2]

    def _made(self, name: str, index: int) -> Tensor:
        made = self._sum(name, index)
        pair = self._pairs.get(name)
        if isinstance(pair, Pair) and pair.magnitude is not None:
            factor_O = self._double(pair.magnitude) / self._row_lengths(name)
            rows = self._rows(name)
            if not pair.turned:
                factor_O = factor_O[index * rows : (index + 1) * rows, None]
            made = made * factor_O
        dtype = self.specs[name].dtype
        rounded = made.to(dtype)
        if not rounded.isfinite().all():
            raise UpcyclingError(
                f"{name} of the base with the adapter on it has values up to "
                f"{made.abs().max():.3g}, which {dtype}, the base's dtype of it, cannot hold. The "
                "adapter or the base is damaged; or save the base in float32 first "
                "(from_pretrained(..., dtype='float32') and save_pretrained)."
            )
        return rounded.view(-1)

    def _sum(self, name: str, index: int) -> Tensor:
        """W + scale * B A, rows of one block, in float64."""
        columns, rows = self._columns(name), self._rows(name)
        first, last = index * rows, (index + 1) * rows
        part = slice(first * columns, min(last * columns, self.specs[name].numel))
        source, own = (
            (self._adapter, self._whole[name]) if name in self._whole else (self._base, name)
        )
        pieces = source.chunks(own, part.start, part.stop)
        total = torch.cat([piece.to(self.specs[name].dtype).double() for piece in pieces])
        pair = self._pairs.get(name)
        if isinstance(pair, BiasPair):
            return total + pair.scale * self._double(pair.b)
        total = total.view(-1, columns)
        if pair is None:
            return total
        a_RI, b_OR = self._double(pair.a), self._double(pair.b)
        product = a_RI[:, first:last].T @ b_OR.T if pair.turned else b_OR[first:last] @ a_RI
        return total.add_(product.mul_(pair.scale))

    def _row_lengths(self, name: str) -> Tensor:
        """Length of each row [out] of W + scale * B A, in float64."""
        if self._lengths is None or self._lengths[0] != name:
            pair = self._pairs[name]
            assert isinstance(pair, Pair)
            blocks = range(-(-self.specs[name].shape[0] // self._rows(name)))
            sums = [
                self._sum(name, block).square().sum(0 if pair.turned else 1) for block in blocks
            ]
            found_O = torch.stack(sums).sum(0) if pair.turned else torch.cat(sums)
            self._lengths = name, found_O.sqrt()
        return self._lengths[1]

    def _double(self, name: str) -> Tensor:
        return self._adapter.tensor(name).double()
