"""One local file of documents, read row by row; no more than a row of it is in memory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.files import json_lines, text_of

#: Formats: a text is one document, the others have a row for each.
SUFFIXES = (".txt", ".jsonl", ".parquet")
_ROWS = 64  # of a table, in memory together


@dataclass(frozen=True)
class DocumentFile:
    """The documents of one file.

    Attributes:
        file: of a format in `SUFFIXES`.
        column: of the documents, where there are rows.
        where: the option that names it, for errors.
    """

    file: Path
    column: str
    where: str

    @cached_property
    def fingerprint(self) -> str:
        """Place, size and times, which change with the contents."""
        known = self.file.stat()
        times = (known.st_mtime_ns, known.st_ctime_ns)
        return json.dumps([str(self.file.resolve()), self.column, known.st_size, *times])

    def __iter__(self) -> Iterator[str]:
        if self.file.suffix.lower() == ".txt":
            yield text_of(self.file, self.where)
            return
        rows = self._lines() if self.file.suffix.lower() == ".jsonl" else self._table()
        for place, value in rows:
            yield _text(value, self.column, place)

    def _lines(self) -> Iterator[tuple[str, Any]]:
        for place, row in json_lines(self.file, self.where):
            if self.column not in row:
                texts = [name for name, value in row.items() if isinstance(value, str)]
                raise self._no_column(place, list(row), texts)
            yield place, row[self.column]

    def _table(self) -> Iterator[tuple[str, Any]]:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
        from pyarrow.types import is_large_string, is_string

        place, number = f"{self.where}: {str(self.file)!r}", 0
        try:
            with ParquetFile(self.file) as table:
                schema = table.schema_arrow
                if self.column not in schema.names:
                    texts = [f.name for f in schema if is_string(f.type) or is_large_string(f.type)]
                    raise self._no_column(place, schema.names, texts)
                for batch in table.iter_batches(_ROWS, columns=[self.column]):
                    for value in batch.column(0).to_pylist():
                        yield f"{place}, row {number}", value
                        number += 1
        except (ArrowException, OSError) as error:
            said = str(error).splitlines()[0].rstrip(".")
            raise UpcyclingError(f"{place} cannot be read: {said}. Get the file again.") from error

    def _no_column(self, place: str, names: list[str], texts: list[str]) -> UpcyclingError:
        path, name = (
            json.dumps(said, ensure_ascii=False)
            for said in (str(self.file), texts[0] if texts else "NAME")
        )
        return UpcyclingError(
            f"{place}: there is no column {self.column!r} but {', '.join(names) or 'none'}. Name "
            f"one, with {{path: {path}, column: {name}}} in place of the file."
        )


def _text(value: Any, column: str, place: str) -> str:
    """A document as it is.

    Raises:
        UpcyclingError: something else, or characters that no file can hold.
    """
    if not isinstance(value, str):
        raise UpcyclingError(
            f"{place}: {column!r} is a {type(value).__name__}, not a string. Leave the row out, or "
            "make it text."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UpcyclingError(
            f"{place}: {column!r} has half of a surrogate pair at character {error.start}. Remove "
            "it."
        ) from error
    return value
