"""Documents to train or evaluate on: local files, Hugging Face data sets, or what a function gives.

A specification is one of:

- the path of a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file, or a list of such paths;
- ``{path, name, split, data_files, column, streaming}`` as ``datasets.load_dataset`` takes them;
- ``{_target_: package.function, ...arguments}``, a function that returns a string or a list.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError, unknown

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_DATASET_KEYS = ("path", "name", "split", "data_files", "column", "streaming")
_COLUMN = "text"


@dataclass(frozen=True)
class Documents:
    """Documents that are read as they are asked for.

    Attributes:
        texts: the documents, in order; iterate once or more.
        fingerprint: changes with their contents, as far as that is known without reading them: the
            contents of what a function gives, `datasets`' own fingerprint of files and data sets,
            and the specification alone of a data set that is streamed.
    """

    texts: Iterable[str]
    fingerprint: str


def load_documents(specification: Any, where: str) -> list[str]:
    """Documents of one specification (see the module), plain ``dict``/``list``/``str``.

    ``where`` names the specification in errors, e.g. ``taskpool.texts.prose``.

    Raises:
        UpcyclingError: what cannot be read as text.
    """
    return list(open_documents(specification, where).texts)


def open_documents(specification: Any, where: str) -> Documents:
    """As `load_documents`, for more text than fits in memory.

    Raises:
        UpcyclingError: what cannot be read as text; of a stream, when it is read.
    """
    if isinstance(specification, str):
        return _file_documents(specification, where)
    if isinstance(specification, Mapping):
        if "_target_" in specification:
            return _function_documents(specification, where)
        return _dataset_documents(specification, where)
    if isinstance(specification, Sequence) and all(isinstance(p, str) for p in specification):
        files = [_file_documents(path, where) for path in specification]
        return Documents(
            _Chained([file.texts for file in files]), " ".join(file.fingerprint for file in files)
        )
    raise UpcyclingError(
        f"{where} is {specification!r}. Give a file, a list of files, {{path, split, ...}} of a "
        "data set, or {_target_: function}."
    )


def named_documents(
    specifications: Mapping[str, Any] | None, where: str = "calibration"
) -> dict[str, list[str]]:
    """Name -> its documents, as `load_documents` reads them; ``where`` names the mapping in errors.

    Raises:
        UpcyclingError: what cannot be read as text, by name.
    """
    if not isinstance(specifications or {}, Mapping):
        raise UpcyclingError(f"{where}={specifications!r} must be a mapping, {{name: documents}}.")
    return {
        name: load_documents(specification, f"{where}.{name}")
        for name, specification in (specifications or {}).items()
    }


def _file_documents(path: str, where: str) -> Documents:
    file = Path(path).expanduser()
    if file.suffix not in _BUILDERS:
        raise UpcyclingError(
            f"{where}: the format of {path!r} is not known. Give a {', '.join(_BUILDERS)} file, or "
            "a data set of the Hub as {path: ..., split: ...}."
        )
    if not file.is_file():
        raise UpcyclingError(
            f"{where}: there is no file {str(file.absolute())!r}. Give the path of one that is."
        )
    builder, arguments = _BUILDERS[file.suffix]
    arguments = {**arguments, "data_files": str(file), "split": "train"}
    return _column_documents(builder, arguments, _COLUMN, where)


def _dataset_documents(specification: Mapping[str, Any], where: str) -> Documents:
    for key in specification:
        if key not in _DATASET_KEYS:
            raise unknown(f"key in {where}:", str(key), _DATASET_KEYS)
    for key in ("path", "split"):
        if key not in specification:
            raise UpcyclingError(
                f"{where} needs `{key}`, as in {{path: org/data_set, split: test}}."
            )
    arguments = dict(specification)
    column = arguments.pop("column", _COLUMN)
    return _column_documents(arguments.pop("path"), arguments, column, where)


def _column_documents(path: str, arguments: dict[str, Any], column: str, where: str) -> Documents:
    from datasets import load_dataset

    what = arguments.get("data_files", path)
    with _readable(where, what):
        table = load_dataset(path, **arguments)
        # A stream may not know its columns before its first row.
        columns = table.column_names or list(next(iter(table), {}))
    if column not in columns:
        raise UpcyclingError(
            f"{where}: {path!r} has no column {column!r} but {', '.join(columns)}. "
            "Name one as {path, split, column}."
        )
    if arguments.get("streaming"):
        fingerprint = json.dumps([path, column, arguments], sort_keys=True, default=str)
    else:
        fingerprint = f"{table._fingerprint}/{column}"
    return Documents(_Checked(table, column, where, what), fingerprint)


@contextmanager
def _readable(where: str, what: Any) -> Iterator[None]:
    """Errors of `datasets`, which are of many kinds, as ours."""
    try:
        yield
    except Exception as error:
        # "An error occurred" says less than its cause, and an empty file is a bare StopIteration.
        reason = str(error.__cause__ or error) or "there is nothing in it"
        raise UpcyclingError(
            f"{where}: {what!r} cannot be read: {reason.rstrip('.')}. Give text that "
            "datasets.load_dataset can read."
        ) from error


def _function_documents(specification: Mapping[str, Any], where: str) -> Documents:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    function = specification["_target_"]
    try:
        result = instantiate(dict(specification), _convert_="all")
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise UpcyclingError(
            f"{where}: {function} gives no text: {reason}. Give a function that can be imported, "
            "and its arguments."
        ) from error
    if not isinstance(result, Iterable):
        raise UpcyclingError(
            f"{where}: {function} gives {result!r}. Give a function of a string or a list of them."
        )
    documents = list(_checked([result] if isinstance(result, str) else result, where))
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return Documents(documents, digest.hexdigest())


@dataclass(frozen=True)
class _Chained:
    """Several iterables as one that can be iterated again."""

    parts: Sequence[Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.parts)


@dataclass(frozen=True)
class _Checked:
    """One column of a table, read row by row; `what` it is, for errors."""

    table: Any
    column: str
    where: str
    what: Any

    def __iter__(self) -> Iterator[str]:
        return _checked(self._values(), self.where)

    def _values(self) -> Iterator[Any]:
        with _readable(self.where, self.what):
            for row in self.table.select_columns(self.column):
                yield row[self.column]


def _checked(values: Iterable[Any], where: str) -> Iterator[str]:
    for index, document in enumerate(values):
        if not isinstance(document, str):
            raise UpcyclingError(
                f"{where}: document {index} is a {type(document).__name__}, not a string. Leave it "
                "out, or make it text."
            )
        yield document
