"""Scores of tasks: how sure a mean is, averages over tasks, and the table that is printed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

STDERR = "_stderr"
#: Of a task's report, what is counted and no score.
COUNTS = ("examples", "truncated_inputs")


def with_error(metric: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of a metric over examples, and its standard error where there are two or more."""
    number = len(values)
    mean = math.fsum(values) / number
    if number < 2:
        return {metric: mean}
    squares = math.fsum((value - mean) ** 2 for value in values)
    return {metric: mean, metric + STDERR: math.sqrt(squares / (number - 1) / number)}


def is_error(metric: str) -> bool:
    """Whether a name is that of a standard error, also in lm-eval's `acc_stderr,filter`."""
    return metric.partition(",")[0].endswith(STDERR)


def average(tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Plain means of the metrics that all tasks have; tasks are independent in their errors."""
    means: dict[str, float] = {}
    number = len(tasks)
    for metric in tasks[0] if tasks else ():
        if metric in COUNTS:
            continue
        known = [task[metric] for task in tasks if metric in task]
        if len(known) < number:
            continue
        total = math.hypot(*known) if is_error(metric) else sum(known)
        means[metric] = total / number
    return means


@rank_zero_only
def print_scores(title: str, report: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """A row for each task and for the average, a column for each metric that one of them has."""
    rows = {name: scores for name, scores in report.items() if name != "model_info"}
    table = Table(title=title)
    table.add_column("task")
    shown = [metric for metric in metrics if any(metric in scores for scores in rows.values())]
    for metric in shown:
        table.add_column(metric.replace("_", " "), justify="right")
    for name, scores in rows.items():
        table.add_row(name, *(_written(scores, metric) for metric in shown))
    Console().print(table)


def _written(scores: Mapping[str, float], metric: str) -> str:
    if metric not in scores:
        return "-"
    if metric in COUNTS:
        return str(scores[metric])
    error = scores.get(metric + STDERR)
    return f"{scores[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
