"""Documents to train or evaluate on: local files, Hugging Face data sets, or what a function gives.

A specification is one of:

- the path of a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file, or a list of such paths;
- ``{path, name, split, data_files, column}`` as ``datasets.load_dataset`` takes them;
- ``{_target_: package.function, ...arguments}``, a function that returns a string or a list.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import unknown

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_DATASET_KEYS = ("path", "name", "split", "data_files", "column")
_COLUMN = "text"


def load_documents(specification: Any, where: str) -> list[str]:
    """Documents of one specification (see the module), plain ``dict``/``list``/``str``.

    ``where`` names the specification in errors, e.g. ``taskpool.texts.prose``. ValueError for what
    cannot be read as text.
    """
    if isinstance(specification, str):
        return _file_documents(specification, where)
    if isinstance(specification, Mapping):
        if "_target_" in specification:
            return _function_documents(specification, where)
        return _dataset_documents(specification, where)
    if isinstance(specification, Sequence) and all(isinstance(p, str) for p in specification):
        return [document for path in specification for document in _file_documents(path, where)]
    raise ValueError(
        f"{where} is {specification!r}: give a file, a list of files, {{path, split, ...}} of a "
        "data set, or {_target_: function}"
    )


def _file_documents(path: str, where: str) -> list[str]:
    file = Path(path).expanduser()
    if file.suffix not in _BUILDERS:
        raise ValueError(
            f"{where}: cannot tell the format of {path!r}: give a {', '.join(_BUILDERS)} file, or "
            "a data set of the Hub as {path: ..., split: ...}"
        )
    if not file.is_file():
        raise ValueError(f"{where}: there is no file {str(file.absolute())!r}")
    builder, arguments = _BUILDERS[file.suffix]
    arguments = {**arguments, "data_files": str(file), "split": "train"}
    return _column_documents(builder, arguments, _COLUMN, where)


def _dataset_documents(specification: Mapping[str, Any], where: str) -> list[str]:
    for key in specification:
        if key not in _DATASET_KEYS:
            raise unknown(f"key in {where}:", str(key), _DATASET_KEYS)
    for key in ("path", "split"):
        if key not in specification:
            raise ValueError(f"{where} needs `{key}`, e.g. {{path: org/data_set, split: test}}")
    arguments = dict(specification)
    column = arguments.pop("column", _COLUMN)
    return _column_documents(arguments.pop("path"), arguments, column, where)


def _column_documents(path: str, arguments: dict[str, Any], column: str, where: str) -> list[str]:
    from datasets import load_dataset

    table = load_dataset(path, **arguments)
    if column not in table.column_names:
        raise ValueError(
            f"{where}: {path!r} has no column {column!r} but {', '.join(table.column_names)}: "
            "name one as {path, split, column}"
        )
    return _checked(table[column], where)


def _function_documents(specification: Mapping[str, Any], where: str) -> list[str]:
    from hydra.utils import instantiate

    result = instantiate(dict(specification), _convert_="all")
    return _checked([result] if isinstance(result, str) else result, where)


def _checked(values: Any, where: str) -> list[str]:
    documents = list(values)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(
                f"{where}: document {index} is a {type(document).__name__}, not a string"
            )
    return documents
