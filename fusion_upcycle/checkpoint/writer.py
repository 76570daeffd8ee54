"""Writing the shards of a checkpoint, one piece of a tensor in memory; finished ones are kept.

They are written to a folder of `fusion_upcycle.checkpoint.staging`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from fusion_upcycle.checkpoint.durable import sync
from fusion_upcycle.checkpoint.tensors import DTYPES, INTEGERS, TensorSpec
from fusion_upcycle.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from fusion_upcycle.errors import UpcyclingError

_DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}
_WRITE_BEHIND_BYTES = 8 * 2**20

Chunks = Callable[[str], Iterator[Tensor]]


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, its tensors in order, and its header."""

    file: str
    specs: Mapping[str, TensorSpec]

    @property
    def header(self) -> bytes:
        """8 bytes of length and a JSON header padded to 8 bytes, as safetensors demands."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in self.specs.items():
            entries[name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs.values())


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_size: int | str) -> list[Shard]:
    """Fill shards in order up to `max_shard_size` (bytes, or "5GB"), as the Hub's own library does.

    A tensor larger than that gets a shard of its own.
    """
    split = split_state_dict_into_shards_factory(
        specs,  # type: ignore[arg-type]  # of tensors, of which it asks nothing but their size
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=SINGLE_FILE.replace(".", "{suffix}."),
        max_shard_size=parse_size(max_shard_size),
    )
    return [
        Shard(file, {name: specs[name] for name in names})
        for file, names in split.filename_to_tensors.items()
    ]


def parse_size(size: int | str, option: str = "max_shard_size") -> int:
    """Bytes from 5GB, 500MB, 2GiB, 1000000, ...

    Args:
        option: whose value it is, for the error.

    Raises:
        UpcyclingError: no size, or none above 0.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    number = text.rstrip("BGIKM")
    try:
        result = int(float(number) * (units[text[len(number) :]] if text != number else 1))
    except (KeyError, ValueError, OverflowError):
        result = 0
    if result <= 0:
        raise UpcyclingError(f"{option}={size!r} is not a size such as 5GB or 500MB.")
    return result


def write_shards(
    staging: Path, shards: list[Shard], chunks: Chunks, progress: Callable[[int], object]
) -> dict[str, str]:
    """Write every shard that a previous run has not finished, and the index.

    Args:
        staging: existing folder.
        chunks: tensor name -> its flat pieces in order.
        progress: called with the number of bytes just written.

    Returns:
        file -> SHA-256 of each shard that was written now, hashed on the way to the disk.
    """
    digests: dict[str, str] = {}
    # Flushing a finished shard to the disk overlaps with writing the next one.
    with ThreadPoolExecutor(1) as flusher:
        flushes: list[Future[None]] = []
        for shard in shards:
            path = staging / shard.file
            if path.is_file() and path.stat().st_size == shard.nbytes:
                progress(sum(spec.nbytes for spec in shard.specs.values()))
                continue
            part = path.with_suffix(".part")
            digests[shard.file] = _write_shard(part, shard, chunks, progress)
            flushes.append(flusher.submit(_flush_and_rename, part, path))
        for flush in flushes:
            flush.result()
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
        weight_map = {name: shard.file for shard in shards for name in shard.specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return digests


def _write_shard(
    path: Path, shard: Shard, chunks: Chunks, progress: Callable[[int], object]
) -> str:
    """Returns the SHA-256 of the file."""
    digest = hashlib.sha256(shard.header)
    with path.open("wb", buffering=0) as handle:
        handle.write(shard.header)
        buffered = 0
        for name, spec in shard.specs.items():
            written = 0
            for chunk in chunks(name):
                assert chunk.dtype == spec.dtype, (name, chunk.dtype, spec.dtype)
                # numpy knows no bfloat16: hand over the bytes
                data = chunk.contiguous().view(torch.uint8).numpy().data
                digest.update(data)
                while data:  # a raw write may take less than it was given
                    data = data[handle.write(data) :]
                written += chunk.nbytes
                buffered += chunk.nbytes
                if buffered >= _WRITE_BEHIND_BYTES:
                    _write_behind(handle.fileno())
                    buffered = 0
                progress(chunk.nbytes)
            assert written == spec.nbytes, (name, written, spec)
    return digest.hexdigest()


def _write_behind(descriptor: int) -> None:
    """Start writing what is buffered to the disk, and give back the pages that are on it.

    Otherwise the output pushes everything else out of the page cache, the disk waits for the end
    of a shard, and fresh pages can cost more than the writing (10 times more on a virtual machine
    whose memory is backed on first use).
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _flush_and_rename(part: Path, path: Path) -> None:
    sync(part)
    part.rename(path)
