"""An output folder that appears only when it is complete, and then stays.

Everything is written to a staging folder beside the output, `.NAME.incomplete`, which takes the
output's name when it is complete, proven and on the disk. A failure removes it; after a kill or a
power cut it stays, and the next run of the same conversion keeps its finished shards. An output
that is replaced is deleted only when the new one is on the disk; what a kill leaves of either, the
next run removes.
"""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fusion_upcycle.checkpoint.durable import exchange, make_folder, sync, sync_tree
from fusion_upcycle.errors import UpcyclingError, setting

#: The file by which a folder is known to be an output of ours; holds the plan and the proof.
RECORD_FILE = "upcycling.json"
TRAINING_RECORD_FILE = "training.json"
#: By one of these a folder is known to be an output of ours.
RECORDS = (RECORD_FILE, TRAINING_RECORD_FILE)
#: In a staging folder: what is being written there. It goes last.
FINGERPRINT_FILE = "conversion.json"
#: What is left in a folder of ours to the end, that a kill in between shows whose it is.
_MARKS = (*RECORDS, FINGERPRINT_FILE)
#: Room for config, tokenizer and file system overhead beside the tensors.
_SPARE_BYTES = 64 * 2**20


@contextmanager
def staging_folder(
    output: Path, fingerprint: Mapping[str, object], *, total_bytes: int, overwrite: bool
) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the block ends without an error.

    Args:
        output: final path. Must not exist, be empty, or be an earlier output with `overwrite`.
        fingerprint: identifies the conversion; a left-over staging folder is kept only for it.
        total_bytes: to be written; checked against the free space first.

    Raises:
        UpcyclingError: the output exists, the disk is too small, another process is writing.
    """
    output = output.resolve()  # "." or a link can be written to, but not renamed over
    check_output(output, overwrite=overwrite)
    staging = output.parent / f".{output.name}.incomplete"
    fresh = not staging.exists()
    try:
        make_folder(output.parent)
        staging.mkdir(exist_ok=True)
    except OSError as error:
        raise UpcyclingError(f"{output} cannot be made: {error}. Choose another output.") from error
    with _locked(staging, output):
        try:
            _heal(output, staging)
            check_output(output, overwrite=overwrite)  # the old one may be back under its name
            _prepare(staging, fingerprint)
            _check_free_space(staging, total_bytes)
        except UpcyclingError:
            if fresh:  # else it is not ours, or holds the finished shards of a killed run
                _remove(staging)
            raise
        try:
            yield staging
            _replace(staging, output, overwrite=overwrite)
        except BaseException as error:
            # Not reached when the process is killed: then finished shards stay for a resume.
            _remove(staging)
            if isinstance(error, OSError):
                raise UpcyclingError(f"Writing {output} failed: {error}.") from error
            raise


@contextmanager
def _locked(staging: Path, output: Path) -> Iterator[None]:
    """Hold the staging folder alone; the lock is the folder itself and leaves no file behind."""
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other process may have finished and renamed the folder in between.
            held = os.path.samestat(os.fstat(descriptor), staging.stat())
        except OSError:
            held = False
        if not held:
            raise UpcyclingError(f"Another process is writing {output}. Wait for it to end.")
        yield
    finally:
        os.close(descriptor)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to touch anything that is not a previous output of ours."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not _is_ours(output):
        raise UpcyclingError(
            f"{output} exists and is not an output of fusion_upcycle (it has no {RECORD_FILE} or "
            f"{TRAINING_RECORD_FILE}), so it is never overwritten. Choose another output or remove "
            "it yourself."
        )
    if not overwrite:
        raise UpcyclingError(f"{output} exists. Pass {setting('overwrite', True)} to replace it.")


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RECORDS)


def _prepare(staging: Path, fingerprint: Mapping[str, object]) -> None:
    """Keep a left-over staging folder of the same conversion; else start with an empty one."""
    text = json.dumps(fingerprint, indent=2, sort_keys=True)
    record = staging / FINGERPRINT_FILE
    if any(staging.iterdir()) and not record.is_file():
        raise UpcyclingError(f"{staging} exists and was not made here. Remove or rename it.")
    if record.is_file() and record.read_text() != text:
        _empty(staging)
        _remove_records(staging)
    record.write_text(text)
    for part in staging.glob("*.part"):
        part.unlink()


def _empty(folder: Path) -> None:
    """Remove all that is in a folder of ours but what says so: that a kill in between shows it."""
    for path in folder.iterdir():
        if path.name not in _MARKS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_records(staging: Path) -> None:
    """Make a staging folder no output: its fingerprint says then whose it is."""
    for name in RECORDS:
        (staging / name).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder of ours; a kill in between leaves one that the next run knows."""
    try:
        _empty(folder)
    except OSError:
        return  # what led here matters more, and the next run tries again
    shutil.rmtree(folder, ignore_errors=True)


def _check_free_space(staging: Path, total_bytes: int) -> None:
    done = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
    free = shutil.disk_usage(staging).free
    if free < (needed := total_bytes - done + _SPARE_BYTES):
        raise UpcyclingError(
            f"Not enough free disk at {staging.parent}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free. Free some, or choose an output on another disk."
        )


def _replace(staging: Path, output: Path, *, overwrite: bool) -> None:
    """Give `staging` the name of `output`, when it is on the disk; then let go of the old one."""
    check_output(output, overwrite=overwrite)  # it may have appeared since the start
    sync_tree(staging)
    old = None
    if _is_ours(output):
        old = Path(tempfile.mkdtemp(prefix=_replaced(output), dir=output.parent))
        if exchange(staging, output):
            staging.rename(old)
        else:  # between these two there is nothing under the name: `_heal` mends that
            output.rename(old)
            staging.rename(output)
    else:
        staging.rename(output)
    sync(output.parent)
    (output / FINGERPRINT_FILE).unlink()
    sync(output)
    if old is not None:
        _remove(old)


def _replaced(output: Path) -> str:
    """What the names begin with under which replaced outputs wait for their removal."""
    return f".{output.name}.replaced-"


def _heal(output: Path, staging: Path) -> None:
    """Finish what a kill left of a replacement.

    The old output has a name of its own then, and perhaps there is none under the output's; or it
    has that of the staging folder, where nothing says what is being written.
    """
    for old in output.parent.glob(f"{glob.escape(_replaced(output))}*"):
        if not any(old.iterdir()):
            old.rmdir()
        elif _is_ours(old) and not output.exists():
            old.rename(output)
            sync(output.parent)
        elif _is_ours(old):
            _remove(old)
    record = staging / FINGERPRINT_FILE
    if _is_ours(staging) and not record.exists():
        record.write_text("{}")
        _remove_records(staging)
