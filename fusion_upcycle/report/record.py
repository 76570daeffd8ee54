"""Run records: one ``run_record.json`` per run, from which all tables and plots are made.

Metrics carry their unit in the key: ``loss_nats_per_token``, ``wall_seconds``, ``peak_rss_bytes``.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from fusion_upcycle.errors import UpcyclingError

SCHEMA = 1
RECORD_NAME = "run_record.json"
#: Of a benchmark's folder: which runs below it belong to the experiment as it is now.
MANIFEST_NAME = "experiment.json"
_DISTRIBUTIONS = ("torch", "transformers", "fusion_bench", "lightning", "fusion_upcycle")


@dataclass
class Measured:
    """Context manager: the cost of its block.

    Attributes, valid after the block (also when it raised): ``wall_seconds``; ``cpu_seconds`` of
    this process, all threads; ``peak_rss_bytes``, the largest resident memory of the process since
    it started, which an earlier and larger block may have set.
    """

    wall_seconds: float = field(default=0.0, init=False)
    cpu_seconds: float = field(default=0.0, init=False)
    peak_rss_bytes: int = field(default=0, init=False)
    _started: tuple[float, float] = field(default=(0.0, 0.0), init=False, repr=False)

    def __enter__(self) -> "Measured":
        self._started = (time.perf_counter(), time.process_time())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.wall_seconds = time.perf_counter() - self._started[0]
        self.cpu_seconds = time.process_time() - self._started[1]
        self.peak_rss_bytes = peak_rss_bytes()

    def as_record(self) -> dict[str, float | int]:
        """The three measurements, ready for a run record."""
        return {
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def write_run_record(
    section: str, record: Mapping[str, Any], folder: Path | str | None = None
) -> Path | None:
    """Set ``section`` of the folder's ``run_record.json`` to ``record`` and return the file's path.

    Other sections of the file stay; the file is replaced in one step. ``folder=None`` means the
    output folder of the running Hydra job, and without one nothing is written and None returned.

    Raises:
        UpcyclingError: ``record`` holds something JSON cannot (NaN and infinity included),
            ``section`` is a name that the record itself uses, or the existing file is not a run
            record.
    """
    if folder is None:
        folder = hydra_output_folder()
        if folder is None:
            return None
    header = _header()
    if section in header:
        raise UpcyclingError(
            f"Section {section!r} of the run record is taken by its header: use another name."
        )
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UpcyclingError(
            f"Section {section!r} of the run record is not JSON ({error}): "
            "give plain dict, list, str, int, bool, None and finite float."
        ) from error

    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**_read(path), **header, section: record}
    temporary = path.with_name(f".{RECORD_NAME}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UpcyclingError(
            f"{path} is not JSON ({error}): move it away and run again."
        ) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UpcyclingError(
            f"{path} is not a run record of schema {SCHEMA}: move it away and run again."
        )
    return content


def _header() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": versions(),
        "machine": {
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
            "total_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide results; None where not installed."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _DISTRIBUTIONS},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # e.g. run from a source tree that is not installed
        return None


def hydra_output_folder() -> str | None:
    """Output folder of the running Hydra job, None without one."""
    # Hydra's folder belongs to one job; FusionBench's log_dir is shared by all jobs of a multirun.
    hydra = sys.modules.get("hydra.core.hydra_config")
    if hydra is None or not hydra.HydraConfig.initialized():
        return None
    runtime = hydra.HydraConfig.get().runtime
    if "output_dir" not in runtime:  # composed by hand, not run by Hydra: nowhere to write
        return None
    return str(runtime.output_dir)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
