"""Importance of every expert, by all metrics, in one pass over calibration text.

What a model is to predict of a text goes by its kind: `fusion_upcycle.texts.reading`.

Gradients are reduced to numbers and freed as they appear, so that the peak is the model and one
layer's gradients. Design and formulas: Expert Upcycling, arXiv 2604.19835.

Shapes: W sequences, T tokens of one, V vocabulary, E experts, F intermediate, D hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_upcycle.architectures.layout import own_class_name
from fusion_upcycle.architectures.moe_config import require_token_choice
from fusion_upcycle.errors import UpcyclingError, plain_logger, setting
from fusion_upcycle.importance.accumulators import ExpertSums
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.experts import expert_parameters
from fusion_upcycle.live.identity import live_identity
from fusion_upcycle.live.inputs import max_positions, num_embeddings
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.live.routers import Routers, expert_counts, find_routers
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.texts.reading import is_masked_lm, mask_token, window_loss
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.texts.windows import Sequences, calibration_sequences, sequence_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = plain_logger(__name__)


def measure_importance(
    model: "PreTrainedModel",
    texts: Mapping[str, Sequence[str]],
    tokenizer_file: Path,
    *,
    tokens: int = 65_536,
    context_length: int | None = None,
    progress: bool = False,
) -> Importance:
    """Score the experts of a language model; modes, gradients' flags and hooks are restored after.

    A gradient is that of the mean loss of one sequence, without a balance loss: of the next tokens
    of a causal LM, of masked tokens (BERT), or of a sequence's second half of its first (T5).

    Args:
        model: a trained MoE on its own device; or sharded by FSDP2, where every process calls this
            with the same arguments and gets the same scores.
        texts: name -> documents.
        tokenizer_file: the model's `tokenizer.json`.
        tokens: of calibration, divided evenly among the texts; a shorter text gives all it has.
        context_length: tokens of a sequence; None is 1024, or what positions the model has.
        progress: show a bar.

    Raises:
        UpcyclingError: a dense or unknown model, a backbone, a model of images, or one that cannot
            be expanded; text that is too short, or of another tokenizer; a gradient that is missing
            or not finite, by name; gradients that the model already has.
    """
    require_token_choice(model.config.get_text_config())
    routers = find_routers(model)
    try:
        if not routers:
            raise UpcyclingError(
                f"This {model.config.get_text_config().model_type} model is dense: it has no "
                "experts to score. Give a Mixture-of-Experts model."
            )
        require_text(model.main_input_name, type(model).__name__)
        if model.get_output_embeddings() is None:
            raise no_head(type(model).__name__)
        masked = is_masked_lm(own_class_name(model))
        mask = mask_token(Path(tokenizer_file)) if masked else None
        length = sequence_length(context_length, max_positions(model))
        sequences = calibration_sequences(
            texts, tokenizer_file, tokens=tokens, context_length=length
        )
        _check(model, sequences)
        sums = ExpertSums(expert_parameters(model, routers))
        counts, seen = _backwards(model, routers, sequences, sums, mask, progress)
    finally:
        routers.close()
    layers = list(routers.modules)
    load = {layer: (counts[layer] / seen[layer]).tolist() for layer in layers}
    unreached = {
        layer: [expert for expert, count in enumerate(counts[layer].tolist()) if not count]
        for layer in layers
    }
    unreached = {layer: experts for layer, experts in unreached.items() if experts}
    if unreached:
        log.warning(
            "No calibration token reached these experts, whose gradient scores are 0: %s. More or "
            "other calibration text may reach them.",
            "; ".join(f"layer {layer}: {experts}" for layer, experts in unreached.items()),
        )
    return Importance(
        sums.metrics(load),
        sequences.tokens,
        sequences.to_json(),
        live_identity(model),
        unreached,
    )


def require_text(takes: str, name: str) -> None:
    """Refuse a model that is given something else than token ids.

    Args:
        takes: its main input.
        name: of its class.

    Raises:
        UpcyclingError: it is.
    """
    if takes != "input_ids":
        raise UpcyclingError(
            f"{name} takes {takes}, and importance is that of a language model's loss on text. "
            f"Choose {setting('selection', 'uniform')}, which needs no scores."
        )


def no_head(name: str) -> UpcyclingError:
    """The error for a model that predicts no tokens."""
    return UpcyclingError(
        f"{name} does not predict tokens, and importance is that of a language model's loss: give "
        "the model with its head (ForCausalLM, ForMaskedLM, ForConditionalGeneration), or scores "
        f"measured of one, or choose {setting('selection', 'uniform')}."
    )


def _check(model: "PreTrainedModel", sequences: Sequences) -> None:
    check_vocabulary(sequences.largest, num_embeddings(model))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            raise UpcyclingError(
                f"The model has gradients already ({name}), which measuring importance would mix "
                "with its own. Call model.zero_grad() before."
            )


def _backwards(
    model: "PreTrainedModel",
    routers: Routers,
    sequences: Sequences,
    sums: ExpertSums,
    mask: int | None,
    progress: bool,
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """One backward pass for each sequence.

    Returns:
        Layer -> tokens routed to each expert [E]; and layer -> tokens that it saw.
    """
    seen = dict.fromkeys(routers.modules, 0)
    counts = {
        layer: torch.zeros(routers.num_experts, dtype=torch.int64) for layer in routers.modules
    }
    rows = [row for ids in sequences.ids.values() for row in ids]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(_only_experts_have_gradients(model, sums))
        bar = stack.enter_context(
            progress_bar("Measuring importance", len(rows), progress, unit="sequence")
        )
        for number, ids_T in enumerate(rows):
            with routers.listening() as routed:
                loss = window_loss(model, ids_T, number=number, mask_token=mask)
            loss.backward()
            for (layer, count_E), chosen in zip(counts.items(), routed.chosen, strict=True):
                count_E += expert_counts(chosen, routers.num_experts).long().cpu()
                seen[layer] += len(chosen)
                sums.require_gradients(layer, number)
            sums.next_sequence()
            bar.update()
    return counts, seen


@contextmanager
def _only_experts_have_gradients(model: nn.Module, sums: ExpertSums) -> Iterator[None]:
    """Gradients for experts alone, each reduced and freed as soon as it is there."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    experts = {id(p) for layer in sums.parameters.values() for p in layer.values()}
    handles: list[Any] = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in experts)
        handles += sums.attach()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trained in before:
            parameter.requires_grad_(trained)
            parameter.grad = None
