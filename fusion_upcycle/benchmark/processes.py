"""Runs in processes of this machine: forked from one warm process, or each fresh."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

from fusion_upcycle.benchmark.board import Board
from fusion_upcycle.benchmark.perform import in_warm_process
from fusion_upcycle.benchmark.request import CONSOLE_NAME, Request
from fusion_upcycle.errors import UpcyclingError

Result = TypeVar("Result")

#: What every run imports; nothing of it computes or starts a thread, so that a fork of it is safe.
PRELOADED = (
    "fusion_bench.scripts.cli",
    "fusion_bench.method",
    "fusion_bench.modelpool",
    "fusion_bench.taskpool",
    "fusion_upcycle.benchmark.preparation",
    "fusion_upcycle.method",
    "fusion_upcycle.modelpool",
    "fusion_upcycle.taskpool",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
)


class Processes:
    """Starts runs, `jobs` at once, and ends those that are left when the block is left."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._left: set[Any] = set()
        self._lock = threading.Lock()
        self._ending = False
        threads = max(1, (os.cpu_count() or 1) // jobs)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read by the imports of the server
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ending = True
            left = list(self._left)
        for process in left:
            process.terminate()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function returns in a warm process.

        Raises:
            UpcyclingError: the function raised one, or its process ended by itself.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_call, args=(sender, function, arguments))
        self._start(process)
        sender.close()
        try:
            error, result = receiver.recv()
        except EOFError:
            process.join()
            raise UpcyclingError(
                f"The process that looks at the experiment ended by itself ({process.exitcode})."
            ) from None
        finally:
            self._forget(process)
        process.join()
        if error is not None:
            raise UpcyclingError(error)
        return result

    def perform(self, requests: Sequence[Request], board: Board, *, isolate: bool) -> None:
        """Make all runs, and say on the board how it goes."""
        make = self._fresh if isolate else self._warm
        with ThreadPoolExecutor(self._jobs) as threads:
            try:
                for done in as_completed([threads.submit(make, r, board) for r in requests]):
                    done.result()
            except BaseException:
                self.__exit__()
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _warm(self, request: Request, board: Board) -> None:
        process = self._context.Process(target=in_warm_process, args=(request.folder,))
        self._run(request, board, process, lambda: self._wait(process))

    def _wait(self, process: Any) -> int | None:
        process.join()
        return process.exitcode

    def _fresh(self, request: Request, board: Board) -> None:
        process = Fresh(request)
        self._run(request, board, process, process.wait)

    def _run(
        self, request: Request, board: Board, process: Any, wait: Callable[[], int | None]
    ) -> None:
        board.started(request)
        self._start(process)
        status = wait()
        self._forget(process)
        if not self._ending:
            record_death(request, status)
            board.ended(request)

    def _start(self, process: Any) -> None:
        with self._lock:
            if self._ending:
                raise KeyboardInterrupt
            process.start()
            self._left.add(process)

    def _forget(self, process: Any) -> None:
        with self._lock:
            self._left.discard(process)


class Fresh:
    """`perform` in an interpreter of its own, which ends with this one: its input closes then."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def start(self) -> None:
        """Start it; what it prints before its console is a file goes there too."""
        with (self._request.folder / CONSOLE_NAME).open("w") as console:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fusion_upcycle.benchmark.perform",
                    str(self._request.folder),
                ],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> int:
        """Its exit status."""
        try:
            return self._process.wait()
        finally:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()


def record_death(request: Request, status: int | None) -> None:
    """Record a run whose process ended without leaving a record."""
    if request.result() is None:
        by_signal = status is not None and status < 0
        how = signal.Signals(-(status or 0)).name if by_signal else f"status {status}"
        request.leave(
            f"The process ended by itself ({how}), perhaps for want of memory; see "
            f"{request.folder / CONSOLE_NAME}.",
            {},
            {},
        )


def _call(sender: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        sender.send((None, function(*arguments)))
    except UpcyclingError as error:
        sender.send((str(error), None))
