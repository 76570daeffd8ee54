"""Local files of data: by their literal names, a folder as all files below it, errors by line.

Names are never patterns: `*`, `?`, `[`, `{` and spaces stand for themselves. `~/` at the beginning
is the home folder, unless there is such a path here.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from glob import escape, has_magic
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError

#: What the Hub takes as the name of a data set, with its organisation.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OLD_HUB_ID = re.compile(r"\w+")


def local_path(given: str | Path, where: str = "") -> Path:
    """Where a path leads, as it is written.

    Args:
        where: the option that names it, for the error.

    Raises:
        UpcyclingError: `~/...` that is both here and in the home folder.
    """
    path = Path(given)
    if path.parts[:1] != ("~",):
        return path
    path = path.absolute()  # or others would expand it
    if str(given) != "~" and not str(given).startswith("~/"):
        return path
    home = Path(given).expanduser()
    if path.exists() and home.exists():
        raise UpcyclingError(
            f"{where + ': ' if where else ''}{str(given)!r} is here and in the home folder. Give "
            f"{str(path)!r} or {str(home)!r}."
        )
    return path if path.exists() else home


def may_be_on_the_hub(given: str, *, more: bool = False) -> bool:
    """Whether a path that is not here may be meant as `org/data_set`: no folder `org` is here.

    Args:
        more: whether a split or the like is given, which local files have not: old data sets of the
            Hub have no organisation.
    """
    if more and _OLD_HUB_ID.fullmatch(given):
        return True
    return _HUB_ID.fullmatch(given) is not None and not Path(given).parent.exists()


def missing(path: Path, where: str) -> UpcyclingError:
    """That there is no such file or folder, with the whole path."""
    kind = "file" if path.suffix else "file or folder"
    return UpcyclingError(
        f"{where}: there is no {kind} {str(path.absolute())!r}. Give the path of one that is."
    )


def data_files(path: Path, where: str, suffixes: Sequence[str]) -> list[Path]:
    """The file; or of a folder all files below it, sorted by their paths.

    Hidden files and folders are left out, and links to folders are not followed.

    Args:
        suffixes: of the formats that can be read, in lower case.

    Raises:
        UpcyclingError: nothing there, an empty folder, or a file of another format, by name.
    """
    if not path.exists():
        raise missing(path, where)
    files = files_below(path) if path.is_dir() else [path]
    if not files:
        raise UpcyclingError(
            f"{where}: the folder {str(path.absolute())!r} has no files. Give one of "
            f"{', '.join(suffixes)} files."
        )
    for file in files:
        if file.suffix.lower() not in suffixes:
            inside = (
                f" Move it out of the folder {str(path)!r}, or list the others." * path.is_dir()
            )
            raise UpcyclingError(
                f"{where}: the format of {str(file)!r} is not known. Give {', '.join(suffixes)} "
                f"files, or a folder of them.{inside}"
            )
    return files


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted; without hidden ones, and links to folders not followed."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(place, name) for name in names if name[0] != "."]
    return sorted(found)


def as_pattern(path: Path, where: str) -> str:
    """A path for `datasets`, to which it is a pattern, so that only this path matches.

    Raises:
        UpcyclingError: a name that `datasets` cannot be given.
    """
    whole = str(path.absolute())
    if _is_special(whole):
        raise UpcyclingError(
            f"{where}: {whole!r} cannot be read with '::' or '$NAME' in it. Rename it."
        )
    return escape(whole)


def _is_special(whole: str) -> bool:
    """Whether `datasets` would look elsewhere, and cannot be told not to."""
    return "::" in whole or os.path.expandvars(whole) != whole


def as_patterns(value: Any, where: str, folder: Path | None = None) -> Any:
    """`data_files` or `data_dir` of `datasets`: what is here is literal, all else a pattern.

    Args:
        folder: that they may be in.
    """
    if isinstance(value, Mapping):
        return {key: as_patterns(inner, where, folder) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_patterns(inner, where, folder) for inner in value]
    if not isinstance(value, str):
        return value
    places = [local_path(value, where)]
    if folder is not None:
        places.insert(0, folder / value)
    return next((as_pattern(path, where) for path in places if path.exists()), value)


def has_wildcards(path: Path) -> bool:
    """Whether `datasets` would take the path of this folder for a pattern."""
    whole = str(path.absolute())
    return has_magic(whole) or _is_special(whole)


def by_name(given: Any) -> Any:
    """Data in place of a mapping name -> data, by their file's name; anything else as it is.

    Args:
        given: a path, or `{path: ...}`, which go by the name of the file, or the mapping.
    """
    named = given.get("path") if isinstance(given, Mapping) else given
    if not isinstance(named, str) or not named:
        return given
    path = Path(named)
    return {path.stem if len(path.suffix) > 1 and not path.is_dir() else path.name: given}


def specification(text: str) -> Any:
    """What a command line says of data: a path; or what stands in braces, where that is no path.

    Raises:
        UpcyclingError: braces that hold no `key: value, ...`.
    """
    if not (text.startswith("{") and text.endswith("}")) or Path(text).exists():
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UpcyclingError(
            f"{text!r} is neither a path that is here nor {{key: value, ...}}. Write "
            '{path: "./data.jsonl", column: body}, in quotes of the shell.'
        ) from error


def text_of(file: Path, where: str) -> str:
    """The contents of a UTF-8 file, line ends as `\\n`; a byte order mark is no part of them.

    Raises:
        UpcyclingError: not UTF-8, with the line.
    """
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(where, file, line, error) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_lines(file: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a `.jsonl` file: where it is, in words, and its object. Blank ones are skipped.

    Raises:
        UpcyclingError: a line that is no JSON object, or not UTF-8; an empty file.
    """
    empty = True
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not (line := line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
                continue
            empty, place = False, f"{where}: {str(file)!r}, line {number}"
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise _not_utf8(where, file, number, error) from error
            except (ValueError, RecursionError) as error:
                raise UpcyclingError(
                    f"{place}: no JSON ({str(error) or 'nested too deep'}). Correct the line: a "
                    ".jsonl file holds one JSON object in each."
                ) from error
            if not isinstance(row, dict):
                raise UpcyclingError(
                    f"{place}: a {type(row).__name__}, not an object. A .jsonl file holds one JSON "
                    'object in each line, as {"text": "..."}.'
                )
            yield place, row
    if empty:
        raise UpcyclingError(f"{where}: {str(file)!r}: there is nothing in it. Leave it out.")


def _not_utf8(where: str, file: Path, line: int, error: UnicodeDecodeError) -> UpcyclingError:
    byte = error.object[error.start]
    return UpcyclingError(
        f"{where}: {str(file)!r}, line {line}: no UTF-8 ({error.reason}, byte 0x{byte:02x}). Save "
        "the file as UTF-8."
    )
