"""What a run leaves and shows: TensorBoard and CSV logs, a progress bar, and no noise."""

import csv
import io
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from fusion_upcycle.checkpoint.durable import sync

METRICS_FILE = "metrics.csv"


class Progress(TQDMProgressBar):
    """Steps, time left, loss and tokens per second."""

    def on_train_start(self, trainer: Any, *arguments: Any) -> None:
        super().on_train_start(trainer, *arguments)
        self._begin(trainer)  # a resumed run starts no epoch

    def on_train_epoch_start(self, trainer: Any, *arguments: Any) -> None:
        self._begin(trainer)

    def _begin(self, trainer: Any) -> None:
        bar = self.train_progress_bar
        bar.reset(self.total_train_batches)
        bar.initial = bar.n = trainer.global_step  # of a resumed run, or time left would be wrong
        bar.set_description("training")

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)  # number of the log, which says nothing
        return {name: f"{value:.4g}" for name, value in metrics.items()}


class Metrics(Logger):
    """`metrics.csv`: all metrics of a step in a row, which is in the file when `log_metrics` ends.

    Lightning's own writes a table whose columns grow over itself, which a kill leaves half; it
    begins another table when a run goes on; and it writes a step after its checkpoint.

    Args:
        folder: where the table is.

    Attributes:
        path: of the table.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / METRICS_FILE
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """They are in the run's record."""

    def begin(self, saved: Path | None) -> None:
        """Begin with the table that a checkpoint has, or with none; what was there is replaced."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(self.path) as part:
            shutil.copyfile(saved, part) if saved is not None else part.touch()
        self._columns = _rows(self.path)[0]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step}
        new = row.keys() - set(self._columns)
        if new or not self.path.is_file():  # somebody has removed it: it begins again
            before = _rows(self.path)[1] if self.path.is_file() else []
            self._columns = sorted([*self._columns, *new])
            with _replacing(self.path) as part:
                part.write_text(self._lines(*before, header=True), encoding="utf-8")
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(self._lines(row))

    def sync(self) -> None:
        """Wait until the table is on the disk."""
        sync(self.path)
        sync(self.path.parent)

    def _lines(self, *rows: dict[str, Any], header: bool = False) -> str:
        lines = io.StringIO()
        writer = csv.DictWriter(lines, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return lines.getvalue()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of another when the block ends."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with open(path, encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        return list(reader.fieldnames or ()), list(reader)


class TensorBoard(TensorBoardLogger):
    """`tensorboard/version_N/`, one for each process that went on with a run.

    It is written by a thread, whose errors its next call raises as what they are.

    Args:
        folder: where `tensorboard/` is.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, name="tensorboard")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:  # as Lightning says it, of a number too
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    def finalize(self, status: str) -> None:
        with suppress(OSError) if status == "failed" else nullcontext():
            super().finalize(status)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All logged metrics of a run, one entry per step.

    Args:
        folder: `Places.log`.
    """
    path = folder / METRICS_FILE
    rows = _rows(path)[1] if path.is_file() else []
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's device report and advice; its errors and our warnings stay.

    TensorBoard's thread is quiet about errors of the disk, which `TensorBoard` raises.
    """

    def excepthook(failed: Any) -> None:
        of_tensorboard = type(failed.thread).__module__.startswith("tensorboard")
        if not (of_tensorboard and issubclass(failed.exc_type, OSError)):
            hook(failed)

    hook, threading.excepthook = threading.excepthook, excepthook
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        threading.excepthook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
