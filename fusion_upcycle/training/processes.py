"""The processes of a distributed run: which is the first, and what all of them must agree on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from fusion_upcycle.errors import UpcyclingError

#: What torchrun, Lightning and SLURM number processes and nodes by.
_NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first() -> bool:
    """Whether this is the first process of its run; known before they can talk, too."""
    if _can_talk():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") == "0" for name in _NUMBERS)


def gathered(value: Any) -> list[Any]:
    """The value that each process gives, by their numbers; before they can talk, only this one's.

    Every process calls it at the same place.
    """
    if not _can_talk():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(in_words: Callable[[object], str]) -> Iterator[None]:
    """A block that fails in all processes where it fails in one, so that none waits for another.

    Every process enters it; inside they must not talk to each other after one has failed.

    Args:
        in_words: what failed and what to do, with the reason that it is given.

    Raises:
        UpcyclingError: an OSError of any process; other exceptions stay what they are.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    of_all = gathered(None if error is None else str(error))
    if isinstance(error, OSError):
        raise UpcyclingError(in_words(error)) from error
    if error is not None:
        raise error
    for number, reason in enumerate(of_all):
        if reason is not None:
            raise UpcyclingError(in_words(f"process {number}: {reason}"))


def _can_talk() -> bool:
    return dist.is_available() and dist.is_initialized()
