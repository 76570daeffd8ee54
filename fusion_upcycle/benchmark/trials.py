"""Settings are chosen on validation data: the best trial of each row."""

from collections.abc import Mapping, Sequence
from typing import Any

from fusion_upcycle.benchmark.experiment import Validation
from fusion_upcycle.benchmark.request import Request
from fusion_upcycle.errors import UpcyclingError


def choose(trials: Sequence[Request], tried: Sequence[str], by: Validation) -> dict[str, Any]:
    """The settings of the best trial, the first of equals.

    Args:
        trials: runs that are over; failed ones do not count.
        tried: names of the settings that were tried.
        by: the metric, and which of its values are better.

    Raises:
        UpcyclingError: no trial gave the metric.
    """
    scores: list[tuple[float, Request]] = []
    errors = []
    for trial in trials:
        result = trial.result()
        assert result is not None
        if result["status"] == "failed":
            errors.append(result["error"])
            continue
        value = _value(result["report"], by.metric)
        if value is not None:
            scores.append((value if by.better == "lower" else -value, trial))
    if not scores:
        why = errors[0] if errors else "their reports lack it, or it is not a finite number"
        raise UpcyclingError(f"No trial gave validation.metric={by.metric}: {why}.".rstrip("."))
    _, best = min(scores, key=lambda scored: scored[0])
    return {name: best.facts["settings"][name] for name in tried}


def _value(report: Mapping[str, Any], place: str) -> float | None:
    """Of `pool.task.metric`; names of tasks may have dots, so that the ends count."""
    pool, _, rest = place.partition(".")
    task, _, metric = rest.rpartition(".")
    value = report.get(pool, {}).get(task, {}).get(metric)
    return float(value) if isinstance(value, int | float) else None
