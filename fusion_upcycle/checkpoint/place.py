"""Whether a folder can be made at a place: its name, what is mounted there, and the room."""

import os
from pathlib import Path

from fusion_upcycle.errors import UpcyclingError

_MOUNTS = Path("/proc/self/mountinfo")
#: Room for config, tokenizer and file system overhead beside the tensors.
_SPARE_BYTES = 64 * 2**20
_SPARE_FILES = 64
#: Of a file system; staging and replaced folders have longer names than their output.
_MOST_BYTES_OF_A_NAME = 200


def check_place(output: Path) -> None:
    """Refuse a place at which no folder could appear in the end.

    Raises:
        UpcyclingError: says why, and what to choose.
    """
    check_name(output)
    if len(os.fsencode(output.name)) > _MOST_BYTES_OF_A_NAME:
        raise UpcyclingError(f"The name {output.name} is too long. Choose another output.")
    if is_mount_point(output):
        raise UpcyclingError(
            f"{output} is a mount point, which no finished folder can take the place of. Choose a "
            f"folder below it, such as {output / 'model'}."
        )


def check_name(path: str | Path) -> None:
    """Refuse a path that records, cards and the screen cannot hold.

    Raises:
        UpcyclingError: shows it with escapes.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UpcyclingError(
            f"The path {shown} is not UTF-8, so no record can name it. Rename it, or go by a link "
            "with another name."
        ) from error


def is_mount_point(path: Path) -> bool:
    """Whether another file system, or folder, is mounted there."""
    if os.path.ismount(path):
        return True
    try:  # what shows another folder of the same file system is known to the system alone
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    escaped = os.fsencode(path)
    for character in b"\\ \t\n":  # the backslash first
        escaped = escaped.replace(bytes([character]), b"\\%03o" % character)
    return any(line.split(b" ")[4] == escaped for line in lines)


def check_space(folder: Path, total_bytes: int, files: int) -> None:
    """Refuse to begin what the disk has no room for; a quota shows only where it is its size.

    Args:
        folder: to be written to.
        total_bytes: of all that will be in it, some of which may be there.
        files: how many of them.

    Raises:
        UpcyclingError: says how much is missing.
    """
    done = [path.stat().st_size for path in folder.glob("*.safetensors")]
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < (needed := total_bytes - sum(done) + _SPARE_BYTES):
        raise UpcyclingError(
            f"Not enough free disk at {folder.parent}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free. Free some, or choose an output on another disk."
        )
    # Of no use where files are not counted, as on btrfs.
    if disk.f_files and disk.f_favail < (more := files - len(done) + _SPARE_FILES):
        raise UpcyclingError(
            f"Not enough free inodes at {folder.parent}: {more:,} files are to be made, there is "
            f"room for {disk.f_favail:,}. Remove some, or choose an output on another disk."
        )
