"""The dense models within a merged one, each under the names that its own files have."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource, TensorSpec
from fusion_upcycle.checkpoint.view import TURNED
from fusion_upcycle.conversion.rules import Carried, Joined, Rule
from fusion_upcycle.merging.merging import Merging
from fusion_upcycle.merging.source import own_name

#: Tensor of the MoE, first element there, last.
Piece = tuple[str, int, int]


class DenseWithin:
    """The dense model of one expert of each layer, and of all that is shared.

    Args:
        moe: the merged model's tensors.
        merging: a merge that made such a model, of models that need no data.
        model: whose experts.
    """

    def __init__(self, moe: TensorSource, merging: Merging, model: str):
        self._moe = moe
        self._pieces: dict[str, list[Piece]] = {}
        self._turned: set[str] = set()
        places = _places(merging)
        splits = merging.architecture.dense[merging.source_config.model_type].splits
        fused = {} if splits is None else splits(merging.source_config)
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in merging.as_dense(model).specs.items():
            parts = _parts(name, fused)
            found = [places.get(own_name(model, p)) or places.get(p) for p in parts]
            if found == [None]:  # a matrix that lies transposed in its own files
                found = [places[own_name(model, name + TURNED)]]
                self._turned.add(name)
            self._pieces[name] = [piece for piece in found if piece is not None]
            assert len(self._pieces[name]) == len(parts), name
            self.specs[name] = TensorSpec(moe.specs[self._pieces[name][0][0]].dtype, spec.shape)

    def tensor(self, name: str) -> Tensor:
        pieces, spec = self._pieces[name], self.specs[name]
        if name in self._turned:
            flat = torch.cat(list(self._flat(pieces, 0, spec.numel)))
            return flat.view(spec.shape[::-1]).t().contiguous()
        if len(pieces) == 1:
            target, first, last = pieces[0]
            return self._moe.tensor(target).reshape(-1)[first:last].view(spec.shape)
        return torch.cat(list(self._flat(pieces, 0, spec.numel))).view(spec.shape)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        if name in self._turned:
            return iter(self.tensor(name).view(-1)[start:stop].split(CHUNK_ELEMENTS))
        end = self.specs[name].numel if stop is None else stop
        return self._flat(self._pieces[name], start, end)

    def release(self, names: Iterable[str]) -> None:
        self._moe.release(target for name in names for target, _, _ in self._pieces[name])

    def _flat(self, pieces: Sequence[Piece], start: int, end: int) -> Iterator[Tensor]:
        at = 0
        for target, first, last in pieces:
            begin, until = max(start - at, 0), min(end - at, last - first)
            if begin < until:
                yield from self._moe.chunks(target, first + begin, first + until)
            at += last - first


class WithFFNs:
    """One dense model with the FFNs of another.

    Args:
        rest: gives all else.
        ffns: gives the tensors that `kept` names.
    """

    def __init__(self, rest: TensorSource, ffns: TensorSource, kept: Iterable[str]):
        self._of = {name: ffns for name in kept}
        self._rest = rest
        self.specs = dict(rest.specs) | {name: ffns.specs[name] for name in self._of}

    def tensor(self, name: str) -> Tensor:
        return self._of.get(name, self._rest).tensor(name)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return self._of.get(name, self._rest).chunks(name, start, stop)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self._of.get(name, self._rest).release([name])


def _places(merging: Merging) -> dict[str, Piece]:
    """Tensor of the sources, as the merge's rules name it -> where the MoE has it."""
    found: dict[str, Piece] = {}

    def take(target: str, rule: Rule, first: int, last: int) -> None:
        if isinstance(rule, Joined):
            size = (last - first) // len(rule.rules)
            for index, part in enumerate(rule.rules):
                take(target, part, first + index * size, first + (index + 1) * size)
        elif isinstance(rule, Carried):
            assert rule.scale == 1.0 and rule.start == 0, (target, rule)
            found.setdefault(rule.source, (target, first, last))

    for target, rule in merging.rules.items():
        take(target, rule, 0, merging.specs[target].numel)
    return found


def _parts(name: str, fused: Mapping[str, Sequence[tuple[str, int]]]) -> list[str]:
    """The names of a tensor's parts, where a family sees it split."""
    for ending, parts in fused.items():
        if name.endswith(ending):
            return [name.removesuffix(ending) + part for part, _ in parts]
    return [name]
