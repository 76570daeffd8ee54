"""One run in the process that it is given: `fusion_bench ARGUMENTS`, its console in a file.

Also `python -m fusion_upcycle.benchmark.perform FOLDER`, for runs in a process of their own.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion_upcycle.benchmark.request import CONSOLE_NAME, read_request
from fusion_upcycle.errors import Stopped
from fusion_upcycle.report import Measured


def perform(folder: Path) -> None:
    """Make the run that is asked for in a folder, and leave its record, also where it failed."""
    request = read_request(folder)
    with (folder / CONSOLE_NAME).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    with Measured() as cost:
        error = _fusion_bench(list(request.arguments))
    report: Any = {}
    if error is None:
        try:
            report = json.loads((folder / "program_report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            error = "fusion_bench left no program_report.json."
    if error is None and not report:
        error = "The report is empty: no task pool gave a result."
    request.leave(error, report, cost.as_record())


def in_warm_process(folder: Path) -> None:
    """`perform` in a process forked from the warm server, which ends with the one that asked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    _prepare_process(parent.join)
    perform(folder)


def _prepare_process(wait_for_parent: Callable[[], Any]) -> None:
    # Ctrl-C reaches every process of a terminal: the one in front ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        wait_for_parent()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _fusion_bench(arguments: list[str]) -> str | None:
    """None where it went well, else what went wrong."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # the exception itself comes here
    sys.argv = ["fusion_bench", *arguments]
    print("$ fusion_bench", *arguments, flush=True)
    try:
        runpy.run_module("fusion_bench.scripts.cli", run_name="__main__")
    except Stopped:
        raise  # as if the signal had ended it: it is no failure of the run
    except SystemExit as end:
        return None if end.code in (0, None) else f"fusion_bench ended with status {end.code}."
    except BaseException as error:
        traceback.print_exc()
        return _in_words(error)
    return None


def _in_words(error: BaseException) -> str:
    from fusion_upcycle.errors import UpcyclingError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UpcyclingError):
        cause = cause.__cause__
    said = str(cause or error).strip()
    return said if cause is not None else f"{type(error).__name__}: {said}".strip(": ")


if __name__ == "__main__":
    _prepare_process(sys.stdin.buffer.read)  # its end is held by the process that started this one
    perform(Path(sys.argv[1]))
