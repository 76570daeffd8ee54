"""Overrides in Hydra's grammar, as `fusion_bench` takes them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_upcycle.errors import UpcyclingError

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
#: Texts that Hydra would read as something else than a text.
_KEYWORDS = ("true", "false", "null", "none", "inf", "nan")


def override(place: str, value: Any, *, sign: str = "") -> str:
    """`place=value`; with sign `+` it is added, with `++` added or replaced."""
    return f"{sign}{place}={quoted(value)}"


def quoted(value: Any) -> str:
    """A value as Hydra's parser reads it back.

    Args:
        value: what YAML can hold.

    Raises:
        UpcyclingError: a key that the grammar has no form for.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(name)}:{quoted(v)}" for name, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(quoted, value)) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _KEYWORDS:
        return text
    # In quotes a backslash is itself, except in front of a quote or of the closing quote.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    trailing = re.search(r"\\*$", escaped)
    assert trailing is not None
    return f"'{escaped}{trailing[0]}'"


def _key(name: Any) -> str:
    text = str(name)
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        return text
    if not re.fullmatch(r"[A-Za-z_][\w./@ -]*", text, re.ASCII) or text.lower() in _KEYWORDS:
        raise UpcyclingError(
            f"{text!r} as a key cannot be said in Hydra's grammar: use letters, digits, _ - . / @ "
            "and spaces, a letter first."
        )
    return text.replace(" ", "\\ ")
