"""Proofs of a conversion: what was checked, what came out, and whether the claim holds."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import ProofError, unknown
from fusion_upcycle.upcycling.upcycling import Upcycling
from fusion_upcycle.verification.function import (
    TOLERANCE,
    Distance,
    Tokens,
    compare_live,
    compare_streamed,
)
from fusion_upcycle.verification.names import check_names, check_shared_fields
from fusion_upcycle.verification.tensors import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VerifyMode = Literal["auto", "layers", "logits", "none"]

#: Below this size of the result, `auto` loads both models and compares their logits.
LOGITS_BELOW_BYTES = 2 * 2**30

#: Largest difference of an exact conversion in half precision arithmetic, whose rounding is 1-3 %.
LOADED_TOLERANCE = 0.3


@dataclass(frozen=True)
class Proof:
    """What the final check of a conversion found.

    Attributes:
        mode: `layers`, `logits` or `none`.
        claim: `exact` (the dense function at step 0, up to rounding) or `approximate`.
        holds: True where exactness was claimed, checked and found (a false claim is an error);
            None for approximate or unchecked.
        rounded: True where half precision rounds scales that are no powers of two: exactness is
            proven before that, in float32.
        tokens: what the models were run on.
        tensors: numbers of tensors found bit-equal, by kind; all of them, or the proof fails.
        layers: each FFN against its MoE block, in float32.
        function: distance of both models' outputs, computed in float32 (or float64).
        own_dtype: the same computed in the dtype of half-precision weights, with its rounding.
        experts: of a merge, for each source model: its experts in a MoE that chooses nothing else,
            against the dense model with its FFNs and the merged rest.
        sources: of a merge, distance of the MoE's outputs from those of each source model.
        reason: of an expansion, why it is not exact.
        restricted: of an expansion, distance of the source from the result with one expert for each
            of the source's.
        wall_seconds: of the proof.
    """

    mode: str
    claim: str
    holds: bool | None = None
    rounded: bool | None = None
    tokens: str | None = None
    tensors: dict[str, int] | None = None
    layers: dict[str, Any] | None = None
    function: dict[str, float] | None = None
    own_dtype: dict[str, float] | None = None
    experts: dict[str, dict[str, float]] | None = None
    sources: dict[str, dict[str, float]] | None = None
    reason: str | None = None
    restricted: dict[str, float] | None = None
    wall_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if self.mode == "none":
            return "not verified (verify=none): unproven"
        assert self.tensors is not None
        if self.sources is not None:
            return self._merge_in_words()
        found = self.function
        assert found is not None
        verdict = "exact, proven" if self.holds else "approximate"
        if self.reason is not None:
            verdict = (
                f"approximate ({self.reason}; with one expert for each of the source's, equal)"
            )
        if self.rounded:
            verdict = "exact but for the rounding of scaled weights, proven in float32"
        parts = [f"largest difference {found['max_abs']:.2g} of output up to {found['scale']:.3g}"]
        if "relative" in found:
            parts.append(f"relative {found['relative']:.2g}")
        if "kl_nats" in found:
            parts.append(f"KL {found['kl_nats']:.2g} nats")
            parts.append(f"arg-max agreement {found['argmax_agreement']:.1%}")
        parts.append(f"{sum(self.tensors.values())} tensors bit-equal")
        return f"{verdict}: {', '.join(parts)}; {self.tokens}"

    def _merge_in_words(self) -> str:
        assert self.tensors is not None and self.sources is not None
        far = [
            f"{name} {found['kl_nats']:.2g} nats KL"
            if "kl_nats" in found
            else f"{name} {found['max_abs']:.2g} of output up to {found['scale']:.3g}"
            for name, found in self.sources.items()
        ]
        return (
            "each expert is its model's FFN, proven; distance from the source models: "
            f"{', '.join(far)}; {sum(self.tensors.values())} tensors bit-equal; {self.tokens}"
        )


def resolve_mode(mode: str, *, streaming: bool, total_bytes: int) -> str:
    """`auto` is `logits` for a model in memory or below 2 GiB, `layers` for a larger folder."""
    if mode not in get_args(VerifyMode):
        raise unknown("verify mode", str(mode), get_args(VerifyMode))
    if mode != "auto":
        return mode
    return "layers" if streaming and total_bytes >= LOGITS_BELOW_BYTES else "logits"


def prove(
    upcycling: Upcycling,
    result: TensorSource,
    *,
    mode: str,
    tokens: Tokens,
    models: Callable[[], tuple["PreTrainedModel", "PreTrainedModel"]],
    progress: bool = False,
) -> Proof:
    """Prove a conversion: every tensor of the result, then the function it computes.

    Args:
        result: the tensors that were made, from the written folder or the live model.
        mode: `layers`, `logits` or `none`.
        tokens: to run both models on.
        models: gives the dense and the upcycled model in memory, for `mode="logits"`.
        progress: show progress bars.

    Raises:
        ProofError: a tensor differs, or the claim of exactness is false.
    """
    claim = "exact" if upcycling.claims_exact else "approximate"
    if mode == "none":
        return Proof("none", claim)
    started = time.perf_counter()
    check_names(upcycling)
    tensors = check_tensors(upcycling, result, progress=progress)
    own, layers, precise = None, None, False
    if mode == "logits":
        dense, moe = models()
        own = compare_live(dense, moe, tokens.ids)
        precise = min(dense.dtype.itemsize, moe.dtype.itemsize) >= 4
    if own is not None and precise:
        judged = own
    else:
        # Exactness is judged in float32 or better, whatever the dtype of the weights.
        judged, layers = compare_streamed(upcycling, result, tokens.ids, progress=progress)
    require_finite(judged)
    if upcycling.claims_exact and not upcycling.rounds_scales:
        require_exact(judged, layers)
    else:
        # Only the experts may differ: the same conversion with plain copies must be exact, or,
        # where no copies could be (shards that make no whole), with the dense FFNs themselves.
        # And in float32, where half precision rounds what it scales.
        twin = upcycling.with_copied_experts() if upcycling.resolved.exact else None
        if twin is not None and upcycling.rounds_scales:
            twin = twin.unrounded()
        require_exact(
            *compare_streamed(
                twin or upcycling,
                twin or result,
                tokens.ids,
                dense_ffn=twin is None,
                progress=progress,
            )
        )
    if own is not None and upcycling.claims_exact:
        _require_close(own)
    check_shared_fields(upcycling, upcycling.architecture.remapped_fields)
    return Proof(
        mode=mode,
        claim=claim,
        holds=True if upcycling.claims_exact else None,
        rounded=True if upcycling.claims_exact and upcycling.rounds_scales else None,
        tokens=tokens.words,
        tensors=tensors,
        layers=layers,
        function=judged.to_json(),
        own_dtype=None if own is None or own is judged else own.to_json(),
        wall_seconds=round(time.perf_counter() - started, 3),
    )


def require_finite(judged: Distance) -> None:
    if not math.isfinite(judged.max_abs):
        raise ProofError(
            "The outputs of the result, or of its source, are not finite: a weight is, or became, "
            "infinite or NaN. Choose another expert_init or dtype=float32, or look at the source."
        )


def _require_close(own: Distance) -> None:
    """Refuse models that differ once transformers loads them."""
    if own.max_abs > LOADED_TOLERANCE * own.scale:
        raise ProofError(
            "The conversion is exact by its weights, but as transformers loads them the two models "
            f"differ by {own.max_abs:.2g} of outputs up to {own.scale:.3g}, more than rounding. "
            "Please report this with the source's config.json."
        )


def require_exact(judged: Distance, layers: dict[str, Any] | None) -> None:
    if judged.within_tolerance and (layers is None or layers["within_tolerance"]):
        return
    raise ProofError(
        "The conversion claims to be exact and is not: NOT exact by "
        f"{judged.max_abs:.2g} of outputs up to {judged.scale:.3g} (tolerance {TOLERANCE:g} of "
        f"that; layers: {layers}). Nothing was left at the output. Please report this with the "
        "source's config.json; verify=none writes the folder unproven."
    )
