"""Which fields of a config.json a class of transformers knows: the others change nothing.

transformers computes without a field that neither the config's class nor the model's code has, and
every proof compares with transformers' own class. So such a field is said once and left out, unless
it is nearly the name of one that is known: then somebody meant something by it.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.errors import UpcyclingError, plain_logger, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = plain_logger(__name__)

#: In the config of a model that is read in another family's words: the model that it is of. What
#: transformers does not know may mean something to that model's own code.
READ_FROM = "_read_from"

#: Old spellings that every class with rope reads before it is made.
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
#: Code that all models share and that looks at their configs.
_SHARED = ("masking_utils.py", "cache_utils.py", "modeling_rope_utils.py")
_NEARLY = 0.9


def knows(config_class: Any, name: str) -> bool:
    """Whether a config's class has a field, or the code of its model looks for it."""
    return name in _known(config_class)


@cache
def _known(config_class: Any) -> frozenset[str]:
    import transformers

    declared = {*config_class().to_dict(), *config_class.attribute_map, *dir(config_class)}
    declared |= {*getattr(config_class, "__dataclass_fields__", ())}
    code = ""
    for kind in config_class.__mro__:
        if kind in (object, transformers.PreTrainedConfig):
            continue
        try:
            declared |= {*re.findall(r"[\"'](\w+)[\"']", inspect.getsource(kind))}
            file = Path(inspect.getfile(kind))
        except (OSError, TypeError):  # ours, which are made of the dense ones without a file
            continue
        code += _text(file.with_name(file.name.replace("configuration_", "modeling_")))
    for file_name in _SHARED:
        code += _text(Path(transformers.__file__).with_name(file_name))
    read = {*re.findall(r"config\.(\w+)", code)}
    read |= {*re.findall(r"(?:get|has)attr\(\s*[\w.]*config,\s*[\"'](\w+)[\"']", code)}
    return frozenset(declared | read | _ROPE)


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def unknown_fields(
    source: "PreTrainedConfig", target: type, fields: Mapping[str, Any], ignored: Collection[str]
) -> list[str]:
    """Those of `fields` that neither the source's class nor the target's knows.

    Args:
        target: config class of the result.
        ignored: fields that the user declares to be without effect.

    Raises:
        UpcyclingError: one that is nearly the name of a known field, or one of a model that is read
            in another family's words.
    """
    from transformers import PreTrainedConfig

    kinds: tuple[Any, Any] = (type(source), target)
    found = [
        name
        for name, value in fields.items()
        if value is not None and not any(knows(kind, name) for kind in kinds)
    ]
    own = getattr(source, READ_FROM, None)
    meant = (_known(kinds[0]) | _known(kinds[1])) - {*dir(PreTrainedConfig)}
    for name in found:
        if own is not None and name != READ_FROM and name not in ignored:
            raise UpcyclingError(
                f"config.json of the {own} source: unknown field {name}={fields[name]!r}, which "
                "may mean something to code of the model's own. If it changes nothing in the "
                f"forward pass, {remove_or_ignore([name], ignored)}."
            )
        near = get_close_matches(name, meant, 1, _NEARLY)
        if near and name not in ignored and not name.endswith(("_token_id", "_token_ids")):
            raise UpcyclingError(
                f"config.json of the {source.model_type} source: unknown field "
                f"{name}={fields[name]!r}, which transformers leaves out, though it is nearly "
                f"{near[0]}. Rename it in config.json if that is meant; if not, "
                f"{remove_or_ignore([name], ignored)}."
            )
    return found


def say_unknown(source: "PreTrainedConfig", target: type, ignored: Collection[str]) -> None:
    """Warn of the fields of a source that change nothing, as no class knows them."""
    found = unknown_fields(source, target, source.to_dict(), ignored)
    if named := [name for name in found if name not in {*ignored, READ_FROM}]:
        values = ", ".join(f"{name}={getattr(source, name)!r}" for name in named)
        log.warning(
            "config.json of the %s source: unknown field %s. Neither %s nor %s has it, so that "
            "transformers computes without it, and so does the result.",
            source.model_type,
            values,
            type(source).__name__,
            target.__name__,
        )


def remove_or_ignore(names: Iterable[str], ignored: Collection[str]) -> str:
    """The remedy for a field that changes nothing."""
    return f"remove it or pass {setting('ignore_config_fields', [*ignored, *names])}"
