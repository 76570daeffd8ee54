"""Several models of one shape as one source: the FFNs of each, and the mean of all the rest."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec, cast
from fusion_upcycle.errors import UpcyclingError


def own_name(model: str, name: str) -> str:
    """How a `MergeSource` calls the tensor `name` that `model` keeps to itself."""
    return f"{model}::{name}"


class MergeSource:
    """Models of one shape: some tensors kept per model, all others one for all.

    A shared tensor is the mean over `shared`, each cast to the result's dtype (as a model that is
    loaded in it would be), computed piece by piece in float64 and rounded once.

    Args:
        sources: model -> its tensors.
        kept: names of those that each model keeps to itself (`own_name`).
        experts: the models that keep theirs.
        shared: the models whose mean the others are; a single one gives its own bits.
        dtypes: name of a shared tensor -> its dtype in the result, where that is not `dtype`.
        dtype: of the result.

    Raises:
        UpcyclingError: a tensor that one model has and another has not, or in another shape.
    """

    def __init__(
        self,
        sources: Mapping[str, TensorSource],
        *,
        kept: Collection[str],
        experts: Sequence[str],
        shared: Sequence[str],
        dtypes: Mapping[str, torch.dtype],
        dtype: torch.dtype,
    ):
        _check_same_tensors(sources)
        self._sources, self._shared = sources, shared
        self.has_data = all(getattr(source, "has_data", True) for source in sources.values())
        self._kept = frozenset(kept)
        #: name of a kept tensor here -> (model, its name there)
        self._owners: dict[str, tuple[str, str]] = {}
        self.specs: dict[str, TensorSpec] = {}
        first = next(iter(sources.values()))
        for name in first.specs:
            if self.keeps(name):
                for model in experts:
                    self._owners[own_name(model, name)] = model, name
                    self.specs[own_name(model, name)] = sources[model].specs[name]
                continue
            only = sources[shared[0]].specs[name]
            self.specs[name] = (
                only if len(shared) == 1 else TensorSpec(dtypes.get(name, dtype), only.shape)
            )

    def keeps(self, name: str) -> bool:
        """Whether each model has its own of this tensor."""
        return name in self._kept

    @property
    def averaged(self) -> frozenset[str]:
        """Names of the tensors that are means."""
        if len(self._shared) == 1:
            return frozenset()
        return frozenset(self.specs.keys() - self._owners.keys())

    def tensor(self, name: str) -> Tensor:
        if name in self._owners or len(self._shared) == 1:
            source, original = self._place(name)
            return source.tensor(original)
        spec = self.specs[name]
        whole, filled = torch.empty(spec.numel, dtype=spec.dtype), 0
        for chunk in self.chunks(name):
            whole[filled : filled + chunk.numel()] = chunk
            filled += chunk.numel()
        return whole.view(spec.shape)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        if name in self._owners or len(self._shared) == 1:
            source, original = self._place(name)
            yield from source.chunks(original, start, stop)
            return
        dtype = self.specs[name].dtype
        sources = [self._sources[model].chunks(name, start, stop) for model in self._shared]
        for pieces in zip(*sources, strict=True):
            total = torch.zeros(pieces[0].shape, dtype=torch.float64)
            for model, piece in zip(self._shared, pieces, strict=True):
                total += cast(piece, own_name(model, name), dtype)
            yield (total / len(pieces)).to(dtype)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._owners:
                model, original = self._owners[name]
                self._sources[model].release([original])
            else:
                for model in self._shared:
                    self._sources[model].release([name])

    def as_dense(self, model: str) -> "DenseView":
        """One dense model: what is shared, with the kept tensors of `model`."""
        return DenseView(self, model)

    def _place(self, name: str) -> tuple[TensorSource, str]:
        model, original = self._owners.get(name, (self._shared[0], name))
        return self._sources[model], original


class DenseView:
    """A `MergeSource` seen as one dense model, under that model's own names."""

    def __init__(self, merged: MergeSource, model: str):
        self._merged, self._model = merged, model
        mine, others = own_name(model, ""), "::"
        self.specs = {
            name.removeprefix(mine): spec
            for name, spec in merged.specs.items()
            if name.startswith(mine) or others not in name
        }

    def tensor(self, name: str) -> Tensor:
        return self._merged.tensor(self._name(name))

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return self._merged.chunks(self._name(name), start, stop)

    def release(self, names: Iterable[str]) -> None:
        self._merged.release(map(self._name, names))

    def _name(self, name: str) -> str:
        return own_name(self._model, name) if self._merged.keeps(name) else name


def _check_same_tensors(sources: Mapping[str, TensorSource]) -> None:
    (first, reference), *others = sources.items()
    for model, source in others:
        for name in sorted(reference.specs.keys() ^ source.specs.keys()):
            having, lacking = (model, first) if name in source.specs else (first, model)
            raise UpcyclingError(
                f"Model {having} has a tensor {name}, model {lacking} has not. Models can be "
                "merged only if they have the same tensors."
            )
        for name, spec in source.specs.items():
            if spec.shape != reference.specs[name].shape:
                raise UpcyclingError(
                    f"Tensor {name} of model {model} has shape {list(spec.shape)}, that of model "
                    f"{first} {list(reference.specs[name].shape)}. Models can be merged only if "
                    "they have the same shapes."
                )
