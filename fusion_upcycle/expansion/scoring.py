"""Importance scores for a selection: given, or measured on the calibration text."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.expansion.router.calibrate import CalibrationText, check_before_scores
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.report.drawing import require_matplotlib


def load_scores(scores: str | Path | Importance | None) -> Importance | None:
    """Importance scores, from their file or as they are."""
    if isinstance(scores, str | Path):
        return Importance.load(Path(scores).expanduser())
    if scores is not None and not isinstance(scores, Importance):
        raise UpcyclingError(
            f"scores={scores!r} must be the importance.json of this model, or what "
            "folder_importance returns."
        )
    return scores


def measured_scores(
    options: ExpansionOptions,
    given: Importance | None,
    text: CalibrationText | None,
    *,
    plan: Callable[[ExpansionOptions], Expansion],
    measure: Callable[[CalibrationText], Importance],
) -> Importance | None:
    """What `measure` finds, where the selection needs scores and none are given but text is.

    Args:
        plan: plans the expansion, to say what stands in the way before the long work.
    """
    if text is None or given is not None or not options.needs_scores:
        return None
    require_matplotlib()
    # Needs no scores, and has the same limits.
    check_before_scores(options, plan(replace(options, selection="random")))
    return measure(text)


def scores_for(
    options: ExpansionOptions, importance: Importance | None, identity: Mapping[str, Any] | None
) -> tuple[dict[int, list[float]] | None, dict[str, Any]]:
    """The scores that `options` go by, of the model of this identity; and what the record says.

    Raises:
        UpcyclingError: scores of another model, or without the metric.
    """
    if importance is None or not options.needs_scores:
        return None, {}
    assert identity is not None
    importance.check(identity)
    about = {"tokens": importance.tokens, "calibration": dict(importance.calibration)}
    return importance.scores(options.metric), {"importance": {"metric": options.metric} | about}
