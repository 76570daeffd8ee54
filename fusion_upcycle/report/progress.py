"""Progress bars, all alike."""

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def loading_bars(shown: bool) -> Iterator[None]:
    """Let transformers show its own bars while it loads a model, or not."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Load a model in silence: what transformers would say of it, the caller says."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with loading_bars(False):
            yield
    finally:
        logging.set_verbosity(before)
