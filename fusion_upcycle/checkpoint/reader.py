"""Reading a checkpoint folder: safetensors files mapped into memory, pages released behind us.

The safetensors library maps files too, but keeps every page that was read resident; conversion of
a model larger than the machine needs to give pages back. The format is 8 bytes of header length,
a JSON header, and the bytes; parsed here, with all that a hostile or damaged file can get wrong.
"""

import json
import mmap
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.memory import memory_for
from fusion_upcycle.checkpoint.tensors import (
    CHUNK_ELEMENTS,
    DTYPES,
    INTEGERS,
    TensorSpec,
    is_buffer,
)
from fusion_upcycle.checkpoint.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    no_weights,
    stale_index,
)
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.untrusted import LARGE, read_bytes

_DTYPES = DTYPES | INTEGERS
#: A third of what the safetensors library allows: 200,000 tensors, more than any model has in one
#: file. Read in 3 CPU seconds and 400 MB.
_MAX_HEADER_BYTES = 32 * 2**20
_SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}\.safetensors")
#: Linux may map this much around a page that is read (large pages; else 64 KiB); what is
#: left mapped adds up over many tensors.
_FAULT_AROUND = 2 * 2**20
_OPEN_FILES = 32


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are: file, and offsets from the start of that file."""

    file: str
    start: int
    stop: int


class CheckpointReader:
    """A folder of safetensors shards as a `TensorSource`.

    Args:
        folder: a local folder with `model.safetensors`, or shards and their index.
        file: the one file to read; None finds the model's.
        read_once: what was released leaves the page cache too. Reading more than fits is faster
            so, nothing else is pushed out, and a proof sees what is on the disk. For files that
            nobody else writes to: pieces of others are copied (0.05 s of CPU per GB).

    Raises:
        UpcyclingError: missing, truncated, inconsistent, quantised or pickled files, by name.
    """

    def __init__(self, folder: Path, *, file: str | None = None, read_once: bool = False):
        self.folder = folder
        self._read_once = read_once
        self._places: dict[str, _Place] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._states: dict[str, tuple[int, int, int]] = {}
        self.specs: dict[str, TensorSpec] = {}
        listed_in: dict[str, set[str]] = {}
        for name, where in (_weight_map(folder) if file is None else {}).items():
            listed_in.setdefault(where, set()).add(name)
        for shard in sorted(listed_in) or [file or SINGLE_FILE]:
            names = self._open(shard)
            if listed_in:
                listed = listed_in[shard]
                if names != listed:
                    raise UpcyclingError(
                        f"{folder / shard} and {INDEX_FILE} disagree: in the index only "
                        f"{sorted(listed - names)[:3]}, in the file only "
                        f"{sorted(names - listed)[:3]}. Download the folder again."
                    )

    @property
    def files(self) -> list[Path]:
        """Paths of the safetensors files that hold the tensors."""
        return [self.folder / file for file in self._states]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor; one larger than a piece is a view of the file: never write to it."""
        spec, place = self.specs[name], self._places[name]
        if spec.numel <= CHUNK_ELEMENTS and not self._read_once:
            return self._read(place, spec.dtype, place.start, spec.numel).view(spec.shape)
        return self._view(place, spec.dtype, place.start, spec.numel).view(spec.shape)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Flat pieces in order: copies, as others may write to the file meanwhile.

        Of a file that is `read_once`, which is ours, views, whose pages are released when the next
        piece is asked for.
        """
        spec, place = self.specs[name], self._places[name]
        end = spec.numel if stop is None else min(stop, spec.numel)
        for at in range(start, max(start + 1, end), CHUNK_ELEMENTS):  # an empty one is one piece
            first = place.start + at * spec.dtype.itemsize
            count = min(CHUNK_ELEMENTS, end - at)
            if not self._read_once:
                yield self._read(place, spec.dtype, first, count)
                continue
            yield self._view(place, spec.dtype, first, count)
            self._release(place.file, first, first + count * spec.dtype.itemsize)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            place = self._places[name]
            self._release(place.file, place.start, place.stop)

    def _read(self, place: _Place, dtype: torch.dtype, start: int, count: int) -> Tensor:
        """A copy: looking at mapped pages of a file that has been cut off ends the process.

        Of small pieces only: fresh memory for a large matrix costs more than reading it.
        """
        if count <= 0:
            return torch.empty(0, dtype=dtype)
        memory = memory_for(count * dtype.itemsize)
        left = memoryview(memory)[: count * dtype.itemsize]
        path, at = self.folder / place.file, start
        try:
            with path.open("rb", buffering=0) as handle:
                while left and (size := os.preadv(handle.fileno(), [left], at)):
                    left, at = left[size:], at + size
                self._check_unchanged(place.file, handle.fileno())
        except OSError as error:
            self._check_unchanged(place.file)
            raise UpcyclingError(f"{path} cannot be read: {error.strerror}.") from error
        assert not left, (path, start, count)
        return torch.frombuffer(memory, dtype=dtype, count=count)

    def _view(self, place: _Place, dtype: torch.dtype, start: int, count: int) -> Tensor:
        if count <= 0:
            return torch.empty(0, dtype=dtype)
        self._check_unchanged(place.file)
        pages = self._mapped(place.file)
        with warnings.catch_warnings():
            # The map is read-only on purpose; torch only warns that writing would crash.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(pages, dtype=dtype, count=count, offset=start)

    def _check_unchanged(self, file: str, descriptor: int | None = None) -> None:
        """Refuse a file that is no longer what was opened; a shorter one would end the process."""
        path = self.folder / file
        state = _state(path if descriptor is None else descriptor)
        if state != self._states[file]:
            raise UpcyclingError(
                f"{path} changed while it was read"
                + (" (it is gone)" if state is None else "")
                + ". Start again when whatever writes it has ended."
            )

    def _mapped(self, file: str) -> mmap.mmap:
        """The file's pages; few files are kept open, as each counts against the system's limit."""
        pages = self._maps.pop(file, None)
        if pages is None:
            with (self.folder / file).open("rb") as handle:
                self._check_unchanged(file, handle.fileno())
                pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) == _OPEN_FILES:
                del self._maps[next(iter(self._maps))]  # a view that is in use keeps its pages
        self._maps[file] = pages  # last: the first is the one that was used the longest ago
        return pages

    def _release(self, file: str, start: int, stop: int) -> None:
        """Drop the pages of the range and those that the kernel mapped around them."""
        if (pages := self._maps.get(file)) is None:
            return
        first = start // _FAULT_AROUND * _FAULT_AROUND
        last = min(-(-stop // _FAULT_AROUND) * _FAULT_AROUND, len(pages))
        if first == last:
            return
        # The file still backs what others may be looking at.
        pages.madvise(mmap.MADV_DONTNEED, first, last - first)
        if self._read_once and hasattr(os, "posix_fadvise"):  # not on macOS
            with (self.folder / file).open("rb") as handle:
                os.posix_fadvise(handle.fileno(), first, stop - first, os.POSIX_FADV_DONTNEED)

    def _open(self, file: str) -> set[str]:
        path = self.folder / file
        if not path.is_file():
            raise UpcyclingError(
                f"{path} is missing, though {INDEX_FILE} names it. Download the folder again."
            )
        state = _state(path)
        assert state is not None
        size = state[0]
        header, data_start = _read_header(path, size)
        if size != (expected := data_start + _data_bytes(path, header)):
            raise UpcyclingError(
                f"{path} has {size:,} bytes, its header says {expected:,}: it is truncated or "
                "damaged. Download it again."
            )
        self._states[file] = state
        for name, entry in header.items():
            if name in self.specs:
                raise UpcyclingError(
                    f"Tensor {name} is in {self._places[name].file} and in {file} of "
                    f"{self.folder}. Keep one."
                )
            start, stop = entry["data_offsets"]
            self.specs[name] = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._places[name] = _Place(file, data_start + start, data_start + stop)
        return set(header)


def _state(file: Path | int) -> tuple[int, int, int] | None:
    """Size, time of the last change and number of a file; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    try:
        handle = path.open("rb")
    except OSError as error:
        raise UpcyclingError(f"{path} cannot be read: {error.strerror}.") from error
    with handle:
        length = int.from_bytes(handle.read(8), "little")
        if _MAX_HEADER_BYTES < length <= size - 8:
            raise UpcyclingError(
                f"{path} has a header of {length:,} bytes, more than {_MAX_HEADER_BYTES:,}: it is "
                "not read. Save the model in several files."
            )
        if size < 8 or length > size - 8:
            raise UpcyclingError(
                f"{path} is not a whole safetensors file: its header is cut off. Download it again."
            )
        header = parse_json(path, handle.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UpcyclingError(f"{path} is damaged (its metadata is no object). Download it again.")
    return header, 8 + length


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object from a file that may be damaged or hostile.

    Raises:
        UpcyclingError: no JSON object, or one with a name that stands there twice.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) < len(pairs):
            raise ValueError("a name stands there twice")
        return result

    try:
        data = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UpcyclingError(f"{path} is damaged ({error}). Download it again.") from error
    if not isinstance(data, dict):
        raise UpcyclingError(f"{path} is damaged (not a JSON object). Download it again.")
    return data


def _data_bytes(path: Path, header: dict[str, Any]) -> int:
    """Check every entry of a header that may be hostile; return the end of the data."""
    ranges = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = isinstance(shape, list) and isinstance(dtype, str)
            whole = whole and all(type(n) is int and 0 <= n < 2**62 for n in (*shape, start, stop))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise UpcyclingError(f"{path}: damaged safetensors entry for tensor {name}: {entry}.")
        if dtype not in DTYPES and not (dtype in INTEGERS and is_buffer(name)):
            raise UpcyclingError(
                f"{path}: tensor {name} has dtype {dtype}, probably quantised. Upcycle the "
                f"unquantised checkpoint; supported: {', '.join(DTYPES)}."
            )
        if stop - start != TensorSpec(_DTYPES[dtype], tuple(shape)).nbytes:
            raise UpcyclingError(
                f"{path}: tensor {name} of shape {shape} does not fill its {stop - start} bytes: "
                "the file is damaged."
            )
        ranges.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(ranges):
        if start != end:
            raise UpcyclingError(
                f"{path}: tensor {name} does not start where the one before it ends: the file is "
                "damaged."
            )
        end = stop
    return end


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file; empty for a single-file checkpoint."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            raise no_weights(folder)
        return {}
    weight_map = _read_index(index)
    if single.is_file() and stale_index(folder, {*weight_map.values()}):
        return {}
    return weight_map


def _read_index(index: Path) -> dict[str, str]:
    contents = parse_json(index, read_bytes(index, LARGE))
    weight_map = contents.get("weight_map")
    # transformers itself cannot read an index without "metadata".
    if not isinstance(weight_map, dict) or "metadata" not in contents:
        raise UpcyclingError(f"{index} lacks weight_map or metadata. Download it again.")
    for file in weight_map.values():
        # The index comes from strangers: only plain file names, nothing outside the folder.
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise UpcyclingError(
                f"{index} names {str(file)[:300]!r}, which is not a safetensors file name."
            )
    if not weight_map:
        raise UpcyclingError(f"{index} lists no tensors. Download it again.")
    return weight_map
