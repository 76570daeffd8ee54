"""The proof of a merge: its tensors, each model's experts by themselves, how far the whole is."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.merging.plan import Merging
from fusion_upcycle.verification.function import (
    Tokens,
    compare_streamed,
    distance,
    evaluating,
    output_of,
    streamed_dense,
    streamed_moe,
)
from fusion_upcycle.verification.names import check_names, check_shared_fields
from fusion_upcycle.verification.proof import Proof, require_exact
from fusion_upcycle.verification.tensors import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prove_merging(
    merging: Merging,
    result: TensorSource,
    *,
    mode: str,
    tokens: Tokens,
    moe: Callable[[], "PreTrainedModel"],
    progress: bool = False,
) -> Proof:
    """Prove a merge: every tensor; the experts of each model; and how far the whole is from each.

    With the experts of one model alone, the MoE must be the dense model that has this model's FFNs
    and the merged rest. What the router makes of several models is nobody's function: it is
    reported how far it is from each of them.

    Args:
        result: the tensors that were made, from the written folder or the live model.
        mode: `layers`, `logits` (`moe` gives the outputs) or `none`.
        tokens: to run the models on.
        moe: gives the merged model in memory.

    Raises:
        ProofError: a tensor differs, or a model's experts are not its FFNs.
    """
    if mode == "none":
        return Proof("none", "approximate")
    upcycling = merging.upcycling
    started = time.perf_counter()
    check_names(upcycling)
    tensors = check_tensors(upcycling, result, progress=progress)
    kept = upcycling.options.preserves_function
    twin = result if kept or not upcycling.resolved.exact else upcycling.with_copied_experts()
    experts = {}
    for model in merging.experts:
        found, layers = compare_streamed(
            upcycling,
            twin,
            tokens.ids,
            reference=merging.as_dense(model),
            expert=merging.first_expert(model),
            dense_ffn=not upcycling.resolved.exact,
            progress=progress,
        )
        require_exact(found, layers)
        experts[model] = found.to_json()
    check_shared_fields(upcycling, upcycling.architecture.remapped_fields)
    return Proof(
        mode=mode,
        claim="approximate",
        tokens=tokens.words,
        tensors=tensors,
        experts=experts,
        sources=_distances(merging, result, tokens, moe if mode == "logits" else None),
        wall_seconds=round(time.perf_counter() - started, 3),
    )


@torch.inference_mode()
def _distances(
    merging: Merging,
    result: TensorSource,
    tokens: Tokens,
    moe: Callable[[], "PreTrainedModel"] | None,
) -> dict[str, dict[str, float]]:
    """How far the MoE's outputs are from those of each source model."""
    upcycling = merging.upcycling
    if moe is None:
        outputs, is_logits = output_of(streamed_moe(upcycling, result), tokens.ids)
    else:
        with evaluating(model := moe()):
            outputs, is_logits = output_of(model, tokens.ids)
    return {
        name: distance(
            output_of(streamed_dense(upcycling, model.source), tokens.ids)[0],
            outputs.cpu(),
            logits=is_logits,
        ).to_json()
        for name, model in merging.models.items()
    }
