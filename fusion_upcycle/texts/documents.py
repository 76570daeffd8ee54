"""Documents to train or evaluate on: local files, Hugging Face data sets, or what a function gives.

A specification is one of:

- the path of a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file, of a folder of such files,
  or a list of such paths (names are literal, see ``fusion_upcycle.files``);
- ``{path, column}``, a path whose documents are in another column than ``text``;
- ``{path, name, split, data_files, column, streaming}`` as ``datasets.load_dataset`` takes them;
- ``{_target_: package.function, ...arguments}``, a function that returns a string or a list.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.files import as_patterns, data_files, local_path, may_be_on_the_hub, missing
from fusion_upcycle.texts.rows import SUFFIXES, DocumentFile

_DATASET_KEYS = ("path", "name", "split", "data_files", "column", "streaming")
_COLUMN = "text"


@dataclass(frozen=True)
class Documents:
    """Documents that are read as they are asked for.

    Attributes:
        texts: the documents, in order; iterate once or more.
        fingerprint: changes with their contents, as far as that is known without reading them: the
            contents of what a function gives, place, size and times of files, `datasets`' own
            fingerprint of data sets, and the specification alone of one that is streamed.
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
        return _local_documents([specification], _COLUMN, where)
    if isinstance(specification, Mapping):
        if "_target_" in specification:
            return _function_documents(specification, where)
        return _mapped_documents(specification, where)
    if isinstance(specification, Sequence) and all(isinstance(p, str) for p in specification):
        return _local_documents(specification, _COLUMN, where)
    raise UpcyclingError(
        f"{where} is {specification!r}. Give a file, a folder, a list of them, a data set as "
        "{path, split, ...}, or {_target_: function}."
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


def _local_documents(paths: Sequence[str], column: str, where: str) -> Documents:
    files = []
    for given in paths:
        path = local_path(given, where)
        if not path.exists() and not path.suffix and may_be_on_the_hub(given):
            raise UpcyclingError(
                f"{where}: there is no file or folder {str(path.absolute())!r}. Give the path of "
                f"one that is, or of a data set of the Hub {{path: {given}, split: train}}."
            )
        files += [DocumentFile(f, column, where) for f in data_files(path, where, SUFFIXES)]
    return Documents(_Chained(files), " ".join(file.fingerprint for file in files))


def _mapped_documents(specification: Mapping[str, Any], where: str) -> Documents:
    """Of `{path, ...}`: local files by our own rules, data sets by those of `datasets`."""
    for key in specification:
        if key not in _DATASET_KEYS:
            raise unknown(f"key in {where}:", str(key), _DATASET_KEYS)
    if not isinstance(given := specification.get("path"), str):
        raise UpcyclingError(f"{where} needs `path`, as in {{path: org/data_set, split: test}}.")
    arguments = {key: value for key, value in specification.items() if value is not None}
    del arguments["path"]
    column, path = str(arguments.pop("column", _COLUMN)), local_path(given, where)
    if path.is_file() or (not path.exists() and path.suffix.lower() in SUFFIXES):
        if arguments:
            raise UpcyclingError(
                f"{where}: {given!r} is a file, which has no {', '.join(arguments)}. Leave that "
                f"out, {{path: {json.dumps(given, ensure_ascii=False)}, column: {column}}}."
            )
        return _local_documents([given], column, where)
    if path.is_dir() and not arguments:
        return _local_documents([given], column, where)
    if not (path.exists() or may_be_on_the_hub(given, more=bool(arguments))):
        raise missing(path, where)
    if "split" not in arguments:
        raise UpcyclingError(f"{where} needs `split`, as in {{path: org/data_set, split: test}}.")
    if "data_files" in arguments:
        folder = path if path.is_dir() else None
        arguments["data_files"] = as_patterns(arguments["data_files"], where, folder)
    return _column_documents(str(path) if path.exists() else given, arguments, column, where)


def _column_documents(path: str, arguments: dict[str, Any], column: str, where: str) -> Documents:
    from datasets import load_dataset

    what = arguments.get("data_files", path)
    with _readable(where, what):
        table = load_dataset(path, **arguments)
        # A stream may not know its columns before its first row.
        columns = table.column_names or list(next(iter(table), {}))
    if column not in columns:
        raise UpcyclingError(
            f"{where}: {path!r} has no column {column!r} but {', '.join(columns)}. Name one beside "
            f"it, as column: {columns[0] if columns else 'NAME'}."
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
