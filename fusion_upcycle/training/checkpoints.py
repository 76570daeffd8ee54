"""Checkpoints that survive a crash at any moment, and are the same for every strategy."""

import hashlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.training.checkpoint_folders import (
    NewCheckpoint,
    agree_on,
    checkpoint_path,
    keep_only,
    new_checkpoint,
)
from fusion_upcycle.training.logs import METRICS_FILE, Metrics
from fusion_upcycle.training.processes import is_first
from fusion_upcycle.training.saved import STATE_FILE, load_state
from fusion_upcycle.training.stopping import Stopping
from fusion_upcycle.training.strategy import PartsStrategy

if TYPE_CHECKING:
    from fusion_upcycle.training.module import PretrainingModule

#: Raised when another version of ours could not go on with what is in one.
CHECKPOINT_VERSION = 3
_KEPT = 2


class HashedCheckpointIO(CheckpointIO):
    """Lightning's state in a file whose digest is taken while it is written.

    Attributes:
        digest: SHA-256 of the last file that was written; in the first process only.
        error: that ended it. It is not raised, as Lightning has the processes meet after writing,
            and one that does not come would leave the others waiting: `CheckpointEvery` does.
    """

    def __init__(self) -> None:
        self.digest: str | None = None
        self.error: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        assert storage_options is None
        self.digest = self.error = None
        try:
            with open(path, "wb") as file:
                hashed = _Hashed(file)
                try:
                    torch.save(checkpoint, hashed)  # type: ignore[arg-type]  # it only writes
                except RuntimeError:  # as torch puts what its file raises
                    if hashed.error is None:
                        raise
                    raise hashed.error from None
            self.digest = hashed.digest.hexdigest()
        except OSError as error:
            self.error = error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_state(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError


class _Hashed:
    """A file to write to, front to back."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, piece: Any) -> int:
        self.digest.update(piece)
        try:
            return self._file.write(piece)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


class CheckpointEvery(Checkpoint):
    """Write the log, and save every so many steps or minutes, at the end, and when asked to stop.

    The row of a step is in the log before its checkpoint is written, which has the log up to there:
    so no kill loses a row or has one twice. The last two are kept that were written here or gone on
    from; others, which are damaged or of another run, go when one was saved.

    Args:
        folder: of the checkpoints.
        identity: what a run must share to go on from one, JSON.
        describe: writes into the folder what an export of it needs, in the first process.
        resumed: what this run goes on from.
        metrics: the log.
        every: steps; 0 is the end of the run only.
        minutes: since the last one, or since the start; 0 does not look at the time.
        stopping: says when the run is to stop, on any of the devices.

    Attributes:
        last: checkpoint of this run.
        seconds: that training has waited for checkpoints; what is written beside it is not in them.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        describe: Callable[[Path], object],
        resumed: Path | None,
        metrics: Metrics,
        *,
        every: int,
        minutes: float,
        stopping: Stopping,
    ):
        self._folder, self._identity, self._metrics = folder, identity, metrics
        self._describe = describe
        self._writing: Iterator[None] = iter(())
        self._every, self._seconds, self.seconds = every, 60 * minutes, 0.0
        self._stopping, self._saved_at = stopping, time.monotonic()
        self._good = [] if resumed is None else [resumed]
        self.io = HashedCheckpointIO()

    @property
    def last(self) -> Path:
        return self._good[-1]

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        agree_on(self._good)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: "PretrainingModule",  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The last callback of a step, to whose row the others have added theirs.

        Raises:
            UpcyclingError: the log or a checkpoint could not be written; in all processes.
        """
        failed = _log(trainer, module)
        late = self._seconds > 0 and time.monotonic() - self._saved_at >= self._seconds
        # Clocks differ and a signal may reach one process only, but all must save the same step.
        wish = [late, self._stopping.asked is not None, failed is not None, _is_saving(trainer)]
        wishes = torch.tensor(wish, dtype=torch.float32, device=trainer.strategy.root_device)
        late, stop, fail, saving = trainer.strategy.reduce(wishes, reduce_op="max").bool().tolist()
        if fail:
            raise UpcyclingError(
                f"Writing the log failed: {failed or 'in the first process'}. When that is mended, "
                "the same command goes on from the last checkpoint."
            ) from failed
        if stop and self._stopping.asked is None:
            self._stopping.asked = signal.SIGTERM  # of another process
        trainer.should_stop |= stop
        began = time.perf_counter()
        if not saving:
            self._finish()
        if module.due(self._every) or late or stop:
            self._save(trainer)
        self.seconds += time.perf_counter() - began

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        began = time.perf_counter()
        self._finish()
        self.seconds += time.perf_counter() - began

    def _finish(self) -> None:
        """Wait for what is still being written, and give the checkpoint its name."""
        next(self._writing, None)

    def _save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint, or, where processes save their parts, begin to."""
        self._finish()
        self._saved_at = time.monotonic()  # while it is written, too, it is not time for another
        self._writing = self._written(trainer)
        next(self._writing, None)

    def _written(self, trainer: L.Trainer) -> Iterator[None]:
        """Write a checkpoint; what is written beside the training comes to an end after `yield`."""
        path = checkpoint_path(self._folder, trainer.global_step)
        with new_checkpoint(path, self._identity) as new:
            trainer.save_checkpoint(new.folder / STATE_FILE)
            failed = self._write_first(new, trainer) if is_first() else None
            if isinstance(strategy := trainer.strategy, PartsStrategy):
                yield
                assert strategy.saving is not None
                new.hashed |= strategy.saving.result()
            if failed is not None:  # not before `yield`: the others have gone on to the next step
                raise failed
        self._good = [*self._good, path][-_KEPT:]
        if is_first():
            keep_only(self._folder, self._good)
        self._saved_at = time.monotonic()

    def _write_first(self, new: NewCheckpoint, trainer: L.Trainer) -> Exception | None:
        """What the first process alone writes; returns what ended it."""
        try:
            self._describe(new.folder)
            if self.io.error is not None:
                raise self.io.error
            assert self.io.digest is not None
            new.hashed[STATE_FILE] = self.io.digest
            for logger in trainer.loggers:
                logger.save()
            shutil.copyfile(self._metrics.path, new.folder / METRICS_FILE)
        except Exception as error:
            return error
        return None


def _log(trainer: L.Trainer, module: "PretrainingModule") -> OSError | None:
    """Write the row of the step, if it has one; returns what ended it."""
    try:
        if metrics := module.take_metrics():
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
    except OSError as error:
        return error
    return None


def _is_saving(trainer: L.Trainer) -> bool:
    """Whether this process is still writing its part of a checkpoint."""
    saving = getattr(trainer.strategy, "saving", None)
    return saving is not None and not saving.done()


def named_state(state: dict[str, Any], names: Any) -> dict[str, Any]:
    """Optimizer state by parameter name instead of number.

    Args:
        state: of `Optimizer.state_dict`, or empty on devices that save nothing.
        names: of parameters by their number: a list, or one list for each group.
    """
    if not state:
        return state
    flat = [n for name in names for n in ([name] if isinstance(name, str) else name)]
    return {
        "state": {flat[number]: values for number, values in state["state"].items()},
        "param_groups": [
            group | {"params": [flat[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def numbered_state(state: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """The inverse of `named_state`, for an optimizer with these groups of names."""
    numbers = {name: i for i, name in enumerate(n for names in groups for n in names)}
    saved = {frozenset(group["params"]): group for group in state["param_groups"]}
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [
            saved[frozenset(names)] | {"params": [numbers[name] for name in names]}
            for names in groups
        ],
    }
