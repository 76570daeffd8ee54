"""Figures of the studies, as SVG, in colours that colour-blind people can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from lab import mean, select

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "fusion_upcycle"  # the same file for the same numbers

# Okabe and Ito's.
COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]


def lines_over_budget(
    rows: Sequence[dict[str, Any]], arms: Sequence[str], start: str | None, file: Path
) -> Path:
    """Bits per byte over training FLOPs of the continuation: a line per arm, a point per seed."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, colour in zip(arms, COLOURS, strict=False):
        of_arm = [r for r in select(rows, arm=arm) if start is None or r["start"] == start]
        shares = sorted({row["share"] for row in of_arm})
        means = []
        for share in shares:
            values = [mean(row) for row in select(of_arm, share=share)]
            means.append(sum(values) / len(values))
            axes.plot([100 * share] * len(values), values, ".", color=colour, markersize=4)
        axes.plot([100 * share for share in shares], means, "-", color=colour, label=arm)
    axes.set_xlabel("training compute of the continuation, % of the base's")
    axes.set_ylabel("bits per byte, held-out, mean of three domains")
    axes.set_xscale("log")
    ticks = sorted({100 * row["share"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    return finished(figure, axes, file)


def gain_over(points: Mapping[float, Sequence[float]], label: str, file: Path) -> Path:
    """What upcycling gains over dense, in bits per byte: the mean, and a point per seed."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(0, color="#999999", linewidth=0.8)
    means = [sum(values) / len(values) for values in points.values()]
    axes.plot(list(points), means, "-", color=COLOURS[1], label="mean of the seeds")
    for place, values in points.items():
        axes.plot([place] * len(values), values, ".", color=COLOURS[0], markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(list(points), [f"{place:.0f}" for place in points])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("gain over dense, bits per byte")
    return finished(figure, axes, file)


def finished(figure: Any, axes: Any, file: Path) -> Path:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file
