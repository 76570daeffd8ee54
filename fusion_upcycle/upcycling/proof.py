"""The proof of a sparse upcycling: each FFN against its MoE block, and the function of the whole.

Details of the proof, beside the common fields:

- `rounded`: True where half precision rounds scales that are no powers of two: exactness is proven
  before that, in float32.
- `layers`: each FFN against its MoE block, in float32. In expert choice on the tokens that an
  expert takes, with `unchosen`, the share of the others in each layer, and `smallest_capacity`, the
  least C at which there would be none on this sample.
- `lost`: what to do, where the source's function is lost (`verification.proof.LOST_SHARE`).
- `own_dtype`: distance of the outputs computed in the dtype of half-precision weights, with its
  rounding.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import ProofError, without_braces
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.upcycling.taken import Taken, watch
from fusion_upcycle.verification.function import (
    Distance,
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
from fusion_upcycle.verification.streamed_model import holding, streamed_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from fusion_upcycle.upcycling.upcycling import Upcycling

#: Largest difference of an exact conversion in half precision arithmetic, whose rounding is 1-3 %.
LOADED_TOLERANCE = 0.3


def prove_upcycling(
    upcycling: "Upcycling",
    result: TensorSource,
    *,
    mode: str,
    sample: Sample,
    models: Models,
    progress: bool = False,
) -> Findings:
    """Compare the dense model with the MoE: exactly where that is claimed, else how far it is.

    Raises:
        ProofError: the claim of exactness is false, or outputs are not finite.
    """
    own, layers, precise = None, None, False
    if mode == "logits":
        dense, moe = models.source(), models.result()
        own = compare_live(dense, moe, sample.inputs)
        precise = min(dense.dtype.itemsize, moe.dtype.itemsize) >= 4
    if own is not None and precise:
        judged = own
    else:
        # Exactness is judged in float32 or better, whatever the dtype of the weights.
        judged, layers = compare_streamed(upcycling, result, sample.inputs, progress=progress)
    require_finite(judged)
    exact, rounded = upcycling.claims_exact, upcycling.rounds_scales
    if exact and not rounded:
        require_exact(judged, layers)
    else:
        if upcycling.options.routing == "expert_choice" and layers is None:  # who is left out
            _, layers = compare_streamed(upcycling, result, sample.inputs, progress=progress)
        # In expert choice tokens that no expert takes may differ, too: here all take all.
        full = upcycling.with_full_capacity()
        # Only the experts may differ: the same conversion with plain copies must be exact, or,
        # where no copies could be (shards that make no whole), with the dense FFNs themselves.
        # And in float32, where half precision rounds what it scales.
        twin = full.with_copied_experts() if full.resolved.exact else None
        if twin is not None and rounded:
            twin = twin.unrounded()
        require_exact(
            *compare_streamed(
                twin or upcycling,
                twin or result,
                sample.inputs,
                dense_ffn=twin is None,
                progress=progress,
            )
        )
    if own is not None and exact:
        _require_close(own)
    verdict = "exact, proven" if exact else "approximate"
    if layers is not None and "unchosen" in layers:
        verdict += f" ({_taken_in_words(layers)})"
    lost = None
    if not exact and has_lost_function(judged):
        lost = lost_in_words(upcycling.options.gentler)
        verdict += f": {lost}"
    if exact and rounded:
        verdict = "exact but for the rounding of scaled weights, proven in float32"
    function = judged.to_json()
    return Findings(
        f"{verdict}{'; ' if lost else ': '}{', '.join(distance_in_words(function))}",
        True if exact else None,
        function,
        {
            "rounded": True if exact and rounded else None,
            "layers": layers,
            "lost": None if lost is None else without_braces(lost),
            "own_dtype": None if own is None or own is judged else own.to_json(),
        },
    )


@torch.inference_mode()
def compare_streamed(
    upcycling: "Upcycling",
    result: TensorSource,
    inputs: Inputs,
    *,
    reference: TensorSource | None = None,
    expert: int | None = None,
    dense_ffn: bool = False,
    progress: bool = False,
) -> tuple[Distance, dict[str, Any]]:
    """Both models on the same tokens, one layer and one expert in memory, in float32.

    Args:
        result: has been compared with `upcycling`, tensor by tensor.
        reference: the dense model; None is the one that the MoE was made from.
        expert: let this expert of each layer stand in for those that the router chooses.
        dense_ffn: let the dense FFNs stand in for the MoE blocks: what is left to differ is
            everything else.

    Returns:
        The distance of the outputs, and that of each FFN against its MoE block on the hidden
        states that reach it.
    """
    dense = streamed_dense(upcycling, reference or upcycling.source)
    moe = streamed_moe(upcycling, result, expert)
    family = upcycling.architecture
    moe_block = family.experts_module.rpartition(".")[0]
    layers: list[Distance] = []
    taken: dict[int, Taken] = {}
    indices = list(range(family.num_layers(upcycling.source_config)))
    pairs = list(zip(family.ffn_layers(dense), family.ffn_layers(moe), strict=True))
    if family.dense[upcycling.source_config.model_type].kept_whole:
        indices = list(upcycling.resolved.moe_layers)
        pairs = [pairs[layer] for layer in indices]
    with progress_bar("Running both models", 2 * len(pairs), progress, unit="layer") as bar:
        for index, (dense_layer, moe_layer) in zip(indices, pairs, strict=True):
            ffn = family.dense_ffn(dense_layer)

            block = moe_layer.get_submodule(moe_block)
            seen = watch(block)

            def measure(
                _: nn.Module,
                args: Any,
                output: Tensor,
                index: int = index,
                layer: nn.Module = dense_layer,
                ffn: nn.Module = ffn,
                seen: list[Taken] = seen,
            ) -> None:
                with holding(dense, layer):
                    expected = ffn(args[0])
                if seen:  # what no expert takes gets nothing
                    taken[index] = seen.pop()
                    expected = expected.flatten(0, -2)[taken[index].tokens_N]
                    output = output.flatten(0, -2)[taken[index].tokens_N]
                layers.append(distance(expected, output, logits=False))

            block.register_forward_hook(measure)
            if dense_ffn:
                block.forward = ffn.forward
            for layer in (dense_layer, moe_layer):
                layer.register_forward_hook(lambda *_: bar.update(1) and None)
        outputs, is_logits = output_of(moe, inputs)
        expected, _ = output_of(dense, inputs)
    assert len(layers) == len(pairs)
    worst = max(range(len(layers)), key=lambda i: _relative(layers[i]))
    return distance(expected, outputs, logits=is_logits), {
        "compared": len(layers),
        "worst_layer": indices[worst],
        "worst_layer_max_abs": layers[worst].max_abs,
        "worst_layer_scale": layers[worst].scale,
        "within_tolerance": all(layer.within_tolerance for layer in layers),
    } | _left_out(taken)


def _taken_in_words(layers: Mapping[str, Any]) -> str:
    share, enough = max(layers["unchosen"].values()), layers["smallest_capacity"]
    if share == 0:
        return f"every token of the sample is taken, as it is from capacity_factor={enough:g} on"
    return (
        f"in a layer up to {share:.1%} of the tokens are taken by no expert; by "
        f"capacity_factor={enough:g} all of the sample would be"
    )


def _left_out(taken: Mapping[int, Taken]) -> dict[str, Any]:
    """What expert choice leaves out, layer by layer; nothing for other routings."""
    if not taken:
        return {}
    return {
        "unchosen": {str(layer): found.unchosen for layer, found in taken.items()},
        "smallest_capacity": max(found.smallest_capacity for found in taken.values()),
    }


def streamed_dense(
    upcycling: "Upcycling", source: TensorSource, config: "PreTrainedConfig | None" = None
) -> "PreTrainedModel":
    """The dense model with the weights of `source`, as the result's dtype rounds them.

    Args:
        config: of the source, where that is not the one that the MoE was made from.
    """
    return streamed_model(
        config or upcycling.source_config, source, None, upcycling.dtype, _compute_dtype(upcycling)
    )


def streamed_moe(
    upcycling: "Upcycling", result: TensorSource, expert: int | None = None
) -> "PreTrainedModel":
    """The MoE with the weights of `result`, which has been compared with `upcycling`.

    Of the experts only `expert`, if it is given.
    """
    architecture, compute = upcycling.architecture, _compute_dtype(upcycling)
    return streamed_model(
        upcycling.config,
        result,
        architecture,
        None,
        compute,
        expert=expert,
        origin=upcycling.origin,
    )


def _compute_dtype(upcycling: "Upcycling") -> torch.dtype:
    """Rounding of half precision would hide what a proof looks for."""
    return torch.promote_types(upcycling.dtype, torch.float32)


def _relative(layer: Distance) -> float:
    """For finding the worst layer; NaN counts as worst."""
    ratio = layer.max_abs / max(layer.scale, 1e-30)
    return ratio if ratio == ratio else float("inf")


def _require_close(own: Distance) -> None:
    """Refuse models that differ once transformers loads them."""
    if own.max_abs > LOADED_TOLERANCE * own.scale:
        raise ProofError(
            "The conversion is exact by its weights, but as transformers loads them the two models "
            f"differ by {own.max_abs:.2g} of outputs up to {own.scale:.3g}, more than rounding. "
            "Please report this with the source's config.json."
        )
