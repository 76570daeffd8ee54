"""Fixtures that several test files share, and the order of the tests."""

import os
from pathlib import Path

import pytest

from fusion_upcycle.demo import demo_model

# Before anything imports torch. Tiny models gain nothing by more threads, and two workers with two
# threads each ran four times slower on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """Folder of the real demo base model: about 75 s on the first use of a machine, then cached."""
    return demo_model("base")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the demo base comes first, and what takes long in the middle.

    pytest-xdist gives each of two workers one half of the tests, in this order, and then what the
    other has left at its end. So one of them trains the base while the other does the long tests,
    neither waits for the other, and the last tests are short ones.
    """
    needs_base = [item for item in items if "demo_base" in getattr(item, "fixturenames", ())]
    early = [item for item in items if item.get_closest_marker("early")]
    others = [item for item in items if item not in {*needs_base, *early}]
    half = len(items) // 2 - len(needs_base)
    items[:] = [*needs_base, *others[:half], *early, *others[half:]]
