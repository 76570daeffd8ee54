"""Figures: quality against what it costs, with the Pareto front, and scores per task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from statistics import mean
from typing import TYPE_CHECKING

from fusion_upcycle.comparison.rows import Row, Task
from fusion_upcycle.comparison.tables import average_of
from fusion_upcycle.report.drawing import LINES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    if not over:
        return []
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
    ranked = sorted(points, key=lambda point: (point[2] if task.lower else -point[2], point[1]))

    @styled
    def draw() -> "Figure":
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

        figure, axes = _canvas(max(4.2, 0.21 * len(points) + 0.8))
        steps = list(zip(*front, strict=True))
        axes.step(*steps, where="post", color="0.6", lw=1.2, label="Pareto front")
        groups = list(dict.fromkeys(row.group for row, _, _ in points))
        for number, (row, x, y) in enumerate(ranked, 1):
            colour, marker = LINES[groups.index(row.group) % len(LINES)]
            axes.plot(x, y, marker, color=colour, ms=7, mec="white", mew=0.6)
            # Names stand beside the picture: between the points they would cover each other.
            axes.plot([], [], marker, color=colour, ms=6, label=f"{number}  {_short(row.label)}")
        logarithmic = _wide([x for _, x, _ in points])
        placed = [(log(x) if logarithmic else x, y) for _, x, y in ranked]
        for numbers in neighbours(placed):
            said = ", ".join(map(str, numbers))
            place = ranked[numbers[0] - 1][1:]
            axes.annotate(said, place, xytext=(5, 4), textcoords="offset points", fontsize=7.5)
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.08, y=0.08)
        axes.set_xlabel(axis)
        axes.set_ylabel(_quality(task))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7.5, frameon=False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        return figure

    words = (
        f"{len(points)} rows by {axis}; {len(front)} of them on the Pareto front. The best average "
        f"is {ranked[0][2]:.4f}, of {ranked[0][0].label}."
    )
    return Picture(key, f"Quality by {axis}", words, draw)


def neighbours(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Numbers of points, from 1, that are drawn so near to each other that they share a label."""
    xs, ys = zip(*points, strict=True)
    near_x = 0.03 * (max(xs) - min(xs)) or 1.0
    near_y = 0.03 * (max(ys) - min(ys)) or 1.0
    found: list[list[int]] = []
    for number, (x, y) in enumerate(points, 1):
        for numbers in found:
            other_x, other_y = points[numbers[0] - 1]
            if abs(x - other_x) <= near_x and abs(y - other_y) <= near_y:
                numbers.append(number)
                break
        else:
            found.append([number])
    return found


def _wide(values: Sequence[float]) -> bool:
    return max(values) > 8 * min(values)


def _bars(rows: Sequence[Row], tasks: Sequence[Task]) -> Picture:
    """What each row is better by than the pre-trained model; its scores where there is none."""
    bases = [row for row in rows if row.results[0].reference == "pretrained"]
    # Rows of another experiment began elsewhere.
    start = bases[0] if bases and len({row.experiment for row in rows}) == 1 else None
    shown = [row for row in rows if row is not start]

    def value(row: Row, task: Task) -> float:
        if start is None:
            return row.scores[task].value
        gain = row.scores[task].value - start.scores[task].value
        return -gain if task.lower else gain

    @styled
    def draw() -> "Figure":
        figure, axes = _canvas(1.0 + 0.34 * len(shown))
        high = 0.8 / len(tasks)
        for place, task in enumerate(tasks):
            colour, _ = LINES[(place + 1) % len(LINES)]
            ys = [y + (place - (len(tasks) - 1) / 2) * high for y in range(len(shown))]
            bars = axes.barh(ys, [value(row, task) for row in shown], high, color=colour)
            bars.set_label(_literal(task.name))
        axes.set_yticks(range(len(shown)), [_short(row.label) for row in shown])
        axes.invert_yaxis()
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.axvline(0, color="0.3", lw=0.8)
        metric = tasks[0].metric.replace("_", " ")
        better = f"{metric}, better than the base by"
        axes.set_xlabel(_quality(tasks[0]) if start is None else better)
        columns = min(6, len(tasks))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        return figure

    what = "Scores" if start is None else "Gains over the pre-trained model"
    words = f"{len(tasks)} bars, one of each task, for {len(shown)} rows; the table has them."
    return Picture("tasks", f"{what}, task by task", words, draw)


def _canvas(height: float) -> tuple["Figure", "Axes"]:
    figure, axes = canvas((11.0, height))
    # The layout is found at the resolution of an SVG, where hinting makes texts the widest: at that
    # of the screen, names would be cut off.
    figure.set_dpi(72)
    return figure, axes


def _short(label: str) -> str:
    return _literal(label if len(label) <= 62 else f"{label[:60]} ...")


def _literal(text: str) -> str:
    """matplotlib reads what is between dollars as formulas."""
    return text.replace("$", r"\$")
