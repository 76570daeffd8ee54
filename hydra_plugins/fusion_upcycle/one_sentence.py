"""An error of ours ends FusionBench's command line with its sentence, not with 100 lines of trace.

FusionBench logs every exception of its program with a trace, and Hydra prints a second one, unless
the exception is a `CompactHydraException`. The logger is the one place open to us where all of them
pass: ours leave it as such an exception. With HYDRA_FULL_ERROR=1 nothing is changed; that is looked
at before the job, for which FusionBench sets it by itself.
"""

import logging
import os
from functools import cache

#: FusionBench's command line, whose logger this is about.
CLI_MODULE = "fusion_bench.scripts.cli"


def end_in_one_sentence(logger: str = CLI_MODULE) -> None:
    """Watch what FusionBench's command line logs.

    Args:
        logger: its name; `__main__` where it is started by `python -m`.
    """
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        logging.getLogger(logger).addFilter(_watch)  # there once, however often it is added


def _watch(record: logging.LogRecord) -> bool:
    from fusion_upcycle.errors import Stopped, UpcyclingError

    cause = record.exc_info[1] if record.exc_info else None
    if isinstance(cause, Stopped):  # by a signal: it has said its sentence
        return False
    while cause is not None and not isinstance(cause, UpcyclingError):
        cause = cause.__cause__  # Hydra's instantiate wraps what it calls
    if cause is not None:
        raise _compact()(f"error: {cause}") from cause
    return True


@cache
def _compact() -> type[Exception]:
    from hydra.errors import CompactHydraException

    from fusion_upcycle.errors import UpcyclingError

    class OneSentence(CompactHydraException, UpcyclingError):
        """Printed by Hydra without a trace, and still an error of ours for who catches it."""

    return OneSentence
