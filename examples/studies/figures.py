"""Figures of the studies, in the package's own style; PNG and SVG."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean as average
from typing import Any

from lab import mean, select
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusion_upcycle.report.drawing import LINES, chart, save, styled

_PLACES = 12  # as wide as a page of the documentation


def lines_over_budget(
    rows: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    folder: Path,
    name: str,
    value: Callable[[Mapping[str, Any]], float] = mean,
    label: str = "bits per byte, held-out, mean of three domains",
) -> Path:
    """A score over training FLOPs of the continuation: a line per arm, a point per seed.

    Args:
        value: of a row.
        label: of the score.
    """
    save(_lines_over_budget(rows, arms, value, label), folder, name)
    return folder / f"{name}.svg"


@styled
def _lines_over_budget(
    rows: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    value: Callable[[Mapping[str, Any]], float],
    label: str,
) -> Figure:
    assert len(arms) <= len(LINES)
    figure, axes = chart(_PLACES)
    for arm, (colour, marker) in zip(arms, LINES, strict=False):
        seeds: dict[float, list[float]] = {}
        for row in select(rows, arm=arm):
            seeds.setdefault(100 * row["share"], []).append(value(row))
        _seeds_and_mean(axes, seeds, colour, marker, arm)
    axes.set_xlabel("training compute of the continuation, % of the base's")
    axes.set_ylabel(label)
    _finish(axes, sorted({100 * row["share"] for row in rows}))
    return figure


def gain_over(points: Mapping[float, Sequence[float]], label: str, folder: Path, name: str) -> Path:
    """What upcycling gains over dense, in bits per byte: the mean, and a point per seed."""
    save(_gain_over(points, label), folder, name)
    return folder / f"{name}.svg"


@styled
def _gain_over(points: Mapping[float, Sequence[float]], label: str) -> Figure:
    figure, axes = chart(_PLACES)
    axes.axhline(0, color="#999999", linewidth=0.8)
    _seeds_and_mean(axes, points, *LINES[0], "mean of the seeds")
    axes.set_xlabel(label)
    axes.set_ylabel("gain over dense, bits per byte")
    _finish(axes, list(points))
    return figure


def _seeds_and_mean(
    axes: Axes, seeds: Mapping[float, Sequence[float]], colour: str, marker: str, label: str
) -> None:
    """A point for each seed at each place, and a line through their means."""
    places = sorted(seeds)
    for place in places:
        values = seeds[place]
        axes.plot([place] * len(values), values, ".", color=colour, markersize=4)
    means = [average(seeds[place]) for place in places]
    axes.plot(places, means, color=colour, marker=marker, markersize=4, label=label)


def _finish(axes: Axes, places: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:.0f}" for place in places])
    axes.minorticks_off()
    axes.legend()
