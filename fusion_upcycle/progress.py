"""Progress bars, all alike."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(what: str, total: int, shown: bool, *, unit: str = "B") -> "tqdm[Any]":
    """A bar with rate and time left; in bytes unless `unit` says otherwise."""
    from tqdm.auto import tqdm

    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        disable=not shown,
        mininterval=0.5,
    )
