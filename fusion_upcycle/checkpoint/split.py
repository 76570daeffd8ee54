"""A source whose fused tensors are seen split: q, k and v of one matrix, gate and up of another."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec
from fusion_upcycle.errors import UpcyclingError


class SplitSource:
    """`source` with some tensors cut along their first axis.

    Parts appear in `specs` in place of the fused tensor, which can still be read by its own name:
    the model that the file belongs to has it whole.

    Args:
        source: with the fused tensors.
        splits: ending of a fused tensor's name -> (ending of a part's name, its rows), in order.

    Raises:
        UpcyclingError: a fused tensor has another number of rows than its parts together.
    """

    def __init__(self, source: TensorSource, splits: Mapping[str, Sequence[tuple[str, int]]]):
        self._source = source
        self.has_data = getattr(source, "has_data", True)
        self.specs: dict[str, TensorSpec] = {}
        #: name of a part -> fused name, first element, last element
        self._ranges: dict[str, tuple[str, int, int]] = {}
        for name, spec in source.specs.items():
            ending = next((ending for ending in splits if name.endswith(ending)), None)
            if ending is None:
                self.specs[name] = spec
                continue
            rows = sum(rows for _, rows in splits[ending])
            if not spec.shape or spec.shape[0] != rows:
                raise UpcyclingError(
                    f"Source tensor {name} has shape {list(spec.shape)}, but its config.json calls "
                    f"for {rows} rows: the config belongs to another model."
                )
            width = spec.numel // rows
            start = 0
            for part, rows in splits[ending]:
                split = name.removesuffix(ending) + part
                self.specs[split] = TensorSpec(spec.dtype, (rows, *spec.shape[1:]))
                self._ranges[split] = name, start, start + rows * width
                start += rows * width

    def tensor(self, name: str) -> Tensor:
        fused, start, stop = self._place(name)
        whole = self._source.tensor(fused)
        return whole.reshape(-1)[start:stop].view(self.specs[name].shape) if stop else whole

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        fused, first, last = self._place(name)
        end = (last or None) if stop is None else first + stop
        return self._source.chunks(fused, first + start, end)

    def release(self, names: Iterable[str]) -> None:
        self._source.release(self._place(name)[0] for name in names)

    def _place(self, name: str) -> tuple[str, int, int]:
        return self._ranges.get(name, (name, 0, 0))
