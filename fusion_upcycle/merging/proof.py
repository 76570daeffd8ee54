"""The proof of a merge: each model's experts by themselves, and how far the whole is.

Details of the proof, beside the common fields:

- `experts`: for each source model: its experts in a MoE that chooses nothing else, against the
  dense model with its FFNs and the merged rest.
- `sources`: distance of the MoE's outputs from those of each source model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.merging.agreement import vocabulary_of
from fusion_upcycle.upcycling.proof import compare_streamed, streamed_dense, streamed_moe
from fusion_upcycle.verification.function import Inputs, Models, Sample, distance, output_of
from fusion_upcycle.verification.proof import Findings, require_exact

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
    sources = _distances(merging, result, sample, models if mode == "logits" else None)
    far = [
        f"{name} {found['kl_nats']:.2g} nats KL"
        if "kl_nats" in found
        else f"{name} {found['max_abs']:.2g} of output up to {found['scale']:.3g}"
        for name, found in sources.items()
    ]
    return Findings(
        "each expert is its model's FFN, proven; distance from the source models: "
        + ", ".join(far),
        details={"experts": experts, "sources": sources},
    )


@torch.inference_mode()
def _distances(
    merging: "Merging", result: TensorSource, sample: Sample, models: Models | None
) -> dict[str, dict[str, float]]:
    """How far the MoE's outputs are from those of each source model."""
    names = list(merging.models)
    inputs, common = inputs_of_all([merging.models[name].config for name in names], sample.inputs)
    outputs, is_logits = outputs_of(merging, result, inputs, models)
    rows = slice(common) if is_logits and common else slice(None)
    found = {}
    for name in names:
        model = merging.models[name]
        dense = streamed_dense(merging, model.source, model.config)
        reference = output_of(dense, inputs)[0]
        found[name] = distance(
            reference[..., rows], outputs[..., rows].cpu(), logits=is_logits
        ).to_json()
    return found


def inputs_of_all(
    configs: "Sequence[PreTrainedConfig]", inputs: Inputs
) -> tuple[dict[str, torch.Tensor], int]:
    """Inputs with ids that all models have, and the number of these; 0 for images."""
    common = min(vocabulary_of(config) for config in configs)
    return {
        name: ids if ids.is_floating_point() else ids.clamp(max=common - 1)
        for name, ids in inputs.items()
    }, common


def outputs_of(
    merging: "Merging", result: TensorSource, inputs: Inputs, models: Models | None
) -> tuple[torch.Tensor, bool]:
    """Outputs of the MoE, and whether they are logits: streamed in float32, or as it is loaded."""
    if models is None:
        return output_of(streamed_moe(merging, result), inputs)
    with evaluating(moe := models.result(), experts="eager"):
        return output_of(moe, inputs)
