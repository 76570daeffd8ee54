"""A run's work folder: one run at a time; failing disks and lost processes end it in one line."""

import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from torch.distributed import DistBackendError

from fusion_upcycle.checkpoint.durable import make_folder
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.training.processes import is_first

#: Who has the folder. The lock is the kernel's, and ends with the process however that ends.
LOCK_FILE = "run.lock"
#: Of file systems without locks.
_CANNOT = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def held(work: Path) -> Iterator[None]:
    """Have the work folder alone; of the processes of a distributed run, the first one has it.

    Warns:
        UserWarning: the file system has no locks.

    Raises:
        UpcyclingError: another run has it: which process, where and since when, and what to do.
    """
    if not is_first():
        yield
        return
    make_folder(work)
    path = work / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpcyclingError(
                f"{work} is in use by another run ({_holder(path)}). Wait for it to end, or end it "
                f"(kill), or choose another {setting('work_folder')}."
            ) from None
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            warnings.warn(
                f"{work} cannot be locked ({error.strerror}): see to it that no other run uses it.",
                stacklevel=3,
            )
        since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
        try:
            yield
        finally:
            os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_bytes())
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written
        return "which has just begun"


@contextmanager
def disk_errors(work: Path) -> Iterator[None]:
    """Say what a disk that is full or fails has ended, and how to go on.

    Raises:
        UpcyclingError: in place of any OSError of the system.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UpcyclingError(
            f"Reading or writing failed: {error}. When that is mended, the same command goes on "
            f"from what is in {work}."
        ) from error


@contextmanager
def lost_processes(work: Path) -> Iterator[None]:
    """Say that another process of the run has ended, in place of the trace of each that is left.

    Raises:
        UpcyclingError: in place of what gloo and NCCL raise then.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistBackendError) or "gloo/transport" in str(error)):
            raise
        raise UpcyclingError(
            "Another process of this run has ended, or cannot be reached "
            f"({str(error).splitlines()[0]}). Why is said by itself, or by torchrun (signal 9 "
            "mostly where memory was full). When that is mended, the same command goes on from "
            f"what is in {work}."
        ) from error
