"""One pass of a live model over texts or images: where its routers send tokens, what they see.

Shapes: N tokens counted, E experts, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.analysis.passes import Material, Pass, material
from fusion_upcycle.analysis.routing import RoutingCounts
from fusion_upcycle.analysis.windows import UNITS
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.live.routers import Routers, find_routers, hearing_inputs
from fusion_upcycle.report.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Collected:
    """What one pass found.

    Attributes:
        counts: where tokens went.
        material: the texts as they were cut, or the images.
        inputs: MoE layer -> what its router saw, [n, D], of a sample of the tokens.
    """

    counts: RoutingCounts
    material: Material
    inputs: dict[int, Tensor]


@torch.inference_mode()
def collect(
    model: "PreTrainedModel",
    routers: Routers,
    processor: Any,
    data: Mapping[str, Sequence[Any]],
    *,
    tokens: int,
    sample: int,
    progress: bool = False,
) -> Collected:
    """Run the model over texts or images, without gradient, in the memory of one batch.

    Args:
        model: MoE on its own device, with a head or without; module modes are restored.
        routers: of the model, by `moe_routers`.
        processor: tokenizer or image processor of the model.
        data: domain -> documents, or images.
        tokens: of each domain at most.
        sample: tokens, evenly spaced over all that a layer sees, whose router inputs are kept.

    Raises:
        UpcyclingError: data that cannot be used, a tokenizer of another model, or weights that are
            not finite.
    """
    found = material(model, processor, data, tokens=tokens)
    counts = RoutingCounts.empty(
        routers.layers, list(found.domains), num_experts=routers.num_experts, units=UNITS
    )
    run = _Run(model, routers, counts, found, sample)
    total = sum(found.counted.values())
    with evaluating(model), progress_bar("Analysing", total, progress, unit="token") as bar:
        for step in found.passes():
            bar.update(run.take(step))
    _check_finite(counts)
    return Collected(counts, found, {layer: torch.cat(rows) for layer, rows in run.kept.items()})


def moe_routers(model: "PreTrainedModel") -> Routers:
    """The routers of an MoE model, or the tables that stand in for them.

    Raises:
        UpcyclingError: a dense model, or a family that is not known.
    """
    routers = find_routers(model)
    if not routers.layers:
        raise UpcyclingError(
            f"This {model.config.get_text_config().model_type} model is dense: it has no experts "
            "to analyse. Give a Mixture-of-Experts model, such as one made by `upcycle`."
        )
    return routers


class _Run:
    """Pass by pass, what is counted and kept.

    Attributes:
        kept: MoE layer -> router inputs of the sample.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        routers: Routers,
        counts: RoutingCounts,
        found: Material,
        sample: int,
    ):
        self.kept: dict[int, list[Tensor]] = {layer: [] for layer in routers.layers}
        self._model, self._routers, self._counts = model, routers, counts
        self._stacks = {
            routers.layers[place]: name
            for name, places in routers.stacks.items()
            for place in places
        }
        self._wanted = {
            stack: torch.linspace(0, number - 1, min(sample, number)).round().long().unique()
            for stack, number in found.counted.items()
        }
        self._seen = dict.fromkeys(found.counted, 0)

    def take(self, step: Pass) -> int:
        """Run the model; returns how many tokens were counted."""
        routers = self._routers
        rows, inside = {}, {}
        for stack, tokens in step.stacks.items():
            rows[stack] = tokens.counted_N.nonzero().flatten()
            places = self._wanted[stack] - self._seen[stack]
            inside[stack] = rows[stack][places[(places >= 0) & (places < len(rows[stack]))]]
            self._seen[stack] += len(rows[stack])

        def keep(layer: int, hidden_ND: Tensor) -> None:
            chosen = inside[self._stacks[layer]].to(hidden_ND.device)
            self.kept[layer].append(hidden_ND[chosen].cpu())

        given = {
            name: value.to(self._model.device) if isinstance(value, Tensor) else value
            for name, value in step.arguments.items()
        }
        with hearing_inputs(routers.modules | routers.tables, keep), routers.listening() as routed:
            # Without the head: nothing here needs logits over the vocabulary.
            self._model.base_model(**given)
        for stack, tokens in step.stacks.items():
            if tokens.classes_N is not None:
                self._counts.add_classes(step.domain, tokens.classes_N[rows[stack]])
        heard = zip(self._routers.layers, routed.logits, routers.sent(routed), strict=True)
        for place, (layer, logits_NE, sent_NE) in enumerate(heard):
            tokens, chosen = step.stacks[self._stacks[layer]], rows[self._stacks[layer]]
            self._counts.add(
                step.domain,
                place,
                routers.probabilities(logits_NE).cpu()[chosen],
                sent_NE.cpu()[chosen],
                None if tokens.classes_N is None else tokens.classes_N[chosen],
                tokens.units_N[chosen],
            )
        return sum(map(len, rows.values()))


def _check_finite(counts: RoutingCounts) -> None:
    finite_L = counts.entropy_LD.isfinite().all(1)
    if broken := [i for i, fine in zip(counts.layers, finite_L, strict=True) if not fine]:
        raise UpcyclingError(
            f"Router probabilities of layer(s) {broken} are not finite numbers: the weights are "
            "uninitialised, or overflow in a short dtype. Load the model in float32, or look at "
            "how it was saved."
        )
