"""Digests of all files of an output: what was written is what is there, to the bit.

`SHA256SUMS` lists every file of the folder in the format of coreutils, so that `sha256sum -c`
checks a copy anywhere. The record lists the same but itself: who weakens one is told by the other.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fusion_upcycle.checkpoint.staging import FINGERPRINT_FILE
from fusion_upcycle.errors import ProofError
from fusion_upcycle.untrusted import LARGE, read_bytes

SUMS_FILE = "SHA256SUMS"
#: What the Hub's own tools put beside what they download.
_OF_THE_HUB = (".cache/huggingface/", ".gitattributes")
_PIECE = 4 * 2**20


def digest(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file, hexadecimal; `progress` is told how many bytes were read."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while piece := handle.read(_PIECE):
            found.update(piece)
            progress(len(piece))
    return found.hexdigest()


def seal(
    staging: Path,
    record: str,
    write_record: Callable[[dict[str, str]], object],
    hashed: Mapping[str, str] | None = None,
) -> None:
    """Write the record with the digests of all files, and `SHA256SUMS`: nothing comes after it.

    Args:
        staging: of `staging_folder`, complete but for the record.
        record: name of the record's file.
        write_record: takes name -> SHA-256 of all other files, and writes the record.
        hashed: digests of files that were hashed while they were written.
    """
    known = hashed or {}
    names = [n for n in _files(staging) if n not in (SUMS_FILE, FINGERPRINT_FILE, record)]
    files = {name: known.get(name) or digest(staging / name) for name in sorted(names)}
    write_record(files)
    _write_sums(staging, {**files, record: digest(staging / record)})


def _write_sums(folder: Path, files: Mapping[str, str]) -> None:
    """A line for each file, its name escaped as coreutils does."""
    lines = []
    for name, found in files.items():
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        mark = "" if escaped == name else "\\"
        lines.append(f"{mark}{found}  {escaped}\n")
    (folder / SUMS_FILE).write_bytes(os.fsencode("".join(lines)))


def check_files(
    folder: Path,
    recorded: Mapping[str, str] | None,
    record: str,
    progress: Callable[[int], object] = lambda _: None,
) -> int:
    """Check that a folder holds exactly the files that were written, bit for bit.

    Args:
        recorded: what the record says of all files but itself; None where it says nothing.
        record: the record's name.
        progress: told how many bytes were read.

    Returns:
        How many files there are; 0 for an output of an earlier version, which has no digests.

    Raises:
        ProofError: names each file that differs, is missing, or was not written here.
    """
    if recorded is None and not (folder / SUMS_FILE).is_file():
        return 0
    if problems := differences(folder, recorded, record, progress):
        raise ProofError(
            f"{folder} is not as it was written: {'; '.join(problems)}. Make or download it again."
        )
    return len(dict(_listed(folder / SUMS_FILE)))


def differences(
    folder: Path,
    recorded: Mapping[str, str] | None,
    record: str,
    progress: Callable[[int], object] = lambda _: None,
    *,
    part: slice = slice(None),
) -> list[str]:
    """What of a folder is not as it was written, in words; the arguments are `check_files`'.

    Args:
        part: of the files, in the order of their names, that are read; others are only there.
    """
    sums = folder / SUMS_FILE
    listed = dict(_listed(sums)) if sums.is_file() else {}
    problems = []
    if not sums.is_file():
        problems.append(f"{SUMS_FILE} is missing")
    elif {name: found for name, found in listed.items() if name != record} != recorded:
        problems.append(f"{SUMS_FILE} and {record} disagree")
    expected = {**(recorded or {}), **listed}
    there = {name for name in _files(folder) if not name.startswith(_OF_THE_HUB)}
    problems += [f"{name} is missing" for name in sorted(expected.keys() - there)]
    problems += [
        f"{name} was not written here" for name in sorted(there - expected.keys() - {SUMS_FILE})
    ]
    for name in sorted(expected.keys() & there)[part]:
        path = folder / name
        if path.is_symlink() and not _in_cache(folder, name):
            problems.append(f"{name} has become a link")
        elif not path.is_file():
            problems.append(f"{name} is no file")
        elif digest(folder / name, progress) != expected[name]:
            # Which of the two was changed, nothing else tells.
            problems.append(f"{name} differs" + f" from {SUMS_FILE}" * (name == record))
    return problems


def _in_cache(folder: Path, name: str) -> bool:
    """Whether a link is one of the Hub's cache, to a blob of its own."""
    return (folder / name).resolve().is_relative_to((folder / "../../blobs").resolve())


def _files(folder: Path) -> Iterator[str]:
    """Names of all files, and of links, which are not followed."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for file in (*files, *links):
            yield Path(place, file).relative_to(folder).as_posix()


def _listed(sums: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of each line; of one that is none, the line itself, which no file has."""
    for line in os.fsdecode(read_bytes(sums, LARGE)).split("\n")[:-1]:
        escaped = line.startswith("\\")
        found, _, name = line.removeprefix("\\").partition("  ")
        if escaped:
            parts = name.split("\\\\")
            name = "\\".join(p.replace("\\n", "\n").replace("\\r", "\r") for p in parts)
        yield name or line, found
