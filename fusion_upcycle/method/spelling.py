"""Options as Hydra's overrides, for the remedies in errors of a class that a config has made."""

import inspect
import json
import re
import shlex
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from fusion_upcycle.errors import spelled, spelled_in_python
from fusion_upcycle.options import config_tree

Result = TypeVar("Result")
#: Modules that make an object by its config.
_BY_CONFIG = ("hydra._internal.instantiate", "fusion_bench.utils.instantiate")
#: What Hydra's grammar reads as a text without quotes around it, and not as anything else.
_BARE = re.compile(r"(?!(?:true|false|null|yes|no|on|off|nan|inf)$)[A-Za-z_/][\w./+@%-]*", re.I)


def overrides_at(place: str, names: Mapping[str, str] | None = None) -> Callable[[str, Any], str]:
    """How `errors.setting` writes an option inside FusionBench.

    Args:
        place: of the options in the config, as in `method.upcycling`.
        names: what an option is called there, where that is not its name.
    """

    def write(name: str, value: Any) -> str:
        whole = f"{place}.{(names or {}).get(name, name)}"
        if value is ...:
            return whole
        # A name replaces the whole node, and with it what was asked for inside of it; a mapping
        # would be merged into it.
        if isinstance(value, Mapping) and _is_file(name, value.get("name")):
            where = f"method/{name}" + ("" if place == "method" else f"@{whole}")
            rest = [write(f"{name}.{key}", v) for key, v in value.items() if key != "name"]
            return " ".join([f"{where}={value['name']}", *rest])
        return shlex.quote(f"{whole}={_value(value)}")

    return write


def _is_file(group: str, name: object) -> bool:
    return isinstance(name, str) and (config_tree() / "method" / group / f"{name}.yaml").is_file()


def _value(value: Any) -> str:
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return value if _BARE.fullmatch(value) else f'"{quoted}"'
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{_value(key)}:{_value(v)}' for key, v in value.items())}}}"
    return json.dumps(value)


def made_by_config() -> bool:
    """Whether what is being made was asked for by a config: its errors are answered there."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_BY_CONFIG):
            return True
        frame = frame.f_back
    return False


def spelled_by_maker(method: Callable[..., Result]) -> Callable[..., Result]:
    """Of a FusionBench class: overrides where a config made the object, else Python's arguments.

    Its `option_places` says where an option is in the config, if that is not its name.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Result:
        if method.__name__ == "__init__":
            self._by_config = made_by_config()
        # Where it is a part of another one, that one has said so.
        if not (getattr(self, "_by_config", False) and spelled_in_python()):
            return method(self, *args, **kwargs)
        with spelled(overrides_at("method", getattr(self, "option_places", None))):
            return method(self, *args, **kwargs)

    return call
