"""Hostile input by the thousand: `examples/fuzz.py`, and that it would notice what it looks for.

Each surface is fuzzed in a fork of this process, which knows all modules already.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fusion_upcycle.errors import UpcyclingError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
fuzz: Any = import_module("fuzz")
surfaces: Any = import_module("fuzzing.surfaces")

INPUTS = 20_000


@pytest.mark.early
def test_no_input_does_anything_but_be_read_or_refused() -> None:
    """Without atheris's wheel (Linux, to Python 3.13) another generator takes its part."""
    outcomes = fuzz.run(list(fuzz.surfaces()), INPUTS, seed=0, jobs=1, progress=False)
    record = fuzz.summary(outcomes, 0, 0.0)
    bad = {
        f"{name}: {kind}": (found["where"], found["input"][:400])
        for name, outcome in record["surfaces"].items()
        for kind, found in outcome["bad"].items()
    }
    assert not bad
    assert record["inputs"] >= INPUTS
    bytes_by = "random" if find_spec("atheris") is None else "atheris"
    assert record["engines"][bytes_by] > INPUTS // 2 and record["engines"]["hypothesis"] > 0
    for name, outcome in record["surfaces"].items():
        if name != "card":  # which refuses nothing: what is no card is left out
            assert outcome["refused"] > 0, name
        if name not in ("digests", "router statistics"):  # of which every bit counts
            assert outcome["refused"] < sum(outcome["inputs"].values()), name


def raises(folder: Path) -> None:
    raise KeyError("x")


def panics(folder: Path) -> None:
    raise BaseException("as tokenizers' PanicException")


def writes_outside(folder: Path) -> None:
    (folder.parent / "outside").write_text("x")


def removes_outside(folder: Path) -> None:
    (folder.parent / "nothing").unlink(missing_ok=True)


def runs_a_program(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def runs_code(folder: Path) -> None:
    (folder / "x.py").write_text("1")
    exec(compile((folder / "x.py").read_text(), folder / "x.py", "exec"))


def reads_code(folder: Path) -> None:
    (folder / "modeling_x.py").write_bytes(b"")


def takes_memory(folder: Path) -> None:
    assert bytearray(300 * 2**20)


def takes_time(folder: Path) -> None:
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass


def shows_an_escape(folder: Path) -> None:
    error = UpcyclingError("A message that is long enough.")
    error.args = ("A message that is long enough, and \x1b[31m red.",)
    raise error


def says_nothing(folder: Path) -> None:
    raise UpcyclingError("No.")


def ends_the_process(folder: Path) -> None:
    os._exit(3)


HARMS: list[tuple[Callable[[Path], Any], str]] = [
    (raises, "KeyError at test_fuzz.py"),
    (panics, "BaseException at test_fuzz.py"),
    (writes_outside, "outside: opened for writing"),
    (removes_outside, "outside: os.remove"),
    (runs_a_program, "outside: subprocess.Popen"),
    (runs_code, "outside: ran code of"),
    (reads_code, "outside: opened code"),
    (takes_memory, "too much memory"),
    (takes_time, "too slow"),
    (shows_an_escape, "message"),
    (says_nothing, "message"),
    (ends_the_process, "the process ended"),
]


def test_each_kind_of_harm_is_noticed() -> None:
    def after_a_valid_one(harm: Callable[[Path], Any]) -> Callable[[Path], Any]:
        seen: list[int] = []

        def read(folder: Path) -> None:
            if seen:
                harm(folder)
            seen.append(1)

        return read

    files = [surfaces.File("x.json", [{"a": 1}])]
    harmful = [
        surfaces.Surface(harm.__name__, files, after_a_valid_one(harm), 1, patience=0.005)
        for harm, _ in HARMS
    ]
    outcomes = fuzz.run(harmful, len(HARMS), seed=0, jobs=2, progress=False)
    for (harm, kind), outcome in zip(HARMS, outcomes, strict=True):
        assert any(found.startswith(kind) for found in outcome["bad"]), (harm, outcome)
