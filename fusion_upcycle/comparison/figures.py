"""Figures: quality against what it costs, with the Pareto front, and scores per task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING

from fusion_upcycle.comparison.rows import Row, Task
from fusion_upcycle.comparison.tables import average_of
from fusion_upcycle.report.drawing import LINES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn.

    Attributes:
        key: of its files.
        title: above it.
        words: what is to be seen, for who cannot see it.
        draw: makes it.
    """

    key: str
    title: str
    words: str
    draw: Callable[[], "Figure"]


def make_pictures(rows: Sequence[Row], tasks: Sequence[Task]) -> list[Picture]:
    """Those for which there are numbers."""
    if not tasks or not rows:
        return []
    over = average_of(tasks[0].pool, tasks)
    whole = [row for row in rows if not row.results[0].subset and row.mean_over(over)]
    costs: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("parameters", "total parameters", lambda row: row.fact("cost", "total_parameters")),
        ("flops", "forward FLOPs per token", lambda row: row.fact("cost", "flops_per_token")),
        ("tokens", "tokens trained on", partial(_mean_of, name="tokens")),
        (
            "seconds",
            "seconds of the run, evaluation included",
            partial(_mean_of, name="seconds"),
        ),
    ]
    pictures = []
    for key, axis, cost in costs:
        points = [(row, x, _average(row, over)) for row in whole if (x := cost(row))]
        if len({x for _, x, _ in points}) > 1:
            pictures.append(_scatter(key, axis, points, over[0]))
    if whole and len(over) > 1:
        pictures.append(_bars(whole, over))
    return pictures


def _average(row: Row, over: Sequence[Task]) -> float:
    score = row.mean_over(over)
    assert score is not None
    return score.value


def _mean_of(row: Row, name: str) -> float | None:
    values = [getattr(result, name) for result in row.results]
    return mean(values) if values and all(value is not None for value in values) else None


def _quality(task: Task) -> str:
    better = "lower" if task.lower else "higher"
    return f"{task.metric.replace('_', ' ')}, average ({better} is better)"


def pareto_front(
    points: Sequence[tuple[float, float]], *, lower: bool
) -> list[tuple[float, float]]:
    """Points that no other is both cheaper than and better than, from cheap to dear."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if lower else -p[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front


def _scatter(
    key: str, axis: str, points: Sequence[tuple[Row, float, float]], task: Task
) -> Picture:
    front = pareto_front([(x, y) for _, x, y in points], lower=task.lower)

    @styled
    def draw() -> "Figure":
        figure, axes = canvas((8.5, max(4.2, 0.24 * len(points) + 1.2)))
        axes.step(
            *zip(*front, strict=True), where="post", color="0.6", lw=1.2, label="Pareto front"
        )
        groups = list(dict.fromkeys(row.group for row, _, _ in points))
        for number, (row, x, y) in enumerate(sorted(points, key=lambda p: (p[2], p[1])), 1):
            colour, marker = LINES[groups.index(row.group) % len(LINES)]
            axes.plot(x, y, marker, color=colour, ms=7, mec="white", mew=0.6)
            axes.annotate(
                str(number), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5
            )
            # Names stand beside the picture: between the points they would cover each other.
            axes.plot([], [], marker, color=colour, ms=6, label=f"{number}  {_literal(row.label)}")
        axes.set_xscale("log" if _wide([x for _, x, _ in points]) else "linear")
        axes.set_xlabel(axis)
        axes.set_ylabel(_quality(task))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7.5, frameon=False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        return figure

    best = (min if task.lower else max)(points, key=lambda point: point[2])
    words = (
        f"{len(points)} rows by {axis}; {len(front)} of them on the Pareto front. The best average "
        f"is {best[2]:.4f}, of {best[0].label}."
    )
    return Picture(key, f"Quality by {axis}", words, draw)


def _wide(values: Sequence[float]) -> bool:
    return max(values) > 8 * min(values)


def _bars(rows: Sequence[Row], tasks: Sequence[Task]) -> Picture:
    @styled
    def draw() -> "Figure":
        figure, axes = canvas((8.5, 0.6 + 0.34 * len(rows)))
        high = 0.8 / len(tasks)
        for place, task in enumerate(tasks):
            colour, _ = LINES[(place + 1) % len(LINES)]
            ys = [y + (place - (len(tasks) - 1) / 2) * high for y in range(len(rows))]
            values = [row.scores[task].value for row in rows]
            errors = [row.scores[task].spread or 0.0 for row in rows]
            error_style = {"lw": 0.8, "ecolor": "0.3"}
            axes.barh(
                ys,
                values,
                high,
                color=colour,
                label=_literal(task.name),
                xerr=errors,
                error_kw=error_style,
            )
        axes.set_yticks(range(len(rows)), [_literal(row.label) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(_quality(tasks[0]).replace(", average", ""))
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(6, len(tasks)), frameon=False
        )
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        return figure

    words = f"A bar for each of {len(tasks)} tasks in each of {len(rows)} rows; the table has them."
    return Picture("tasks", "Scores per task", words, draw)


def _literal(text: str) -> str:
    """matplotlib reads what is between dollars as formulas."""
    return text.replace("$", r"\$")
