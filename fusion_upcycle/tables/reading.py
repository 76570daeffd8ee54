"""Rows of examples: local files and folders, data sets of the Hub, as `datasets` reads them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.files import (
    as_pattern,
    as_patterns,
    data_files,
    files_below,
    has_wildcards,
    json_lines,
    local_path,
    may_be_on_the_hub,
    missing,
)

_BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
#: Of a specification, what `datasets.load_dataset` is given.
SOURCE_KEYS = ("path", "name", "split", "data_files", "data_dir")


def specified(
    specification: Any, where: str, more: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A path, or a mapping, as what is loaded and what is said of it.

    Args:
        more: keys of what may be said, beside `SOURCE_KEYS`.

    Raises:
        UpcyclingError: something else, or an unknown key.
    """
    if isinstance(specification, str | Path):
        return {"path": str(specification)}, {}
    if not isinstance(specification, Mapping) or not specification.get("path"):
        raise UpcyclingError(
            f"{where}={specification!r} must be a file, a folder, or a mapping {{path: ...}}."
        )
    known = (*SOURCE_KEYS, *more)
    for key in specification:
        if key not in known:
            raise unknown(f"key in {where}:", str(key), known)
    source = {str(k): v for k, v in specification.items() if k in SOURCE_KEYS}
    return source, {str(k): v for k, v in specification.items() if k in more}


def load_table(source: Mapping[str, Any], where: str, splits: Sequence[str]) -> Any:
    """A `datasets.Dataset` of a .jsonl or .parquet file, a folder, or a data set of the Hub.

    Names of what is here are literal, see `fusion_upcycle.files`.

    Args:
        where: the option that names it, for errors.
        splits: without a `split`, the first of these that there is, or the only one.

    Raises:
        UpcyclingError: what is not there, cannot be read, is empty, or has several other splits.
    """
    from datasets import DatasetDict, load_dataset

    arguments = dict(source)
    given, split = str(arguments.pop("path")), arguments.pop("split", None)
    more = split is not None or bool(arguments)
    path, place = _placed(given, where, more=more, chosen="data_files" in arguments)
    folder = Path(path) if Path(path).is_dir() else None
    for key in arguments.keys() & {"data_files", "data_dir"}:
        arguments[key] = as_patterns(arguments[key], where, folder)
    arguments = place | arguments
    with readable(where, given):
        table = load_dataset(path, split=split, **arguments)
    if isinstance(table, DatasetDict):
        names = list(table)
        found = [name for name in splits if name in names]
        if not found and len(names) > 1:
            raise UpcyclingError(
                f"{where} has the splits {', '.join(names)}: choose one, {{path: ..., split: ...}}."
            )
        table = table[(found or names)[0]]
    if not len(table):
        raise UpcyclingError(f"{where} is empty.")
    return table


def _placed(given: str, where: str, *, more: bool, chosen: bool) -> tuple[str, dict[str, Any]]:
    """What `datasets.load_dataset` is to be given for a path.

    Args:
        more: whether anything but the path is given.
        chosen: whether the files in it are named.
    """
    file = local_path(given, where)
    if not file.exists():
        if file.suffix.lower() in _BUILDERS or not may_be_on_the_hub(given, more=more):
            raise missing(file, where)
        return given, {}
    if file.is_file():
        data_files(file, where, tuple(_BUILDERS))  # or it is of another format
        _check(file, where)
        builder = _BUILDERS[file.suffix.lower()]
        return builder, {"data_files": as_pattern(file, where)}
    inside = [f for f in files_below(file) if f.suffix.lower() in _BUILDERS]
    for each in inside:
        _check(each, where)
    if chosen or not has_wildcards(file):
        return str(file), {}
    builder = _BUILDERS[inside[0].suffix.lower()] if inside else "imagefolder"
    return builder, {"data_dir": as_pattern(file, where)}


def _check(file: Path, where: str) -> None:
    """Refuse a file that `datasets` would not name, or not say the line of."""
    if file.suffix.lower() == ".jsonl":
        for _ in json_lines(file, where):
            pass
        return
    from pyarrow.parquet import ParquetFile

    with readable(where, str(file)), ParquetFile(file):
        pass


@contextmanager
def readable(where: str, what: str) -> Iterator[None]:
    """Errors of `datasets`, which are of many kinds, as ours.

    Raises:
        UpcyclingError: for any other error.
    """
    try:
        yield
    except UpcyclingError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error) or type(error).__name__
        raise UpcyclingError(
            f"{where}: {what!r} cannot be read: {reason.strip().splitlines()[0].rstrip('.')}. "
            "Give a file, a folder or a data set that datasets.load_dataset can read."
        ) from error
