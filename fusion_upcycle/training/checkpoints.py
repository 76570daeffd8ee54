"""Checkpoints that survive a crash at any moment, and are the same for every strategy."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from fusion_upcycle.checkpoint.durable import sync
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.training.stopping import Stopping

#: Raised when another version of ours could not go on with what is in one.
CHECKPOINT_VERSION = 2
#: Of an identity, what no option sets: its key -> what another version of ours does otherwise.
_BY_VERSION = {"checkpoint": "the format of checkpoints", "order": "the order of examples"}
_KEPT = 2
_NAME = "step-{:09d}.ckpt"
_PATTERN = re.compile(r"step-(\d{9})\.ckpt")


class AtomicCheckpointIO(CheckpointIO):
    """Files that appear under their name only when complete and on the disk.

    They hold tensors and plain data, so that loading runs no code (`weights_only`).
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        assert storage_options is None
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class CheckpointEvery(Checkpoint):
    """Save every so many steps or minutes, when the run is to stop, and at the end; keep two.

    Args:
        folder: of the checkpoints.
        every: steps; 0 is the end of the run only.
        minutes: since the last one, or since the start; 0 does not look at the time.
        stopping: says when the run is to stop, on any of the devices.
    """

    def __init__(self, folder: Path, every: int, minutes: float, stopping: Stopping):
        self._folder, self._every, self._seconds = folder, every, 60 * minutes
        self._stopping, self._last = stopping, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        late = self._seconds > 0 and time.monotonic() - self._last >= self._seconds
        # Clocks differ and a signal may reach one process only, but all must save the same step.
        wish = torch.tensor([late, self._stopping.asked is not None], dtype=torch.float32)
        wish = wish.to(trainer.strategy.root_device)
        late, stop = trainer.strategy.reduce(wish, reduce_op="max").bool().tolist()
        if stop and self._stopping.asked is None:
            self._stopping.asked = signal.SIGTERM  # of another process
        trainer.should_stop |= stop
        if not (module.due(self._every) or late or stop):
            return
        trainer.save_checkpoint(self._folder / _NAME.format(trainer.global_step))
        self._last = time.monotonic()
        if trainer.is_global_zero:
            for old in checkpoints_in(self._folder)[:-_KEPT]:
                old.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors mapped from the disk; no code is run."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("*.ckpt") if _PATTERN.fullmatch(path.name))


def last_checkpoint(folder: Path, identity: dict[str, Any], key: str) -> Path | None:
    """The checkpoint to go on with; None where there is none.

    Args:
        identity: what the checkpoint must have been made with, found in it under `key`.

    Raises:
        UpcyclingError: it was made with something else, which is named, or by another version.
    """
    found = checkpoints_in(folder)
    if not found:
        return None
    saved = load_checkpoint(found[-1])[key]
    for name, what in _BY_VERSION.items():
        if (was := saved.get(name, 1)) != (now := identity[name]):
            raise UpcyclingError(
                f"{found[-1]} was saved by another version of fusion_upcycle: {what} was version "
                f"{was}, is {now}. Finish the run with the version that began it, or pass "
                f"{setting('resume', False)} to start over (it will be replaced), or choose "
                f"another {setting('work_folder')}."
            )
    if differences := list(_differences("", saved, identity)):
        raise UpcyclingError(
            f"{found[-1]} is of a run with other settings: {'; '.join(differences)}. Set them back "
            f"to go on with it, or pass {setting('resume', False)} to start over (it will be "
            f"replaced), or choose another {setting('work_folder')}."
        )
    return found[-1]


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


def _differences(where: str, saved: Any, wanted: Any) -> Any:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*saved, *wanted]):
            name = f"{where}.{key}" if where else str(key)
            yield from _differences(name, saved.get(key), wanted.get(key))
    elif saved != wanted:
        yield f"{where} was {saved}, is {wanted}"
