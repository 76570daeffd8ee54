"""The proof of an expansion: the model within it that the source was, and the distance.

Details of the proof, beside the common fields:

- `reason`: why it is not exact.
- `lost`: what to do, where the source's function is lost (`verification.proof.LOST_SHARE`).
- `restricted`: distance of the source from the result with one expert for each of the source's.
- `own_dtype`: distance of both models in memory, in their own dtype.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import without_braces
from fusion_upcycle.experts import part_shape
from fusion_upcycle.verification.function import (
    Inputs,
    Models,
    Sample,
    compare_live,
    distance,
    output_of,
)
from fusion_upcycle.verification.proof import (
    Findings,
    distance_in_words,
    has_lost_function,
    lost_in_words,
    require_exact,
    require_finite,
)
from fusion_upcycle.verification.streamed_model import streamed_model

if TYPE_CHECKING:
    from fusion_upcycle.expansion.expansion import Expansion


def prove_expansion(
    expansion: "Expansion",
    result: TensorSource,
    *,
    mode: str,
    sample: Sample,
    models: Models,
    progress: bool = False,
) -> Findings:
    """Find the source within the result, and measure how far the whole is from it.

    A result in which each source expert is represented by one of its experts alone must be the
    source: by the last copy where copies compute the same as their source, else by the original.
    What the router makes of all copies with top-k fixed is another function: it is reported how
    far it is from the source, and why. `logits` compares both models in memory too.

    Raises:
        ProofError: the source is not within the result, or an expansion by no expert is not the
            source.
    """
    exact = expansion.claims_exact
    reference, is_logits = _outputs(expansion, expansion.source, sample.inputs, whole=False)
    restricted = None
    if not expansion.is_identity:
        within, _ = _outputs(expansion, SourceWithin(expansion, result), sample.inputs, whole=False)
        require_exact(restricted := distance(reference, within, logits=is_logits), None)
    outputs, _ = _outputs(expansion, result, sample.inputs, whole=True)
    found = distance(reference, outputs, logits=is_logits)
    if exact:
        require_exact(found, None)
    require_finite(found)
    own = None
    if mode == "logits":
        own = compare_live(models.source(), models.result(), sample.inputs)
    why = None if exact else reason(expansion)
    verdict = (
        "exact, proven"
        if exact
        else f"approximate ({why}; with one expert for each of the source's, equal)"
    )
    lost = None
    if not exact and has_lost_function(found):
        lost = lost_in_words(expansion.options.gentler)
        verdict += f" {lost}"
    function = found.to_json() | {"relative": _relative(reference, outputs)}
    return Findings(
        f"{verdict}{'; ' if lost else ': '}{', '.join(distance_in_words(function))}",
        True if exact else None,
        function,
        {
            "reason": why,
            "lost": None if lost is None else without_braces(lost),
            "restricted": None if restricted is None else restricted.to_json(),
            "own_dtype": None if own is None else own.to_json(),
        },
    )


def reason(expansion: "Expansion") -> str:
    """Why the result does not compute the source's function, in words."""
    before, after = expansion.experts_per_token
    if before != after:
        return f"top-k is {after}, and was {before}"
    if expansion.is_identity:
        return "the router is another one"
    if expansion.router_rows is not None:
        router = "the router keeps the source's choice of experts and their weights only nearly"
    else:
        router = "copies of an expert have nearly its router row, so that top-k picks them together"
    if expansion.options.copies_compute_the_same:
        return router
    return f"{router}, and new experts differ from those that they are copies of"


class SourceWithin:
    """The result with one expert for each source expert, as a `TensorSource` in its files' layout.

    It is the last copy where copies compute the same as their source, else the original. The router
    is that of the originals; the source's own where router rows were given.
    """

    def __init__(self, expansion: "Expansion", result: TensorSource):
        self.specs = expansion.source.specs
        self._result = result
        self._source = expansion.source
        self._own: set[str] = set()
        #: name in the source -> name in the result, [first element there, last], in order.
        self._pieces: dict[str, list[tuple[str, int, int]]] = {}
        for layer, origins in expansion.plan.source_experts.items():
            chosen = range(expansion.num_experts)
            places: Mapping[int, int] = dict(zip(chosen, chosen, strict=True))
            if expansion.options.copies_compute_the_same:
                places = {origin: expert for expert, origin in enumerate(origins)}
            self._take_experts(expansion, layer, places)
            for name in (expansion.router_name(layer), expansion.bias_name(layer)):
                if name is not None and expansion.router_rows is not None:
                    self._own.add(name)
                elif name is not None:
                    self._pieces[name] = [(name, 0, self.specs[name].numel)]

    def _take_experts(self, expansion: "Expansion", layer: int, places: Mapping[int, int]) -> None:
        prefix = expansion.architecture.layer_prefix(expansion.config, layer)
        found: dict[str, dict[int, tuple[str, int, int]]] = {}
        for origin, expert in places.items():
            for part in expansion.architecture.parts:
                elements = math.prod(part_shape(part, *expansion.expert_shape))
                old = expansion.architecture.place(origin, part, elements)
                new = expansion.architecture.place(expert, part, elements)
                piece = prefix + new.name, new.start, new.stop
                found.setdefault(prefix + old.name, {})[old.start] = piece
        for name, pieces in found.items():
            self._pieces[name] = [piece for _, piece in sorted(pieces.items())]

    def tensor(self, name: str) -> Tensor:
        if name in self._own:
            return self._source.tensor(name)
        if name not in self._pieces:
            return self._result.tensor(name)
        return torch.cat(list(self.chunks(name))).view(self.specs[name].shape)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        end = self.specs[name].numel if stop is None else stop
        if name in self._own:
            yield from self._source.chunks(name, start, end)
            return
        at = 0
        for there, first, last in self._pieces.get(name, [(name, 0, self.specs[name].numel)]):
            begin, until = max(start - at, 0), min(end - at, last - first)
            if begin < until:
                yield from self._result.chunks(there, first + begin, first + until)
            at += last - first

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._own:
                self._source.release([name])
            else:
                pieces: Sequence[Any] = self._pieces.get(name, [(name, 0, 0)])
                self._result.release([there for there, _, _ in pieces])


@torch.inference_mode()
def _outputs(
    expansion: "Expansion", weights: TensorSource, inputs: Inputs, *, whole: bool
) -> tuple[Tensor, bool]:
    """Outputs in float32 or better of the result (`whole`) or the source, one expert in memory."""
    compute = torch.promote_types(expansion.dtype, torch.float32)
    config = expansion.config if whole else expansion.source_config
    origin = expansion.origin if whole else None
    model = streamed_model(config, weights, expansion.architecture, None, compute, origin=origin)
    return output_of(model, inputs)


def _relative(reference: Tensor, found: Tensor) -> float:
    """||found - reference|| / ||reference||, in float64."""
    exact = reference.double()
    return ((found.double() - exact).norm() / exact.norm()).item()
