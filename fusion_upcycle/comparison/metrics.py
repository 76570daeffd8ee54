"""Which number of a task is shown, which of two is better, and how it is written."""

from collections.abc import Mapping
from typing import Any

#: In this order, the first that a task has.
HIGHER = ("accuracy", "acc_norm", "acc", "exact_match", "f1", "mcc", "bleu", "rouge1", "pass@1")
LOWER = ("bits_per_byte", "word_perplexity", "perplexity", "loss_nats_per_token", "loss")
_STDERR = "_stderr"


def primary_metric(task: Mapping[str, Any], wanted: str | None) -> str | None:
    """The metric that the tables show of a task; None where it has no number.

    Args:
        wanted: by the experiment, where the task has it.
    """
    numbers = [name for name, value in task.items() if _is_number(value)]
    if wanted in numbers:
        return wanted
    for known in (*HIGHER, *LOWER):
        for name in numbers:
            if name.partition(",")[0] == known:
                return name
    shown = [name for name in numbers if not name.partition(",")[0].endswith(_STDERR)]
    return shown[0] if shown else None


def lower_is_better(metric: str, said: str | None) -> bool:
    """As the experiment says, else by the metric's name."""
    if said is not None:
        return said == "lower"
    name = metric.partition(",")[0]
    return name in LOWER or any(word in name for word in ("loss", "perplexity", "error"))


def stderr_of(task: Mapping[str, Any], metric: str) -> float | None:
    """The standard error beside a metric, where there is one."""
    name, comma, kind = metric.partition(",")
    value = task.get(f"{name}{_STDERR}{comma}{kind}")
    return float(value) if _is_number(value) else None  # type: ignore[arg-type]


def is_share(metric: str, values: list[float]) -> bool:
    """Whether values are written in percent: shares of right answers, between 0 and 1."""
    return metric.partition(",")[0] in HIGHER and all(0 <= value <= 1 for value in values)


def written(value: float | None, form: str) -> str:
    """A value in one of the forms of `FORMS`; a hyphen for none."""
    return "-" if value is None else FORMS[form](value)


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


FORMS = {
    "percent": lambda value: f"{100 * value:.1f}",
    "digits": lambda value: f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}",
    "ratio": lambda value: f"{value:.3f}",
    "gain": lambda value: f"{value:+.4f}",
    "count": _count,
    "whole": lambda value: f"{value:.0f}",
    "seconds": lambda value: f"{value:.1f}",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
