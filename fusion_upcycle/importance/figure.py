"""The figure of importance scores: experts x layers, one heat map for each metric."""

from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.report.drawing import add_colour_bar, heat_map, panels_of, save, styled
from fusion_upcycle.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME = "importance"


@styled
def importance_map(importance: Importance) -> "Figure":
    """Each expert's share of its layer's score, by each metric, in percent.

    Shares, because layers differ in scale and experts are chosen within a layer.
    """
    layers = list(next(iter(importance.metrics.values())))
    number = int(importance.model["num_experts"])
    figure, panels = panels_of(len(importance.metrics), number, len(layers))
    shares = {
        metric: [_shares(scores[layer]) for layer in layers]
        for metric, scores in importance.metrics.items()
    }
    highest = max(max(map(max, rows)) for rows in shares.values())
    rows = [f"layer {layer}" for layer in layers]
    for axes, (metric, values) in zip(panels, shares.items(), strict=True):
        image = heat_map(axes, values, rows, "{:.0f}", highest=highest)
        axes.set_title(metric)
        axes.set_xlabel("expert")
    figure.suptitle(
        f"Importance: share of a layer's score (even: {100 / number:.3g} %), "
        f"{importance.tokens:,} tokens"
    )
    add_colour_bar(figure, image, panels, "share of the layer's score / %")
    return figure


def importance_table(importance: Importance) -> Table:
    """The most important expert of each layer, by each metric, with its share of the score."""
    rows = []
    for layer in next(iter(importance.metrics.values())):
        row = [f"layer {layer}"]
        for scores in importance.metrics.values():
            shares = _shares(scores[layer])
            best = max(range(len(shares)), key=shares.__getitem__)
            row.append(f"{best}: {shares[best]:.0f} %")
        rows.append(row)
    even = 100 / int(importance.model["num_experts"])
    title = f"Most important expert: share of the layer's score (even: {even:.3g} %)"
    return Table(title, ["", *importance.metrics], rows)


def save_importance_map(importance: Importance, folder: Path) -> list[Path]:
    """Write `importance.png` and `importance.svg`."""
    save(importance_map(importance), folder, _NAME)
    return [folder / f"{_NAME}.{suffix}" for suffix in ("png", "svg")]


def _shares(scores: list[float]) -> list[float]:
    total = sum(scores)
    return [100 * score / total if total else 0.0 for score in scores]
