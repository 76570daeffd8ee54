"""Other processes of Python, forked by one that has the libraries loaded: 0.1 s instead of 10 each.

Nothing of the test's own process is in them but its environment. Libraries that read variables as
they are imported have read those of the first test that started one.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusion_upcycle.benchmark.processes import PRELOADED

_CONTEXT = multiprocessing.get_context("forkserver")
# No modules of this folder, which the server does not know.
_CONTEXT.set_forkserver_preload(
    [
        *PRELOADED,  # a benchmark in a test's process uses this server: there is one per process
        "torch.distributed.fsdp",
        "fusion_upcycle.demo.train",
        "fusion_upcycle.importance.measure",
        "fusion_upcycle.training.run",
    ]
)
Process = multiprocessing.process.BaseProcess


def start(
    function: Callable[..., object], *arguments: Any, log: Path, **environment: str
) -> Process:
    """Call a function of a test module in another process.

    Args:
        log: what it prints, its traceback included, goes here.
        environment: of the process, beside that of this one.
    """
    variables, threads = {**os.environ, **environment}, torch.get_num_threads()
    process = _CONTEXT.Process(target=_call, args=(function, arguments, log, variables, threads))
    process.start()
    return process


def _call(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    log: Path,
    variables: dict[str, str],
    threads: int,
) -> None:
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(threads)
    function(*arguments)


def ended(process: Process, log: Path, seconds: float = 300) -> int:
    """The exit code, minus the signal where one ended it; what it printed is printed here."""
    process.join(seconds)
    print(log.read_text())
    assert process.exitcode is not None, f"still running after {seconds} s"
    return process.exitcode


def two_ranks(
    function: Callable[..., object], *arguments: Any, folder: Path, ranks: int = 2, code: int = 0
) -> None:
    """Call a function in processes that find each other, as torchrun would start them.

    Args:
        ranks: how many there are.
        code: with which they exit.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = [
        start(function, *arguments, log=log, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, log in enumerate(logs)
    ]
    assert {ended(*pair) for pair in zip(processes, logs, strict=True)} == {code}
