"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from fusion_upcycle.demo import demo_model


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """Folder of the real demo base model: about 75 s on the first use of a machine, then cached."""
    return demo_model("base")
