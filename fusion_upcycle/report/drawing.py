"""How figures look: colours, sizes, heat maps, files. matplotlib is imported on first use.

Colours are cividis (read alike with and without colour vision, and in grey) or Okabe and Ito's;
nothing is said by colour alone: cells carry numbers, lines carry markers.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_P = ParamSpec("_P")

#: Okabe and Ito's colours, with markers; grey for their yellow, too pale for a line.
LINES = (
    ("#000000", "o"),
    ("#E69F00", "s"),
    ("#56B4E9", "^"),
    ("#009E73", "D"),
    ("#D55E00", "v"),
    ("#0072B2", "P"),
    ("#CC79A7", "X"),
    ("#999999", "*"),
)
_MAP = "cividis"
_MOST_WITH_NUMBERS = 16  # experts; narrower cells cannot hold a number
_PAGE_WIDTH = 12.0  # inches
_DPI = 150
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fusion_upcycle",
}


def styled(draw: "Callable[_P, Figure]") -> "Callable[_P, Figure]":
    """Run a function that draws in our style, whatever matplotlib's settings are.

    Raises:
        UpcyclingError: matplotlib is not installed.
    """

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> "Figure":
        require_matplotlib()
        with _settings():
            return draw(*args, **kwargs)

    return drawn


def require_matplotlib() -> None:
    """Raises UpcyclingError where it is not installed; called before long work."""
    if not has_matplotlib():
        raise UpcyclingError("Figures need matplotlib: pip install 'fusion-upcycle[plots]'.")


def has_matplotlib() -> bool:
    """Whether it is installed, without importing it."""
    return find_spec("matplotlib") is not None


def _settings() -> "AbstractContextManager[None]":
    import matplotlib

    return matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | _STYLE)


def save(figure: "Figure", folder: Path, name: str) -> None:
    """Write NAME.png and NAME.svg; the same figure gives the same bytes."""
    with _settings():
        # The layout is found once: it takes longer than the drawing.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        figure.savefig(folder / f"{name}.png", dpi=_DPI, metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def heat_map(
    axes: "Axes",
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    form: str,
    *,
    lowest: float = 0.0,
    highest: float | None = None,
) -> Any:
    """Cells with their numbers, where these fit; one row of names, one column per expert."""
    image: Any = axes.imshow(values, cmap=_MAP, aspect="auto", vmin=lowest, vmax=highest)
    number = len(values[0])
    step = math.ceil(number / _MOST_WITH_NUMBERS)
    axes.set_xticks(range(0, number, step))
    down = step if len(rows) == number else 1  # experts against experts are named alike
    axes.set_yticks(range(0, len(rows), down), rows[::down])
    if number <= _MOST_WITH_NUMBERS:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "white" if image.norm(value) < 0.45 else "black"
                text = form.format(value)
                axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour)
    return image


def panels_of(panels: int, experts: int, rows: int) -> tuple["Figure", list["Axes"]]:
    """Panels large enough for cells, of `experts` columns, with numbers where there are some."""
    numbers = experts <= _MOST_WITH_NUMBERS
    wide = 1.4 + (0.36 if numbers else 0.09) * experts
    high = 1.0 + (0.26 if numbers or rows < experts else 0.09) * rows
    across = min(panels, max(1, int(_PAGE_WIDTH / wide)))
    down = math.ceil(panels / across)
    figure = _new((max(5.5, across * wide + 1.0), down * high + 0.6))
    grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for axes in grid[panels:]:
        axes.remove()
    return figure, grid[:panels]


def add_colour_bar(figure: "Figure", image: Any, axes: Sequence["Axes"], label: str) -> None:
    """One bar for all panels, about as high as a screen at most."""
    wide, high = figure.get_size_inches()
    shrink = min(1.0, 6.0 / high)
    figure.colorbar(
        image,
        ax=list(axes),
        label=label,
        fraction=0.3 / wide,
        shrink=shrink,
        aspect=shrink * high / 0.2,
        anchor=(0.0, 1.0),
    )


def chart(places: int) -> tuple["Figure", "Axes"]:
    figure = _new((min(16.0, max(6.0, 2.0 + 0.45 * places)), 4.0))
    return figure, figure.subplots()


def canvas(size: tuple[float, float]) -> tuple["Figure", "Axes"]:
    """One chart of this size, in inches."""
    figure = _new(size)
    return figure, figure.subplots()


def stacked(panels: int) -> tuple["Figure", list["Axes"]]:
    """Charts below each other, with one horizontal axis."""
    figure = _new((8.0, 1.0 + 2.2 * panels))
    return figure, figure.subplots(panels, 1, sharex=True, squeeze=False).flatten().tolist()


def _new(size: tuple[float, float]) -> "Figure":
    """A figure of its own, which no window and no global state knows."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")
