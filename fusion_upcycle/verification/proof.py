"""Proofs of a conversion: what was checked, what came out, and whether the claim holds."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import ProofError, unknown
from fusion_upcycle.upcycling import Upcycling
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


@dataclass(frozen=True)
class Proof:
    """What the final check of a conversion found.

    Attributes:
        mode: `layers`, `logits` or `none`.
        claim: `exact` (the dense function at step 0, up to rounding) or `approximate`.
        holds: True where exactness was claimed, checked and found (a false claim is an error);
            None for approximate or unchecked.
        tokens: what the models were run on.
        tensors: numbers of tensors found bit-equal, by kind; all of them, or the proof fails.
        layers: each FFN against its MoE block, in float32.
        function: distance of both models' outputs, computed in float32 (or float64).
        own_dtype: the same computed in the dtype of half-precision weights, with its rounding.
        wall_seconds: of the proof.
    """

    mode: str
    claim: str
    holds: bool | None = None
    tokens: str | None = None
    tensors: dict[str, int] | None = None
    layers: dict[str, Any] | None = None
    function: dict[str, float] | None = None
    own_dtype: dict[str, float] | None = None
    wall_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if self.mode == "none":
            return "not verified (verify=none): unproven"
        found = self.function
        assert found is not None and self.tensors is not None
        verdict = "exact, proven" if self.holds else "approximate"
        parts = [f"largest difference {found['max_abs']:.2g} of output up to {found['scale']:.3g}"]
        if "kl_nats" in found:
            parts.append(f"KL {found['kl_nats']:.2g} nats")
            parts.append(f"arg-max agreement {found['argmax_agreement']:.1%}")
        parts.append(f"{sum(self.tensors.values())} tensors bit-equal")
        return f"{verdict}: {', '.join(parts)}; {self.tokens}"


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
    own = compare_live(*models(), tokens.ids) if mode == "logits" else None
    layers = None
    if own is None or upcycling.dtype.itemsize < 4:
        # Exactness is judged in float32 or better, whatever the dtype of the weights.
        judged, layers = compare_streamed(upcycling, result, tokens.ids, progress=progress)
    else:
        judged = own
    if upcycling.claims_exact:
        _require_exact(judged, layers)
    else:
        # Only the experts may differ: the same conversion with plain copies must be exact, or,
        # where no copies could be (shards that make no whole), with the dense FFNs themselves.
        twin = upcycling.with_copied_experts() if upcycling.resolved.exact else None
        _require_exact(
            *compare_streamed(
                twin or upcycling,
                twin or result,
                tokens.ids,
                dense_ffn=twin is None,
                progress=progress,
            )
        )
    check_shared_fields(upcycling)
    return Proof(
        mode=mode,
        claim=claim,
        holds=True if upcycling.claims_exact else None,
        tokens=tokens.words,
        tensors=tensors,
        layers=layers,
        function=judged.to_json(),
        own_dtype=None if own is None or own is judged else own.to_json(),
        wall_seconds=round(time.perf_counter() - started, 3),
    )


def _require_exact(judged: Distance, layers: dict[str, Any] | None) -> None:
    if judged.within_tolerance and (layers is None or layers["within_tolerance"]):
        return
    raise ProofError(
        "The conversion claims to be exact and is not: NOT exact by "
        f"{judged.max_abs:.2g} of outputs up to {judged.scale:.3g} (tolerance {TOLERANCE:g} of "
        f"that; layers: {layers}). Nothing was left at the output. Please report this with the "
        "source's config.json; verify=none writes the folder unproven."
    )
