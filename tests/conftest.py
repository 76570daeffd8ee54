"""Fixtures that several test files share, and the order of the tests."""

import os
import shutil
import signal
from itertools import islice
from pathlib import Path

import pytest

from fusion_upcycle.demo import demo_model

# Before anything imports torch. Tiny models gain nothing by more threads, and two workers with two
# threads each ran four times slower on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests write 40,000 files that nobody needs afterwards, and wait for the disk to have them: a
# file system in memory gives them back sooner, and nothing here asks what survives a power cut.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# A shell starts what is put into the background with Ctrl-C ignored, and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """Folder of the shipped base model, to be read only."""
    return demo_model("base")


@pytest.hookimpl(trylast=True)  # what is not run is left out by then, or the shares were others
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long is at the start of each worker's share.

    pytest-xdist gives each worker an equal share of the tests, in this order, and then what another
    has left at its end. So all begin with long tests, and the last tests are short ones. Those of
    a file stay together, which starts its programs once.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    early = [item for item in items if item.get_closest_marker("early")]
    others = iter([item for item in items if not item.get_closest_marker("early")])
    files = list(dict.fromkeys(item.path for item in early))
    ends = [len(items) * (n + 1) // workers for n in range(workers)]
    items[:] = []
    for n, end in enumerate(ends):
        items += [item for item in early if files.index(item.path) % workers == n]
        items += islice(others, max(0, end - len(items)))
