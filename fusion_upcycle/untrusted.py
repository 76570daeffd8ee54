"""Files that strangers wrote: read in bounded time and memory, or refused by name.

Every small file of a model, a record or a run is read here: JSON, templates, digests. A limit is
several times what the largest published model has, and stands where the file is read.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError

#: Bytes of a small JSON file: a config, a record, a template, scores. JSON takes up to 30 times as
#: much in memory as on the disk. The largest that are known have one or two million.
SMALL = 16 * 2**20
#: Bytes of a tokenizer's file or an index; Gemma's tokenizer has 34 million, DeepSeek-V3's index 9.
LARGE = 64 * 2**20

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(path: Path, most: int = SMALL) -> bytes:
    """The contents of a file, of a bounded size.

    Args:
        most: bytes that it may have.

    Raises:
        UpcyclingError: it is larger, no regular file, or cannot be read.
    """
    try:
        # Without waiting for whoever writes into a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as handle:
            found = os.fstat(descriptor)
            kind = stat.S_IFMT(found.st_mode)
            if kind != stat.S_IFREG:
                raise UpcyclingError(
                    f"{path} is {_KINDS.get(kind, 'something')}, not a file. Put the model's own "
                    "in its place."
                )
            if found.st_size > most:
                raise UpcyclingError(
                    f"{path} has {found.st_size:,} bytes: more than {most:,}, so that it is not "
                    "read. No file of this name needs as many; get it again from where it is from."
                )
            content = handle.read(found.st_size)
            while more := handle.read(most):  # it is being written, or the system's own
                content += more
                if len(content) > most:
                    raise UpcyclingError(f"{path} grows while it is read. Start again when it is.")
            return content
    except OSError as error:
        if os.path.isdir(path):
            raise UpcyclingError(f"{path} is a folder, not a file.") from error
        raise UpcyclingError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        if isinstance(error, UpcyclingError):
            raise
        raise UpcyclingError(f"{path} is no name of a file.") from error  # it has a NUL


def read_text(path: Path, most: int = SMALL) -> str:
    """The contents of a UTF-8 file.

    Raises:
        UpcyclingError: as `read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise UpcyclingError(f"{path} is damaged (no UTF-8). Get it again.") from error


def read_json(path: Path, most: int = SMALL) -> Any:
    """What a JSON file says.

    Raises:
        UpcyclingError: as `read_bytes`, or no JSON.
    """
    try:
        return json.loads(read_bytes(path, most))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UpcyclingError):
            raise
        raise UpcyclingError(
            f"{path} is damaged ({error}). Get it again from where it is from."
        ) from error


def read_object(path: Path, most: int = SMALL) -> dict[str, Any]:
    """What a JSON file says that holds an object.

    Raises:
        UpcyclingError: as `read_json`, or something else than an object.
    """
    found = read_json(path, most)
    if not isinstance(found, dict):
        raise UpcyclingError(f"{path} is damaged (not a JSON object). Get it again.")
    return found
