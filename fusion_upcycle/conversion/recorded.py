"""Options as older versions recorded them."""

from collections.abc import Collection, Mapping
from typing import Any

from fusion_upcycle.errors import UpcyclingError


def without_gone(
    options: Mapping[str, Any],
    gone: Mapping[str, Any],
    values: Mapping[str, Collection[Any]] | None = None,
) -> dict[str, Any]:
    """The options of a record, less those that are gone.

    Args:
        gone: option -> the value at which it did what is done now.
        values: option that is still there -> values of it that are gone.

    Raises:
        UpcyclingError: one that is gone changed the result.
    """
    for name, value in options.items():
        if (name in gone and value != gone[name]) or value in (values or {}).get(name, ()):
            raise UpcyclingError(
                f"The record was made by an older version with {name}={value}, which this one "
                "does not have. Use the version that made it, or convert again without it."
            )
    return {name: value for name, value in options.items() if name not in gone}
