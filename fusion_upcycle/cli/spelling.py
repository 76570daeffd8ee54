"""Options as flags of the command that runs, for the remedies in errors."""

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

#: Options that flags call otherwise: command -> option -> flag.
_FLAGS = {
    "expand": {"calibration": "--data", "calibration_tokens": "--tokens"},
    "verify": {"verify": "--mode"},
}
#: Flags that are given once for each name.
_PAIRS = ("calibration", "data", "validation", "model")


def flags_of(command: str | None) -> Callable[[str, Any], str]:
    """How `errors.setting` writes an option on our command line.

    Args:
        command: the one that runs.
    """

    def write(name: str, value: Any) -> str:
        flag = _FLAGS.get(command or "", {}).get(name, f"--{name.replace('_', '-')}")
        if (name, value) == ("resume", False):
            return "--start-over"
        if value is ...:
            return flag
        if value is None:
            return f"no {flag}"
        if isinstance(value, bool):
            return flag if value else flag.replace("--", "--no-", 1)
        if name in _PAIRS and isinstance(value, Mapping):
            return " ".join(f"{flag} {shlex.quote(f'{key}={v}')}" for key, v in value.items())
        return f"{flag} {shlex.quote(_value(value))}"

    return write


def _value(value: Any) -> str:
    if isinstance(value, Mapping):  # an initialiser with its options, or a value for each of some
        rest = [f"{key}={_value(v)}" for key, v in value.items() if key != "name"]
        return ",".join([*([value["name"]] if "name" in value else []), *rest])
    if isinstance(value, list | tuple):
        return ",".join(map(_value, value))
    return value if isinstance(value, str) else json.dumps(value)
