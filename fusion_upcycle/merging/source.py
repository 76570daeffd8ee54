"""Several models of one shape as one source: the FFNs of each, and the mean of all the rest."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec, cast
from fusion_upcycle.errors import UpcyclingError


def own_name(model: str, name: str) -> str:
    """How a `MergeSource` calls the tensor `name` that `model` keeps to itself."""
    return f"{model}::{name}"


@dataclass(frozen=True)
class _Stretch:
    """Elements `start` to `stop` of a shared tensor: the mean over these models."""

    start: int
    stop: int
    models: Sequence[str]


class MergeSource:
    """Models of one shape: some tensors kept per model, all others one for all.

    A shared tensor is the mean over `shared`, each cast to the result's dtype (as a model that is
    loaded in it would be), computed piece by piece in float64 and rounded once.

    Embeddings and output heads, one row for each token id, may have other numbers of rows: what is
    beyond those of `main` is cut. A row that only some of `shared` have is the mean over these; one
    that none of them has, over all models that have it.

    Args:
        sources: model -> its tensors.
        main: the model whose shapes the shared tensors have.
        vocabularies: model -> rows of its embeddings; none for models without.
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
        main: str,
        vocabularies: Mapping[str, int],
        kept: Collection[str],
        experts: Sequence[str],
        shared: Sequence[str],
        dtypes: Mapping[str, torch.dtype],
        dtype: torch.dtype,
    ):
        _check_same_tensors(sources, main, vocabularies)
        self._sources, self._kept = sources, frozenset(kept)
        self.has_data = all(getattr(source, "has_data", True) for source in sources.values())
        #: name of a kept tensor here -> (model, its name there)
        self._owners: dict[str, tuple[str, str]] = {}
        self._stretches: dict[str, Sequence[_Stretch]] = {}
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in sources[main].specs.items():
            if self.keeps(name):
                for model in experts:
                    self._owners[own_name(model, name)] = model, name
                    self.specs[own_name(model, name)] = sources[model].specs[name]
                continue
            stretches = _stretches(spec, {m: s.specs[name] for m, s in sources.items()}, shared)
            self._stretches[name] = stretches
            first, *more = stretches
            self.specs[name] = (
                sources[first.models[0]].specs[name]
                if len(first.models) == 1 and not more
                else TensorSpec(dtypes.get(name, dtype), spec.shape)
            )

    def keeps(self, name: str) -> bool:
        """Whether each model has its own of this tensor."""
        return name in self._kept

    @property
    def averaged(self) -> frozenset[str]:
        """Names of the tensors that are means."""
        return frozenset(name for name in self._stretches if self._place(name) is None)

    def tensor(self, name: str) -> Tensor:
        if place := self._place(name):
            source, original = place
            return source.tensor(original)
        spec = self.specs[name]
        whole, filled = torch.empty(spec.numel, dtype=spec.dtype), 0
        for chunk in self.chunks(name):
            whole[filled : filled + chunk.numel()] = chunk
            filled += chunk.numel()
        return whole.view(spec.shape)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        if place := self._place(name):
            source, original = place
            yield from source.chunks(original, start, stop)
            return
        spec = self.specs[name]
        end = spec.numel if stop is None else stop
        for part in self._stretches[name]:
            first, last = max(start, part.start), min(end, part.stop)
            if first < last:
                yield from self._means(name, part.models, first, last, spec.dtype)

    def _means(
        self, name: str, models: Sequence[str], start: int, stop: int, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        sources = [self._sources[model].chunks(name, start, stop) for model in models]
        for pieces in zip(*sources, strict=True):
            total = torch.zeros(pieces[0].shape, dtype=torch.float64)
            for model, piece in zip(models, pieces, strict=True):
                total += cast(piece, own_name(model, name), dtype)
            yield (total / len(pieces)).to(dtype)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._owners:
                model, original = self._owners[name]
                self._sources[model].release([original])
            else:
                for model in {m for part in self._stretches[name] for m in part.models}:
                    self._sources[model].release([name])

    def as_dense(self, model: str) -> "DenseView":
        """One dense model: what is shared, with the kept tensors of `model`."""
        return DenseView(self, model)

    def _place(self, name: str) -> tuple[TensorSource, str] | None:
        """Where the bits of a tensor are that is no mean."""
        if name in self._owners:
            model, original = self._owners[name]
            return self._sources[model], original
        first, *more = self._stretches[name]
        return None if more or len(first.models) > 1 else (self._sources[first.models[0]], name)


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


def _stretches(
    result: TensorSpec, specs: Mapping[str, TensorSpec], shared: Sequence[str]
) -> Sequence[_Stretch]:
    """Which models each element of a shared tensor is the mean of.

    Args:
        result: main's.
        specs: model -> that of its tensor of this name.
    """
    sizes = {model: min(spec.numel, result.numel) for model, spec in specs.items()}
    cuts = sorted({*sizes.values()}) or [0]
    found: list[_Stretch] = []
    for start, stop in zip([0, *cuts], cuts, strict=False):
        if start == stop and found:
            continue
        having = [m for m in shared if sizes[m] >= stop] or [m for m in sizes if sizes[m] >= stop]
        if found and found[-1].models == having:
            found[-1] = _Stretch(found[-1].start, stop, having)
        else:
            found.append(_Stretch(start, stop, having))
    return found


def _check_same_tensors(
    sources: Mapping[str, TensorSource], main: str, vocabularies: Mapping[str, int]
) -> None:
    reference = sources[main]
    for model, source in sources.items():
        for name in sorted(reference.specs.keys() ^ source.specs.keys()):
            having, lacking = (model, main) if name in source.specs else (main, model)
            raise UpcyclingError(
                f"Model {having} has a tensor {name}, model {lacking} has not. Models can be "
                "merged only if they have the same tensors."
            )
        for name, spec in source.specs.items():
            expected = reference.specs[name].shape
            rows = [(shape[0] if shape else None) for shape in (spec.shape, expected)]
            of_vocabulary = (
                rows == [vocabularies.get(model), vocabularies.get(main)]
                and spec.shape[1:] == expected[1:]
            )
            if spec.shape != expected and not of_vocabulary:
                raise UpcyclingError(
                    f"Tensor {name} of model {model} has shape {list(spec.shape)}, that of model "
                    f"{main} {list(expected)}. Models can be merged only if they have the same "
                    "shapes."
                )
