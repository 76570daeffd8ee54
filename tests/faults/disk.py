"""A disk of its own in a file, and what a power cut leaves on it: a copy of the file, mounted."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TOOLS = ("mkfs.ext4", "mount", "umount")


def no_disk() -> str:
    """Why there can be no such disk here; empty where there can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "only root can mount"
    return "" if list(Path("/dev").glob("loop*")) else "no loop devices"


class Disk:
    """An ext4 file system in a file.

    Args:
        folder: for the file and where it is mounted.
        size: of the disk, as truncate understands it.
        inodes: how many files it has room for; None leaves that to it.
    """

    def __init__(self, folder: Path, size: str = "64M", inodes: int | None = None):
        self._image = folder / "disk.img"
        subprocess.run(["truncate", "-s", size, self._image], check=True)
        few = [] if inodes is None else ["-N", str(inodes)]
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", *few, self._image], check=True)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Where it is mounted; nothing of it stays."""
        with _mounted(self._image) as folder:
            yield folder

    @contextmanager
    def after_a_power_cut(self) -> Iterator[Path]:
        """What would be there if the power were cut now: what has not reached the disk is lost."""
        copy = self._image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", self._image, copy], check=True)
        try:
            with _mounted(copy) as folder:
                yield folder
        finally:
            copy.unlink()


@contextmanager
def _mounted(image: Path) -> Iterator[Path]:
    folder = image.with_name(f"{image.name}.mounted")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)  # and the loop device goes with it
