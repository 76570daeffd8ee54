"""One run: as it is asked for, in `run.json`, and as it is left, in its record."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.report.record import RECORD_NAME, write_run_record

REQUEST_NAME = "run.json"
CONSOLE_NAME = "console.log"
SECTION = "benchmark"


@dataclass(frozen=True)
class Request:
    """One `fusion_bench` run.

    Attributes:
        folder: of its results, absolute.
        arguments: of `fusion_bench`.
        config_hash: of its resolved config, but for the folder.
        facts: of its row, for the record.
    """

    folder: Path
    arguments: Sequence[str]
    config_hash: str
    facts: Mapping[str, Any]

    def result(self) -> dict[str, Any] | None:
        """The record's section of this very run; None where it did not end, or was another."""
        path = self.folder / RECORD_NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))[SECTION]
        except (OSError, ValueError, KeyError):
            return None
        return found if found.get("config_hash") == self.config_hash else None

    @property
    def complete(self) -> bool:
        """Whether it was made, with this config."""
        result = self.result()
        return result is not None and result["status"] == "done"

    def write(self) -> None:
        """Make the folder for the run; what an interrupted run of the same config left stays, since
        a training goes on from it.

        Raises:
            UpcyclingError: there is something that no benchmark made.
        """
        path = self.folder / REQUEST_NAME
        if path.is_file() and json.loads(path.read_text())["config_hash"] != self.config_hash:
            shutil.rmtree(self.folder)
        elif self.folder.is_dir() and any(self.folder.iterdir()) and not path.is_file():
            raise UpcyclingError(
                f"{self.folder} holds something that no benchmark made: move it away, or set "
                "output to another folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (RECORD_NAME, "program_report.json"):
            (self.folder / name).unlink(missing_ok=True)
        content = {
            "arguments": list(self.arguments),
            "config_hash": self.config_hash,
            "facts": dict(self.facts),
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
        temporary.replace(path)

    def refresh(self) -> None:
        """What is said of a complete run follows the experiment: labels, headings, metrics."""
        result = self.result()
        assert result is not None
        if any(result.get(name) != value for name, value in self.facts.items()):
            write_run_record(SECTION, {**result, **self.facts}, self.folder)

    def leave(self, error: str | None, report: Any, costs: Mapping[str, Any]) -> None:
        """Write how the run ended."""
        section = {
            **self.facts,
            "status": "done" if error is None else "failed",
            "error": error,
            "config_hash": self.config_hash,
            "arguments": list(self.arguments),
            "costs": dict(costs),
            "report": _finite(report),
        }
        write_run_record(SECTION, section, self.folder)


def read_request(folder: Path) -> Request:
    """What `Request.write` wrote."""
    content = json.loads((folder / REQUEST_NAME).read_text(encoding="utf-8"))
    return Request(folder, tuple(content["arguments"]), content["config_hash"], content["facts"])


def _finite(report: Any) -> Any:
    """JSON has no NaN: a number that is none becomes null."""
    if isinstance(report, Mapping):
        return {str(name): _finite(value) for name, value in report.items()}
    if isinstance(report, list):
        return [_finite(value) for value in report]
    is_number = isinstance(report, float)
    return None if is_number and report - report != 0 else report
