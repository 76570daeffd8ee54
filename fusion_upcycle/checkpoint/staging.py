"""An output folder that appears only when it is complete, and then stays.

Everything is written to a staging folder beside the output, `.NAME.incomplete`, which takes the
output's name when it is complete, proven and on the disk. A failure removes it; after a signal, a
kill or a power cut it stays, and the next run of the same conversion keeps its finished shards. An
output that is replaced is deleted only when the new one is on the disk; what a kill leaves of
either, the next run removes.
"""

import fcntl
import glob
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from fusion_upcycle.checkpoint.durable import exchange, make_folder, sync, sync_tree
from fusion_upcycle.checkpoint.place import check_place, check_space
from fusion_upcycle.errors import UpcyclingError, setting

#: The file by which a folder is known to be an output of ours; holds the plan and the proof.
RECORD_FILE = "upcycling.json"
TRAINING_RECORD_FILE = "training.json"
#: By one of these a folder is known to be an output of ours.
RECORDS = (RECORD_FILE, TRAINING_RECORD_FILE)
#: In a staging folder: what is being written there. It goes before the folder gets its name.
FINGERPRINT_FILE = "conversion.json"
#: What is left in a folder of ours to the end, that a kill in between shows whose it is.
_MARKS = (*RECORDS, FINGERPRINT_FILE)

log = logging.getLogger(__name__)


@contextmanager
def staging_folder(
    output: Path,
    fingerprint: Mapping[str, object],
    *,
    total_bytes: int,
    overwrite: bool,
    shards: Collection[str] = (),
) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the block ends without an error.

    Args:
        output: final path. Must not exist, be empty, or be an earlier output with `overwrite`.
        fingerprint: identifies the conversion.
        total_bytes: to be written; checked against the free space first.
        shards: names of files that a later run with the same fingerprint keeps when they are there.

    Raises:
        UpcyclingError: the output exists, the disk is too small or refuses to write, another
            process is writing.
    """
    output = Path(os.path.realpath(output))  # a link can be written to, but not renamed over
    check_output(output, overwrite=overwrite)
    staging = output.parent / f".{output.name}.incomplete"
    if staging.is_symlink():
        raise UpcyclingError(f"{staging} is a link, and was not made here. Remove or rename it.")
    fresh = not staging.exists()
    try:
        make_folder(output.parent)
        staging.mkdir(exist_ok=True)
    except OSError as error:
        raise UpcyclingError(f"{output} cannot be made: {error}. Choose another output.") from error
    with _reported(output), _locked(staging, output) as folder:
        try:
            _heal(output, staging)
            check_output(output, overwrite=overwrite)  # the old one may be back under its name
            _prepare(staging, fingerprint, shards)
            check_space(staging, total_bytes, len(shards))
        except BaseException:
            if fresh:  # else it is not ours, or holds the finished shards of a killed run
                _remove(staging)
            raise
        try:
            yield staging
            _replace(staging, output, overwrite=overwrite)
        except BaseException as error:
            # Not reached when the process is killed: then finished shards stay for a resume.
            complete = _is_folder(output, folder)
            if complete and isinstance(error, OSError):  # taking the last step back failed as well
                log.warning("%s is complete, but perhaps not on the disk yet: %s.", output, error)
                return
            if complete:
                error.add_note(f"{output} is complete.")
            elif _is_folder(staging, folder):
                _clean_up(staging, shards, error)
            raise


@contextmanager
def _reported(output: Path) -> Iterator[None]:
    """What the system refuses is an error of ours, also where a library in Rust was told so."""
    try:
        yield
    except UpcyclingError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise UpcyclingError(
            f"Writing {output} failed: {error}. The same command starts again when that is mended."
        ) from error


@contextmanager
def _locked(staging: Path, output: Path) -> Iterator[os.stat_result]:
    """Hold the staging folder alone; the lock is the folder itself and leaves no file behind.

    Yields which folder that is, whatever its name becomes.
    """
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        folder = os.fstat(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other process may have finished and renamed the folder in between.
            held = _is_folder(staging, folder)
        except OSError:
            held = False
        if not held:
            raise UpcyclingError(f"Another process is writing {output}. Wait for it to end.")
        yield folder
    finally:
        os.close(descriptor)


def _is_folder(path: Path, folder: os.stat_result) -> bool:
    """Whether a name is that of this very folder."""
    try:
        return os.path.samestat(path.stat(), folder)
    except OSError:
        return False


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to touch anything that is not a previous output of ours, or cannot be replaced.

    Raises:
        UpcyclingError: says why, and what to choose.
    """
    check_place(output)
    try:
        free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    except OSError as error:
        raise UpcyclingError(
            f"{output} cannot be looked at: {error}. Choose another output."
        ) from error
    if free:
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


def _prepare(staging: Path, fingerprint: Mapping[str, object], shards: Collection[str]) -> None:
    """Keep the finished shards of the same conversion in a staging folder, and nothing else."""
    text = json.dumps(fingerprint, indent=2, sort_keys=True).encode()
    record = staging / FINGERPRINT_FILE
    known = record.is_file() and not record.is_symlink()
    if not known and any(staging.iterdir()):
        raise UpcyclingError(f"{staging} exists and was not made here. Remove or rename it.")
    same = known and record.read_bytes() == text
    _empty(staging, shards if same else ())
    _remove_records(staging)
    if not same:
        record.write_bytes(text)


def _empty(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove all that is in a folder of ours but what says so: that a kill in between shows it.

    Args:
        kept: names of files that stay.
    """
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name in kept and path.is_file() and not path.is_symlink():
            continue
        if is_folder:
            shutil.rmtree(path)
        elif path.name not in _MARKS:
            path.unlink()


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


def _clean_up(staging: Path, shards: Collection[str], error: BaseException) -> None:
    """After an error remove all; where the user asked for the end, keep finished shards."""
    asked = not isinstance(error, Exception)
    done = [name for name in shards if (staging / name).is_file()]
    if asked and done and (staging / FINGERPRINT_FILE).is_file():
        error.add_note(
            f"Finished shards ({len(done)} of {len(shards)}) are kept in {staging}: "
            "the same command goes on with them."
        )
    else:
        _remove(staging)


def _replace(staging: Path, output: Path, *, overwrite: bool) -> None:
    """Give `staging` the name of `output`, when it is on the disk; then let go of the old one.

    Raises:
        OSError: a step failed; those before it were taken back.
    """
    check_output(output, overwrite=overwrite)  # it may have appeared since the start
    sync_tree(staging)
    (staging / FINGERPRINT_FILE).unlink()
    sync(staging)
    old = output.parent / f"{_replaced(output)}{uuid4().hex[:8]}" if _is_ours(output) else None
    with ExitStack() as taking_back:
        if old is None:
            staging.rename(output)
            taking_back.callback(output.rename, staging)
        elif exchange(staging, output):
            taking_back.callback(exchange, staging, output)
            staging.rename(old)
            taking_back.callback(old.rename, staging)
        else:  # between these two there is nothing under the name: `_heal` mends that
            output.rename(old)
            taking_back.callback(old.rename, output)
            staging.rename(output)
            taking_back.callback(output.rename, staging)
        sync(output.parent)
        taking_back.pop_all()
    if old is not None:
        _remove(old)
        if old.exists():
            log.warning("%s, the output that was replaced, could not be removed yet.", old)


def _replaced(output: Path) -> str:
    """What the names begin with under which replaced outputs wait for their removal."""
    return f".{output.name}.replaced-"


def _heal(output: Path, staging: Path) -> None:
    """Finish what a kill left of a replacement.

    The old output has a name of its own then, and perhaps there is none under the output's; or it
    has that of the staging folder, where nothing says what is being written.
    """
    for old in output.parent.glob(f"{glob.escape(_replaced(output))}*"):
        if old.is_symlink() or not old.is_dir():
            continue
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
