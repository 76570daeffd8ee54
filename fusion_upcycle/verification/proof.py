"""Proofs of a conversion: what was checked, what came out, and whether the claim holds."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import ProofError, unknown
from fusion_upcycle.upcycling import Upcycling
from fusion_upcycle.verification.function import (
    TOLERANCE,
    Distance,
    compare_live,
    compare_streamed,
    token_ids,
)
from fusion_upcycle.verification.tensors import check_tensors

if TYPE_CHECKING:
    from torch import Tensor
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
        holds: whether the claim was checked and is true; None for approximate or unchecked.
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
        verdict = {True: "exact, proven", None: "approximate", False: "NOT exact"}[self.holds]
        parts = [f"largest difference {found['max_abs']:.2g} of output up to {found['scale']:.3g}"]
        if "kl_nats" in found:
            parts.append(f"KL {found['kl_nats']:.2g} nats")
            parts.append(f"arg-max agreement {found['argmax_agreement']:.1%}")
        parts.append(f"{sum(self.tensors.values())} tensors bit-equal")
        return f"{verdict}: {', '.join(parts)}; {self.tokens}"


def resolve_mode(mode: str, *, streaming: bool, total_bytes: int) -> str:
    """`auto` is `logits` for a model in memory or below 2 GiB, `layers` for a larger folder."""
    if mode not in get_args(VerifyMode):
        raise unknown("verify mode", mode, get_args(VerifyMode))
    if mode != "auto":
        return mode
    return "layers" if streaming and total_bytes >= LOGITS_BELOW_BYTES else "logits"


def prove(
    upcycling: Upcycling,
    result: TensorSource,
    *,
    mode: str,
    tokenizer_file: Path | None,
    models: Callable[[], tuple["PreTrainedModel", "PreTrainedModel"]],
    progress: bool = False,
) -> Proof:
    """Prove a conversion: every tensor of the result, then the function it computes.

    Args:
        result: the tensors that were made, from the written folder or the live model.
        mode: `layers`, `logits` or `none`.
        tokenizer_file: `tokenizer.json` of the source, if there is one.
        models: gives the dense and the upcycled model in memory, for `mode="logits"`.
        progress: show progress bars.

    Raises:
        ProofError: a tensor differs, or the claim of exactness is false.
    """
    claim = "exact" if upcycling.claims_exact else "approximate"
    if mode == "none":
        return Proof("none", claim)
    started = time.perf_counter()
    tensors = check_tensors(upcycling, result, progress=progress)
    config = upcycling.config
    ids, words = token_ids(tokenizer_file, config.vocab_size, config.max_position_embeddings)
    own = compare_live(*models(), ids) if mode == "logits" else None
    holds, judged, layers = _judge(upcycling, result, own, ids, progress)
    proof = Proof(
        mode=mode,
        claim=claim,
        holds=holds,
        tokens=words,
        tensors=tensors,
        layers=layers,
        function=judged.to_json(),
        own_dtype=None if own is None or own is judged else own.to_json(),
        wall_seconds=round(time.perf_counter() - started, 3),
    )
    if holds is False:
        raise ProofError(
            f"The conversion claims to be exact and is not ({proof}; tolerance {TOLERANCE:g} of "
            f"the largest output; layers: {layers}). Nothing was left at the output. Please "
            "report this with the source's config.json; verify=none writes the folder unproven."
        )
    return proof


def _judge(
    upcycling: Upcycling,
    result: TensorSource,
    own: Distance | None,
    ids: "Tensor",
    progress: bool,
) -> tuple[bool | None, Distance, dict[str, Any] | None]:
    """Whether the claim holds; judged in float32 or better, whatever the dtype of the weights."""
    layers = None
    if own is None or upcycling.dtype.itemsize < 4:
        judged, layers = compare_streamed(upcycling, result, ids, progress=progress)
    else:
        judged = own
    if not upcycling.claims_exact:
        return None, judged, layers
    return judged.within_tolerance and (not layers or layers["within_tolerance"]), judged, layers
