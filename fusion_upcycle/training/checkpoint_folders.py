"""Checkpoints as folders: whatever files are in one, it is there whole and to the bit, or not used.

`step-000000010/` holds the files of a step, `checkpoint.json`, which says of which run they are,
and `SHA256SUMS`. It is written beside, under a hidden name, and takes its own when all of it is on
the disk. In a distributed run every process calls the functions here at the same place: the first
one makes and removes folders, each may write files of its own.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_upcycle.checkpoint.digests import differences, seal
from fusion_upcycle.checkpoint.durable import make_folder, move, sync
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.training.processes import gathered, is_first, place, together

RECORD_FILE = "checkpoint.json"
_PATTERN = re.compile(r"step-\d{9}")
#: Of an identity, what no option sets: its key -> what another version of ours does otherwise.
_BY_VERSION = {"checkpoint": "the format of checkpoints", "order": "the order of examples"}
#: Of versions whose checkpoints were single files without digests.
_OLD_PATTERN = "step-*.ckpt"


@dataclass
class NewCheckpoint:
    """One that is being written.

    Attributes:
        folder: where its files go.
        hashed: name -> SHA-256 of files that this process hashed as it wrote them; the others are
            read again by the first process.
    """

    folder: Path
    hashed: dict[str, str] = field(default_factory=dict)


@contextmanager
def new_checkpoint(path: Path, identity: Mapping[str, Any]) -> Iterator[NewCheckpoint]:
    """Write the checkpoint `path`: it is there, complete and on the disk, when the block has ended.

    A process whose block fails by itself must have done all that the processes do together in it.

    Args:
        path: of `checkpoint_path`. What has that name is replaced.
        identity: what a run must share to go on from it, JSON.

    Raises:
        UpcyclingError: a process could not write; nothing is left under the name, or what was.
    """
    new = NewCheckpoint(path.with_name(f".{path.name}.incomplete"))

    def failed(reason: object) -> str:
        return (
            f"Saving {path} failed: {reason}. When that is mended, the same command goes on from "
            "what was saved before."
        )

    try:
        with together(failed):
            if is_first():
                make_folder(path.parent)
                _clear(path.parent)
                new.folder.mkdir()
        with together(failed):
            yield new
        hashed = {name: found for each in gathered(new.hashed) for name, found in each.items()}
        with together(failed):
            if is_first():
                _complete(new.folder, path, identity, hashed)
    except Exception:
        if is_first():
            shutil.rmtree(new.folder, ignore_errors=True)
        raise


def checkpoint_path(folder: Path, step: int) -> Path:
    """Of the checkpoint of a step; names sort as steps do."""
    return folder / f"step-{step:09d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _PATTERN.fullmatch(path.name))


def latest_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Path | None:
    """The newest checkpoint to go on from; None where there is none at all.

    It is read whole, for its digests (1.7 GB/s for each process; those that can talk to each other
    share its files); those before it only where it is not good.

    Args:
        identity: what it must have been made with, JSON.

    Warns:
        UserWarning: names newer ones that are damaged or of another run, and what is wrong.

    Raises:
        UpcyclingError: none is good, and what to do; or processes do not see the same ones.
    """
    wanted = json.loads(json.dumps(identity))
    unusable, others = [], []
    paths = checkpoints_in(folder)
    agree_on(paths)
    for path in reversed(paths):
        damaged, saved = _read(path)
        if damaged:
            unusable.append(f"{path.name} is damaged ({damaged})")
        elif other := "; ".join(_other_fields("", saved, wanted)):
            others.append(f"{path} is of a run with other settings: {other}.")
            unusable.append(f"{path.name} is of a run with other settings ({other})")
        else:
            if unusable and is_first():
                warnings.warn(
                    f"In {folder} {'; '.join(unusable)}. The run goes on from {path.name}, and "
                    "removes what is newer when it saves again.",
                    stacklevel=2,
                )
            return path
    start_over = f"pass {setting('resume', False)} to start over"
    if others:
        raise UpcyclingError(
            f"{others[0]} Set them back to go on with it, or {start_over} (it will be replaced), "
            f"or choose another {setting('work_folder')}."
        )
    if unusable:
        raise UpcyclingError(
            f"No checkpoint in {folder} is as it was written: {'; '.join(unusable)}. Copy one back "
            f"from where you have it, or {start_over} (they will be removed)."
        )
    if old := sorted(folder.glob(_OLD_PATTERN)):
        raise UpcyclingError(
            f"{old[-1]} is of an earlier version of fusion_upcycle, without digests. End the run "
            f"with that version, or {start_over} (it will be removed)."
        )
    return None


def require_undamaged(path: Path) -> None:
    """Read a checkpoint whole, for its digests.

    Raises:
        UpcyclingError: it is not as it was written, and what of it.
    """
    damaged, _ = _read(path)
    if damaged:
        raise UpcyclingError(
            f"{path} is damaged ({damaged}). Copy it again from where you have it, or give another."
        )


def agree_on(paths: Sequence[Path]) -> None:
    """Refuse that processes go on from different checkpoints.

    Raises:
        UpcyclingError: they would, and from which.
    """
    found = gathered(" ".join(path.name for path in paths))
    if len(set(found)) > 1:
        each = ", ".join(f"{number}: {names or 'none'}" for number, names in enumerate(found))
        raise UpcyclingError(
            f"The processes of this run found different checkpoints ({each}). "
            f"{setting('work_folder')} must be one folder for all of them, on a disk that they "
            "share; then run the same command again."
        )


def keep_only(folder: Path, kept: Sequence[Path]) -> None:
    """Remove all other checkpoints, the oldest first, and what kills have left of any.

    A kill in between leaves none that is half removed.
    """
    _clear(folder)
    for path in [*sorted(folder.glob(_OLD_PATTERN)), *checkpoints_in(folder)]:
        if path not in kept:
            path.rename(path.with_name(f".{path.name}.removed"))
            _clear(folder)


def _clear(folder: Path) -> None:
    """Remove what is not under the name of a checkpoint; what cannot go now may the next time."""
    for path in folder.glob(".step-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _complete(
    staging: Path, path: Path, identity: Mapping[str, Any], hashed: Mapping[str, str]
) -> None:
    def write_record(files: dict[str, str]) -> None:
        text = json.dumps({"identity": identity, "files": files}, indent=2)
        (staging / RECORD_FILE).write_text(text + "\n", encoding="utf-8")

    seal(staging, RECORD_FILE, write_record, hashed)
    if path.exists() or path.is_symlink():  # of a run that went on from an earlier one
        path.rename(path.with_name(f".{path.name}.removed"))
        sync(path.parent)
    move(staging, path)


def _read(path: Path) -> tuple[str, Any]:
    """What is wrong with a checkpoint, or ""; and the identity that is in it."""
    each = gathered(_read_share(path))
    return "; ".join(dict.fromkeys(p for problems, _ in each for p in problems)), each[0][1]


def _read_share(path: Path) -> tuple[list[str], Any]:
    """The same of the files that this process is to read."""
    if path.is_symlink() or not path.is_dir():
        return ["it is no folder"], None
    try:
        record = json.loads((path / RECORD_FILE).read_bytes())
        files = {str(name): str(found) for name, found in record["files"].items()}
        number, processes = place()
        mine = slice(number, None, processes)
        return differences(path, files, RECORD_FILE, part=mine), record["identity"]
    except OSError as error:
        return [str(error)], None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{RECORD_FILE} is no record of a checkpoint"], None


def _other_fields(where: str, saved: Any, wanted: Any) -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*saved, *wanted]):
            name = f"{where}.{key}" if where else _BY_VERSION.get(key, str(key))
            yield from _other_fields(name, saved.get(key), wanted.get(key))
    elif saved != wanted and where in _BY_VERSION.values():
        yield (
            f"{where} was version {saved or 1}, is {wanted} in this version of fusion_upcycle "
            "(the one that began the run can end it)"
        )
    elif saved != wanted:
        yield f"{where} was {saved}, is {wanted}"
