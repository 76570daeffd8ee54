"""What is shown while an experiment runs: a live table on a terminal, else a line for each run."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fusion_upcycle.benchmark.request import Request

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST_ERROR = 300  # characters
_HIGHEST = 40  # rows; the others are counted in one


class Board:
    """Context manager: the states of runs, by the rows that they belong to."""

    def __init__(self, requests: Sequence[Request], jobs: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._jobs = jobs
        self._states: dict[Path, str] = {}
        self._rows: dict[Path, str] = {}
        self._began: dict[Path, float] = {}
        self._seconds: list[float] = []
        self._lock = threading.Lock()
        self._console = Console(stderr=True)
        self._live = Live(
            console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True
        )
        self.add(requests)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def add(self, requests: Sequence[Request]) -> None:
        """More runs, those that are complete already among them."""
        with self._lock:
            for request in requests:
                self._rows[request.folder] = request.facts["row"]
                self._states[request.folder] = "there already" if request.complete else "waiting"

    def started(self, request: Request) -> None:
        """A run begins."""
        with self._lock:
            self._states[request.folder] = "running"
            self._began[request.folder] = time.monotonic()

    def ended(self, request: Request) -> None:
        """A run has left its record."""
        result = request.result()
        assert result is not None
        with self._lock:
            self._states[request.folder] = result["status"]
            self._seconds.append(time.monotonic() - self._began[request.folder])
            counts = Counter(self._states.values())
        if result["status"] == "failed":
            self._say(f"failed: {label(request)}: {short_error(request)}")
        elif not self._live.is_started:
            over = len(self._states) - counts["waiting"] - counts["running"]
            self._say(f"{over}/{len(self._states)} {label(request)}: {self._seconds[-1]:.1f} s")

    def is_running(self, request: Request) -> bool:
        """Whether it began and is not over."""
        return self._states[request.folder] == "running"

    def seconds_left(self) -> float | None:
        """As the runs so far, on average; None before the first is over."""
        counts = Counter(self._states.values())
        if not self._seconds:
            return None
        waiting = counts["waiting"] + 0.5 * counts["running"]
        return waiting * sum(self._seconds) / len(self._seconds) / self._jobs

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> "Table":
        from rich.table import Table

        with self._lock:
            states = dict(self._states)
        rows: dict[str, Counter[str]] = {}
        for folder, state in states.items():
            rows.setdefault(self._rows[folder], Counter())[state] += 1
        left = self.seconds_left()
        title = "" if left is None else f"about {left // 60:.0f} min {left % 60:.0f} s left"
        table = Table(title=title)
        for index, header in enumerate(("row", "runs", "done", "running", "failed")):
            table.add_column(header, justify="right" if index else "left")
        shown = sorted(rows.items(), key=lambda row: not row[1]["running"])
        for name, counts in shown[:_HIGHEST]:
            done = counts["done"] + counts["there already"]
            numbers = (sum(counts.values()), done, counts["running"], counts["failed"])
            table.add_row(name, *(str(number) if number else "" for number in numbers))
        total = Counter(states.values())
        table.add_section()
        done = total["done"] + total["there already"]
        numbers = (len(states), done, total["running"], total["failed"])
        table.add_row("all", *(str(number) for number in numbers))
        return table


def label(request: Request) -> str:
    """A run in words."""
    facts = request.facts
    settings = ", ".join(f"{name}={value}" for name, value in facts["settings"].items())
    parts = [f"of {'+'.join(facts['models'])}"] if facts["subset"] else []
    parts += [settings] if settings and facts["purpose"] == "trial" else []
    return " ".join([facts["row"], *parts])


def short_error(request: Request) -> str:
    """The beginning of what went wrong; the record and the console have it all."""
    result = request.result()
    assert result is not None
    line = (result["error"].strip().splitlines() or ["(no message)"])[0]
    return line if len(line) <= _LONGEST_ERROR else f"{line[:_LONGEST_ERROR]} ..."
