"""Commands of ours with a fault at the n-th change that they make to a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
#: Why there can be no faults here; empty where there can.
NOT_HERE = (
    "the shim is of Linux"
    if not sys.platform.startswith("linux")
    else ""
    if COMPILER
    else "no C compiler"
)


@dataclass(frozen=True)
class Fault:
    """What happens before a call that changes the watched folder.

    Attributes:
        point: number of the call; -1 is none of them, and they are only recorded.
        errno: that it returns; 0 sends a signal.
        lasting: whether all later ones return it as well.
        growing: whether only calls that take space are counted.
        signal: that the process gets, where there is no errno.
        then_kill: so many calls after it a kill; 0 is none.
        exchange: whether names can be exchanged in one step.
    """

    point: int = -1
    errno: int = 0
    lasting: bool = False
    growing: bool = False
    then_kill: int = 0
    signal: int = signal.SIGKILL
    exchange: bool = True


@dataclass(frozen=True)
class Call:
    """A call that changes the watched folder: its name, path, and second path."""

    name: str
    path: Path
    second: Path


@dataclass(frozen=True)
class Ended:
    """How a command ended, minus the signal where one ended it, what it said, its calls."""

    status: int
    said: str
    calls: list[Call]


class Warm:
    """The process of `warm.py`, with the shim preloaded.

    Args:
        home: folder for what it needs, outside of the watched ones.
    """

    def __init__(self, home: Path):
        self._home = home
        shim = home / "shim.so"
        assert COMPILER is not None
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-O2", "-o", shim, HERE / "shim.c", "-ldl"], check=True
        )
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        self._process = subprocess.Popen(
            [sys.executable, HERE / "warm.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"LD_PRELOAD": str(shim), "PYTHONPATH": path}
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(
        self,
        arguments: Sequence[str | Path],
        watched: Path | None = None,
        fault: Fault | None = None,
        *,
        seconds: float = 120,
    ) -> Ended:
        """Run a command of ours, or `fusion_bench ...`, in a process of its own."""
        fault = fault or Fault()
        log = self._home / "calls.txt"
        log.unlink(missing_ok=True)
        request = {
            "arguments": [os.fspath(argument) for argument in arguments],
            "folder": str(self._home),
            "watched": None if watched is None else str(watched),
            "point": fault.point,
            "mode": 0 if not fault.errno else 2 if fault.lasting else 1,
            "number": fault.errno or fault.signal,
            "growing": fault.growing,
            "exchange": fault.exchange,
            "then": fault.then_kill,
            "log": str(log),
            "said": str(self._home / "said.txt"),
            "seconds": seconds,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        calls = []
        if log.exists():
            rows = [line.split("\t") for line in log.read_text().splitlines()]
            calls = [Call(name, Path(path), Path(second)) for _, name, path, second in rows]
        return Ended(answer["status"], answer["said"], calls)
