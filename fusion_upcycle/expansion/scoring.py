"""Importance scores for a selection: as they are given, and what the record says of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.importance.scores import Importance


def load_scores(scores: str | Path | Importance | None) -> Importance | None:
    """Importance scores, from their file or as they are.

    Raises:
        UpcyclingError: no scores, or a file that cannot be read as scores.
    """
    if isinstance(scores, str | Path):
        return Importance.load(Path(scores).expanduser())
    if scores is not None and not isinstance(scores, Importance):
        raise UpcyclingError(
            f"scores={scores!r} must be the importance.json of this model, or what "
            "folder_importance returns."
        )
    return scores


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
