"""Options as older versions recorded them."""

from collections.abc import Mapping
from typing import Any

from fusion_upcycle.errors import UpcyclingError

#: Options that are gone -> the value at which they did what is done now.
_GONE = {"scaling": "exact", "temperature": 1.0, "after_split": False}


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record, less those that are gone, also within an initialiser's.

    Raises:
        UpcyclingError: one that is gone changed the result.
    """
    kept: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _GONE:
            kept[name] = recorded_options(value) if isinstance(value, Mapping) else value
        elif value != _GONE[name]:
            raise UpcyclingError(
                f"The record was made by an older version with {name}={value}, which this one "
                "does not have. Use the version that made it, or convert again without it."
            )
    return kept
