"""A source seen otherwise: under other names, or with matrices turned."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource, TensorSpec


class RenamedSource:
    """`source` under other names.

    Args:
        names: name here -> name in `source`; what is not there is not seen.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        self._source, self._names = source, names
        self.has_data = getattr(source, "has_data", True)
        self.specs = {name: source.specs[own] for name, own in names.items()}

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(self._names[name])

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return self._source.chunks(self._names[name], start, stop)

    def release(self, names: Iterable[str]) -> None:
        self._source.release(self._names[name] for name in names)


#: Ending of the name of a turned matrix.
TURNED = ".turned"


class TurnedSource:
    """`source` with some matrices transposed, under their name and `TURNED`.

    The matrix itself can still be read by its own name: the model that the file belongs to has it
    as it is.

    Args:
        endings: of the names of these matrices.
    """

    def __init__(self, source: TensorSource, endings: Collection[str]):
        self._source = source
        self.has_data = getattr(source, "has_data", True)
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in source.specs.items():
            if name.endswith(tuple(endings)):
                self.specs[name + TURNED] = TensorSpec(spec.dtype, spec.shape[::-1])
            else:
                self.specs[name] = spec

    def tensor(self, name: str) -> Tensor:
        whole = self._source.tensor(name.removesuffix(TURNED))
        return whole.t().contiguous() if name.endswith(TURNED) else whole

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        if not name.endswith(TURNED):
            return self._source.chunks(name, start, stop)
        return iter(self.tensor(name).view(-1)[start:stop].split(CHUNK_ELEMENTS))

    def release(self, names: Iterable[str]) -> None:
        self._source.release(name.removesuffix(TURNED) for name in names)
