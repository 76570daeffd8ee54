"""What is known by a name: ours, and what installed packages add as entry points."""

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fusion_upcycle.errors import UpcyclingError

T = TypeVar("T")


V = TypeVar("V")


class Registry(MutableMapping[str, T]):
    """What is known by a name: ours, and what installed packages add as entry points.

    A package adds one by an entry point of its own in the group `fusion_upcycle.KIND`; it is
    imported when it is asked for, so that a broken one breaks nothing else. A name of ours stays
    ours, with a warning; one of two packages is refused. `docs/extending.md` has an example.

    Args:
        kind: `expert_init`, `router_init`, `router_extension` or `architectures`.
        own: ours.
        check: refuses what an entry point may not be, given its name and what was loaded.
    """

    def __init__(
        self,
        kind: str,
        own: Mapping[str, T] | None = None,
        check: Callable[[str, Any], None] | None = None,
    ):
        self.kind, self._own, self._check = kind, dict(own or {}), check
        self._loaded: dict[str, T] = {}

    def add(self, value: V) -> V:
        """Decorator: know a function of ours by its own name."""
        self._own[value.__name__] = value  # type: ignore[attr-defined, assignment]
        return value

    def without(self, *names: str) -> "Registry[T]":
        """A registry without these entries of its own."""
        own = {name: value for name, value in self._own.items() if name not in names}
        return Registry(self.kind, own, self._check)

    def plus(self, **own: T) -> "Registry[T]":
        """A registry with these entries beside its own, and the same entry points."""
        return Registry(self.kind, self._own | own, self._check)

    def name_of(self, value: object) -> str | None:
        """The name by which `value` is known; None if it is not."""
        for name, known in self._own.items():
            if known is value:
                return name
        place = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
        for name, (point, *others) in self._points.items():
            if point.value == place and not others:
                return name
        return None

    @cached_property
    def _points(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=f"fusion_upcycle.{self.kind}"):
            if point.name in self._own:
                warnings.warn(
                    f"{self.kind}={point.name} of {_package(point)} is not used: the name is taken "
                    "by ours. Rename its entry point.",
                    stacklevel=2,
                )
            else:
                found.setdefault(point.name, []).append(point)
        return found

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            point, *others = self._points[name]
            if others:
                packages = " and ".join(map(_package, (point, *others)))
                raise UpcyclingError(
                    f"{self.kind}={name} is added by {packages}. Uninstall one, or rename its "
                    "entry point."
                )
            try:
                value = point.load()
            except Exception as error:  # of a package that is not ours
                raise UpcyclingError(
                    f"{self.kind}={name} of {_package(point)} cannot be loaded: {error!r}. Repair "
                    "or uninstall the package."
                ) from error
            if self._check is not None:
                self._check(name, value)
            self._loaded[name] = value
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._points

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._points

    def __len__(self) -> int:
        return len(self._own) + len(self._points)

    def __setitem__(self, name: str, value: T) -> None:
        self._own[name] = value

    def __delitem__(self, name: str) -> None:
        del self._own[name]


def _package(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist is not None else f"entry point {point.value}"
