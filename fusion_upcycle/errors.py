"""How users' mistakes are reported: what, where, what to do. Invariants of ours are `assert`."""

from collections.abc import Iterable
from difflib import get_close_matches


class UpcyclingError(ValueError):
    """A source, option or output that cannot be used; the message names it and the remedy."""


class ProofError(UpcyclingError):
    """A conversion that claims to be exact and is not. Nothing is left at the output path."""


class VersionError(UpcyclingError, ImportError):
    """A library that is installed in a version that does not work."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UpcyclingError:
    """The error for an unknown name, with the nearest known one suggested."""
    known = sorted(known)
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UpcyclingError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")
