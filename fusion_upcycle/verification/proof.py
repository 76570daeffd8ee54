"""What the final check of a conversion found, and the judgements that every operation shares."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from fusion_upcycle.errors import ProofError, setting, unknown, with_settings
from fusion_upcycle.verification.function import TOLERANCE, Distance

VerifyMode = Literal["auto", "layers", "logits", "none"]


#: From these on the function of the source is lost: more than half of what its answers say beyond
#: one answer for all inputs is gone, and not only because they hardly say anything (there 0.1
#: nats). Of SmolLM2-135M (2 experts, 128 tokens, where all of it is 2.6 nats) noise of 0.02 loses
#: 0.3 %, of 0.2 34 %, drop_ratio=0.1 44 %, and 0.5 four times all of it.
LOST_SHARE, LOST_KL = 0.5, 0.1


@dataclass(frozen=True)
class Findings:
    """What an operation's own part of a proof found of the function.

    Attributes:
        words: verdict and distances, for people.
        holds: True where exactness was claimed, checked and found.
        function: distance of both models' outputs, computed in float32 (or float64).
        details: what this operation alone looks at; each says so in its `proof.py`.
    """

    words: str
    holds: bool | None = None
    function: Mapping[str, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """What the final check of a conversion found.

    Attributes:
        mode: `layers`, `logits` or `none`.
        claim: `exact` (the source's function at step 0, up to rounding) or `approximate`.
        holds: True where exactness was claimed, checked and found (a false claim is an error);
            None for approximate or unchecked.
        tokens: what the models were run on.
        tensors: numbers of tensors found bit-equal, by kind; all of them, or the proof fails.
        function: distance of both models' outputs, computed in float32 (or float64).
        details: what the operation looks at beside that, by name.
        wall_seconds: of the proof.
        words: all of it in a sentence, with options as `{option=value}`: `str` writes them as they
            are given where the program runs.
    """

    mode: str
    claim: str
    holds: bool | None = None
    tokens: str | None = None
    tensors: Mapping[str, int] | None = None
    function: Mapping[str, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    words: str = "not verified (verify=none): unproven"

    def to_json(self) -> dict[str, Any]:
        """Plain data without what is not known; details stand beside the common fields."""
        plain = asdict(self)
        del plain["words"]
        plain |= plain.pop("details")
        return {name: value for name, value in plain.items() if value is not None}

    def __str__(self) -> str:
        return with_settings(self.words)


def distance_in_words(found: Mapping[str, float]) -> Sequence[str]:
    """A `Distance.to_json` in words."""
    parts = [f"largest difference {found['max_abs']:.2g} of output up to {found['scale']:.3g}"]
    if "relative" in found:
        parts.append(f"relative {found['relative']:.2g}")
    share = found.get("share_lost") or 0.0
    if "kl_nats" in found:
        kl = found["kl_nats"]
        beside = f" (one answer to everything: {kl / share:.2g})" if share > 0.1 else ""
        parts.append(f"KL {kl:.2g} nats{beside}")
        parts.append(f"arg-max agreement {found['argmax_agreement']:.1%}")
    elif share > 0.1:
        parts.append(f"mean square {share:.0%} of the outputs' variance")
    return parts


def resolve_mode(mode: str, *, streaming: bool) -> str:
    """`auto` is `layers` for a folder, and `logits` for models that are in memory anyway.

    Raises:
        UpcyclingError: a mode that is not known.
    """
    if mode not in get_args(VerifyMode):
        raise unknown("verify mode", str(mode), get_args(VerifyMode))
    if mode != "auto":
        return mode
    return "layers" if streaming else "logits"


def has_lost_function(found: Distance) -> bool:
    """Whether a result is no longer its source with a change, but has to be trained."""
    share, kl = found.share_lost, found.kl_nats
    return share is not None and share > LOST_SHARE and (kl is None or kl > LOST_KL)


def lost_in_words(remedies: Sequence[str]) -> str:
    """What to do with a result that has lost its source's function.

    Args:
        remedies: options that would keep more of it; see `errors.with_settings`.
    """
    choose = f", or choose {' or '.join(remedies)}" if remedies else ""
    return f"has lost the source's function: train it{choose}"


def require_finite(judged: Distance) -> None:
    """Refuse outputs that are not numbers.

    Raises:
        ProofError: infinity or NaN, and what may have made it.
    """
    if not judged.is_finite:
        raise ProofError(
            "The outputs of the result, or of its source, are not finite: a weight is, or became, "
            f"infinite or NaN. Choose another {setting('expert_init')} or "
            f"{setting('dtype', 'float32')}, or look at the source."
        )


def require_exact(judged: Distance, layers: Mapping[str, Any] | None) -> None:
    """Refuse a conversion that claims to be exact and is not.

    Raises:
        ProofError: how far it is off.
    """
    if judged.within_tolerance and (layers is None or layers["within_tolerance"]):
        return
    raise ProofError(
        "The conversion claims to be exact and is not: NOT exact by "
        f"{judged.max_abs:.2g} of outputs up to {judged.scale:.3g} (tolerance {TOLERANCE:g} of "
        f"that; layers: {layers}). Nothing was left at the output. Please report this with the "
        f"source's config.json; {setting('verify', 'none')} writes the folder unproven."
    )
