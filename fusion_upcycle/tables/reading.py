"""Rows of examples: local files and folders, data sets of the Hub, as `datasets` reads them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError, unknown

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

    Args:
        where: the option that names it, for errors.
        splits: without a `split`, the first of these that there is, or the only one.

    Raises:
        UpcyclingError: what is not there, cannot be read, is empty, or has several other splits.
    """
    from datasets import DatasetDict, load_dataset

    arguments = dict(source)
    path, split = str(arguments.pop("path")), arguments.pop("split", None)
    file = Path(path).expanduser()
    if file.is_file() or file.suffix in _BUILDERS:
        if file.suffix not in _BUILDERS:
            known = ", ".join(_BUILDERS)
            raise UpcyclingError(f"{where}: the format of {path!r} is not known. Give {known}.")
        if not file.is_file():
            raise UpcyclingError(f"{where}: there is no file {str(file.absolute())!r}.")
        path, arguments = _BUILDERS[file.suffix], {**arguments, "data_files": str(file)}
    elif file.is_dir():
        path = str(file)
    elif path.startswith((".", "/", "~")):
        raise UpcyclingError(f"{where}: there is no folder {str(file.absolute())!r}.")
    with readable(where, str(source["path"])):
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
