"""One pass of a live model over texts: where its routers send tokens, and what they see.

Shapes: B windows, T tokens of a window, N tokens counted, E experts, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_upcycle.analysis.routing import RoutingCounts
from fusion_upcycle.analysis.token_classes import TokenClasses
from fusion_upcycle.analysis.windows import UNITS, Batch, DomainWindows, domain_windows
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import max_positions, num_embeddings
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.live.routers import Routers, find_routers, hearing_inputs
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.texts.tokens import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens of one window, less where the model has fewer positions.
WINDOW_TOKENS = 512
#: Windows of one forward pass.
BATCH_WINDOWS = 8


@dataclass(frozen=True)
class Collected:
    """What one pass found.

    Attributes:
        counts: where tokens went.
        windows: the texts, as they were cut.
        inputs: MoE layer -> what its router saw, [n, D], of a sample of the tokens.
    """

    counts: RoutingCounts
    windows: DomainWindows
    inputs: dict[int, Tensor]


@torch.inference_mode()
def collect(
    model: "PreTrainedModel",
    routers: Routers,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Mapping[str, Sequence[str]],
    *,
    tokens: int,
    sample: int,
    progress: bool = False,
) -> Collected:
    """Run the model over the texts, without gradient, in the memory of one batch.

    Args:
        model: MoE on its own device, causal LM or backbone; module modes are restored.
        routers: of the model, by `moe_routers`.
        tokenizer: of the model.
        texts: domain -> documents.
        tokens: of each domain at most.
        sample: tokens, evenly spaced over all, whose router inputs are kept.

    Raises:
        UpcyclingError: texts without tokens, a tokenizer of another model, or weights that are not
            finite.
    """
    length = min(max_positions(model) or WINDOW_TOKENS, WINDOW_TOKENS)
    windows = domain_windows(tokenizer, texts, tokens=tokens, length=length)
    check_vocabulary(windows.largest, num_embeddings(model))
    total = sum(windows.tokens(domain) for domain in windows.windows)
    wanted = torch.linspace(0, total - 1, min(sample, total)).round().long().unique()
    counts = RoutingCounts.empty(
        list(routers.modules),
        list(windows.windows),
        num_experts=routers.num_experts,
        experts_per_token=routers.experts_per_token,
        units=UNITS,
    )
    classes = TokenClasses(tokenizer)
    kept: dict[int, list[Tensor]] = {layer: [] for layer in routers.modules}
    seen = 0
    with evaluating(model), progress_bar("Analysing", total, progress, unit="token") as bar:
        for batch in windows.batches(BATCH_WINDOWS):
            counted = batch.counted_BT.flatten()
            number = int(counted.sum())
            inside = wanted[(wanted >= seen) & (wanted < seen + number)] - seen
            _run(model, routers, batch, counted, classes, counts, kept, inside)
            seen += number
            bar.update(number)
    _check_finite(counts)
    return Collected(counts, windows, {layer: torch.cat(rows) for layer, rows in kept.items()})


def moe_routers(model: "PreTrainedModel") -> Routers:
    """The routers of an MoE model.

    Raises:
        UpcyclingError: a dense model, or a family that is not known.
    """
    routers = find_routers(model)
    if not routers:
        raise UpcyclingError(
            f"This {model.config.get_text_config().model_type} model is dense: it has no experts "
            "to analyse. Give a Mixture-of-Experts model, such as one made by `upcycle`."
        )
    return routers


def _run(
    model: "PreTrainedModel",
    routers: Routers,
    batch: Batch,
    counted: Tensor,
    classes: TokenClasses,
    counts: RoutingCounts,
    kept: dict[int, list[Tensor]],
    inside: Tensor,
) -> None:
    """One batch; `inside` are the places, among its counted tokens, whose inputs are kept."""
    rows = counted.nonzero().flatten()

    def keep(layer: int, hidden_ND: Tensor) -> None:
        kept[layer].append(hidden_ND[rows[inside].to(hidden_ND.device)].cpu())

    with hearing_inputs(routers.modules, keep), routers.listening() as routed:
        # Without the head: nothing here needs logits over the vocabulary.
        model.base_model(input_ids=batch.ids_BT.to(model.device), use_cache=False)
    counts.add(
        batch.domain,
        [
            (routers.probabilities(logits).cpu()[rows], chosen.cpu()[rows])
            for logits, chosen in zip(routed.logits, routed.chosen, strict=True)
        ],
        classes(batch.ids_BT.flatten()[rows]),
        batch.units_BT.flatten()[rows],
    )


def _check_finite(counts: RoutingCounts) -> None:
    finite_L = counts.entropy_LD.isfinite().all(1)
    if broken := [i for i, fine in zip(counts.layers, finite_L, strict=True) if not fine]:
        raise UpcyclingError(
            f"Router probabilities of layer(s) {broken} are not finite numbers: the weights are "
            "uninitialised, or overflow in a short dtype. Load the model in float32, or look at "
            "how it was saved."
        )
