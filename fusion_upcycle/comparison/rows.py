"""Rows of the comparison: runs of one row, over seeds, with their scores on every task."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from fusion_upcycle.checks import is_number
from fusion_upcycle.comparison.metrics import (
    is_share,
    lower_is_better,
    primary_metric,
    stderr_of,
)
from fusion_upcycle.comparison.results import NOT_TASKS, Result
from fusion_upcycle.errors import UpcyclingError

#: Of models as they are, and of bounds; their rows do not compete.
REFERENCES = "Reference Results"
#: As FusionBench's documentation orders them; others come after.
GROUPS = (REFERENCES, "Model Ensemble", "Model Merging", "Model Mixing")


@dataclass(frozen=True)
class Task:
    """A column.

    Attributes:
        pool, name: of the task pool and in its report.
        metric: that is shown.
        lower: whether lower is better.
        form: how a value is written.
    """

    pool: str
    name: str
    metric: str
    lower: bool
    form: str


@dataclass(frozen=True)
class Score:
    """A value over seeds.

    Attributes:
        value: the mean.
        spread: standard deviation over seeds, or the standard error of the only one.
        seeds: each value.
    """

    value: float
    spread: float | None
    seeds: Sequence[float]


@dataclass(frozen=True)
class Row:
    """Runs that differ by their seed only.

    Attributes:
        label: as printed.
        group: heading.
        results: one for each seed.
        scores: task -> score; a task that a run lacks is not there.
    """

    label: str
    group: str
    results: Sequence[Result]
    scores: Mapping[Task, Score]

    @property
    def reference(self) -> bool:
        """Whether it is a model as it is, or a bound, and does not compete."""
        return self.results[0].reference is not None or self.group == REFERENCES

    @property
    def experiment(self) -> str:
        """That it belongs to; empty for what others left."""
        return self.results[0].experiment

    def mean_over(self, tasks: Iterable[Task]) -> Score | None:
        """The plain mean over tasks, seed by seed; None where a task is missing."""
        chosen = list(tasks)
        if not chosen or any(task not in self.scores for task in chosen):
            return None
        every = [self.scores[task] for task in chosen]
        seeds = [mean(values) for values in zip(*(s.seeds for s in every), strict=False)]
        if len(seeds) > 1:
            return Score(mean(seeds), stdev(seeds), seeds)
        errors = [score.spread for score in every]
        known = [error for error in errors if error is not None]
        joint = sum(e**2 for e in known) ** 0.5 / len(known) if len(known) == len(every) else None
        return Score(seeds[0], joint, seeds)

    def fact(self, section: str, name: str) -> float | None:
        """A number that is no task's, as of `cost` or `routing`; the mean over seeds.

        Raises:
            UpcyclingError: it is something else.
        """
        values = []
        for result in self.results:
            for report in result.report.values():
                facts = report.get(section) if isinstance(report, dict) else None
                if isinstance(facts, dict) and name in facts:
                    if not is_number(facts[name]):
                        raise UpcyclingError(
                            f"{result.source}: {section}.{name} is {facts[name]!r:.60}, not a "
                            "number. Leave the file out."
                        )
                    values.append(facts[name])
        return mean(values) if values else None


def find_tasks(results: Sequence[Result]) -> list[Task]:
    """The columns, in the order in which reports name them."""
    found: dict[tuple[str, str], list[tuple[str, float, str | None]]] = {}
    for result in results:
        for pool, report in result.report.items():
            said = result.tasks.get(pool) or {}
            for name, task in _tasks_of(report):
                metric = primary_metric(task, said.get("metric"))
                if metric is not None:
                    entry = (metric, float(task[metric]), said.get("better"))
                    found.setdefault((pool, name), []).append(entry)
    tasks = []
    for (pool, name), entries in found.items():
        metric, _, better = entries[0]
        values = [value for other, value, _ in entries if other == metric]
        form = "percent" if is_share(metric, values) else "digits"
        tasks.append(Task(pool, name, metric, lower_is_better(metric, better), form))
    return tasks


def make_rows(results: Sequence[Result], tasks: Sequence[Task]) -> list[Row]:
    """Rows in the order of their groups, runs that did not fail."""
    many = len({result.experiment for result in results}) > 1
    collected: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        if result.error is None:
            label = f"{result.experiment}: {result.label}" if many else result.label
            # What others left has no seed: each file is a row of its own.
            apart = "" if result.seed is not None else str(result.source)
            collected.setdefault((result.group, label, apart), []).append(result)
    alike = Counter(label for _, label, _ in collected)
    rows = [
        Row(
            f"{label} ({apart})" if apart and alike[label] > 1 else label,
            group,
            runs,
            {t: s for t in tasks if (s := _score(runs, t)) is not None},
        )
        for (group, label, apart), runs in collected.items()
    ]
    rows.sort(key=lambda row: row.results[0].position)
    groups = dict.fromkeys([*GROUPS, *(row.group for row in rows)])
    order = {group: place for place, group in enumerate(groups)}
    return sorted(rows, key=lambda row: order[row.group])


def _score(results: Sequence[Result], task: Task) -> Score | None:
    values, errors = [], []
    for result in results:
        found = dict(_tasks_of(result.report.get(task.pool))).get(task.name) or {}
        if isinstance(found.get(task.metric), int | float):
            values.append(float(found[task.metric]))
            errors.append(stderr_of(found, task.metric))
    if not values or len(values) < len(results):
        return None
    return Score(mean(values), stdev(values) if len(values) > 1 else errors[0], values)


def _tasks_of(report: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(report, Mapping):
        return []
    return [
        (str(name), dict(task))
        for name, task in report.items()
        if name not in NOT_TASKS and isinstance(task, Mapping)
    ]
