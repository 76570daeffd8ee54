"""The operations as most tests call them: quietly, and without their proof.

The proof costs two to four times what a tiny conversion does. Tests of what it finds, claims or
records ask for it: `verify="auto"`, or the mode.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import files_of

from fusion_upcycle import expand, merge_into_moe, upcycle
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.errors import UpcyclingError

QUICK: dict[str, Any] = {"progress": False, "verify": "none"}


def convert(source: Path, output: Path, **options: Any) -> Converted:
    """`upcycle`."""
    return upcycle(source, output, **QUICK | options)


def grow(source: Path, output: Path, **options: Any) -> Converted:
    """`expand`."""
    return expand(source, output, **QUICK | options)


def merge(models: Any, output: Path, **options: Any) -> Converted:
    """`merge_into_moe`."""
    return merge_into_moe(models, output, **QUICK | options)


def refused(
    operation: Callable[..., object], source: Path, match: str | None = None, **options: Any
) -> None:
    """The operation says so before it writes, and leaves the disk as it was.

    It is the plan that has to notice, as there is no proof.
    """
    before = files_of(source.parent)
    with pytest.raises(UpcyclingError, match=match):
        operation(source, source.parent / "out", **options)
    assert files_of(source.parent) == before
    assert not list(source.parent.glob("*out*"))
