"""The processes of a distributed run: which is the first, and what all of them must agree on."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch.distributed as dist

from fusion_upcycle.errors import UpcyclingError

#: What torchrun, Lightning and SLURM number processes and nodes by.
_NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

_WORK, _REST, _END = "work", "rest", "end"  # what a process is told, with a piece of work or None

T = TypeVar("T")
R = TypeVar("R")


def is_first() -> bool:
    """Whether this is the first process of its run; known before they can talk, too."""
    if can_talk():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") == "0" for name in _NUMBERS)


def place() -> tuple[int, int]:
    """The number of this process, and how many there are; before they can talk, it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if can_talk() else (0, 1)


def gathered(value: Any) -> list[Any]:
    """The value that each process gives, by their numbers; before they can talk, only this one's.

    Every process calls it at the same place.
    """
    if not can_talk():
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


@contextmanager
def shared_map(function: Callable[[T], R]) -> Iterator[Callable[[Iterable[T]], Iterator[R]]]:
    """Within the block of the first process, `map` of `function` that all processes work on.

    Results come in the order of the pieces. The others work before their block begins, until that
    of the first one ends, however it does; they have nothing to map.
    """
    if not can_talk():
        yield partial(map, function)
    elif is_first():
        try:
            yield partial(_mapped, function)
        finally:
            _dealt([(_END, None)] * dist.get_world_size())
    else:
        while (task := _dealt(None))[0] != _END:
            dist.gather_object(_result(function, task))
        yield lambda pieces: iter(())


def _mapped(function: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
    world, rest = dist.get_world_size(), iter(pieces)
    while tasks := [(_WORK, piece) for piece in islice(rest, world)]:
        mine = _dealt(tasks + [(_REST, None)] * (world - len(tasks)))
        results: list[Any] = [None] * world
        dist.gather_object(_result(function, mine), results)
        for result in results[: len(tasks)]:
            if isinstance(result, Exception):
                raise result
            yield result


def _result(function: Callable[[Any], Any], task: tuple[str, Any]) -> Any:
    """Of a task, or the exception that ended it."""
    try:
        return function(task[1]) if task[0] == _WORK else None
    except Exception as error:
        return error


def _dealt(tasks: list[tuple[str, Any]] | None) -> tuple[str, Any]:
    """This process's of the tasks that the first one gives, one for each."""
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, tasks)
    return mine[0]


def can_talk() -> bool:
    """Whether the processes have found each other, or this is one alone that could."""
    return dist.is_available() and dist.is_initialized()
