"""A process with all libraries loaded, forked for each command: started by `Warm`, shim preloaded.

Reads a request as a line of JSON, answers with one: the exit status, minus the signal where one
ended it, and what the command printed. Between the two a child has run the command line.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    import torch

    torch.set_num_threads(1)
    # All that a command imports as it goes.
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    import fusion_upcycle.addition.run
    import fusion_upcycle.cli
    import fusion_upcycle.method
    import fusion_upcycle.verify  # noqa: F401

    gc.freeze()  # a collection in a child would copy every page
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        said = Path(request["said"])
        child = os.fork()
        if child == 0:
            with said.open("wb", buffering=0) as stream:
                for descriptor in (1, 2):
                    os.dup2(stream.fileno(), descriptor)
            os._exit(_run(request))
        status = _ended(child, request["seconds"])
        text = said.read_text(errors="replace")
        print(json.dumps({"status": status, "said": text}), file=answers)


def _run(request: dict[str, Any]) -> int:
    # A shell starts what is put into the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    if request["watched"] is not None:
        ctypes.CDLL(None).faults_arm(
            os.fsencode(request["watched"]),
            ctypes.c_long(request["point"]),
            request["mode"],
            request["number"],
            int(request["growing"]),
            int(request["exchange"]),
            ctypes.c_long(request["then"]),
            os.fsencode(request["log"]),
        )
    try:
        _command(request["arguments"])
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _command(arguments: list[str]) -> None:
    if arguments[0] != "fusion_bench":
        from fusion_upcycle.cli import main as command

        return command(arguments)
    from fusion_bench.scripts.cli import _hydra_main as program

    sys.argv = arguments
    return program()


def _ended(child: int, seconds: float) -> int:
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM
        time.sleep(0.002)


if __name__ == "__main__":
    main()
