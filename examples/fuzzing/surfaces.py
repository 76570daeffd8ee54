"""What is read of strangers' files, and valid files of each kind to begin with.

A surface is a folder that is valid, the files of it that are changed, and the function of ours that
reads them. An input is one such file: its number, and its contents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.mutation import Choice, Encoder, as_json, mutated_bytes, mutated_json


@dataclass(frozen=True)
class File:
    """A file that is changed.

    Attributes:
        name: in the surface's folder.
        documents: valid contents, as data; bytes are taken as they are.
        encode: writes such a document.
    """

    name: str
    documents: Sequence[Any]
    encode: Encoder = as_json

    def contents(self) -> list[bytes]:
        return [d if isinstance(d, bytes) else self.encode(d) for d in self.documents]


@dataclass(frozen=True)
class Surface:
    """One kind of input.

    Attributes:
        name: in the record.
        files: that are changed, one at a time.
        read: what of ours reads the folder.
        share: of a million inputs.
        others: makes the other files of the folder.
        patience: how many times the usual CPU seconds one input may take.
    """

    name: str
    files: Sequence[File]
    read: Callable[[Path], object]
    share: int
    others: Callable[[Path], object] = lambda folder: None
    patience: float = 1.0
    _known: dict[int, list[bytes]] = field(default_factory=dict, repr=False)

    def prepare(self, folder: Path) -> None:
        """Make the folder, with a valid file of each kind."""
        self.others(folder)
        for index in range(len(self.files)):
            self._write(folder, index, self._contents(index)[0])

    def use(self, folder: Path, content: bytes) -> None:
        """Put an input in its place, read the folder, and put a valid file there again.

        Raises:
            UpcyclingError: refused.
        """
        index = content[0] % len(self.files)
        self._write(folder, index, content[1:])
        try:
            self.read(folder)
        finally:
            if len(self.files) > 1:
                self._write(folder, index, self._contents(index)[0])

    def samples(self) -> list[bytes]:
        """Valid inputs: the first contents of each file."""
        return [bytes([i]) + self._contents(i)[0] for i in range(len(self.files))]

    def structured(self, choose: Choice) -> bytes:
        """An input whose structure is not that of a valid one."""
        index = choose(len(self.files) - 1)
        file = self.files[index]
        document = file.documents[choose(len(file.documents) - 1)]
        if isinstance(document, bytes):
            return self._changed(index, choose)
        try:
            return bytes([index]) + file.encode(mutated_json(document, choose))
        except ValueError:  # a number that Python itself does not write
            return self._changed(index, choose)

    def made(self, choose: Choice) -> bytes:
        """An input changed in its structure, or in its bytes."""
        if choose(1):
            return self.structured(choose)
        return self._changed(choose(len(self.files) - 1), choose)

    def _changed(self, index: int, choose: Choice) -> bytes:
        contents = self._contents(index)
        content = contents[choose(len(contents) - 1)]
        return bytes([index]) + mutated_bytes(content, choose, contents)

    def _contents(self, index: int) -> list[bytes]:
        if index not in self._known:
            self._known[index] = self.files[index].contents()
        return self._known[index]

    def _write(self, folder: Path, index: int, content: bytes) -> None:
        (folder / self.files[index].name).write_bytes(content)
