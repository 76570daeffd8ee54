"""Prove an output folder again, whatever operation made it."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion_upcycle.addition import run as addition
from fusion_upcycle.addition.addition import Addition
from fusion_upcycle.checkpoint.digests import check_files
from fusion_upcycle.checkpoint.located import locate_model
from fusion_upcycle.checkpoint.staging import RECORDS, TRAINING_RECORD_FILE
from fusion_upcycle.conversion.run import prove_folder
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.expansion import run as expansion
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.merging.merging import Merging
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.untrusted import read_json
from fusion_upcycle.upcycling import run as upcycling
from fusion_upcycle.upcycling.run import check_base
from fusion_upcycle.upcycling.upcycling import Upcycling
from fusion_upcycle.verification.proof import Proof

#: The method of a record -> the module that plans its conversion again.
_FILES_ONLY = "verify --quick checks that its files are as they were written."
_OPERATIONS = {
    Upcycling.method: upcycling,
    Expansion.method: expansion,
    Addition.method: addition,
}


def verify_files(output: str | Path, *, progress: bool = True) -> int:
    """Check that a folder of ours has exactly the files that were written, bit for bit.

    Every flipped bit, missing, replaced or added file is found by the digests that were taken while
    the folder was written. Needs no source; `sha256sum -c SHA256SUMS` does half of it elsewhere.

    Args:
        output: folder made by any command of ours, or a copy of it.
        progress: show a progress bar.

    Returns:
        How many files were checked; 0 for an output of an earlier version, which has no digests.

    Raises:
        UpcyclingError: not an output of ours.
        ProofError: names each file that is not as it was written.
    """
    output = Path(output).expanduser()
    return _check_files(output, *_record(output), progress=progress)


def _check_files(output: Path, path: Path, record: Mapping[str, Any], *, progress: bool) -> int:
    with _reading(path):
        files = record.get("files")
        if files is not None:
            files = {str(name): str(found) for name, found in files.items()}
    total = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    with progress_bar("Checking files", total, progress) as bar:
        return check_files(output, files, path.name, bar.update)


def verify(
    output: str | Path,
    source: str | Path | None = None,
    *,
    base: str | Path | None = None,
    mode: str = "auto",
    progress: bool = True,
) -> Proof:
    """Prove an output folder again: its files, then all of it against the source.

    Args:
        output: folder made by `upcycle`, `expand` or `add_expert`.
        source: where the source is now, if it has moved.
        base: where the base model of an adapter is now, if it has moved.
        mode: `layers`, `logits` or `auto`.
        progress: show progress bars.

    Raises:
        UpcyclingError: not an output of ours, its source is not there, or a merge, which is proven
            only when it is made.
        ProofError: the folder is not what its record says.
    """
    if mode == "none":
        raise UpcyclingError("verify needs a mode that verifies: layers, logits or auto.")
    output = Path(output).expanduser()
    path, record = _record(output)
    if _check_files(output, path, record, progress=progress) == 0:
        warnings.warn(
            f"{output} was made by an earlier version, which took no digests of files: its weights "
            "and config are proven, its tokenizer and other files are not looked at.",
            stacklevel=2,
        )
    if path.name == TRAINING_RECORD_FILE:
        raise UpcyclingError(
            f"{output} was trained, so that there is nothing to compare its weights with. "
            f"{_FILES_ONLY}"
        )
    with _reading(path):
        name, method, options = record["source"]["name"], record["method"], dict(record["options"])
        if not isinstance(name, str):
            raise TypeError(f"source {name!r}")
        operation = _OPERATIONS.get(method)
        if base is None and "base" in record["source"]:
            base = str(record["source"]["base"]["name"])
    if method == Merging.method:
        raise UpcyclingError(
            f"{output} is a merge of several models, which is proven when it is made, and only "
            f"then. {_FILES_ONLY} To prove it again, merge again."
        )
    if operation is None:
        raise unknown(f"method in {path}:", str(method), _OPERATIONS)
    record["options"] = operation.recorded_options(options)  # refuses in its own words
    with _reading(path):
        plan = operation.replan(record)
    at = locate_model(source or name, base)
    check_base(at, base)
    return prove_folder(plan(at, output), at, output, mode=mode, progress=progress)


def _record(output: Path) -> tuple[Path, dict[str, Any]]:
    """Place and contents of the record of an output.

    Raises:
        UpcyclingError: there is none, or a damaged one.
    """
    for name in RECORDS:
        if (path := output / name).is_file():
            with _reading(path):
                record = read_json(path)
                if not isinstance(record, dict):
                    raise TypeError("it is no JSON object")
                return path, record
    raise UpcyclingError(f"{output} has no {' or '.join(RECORDS)}: it is not an output of ours.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong in the block is put down to the record's being damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UpcyclingError(
            f"{path} cannot be used: {error!r}. An output whose initialiser is a function of your "
            "own can only be proven when it is made."
        ) from error
