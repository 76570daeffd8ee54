"""Options once: a dataclass and its docstring are the only home of names, defaults and meanings.

The text of an option is its entry in the dataclass's `Attributes:`; the first sentence is the
summary, which YAML comments begin with. Command-line flags, the constructors of the FusionBench
classes and the tables of the documentation are made from both, here and in `cli.option_flags` and
`method.arguments`.

Light: nothing here imports torch, so that `--help` is quick.
"""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fusion_upcycle.errors import UpcyclingError, unknown

PACKAGE = Path(__file__).resolve().parent

Options = TypeVar("Options")
#: Names that an option takes, or a function that finds them.
Choices = Sequence[str] | Callable[[], Sequence[str]]


# --- to declare -------------------------------------------------------------------------------


def choice(default: Any, choices: Choices) -> Any:
    """A field of a dataclass of options that takes one of some names."""
    return field(default=default, metadata={"choices": choices})


def same_as(home: type, name: str) -> Any:
    """A field that is another dataclass's: its default, choices and text."""
    original = home.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=original.default, metadata={"home": home} | original.metadata)


def registry(file: str, name: str, *more: str) -> Callable[[], list[str]]:
    """The keys of a module's dict of names, read from its source: importing it may take seconds.

    Args:
        file: of the package, as in `selection.py`.
        name: of the dict, or of the `Registry` of one, which must be written out with its keys.
        more: names that the option takes besides.
    """

    @cache
    def read() -> list[str]:
        for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign([ast.Name(found)], value) | ast.AnnAssign(
                    ast.Name(found), _, value
                ) if found == name:
                    theirs = []
                    if isinstance(value, ast.Call):  # Registry("kind", {...}, ...)
                        theirs = _added_by_packages(ast.literal_eval(value.args[0]))
                        value = value.args[1]
                    assert isinstance(value, ast.Dict), (file, name)
                    ours = [ast.literal_eval(key) for key in value.keys if key]
                    return list(dict.fromkeys([*more, *ours, *theirs]))
        raise AssertionError(f"{file} has no dict {name}")

    return read


def config_group(group: str, without: Sequence[str] = ()) -> Callable[[], list[str]]:
    """The files of `config/method/GROUP/`, in the syntax of flags: `drop,drop_ratio=0.5`.

    What packages add to the registry of that name comes without options.
    """

    @cache
    def names() -> list[str]:
        files = sorted((config_tree() / "method" / group).glob("*.yaml"))
        ours = [_as_a_flag(file) for file in files if file.stem not in without]
        known = {name.partition(",")[0] for name in ours}
        return ours + [name for name in _added_by_packages(group) if name not in known]

    return names


def _added_by_packages(kind: str) -> list[str]:
    from importlib.metadata import entry_points

    return [point.name for point in entry_points(group=f"fusion_upcycle.{kind}")]


def _as_a_flag(file: Path) -> str:
    # By hand, as a parser of YAML takes longer to import than all else that a help text needs.
    options = re.findall(
        r"^(?!_|name:)(\w+): ([^#\n]*[^#\s])", file.read_text("utf-8"), re.MULTILINE
    )
    return ",".join([file.stem, *(f"{name}={value}" for name, value in options)])


def config_tree() -> Path:
    """Our config tree: in a wheel inside the package, in a checkout beside it."""
    inside = PACKAGE / "config"
    return inside if inside.is_dir() else PACKAGE.parent / "config"


# --- to make ----------------------------------------------------------------------------------


def make(options: type[Options], given: Mapping[str, Any]) -> Options:
    """A dataclass of options.

    Raises:
        UpcyclingError: a name that is unknown, with the nearest known one; a missing option; and
            what the dataclass itself refuses.
    """
    known = names(options)
    for name in given:
        if name not in known:
            raise unknown("option", name, known)
    for option in fields(options):  # type: ignore[arg-type]
        if option.default is MISSING and given.get(option.name) is None:
            raise UpcyclingError(
                f"The option {option.name} must be given: {meanings(options)[option.name]}"
            )
    return options(**given)


def names(options: type) -> list[str]:
    return [option.name for option in fields(options)]


# --- to explain -------------------------------------------------------------------------------


def meanings(options: type) -> dict[str, str]:
    """Option -> its whole text, in one line."""
    return {
        option.name: _attributes(option.metadata.get("home", options)).get(option.name, "")
        for option in fields(options)
    }


def summaries(options: type) -> dict[str, str]:
    """Option -> the first sentence of its text, without the full stop."""
    return {
        name: re.split(r"(?<=\.)\s", text)[0].rstrip(".")
        for name, text in meanings(options).items()
    }


def choices(option: "Field[Any]") -> list[str]:
    """The names that an option takes; none where it takes other values."""
    found: Choices = option.metadata.get("choices", ())
    return list(found() if callable(found) else found)


def explained(options: type, *, everything: bool = True) -> Iterator[tuple["Field[Any]", str]]:
    """Each option with its text, and the names that it takes where the text does not say them.

    Args:
        everything: names of registries too, to which one may be added without a look at the text.
    """
    texts = meanings(options)
    for option in fields(options):
        text, taken = texts[option.name], choices(option)
        if not everything and callable(option.metadata.get("choices")):
            taken = []
        if not all(f"`{name}`" in text for name in taken):
            text = f"{text} Choices: {' | '.join(f'`{name}`' for name in taken)}."
        yield option, text


def default_text(option: "Field[Any]") -> str | None:
    """The default as YAML and command line have it; None where the option must be given."""
    if option.default is MISSING:
        return None
    return option.default if isinstance(option.default, str) else json.dumps(option.default)


def markdown_table(options: type) -> str:
    """The table of the documentation, without the names of registries, which have their own."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for option, text in explained(options, everything=False):
        default = default_text(option)
        cells = f"`{option.name}`", "required" if default is None else f"`{default}`", text
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


@cache
def _attributes(options: type) -> dict[str, str]:
    """Name -> text of the docstring's `Attributes:`, which ends with a blank line."""
    _, _, section = (inspect.getdoc(options) or "").partition("Attributes:\n")
    entries = re.findall(
        r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section.partition("\n\n")[0], re.MULTILINE
    )
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}
