"""The figure of a run's routing: how uneven the loads are, and how many tokens change experts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.report.drawing import LINES, has_matplotlib, save, stacked, styled
from fusion_upcycle.training.logs import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME = "routing"
#: What is drawn, below each other: metric of each layer -> what it is.
_PANELS = {
    "load_cv": "load: std / mean over experts",
    "churn": "tokens with another first expert\nthan at the last log",
}


def save_routing(log: Path) -> Path | None:
    """Draw the logged routing of a run beside its logs, `routing.png` and `.svg`.

    Args:
        log: folder of the logs.

    Returns:
        The figure; None for a dense model, for a log of one entry, and without matplotlib.
    """
    rows = [row for row in read_metrics(log) if "churn" in row]
    if len(rows) < 2 or not has_matplotlib():
        return None
    save(routing_figure(rows), log, _NAME)
    return log / f"{_NAME}.png"


@styled
def routing_figure(rows: Sequence[dict[str, float]]) -> "Figure":
    """Mean and largest value over layers, by step.

    Args:
        rows: of `read_metrics`, those with routing.
    """
    figure, panels = stacked(len(_PANELS))
    steps = [row["step"] for row in rows]
    for axes, (metric, label) in zip(panels, _PANELS.items(), strict=True):
        layers = [name for name in rows[0] if name.endswith(f"/{metric}")]
        values = [[row[name] for name in layers] for row in rows]
        lines = {
            "mean over layers": [sum(each) / len(each) for each in values],
            "largest of a layer": [max(each) for each in values],
        }
        for (name, line), (colour, marker) in zip(lines.items(), LINES, strict=False):
            every = max(1, len(steps) // 20)
            axes.plot(steps, line, color=colour, marker=marker, markevery=every, label=name)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0.0)
    panels[0].legend()
    panels[-1].set_xlabel("step")
    return figure
