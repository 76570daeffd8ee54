"""Writing a checkpoint folder: sharded, one piece of a tensor in memory, atomic, resumable.

Shards are written to a staging folder beside the output, `.NAME.incomplete`, which is renamed to
the output's name only when the folder is complete and proven. A failure removes it; after a kill
or a power cut it stays, and the next run of the same conversion keeps its finished shards.
"""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from fusion_upcycle.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from fusion_upcycle.checkpoint.tensors import DTYPES, TensorSpec
from fusion_upcycle.errors import UpcyclingError

#: The file by which a folder is known to be an output of ours; holds the plan and the proof.
RECORD_FILE = "upcycling.json"
TRAINING_RECORD_FILE = "training.json"
_FINGERPRINT_FILE = "conversion.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Room for config, tokenizer and file system overhead beside the tensors.
_SPARE_BYTES = 64 * 2**20
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


def parse_size(size: int | str) -> int:
    """Bytes from 5GB, 500MB, 2GiB, 1000000, ...

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
        raise UpcyclingError(f"max_shard_size={size!r} is not a size such as 5GB or 500MB.")
    return result


@contextmanager
def staging_folder(
    output: Path, fingerprint: Mapping[str, object], *, total_bytes: int, overwrite: bool
) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the block ends without an error.

    Args:
        output: final path. Must not exist, be empty, or be an earlier output with `overwrite`.
        fingerprint: identifies the conversion; a left-over staging folder is kept only for it.
        total_bytes: to be written; checked against the free space first.

    Raises:
        UpcyclingError: the output exists, the disk is too small, another process is writing.
    """
    output = output.resolve()  # "." or a link can be written to, but not renamed over
    check_output(output, overwrite=overwrite)
    staging = output.parent / f".{output.name}.incomplete"
    fresh = not staging.exists()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
    except OSError as error:
        raise UpcyclingError(f"{output} cannot be made: {error}. Choose another output.") from error
    with _locked(staging, output):
        try:
            _prepare(staging, fingerprint)
            _check_free_space(staging, total_bytes)
        except UpcyclingError:
            if fresh:  # else it is not ours, or holds the finished shards of a killed run
                shutil.rmtree(staging)
            raise
        try:
            yield staging
            _replace(staging, output, overwrite=overwrite)
        except BaseException as error:
            # Not reached when the process is killed: then finished shards stay for a resume.
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError):
                raise UpcyclingError(f"Writing {output} failed: {error}.") from error
            raise


@contextmanager
def _locked(staging: Path, output: Path) -> Iterator[None]:
    """Hold the staging folder alone; the lock is the folder itself and leaves no file behind."""
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other process may have finished and renamed the folder in between.
            held = os.path.samestat(os.fstat(descriptor), staging.stat())
        except OSError:
            held = False
        if not held:
            raise UpcyclingError(f"Another process is writing {output}. Wait for it to end.")
        yield
    finally:
        os.close(descriptor)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to touch anything that is not a previous output of ours."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not _is_ours(output):
        raise UpcyclingError(
            f"{output} exists and is not an output of fusion_upcycle (it has no {RECORD_FILE} or "
            f"{TRAINING_RECORD_FILE}), so it is never overwritten. Choose another output or remove "
            "it yourself."
        )
    if not overwrite:
        raise UpcyclingError(f"{output} exists. Pass overwrite=true to replace it.")


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RECORD_FILE, TRAINING_RECORD_FILE))


def write_shards(
    staging: Path, shards: list[Shard], chunks: Chunks, progress: Callable[[int], object]
) -> None:
    """Write every shard that a previous run has not finished, and the index.

    Args:
        staging: existing folder.
        chunks: tensor name -> its flat pieces in order.
        progress: called with the number of bytes just written.
    """
    # Flushing a finished shard to the disk overlaps with writing the next one.
    with ThreadPoolExecutor(1) as flusher:
        flushes: list[Future[None]] = []
        for shard in shards:
            path = staging / shard.file
            if path.is_file() and path.stat().st_size == shard.nbytes:
                progress(sum(spec.nbytes for spec in shard.specs.values()))
                continue
            part = path.with_suffix(".part")
            _write_shard(part, shard, chunks, progress)
            flushes.append(flusher.submit(_flush_and_rename, part, path))
        for flush in flushes:
            flush.result()
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
        weight_map = {name: shard.file for shard in shards for name in shard.specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    path: Path, shard: Shard, chunks: Chunks, progress: Callable[[int], object]
) -> None:
    with path.open("wb", buffering=0) as handle:
        handle.write(shard.header)
        buffered = 0
        for name, spec in shard.specs.items():
            written = 0
            for chunk in chunks(name):
                assert chunk.dtype == spec.dtype, (name, chunk.dtype, spec.dtype)
                # numpy knows no bfloat16: hand over the bytes
                data = chunk.contiguous().view(torch.uint8).numpy().data
                while data:  # a raw write may take less than it was given
                    data = data[handle.write(data) :]
                written += chunk.nbytes
                buffered += chunk.nbytes
                if buffered >= _WRITE_BEHIND_BYTES:
                    _write_behind(handle.fileno())
                    buffered = 0
                progress(chunk.nbytes)
            assert written == spec.nbytes, (name, written, spec)


def _write_behind(descriptor: int) -> None:
    """Start writing what is buffered to the disk, and give back the pages that are on it.

    Otherwise the output pushes everything else out of the page cache, the disk waits for the end
    of a shard, and fresh pages can cost more than the writing (10 times more on a virtual machine
    whose memory is backed on first use).
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _flush_and_rename(part: Path, path: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(path)


def _prepare(staging: Path, fingerprint: Mapping[str, object]) -> None:
    """Keep a left-over staging folder of the same conversion; else start with an empty one."""
    text = json.dumps(fingerprint, indent=2, sort_keys=True)
    record = staging / _FINGERPRINT_FILE
    if any(staging.iterdir()) and not record.is_file():
        raise UpcyclingError(f"{staging} exists and was not made here. Remove or rename it.")
    if record.is_file() and record.read_text() != text:
        for path in staging.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
    record.write_text(text)
    for part in staging.glob("*.part"):
        part.unlink()


def _check_free_space(staging: Path, total_bytes: int) -> None:
    done = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
    free = shutil.disk_usage(staging).free
    if free < (needed := total_bytes - done + _SPARE_BYTES):
        raise UpcyclingError(
            f"Not enough free disk at {staging.parent}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free. Free some, or choose an output on another disk."
        )


def _replace(staging: Path, output: Path, *, overwrite: bool) -> None:
    check_output(output, overwrite=overwrite)  # it may have appeared since the start
    if _is_ours(output):
        output.rename(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    staging.rename(output)
    (output / _FINGERPRINT_FILE).unlink()
    # The one just replaced, and any of a run that was killed between its two renames.
    for old in output.parent.glob(f".{glob.escape(output.name)}.replaced-*"):
        if _is_ours(old):
            shutil.rmtree(old, ignore_errors=True)
