"""The proof of a merge: each model's experts by themselves, and how far the whole is.

Details of the proof, beside the common fields:

- `experts`: for each source model: its experts in a MoE that chooses nothing else, against the
  dense model with its FFNs and the merged rest.
- `sources`: distance of the MoE's outputs from those of each source model.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.merging.agreement import vocabulary_of
from fusion_upcycle.upcycling.proof import compare_streamed, streamed_dense, streamed_moe
from fusion_upcycle.verification.function import Models, Sample, distance, output_of
from fusion_upcycle.verification.proof import Findings, require_exact

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from fusion_upcycle.merging.merging import Merging


def prove_merging(
    merging: "Merging",
    result: TensorSource,
    *,
    mode: str,
    sample: Sample,
    models: Models,
    progress: bool = False,
) -> Findings:
    """Prove the experts of each model; and measure how far the whole is from each.

    With the experts of one model alone, the MoE must be the dense model that has this model's FFNs
    and the merged rest. What the router makes of several models is nobody's function: it is
    reported how far it is from each of them.

    Raises:
        ProofError: a model's experts are not its FFNs.
    """
    kept = merging.options.preserves_function
    twin = result if kept or not merging.resolved.exact else merging.with_copied_experts()
    experts = {}
    for model in merging.experts:
        found, layers = compare_streamed(
            merging,
            twin,
            sample.inputs,
            reference=merging.as_dense(model),
            expert=merging.first_expert(model),
            dense_ffn=not merging.resolved.exact,
            progress=progress,
        )
        require_exact(found, layers)
        experts[model] = found.to_json()
    before = {
        name: (model.config, partial(streamed_dense, merging, model.source, model.config))
        for name, model in merging.models.items()
    }
    sources = distances(merging, result, before, sample, models if mode == "logits" else None)
    return Findings(
        "each expert is its model's FFN, proven; distance from the source models: "
        + distances_in_words(sources),
        details={"experts": experts, "sources": sources},
    )


@torch.inference_mode()
def distances(
    merging: "Merging",
    result: TensorSource,
    before: "Mapping[str, tuple[PreTrainedConfig, Callable[[], PreTrainedModel]]]",
    sample: Sample,
    models: Models | None,
) -> dict[str, dict[str, float]]:
    """How far the MoE's outputs are from those of other models, on ids that all of them have.

    Args:
        before: name of a model -> its config, and what makes it; one at a time is in memory.
        models: the MoE as it is loaded; None streams it in float32.
    """
    common = min(vocabulary_of(config) for config, _ in before.values())  # 0 for images
    inputs = {
        name: ids if ids.is_floating_point() else ids.clamp(max=common - 1)
        for name, ids in sample.inputs.items()
    }
    if models is None:
        outputs, is_logits = output_of(streamed_moe(merging, result), inputs)
    else:
        with evaluating(moe := models.result(), experts="eager"):
            outputs, is_logits = output_of(moe, inputs)
    rows = slice(common) if is_logits and common else slice(None)
    return {
        name: distance(
            output_of(make(), inputs)[0][..., rows], outputs[..., rows].cpu(), logits=is_logits
        ).to_json()
        for name, (_, make) in before.items()
    }


def distances_in_words(found: Mapping[str, Mapping[str, float]]) -> str:
    """`distances` for the screen."""
    return ", ".join(
        f"{name} {away['kl_nats']:.2g} nats KL"
        if "kl_nats" in away
        else f"{name} {away['max_abs']:.2g} of output up to {away['scale']:.3g}"
        for name, away in found.items()
    )
