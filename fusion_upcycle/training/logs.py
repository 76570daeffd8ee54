"""What a run leaves and shows: TensorBoard and CSV logs, a progress bar, and no noise."""

import csv
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

_TABLES = "csv"


class Progress(TQDMProgressBar):
    """Steps, time left, loss and tokens per second."""

    def on_train_epoch_start(self, trainer: Any, *arguments: Any) -> None:
        bar = self.train_progress_bar
        bar.reset(self.total_train_batches)
        bar.initial = bar.n = trainer.global_step  # of a resumed run, or time left would be wrong
        bar.set_description("training")

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)  # number of the log, which says nothing
        return {name: f"{value:.4g}" for name, value in metrics.items()}


def loggers(folder: Path) -> list[Logger]:
    """Of one run, or of what a resumed run adds to it: `tensorboard/` and `csv/version_N/`."""
    return [
        TensorBoardLogger(folder, name="tensorboard"),
        CSVLogger(folder, name=_TABLES, flush_logs_every_n_steps=1),
    ]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All logged metrics of a run, one entry per step; what was logged again after a resume wins.

    Args:
        folder: `Places.log`.
    """
    rows: dict[int, dict[str, float]] = {}
    files = folder.glob(f"{_TABLES}/version_*/metrics.csv")
    for file in sorted(files, key=lambda path: int(path.parent.name.removeprefix("version_"))):
        with open(file, encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                row = {name: float(value) for name, value in line.items() if value}
                rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's device report and advice; its errors and our warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
