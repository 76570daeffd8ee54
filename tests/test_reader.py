"""The reader on good, damaged and hostile checkpoint folders: a clear error, never a crash."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS
from fusion_upcycle.errors import UpcyclingError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.arange(8, dtype=torch.bfloat16),
    "c.weight": torch.arange(6, dtype=torch.float16).view(2, 3),
    "d.weight": torch.arange(4, dtype=torch.float64),
}
#: Fuzzing works in one folder; each example writes the files that it reads.
fuzz = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file with this header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_everything(folder: Path) -> dict[str, Tensor]:
    """Every tensor, whole and in pieces."""
    reader = CheckpointReader(folder)
    for name in reader.specs:
        pieces = list(reader.chunks(name))
        whole = reader.tensor(name)
        assert sum(piece.numel() for piece in pieces) == whole.numel()
    reader.release(reader.specs)
    return {name: reader.tensor(name) for name in reader.specs}


def refused(folder: Path, match: str | None = None) -> None:
    with pytest.raises(UpcyclingError, match=match):
        read_everything(folder)


def two_shards(folder: Path) -> dict[str, str]:
    """A folder of two shards and an index; returns its weight map."""
    names = sorted(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_reads(folder: Path) -> None:
    found = read_everything(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_a_single_file_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    assert_reads(tmp_path)


def test_shards_are_read(tmp_path: Path) -> None:
    two_shards(tmp_path)
    assert_reads(tmp_path)


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}, tmp_path / WEIGHTS)
    found = read_everything(tmp_path)
    assert found["scalar"].item() == 3.0
    assert found["empty"].shape == (0, 5)


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    header = json.dumps({"x": entry()}).encode()
    header += b" " * (3 - len(header) % 8 if len(header) % 8 < 3 else 11 - len(header) % 8)
    data = torch.tensor([1.5, -2.5]).numpy().tobytes()
    (tmp_path / WEIGHTS).write_bytes(safetensors(header, data))
    assert (8 + len(header)) % 4
    assert read_everything(tmp_path)["x"].tolist() == [1.5, -2.5]


@pytest.mark.parametrize("name", TENSORS)
def test_pieces_of_a_large_tensor_come_in_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_upcycle.checkpoint.reader.CHUNK_ELEMENTS", 3)
    save_file(TENSORS, tmp_path / WEIGHTS)
    pieces = list(CheckpointReader(tmp_path).chunks(name))
    assert [len(piece) for piece in pieces[:-1]] == [3] * (len(pieces) - 1)
    assert torch.equal(torch.cat(pieces), TENSORS[name].flatten())


def test_a_range_beyond_the_end_is_cut_off_there(tmp_path: Path) -> None:
    save_file({"x": torch.arange(3.0), "y": torch.ones(9)}, tmp_path / WEIGHTS)
    (found,) = CheckpointReader(tmp_path).chunks("x", 1, 64)
    assert torch.equal(found, torch.tensor([1.0, 2.0]))


def test_a_released_tensor_can_be_read_again(tmp_path: Path) -> None:
    save_file({"x": torch.arange(100_000.0)}, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    kept = reader.tensor("x")
    reader.release(["x"])
    assert torch.equal(kept, torch.arange(100_000.0))


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cut off"),
    "seven bytes": (b"1234567", "cut off"),
    "header longer than the file": (safetensors({}, length=10**6), "cut off"),
    "header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "cut off"),
    "header of no bytes": (safetensors(b""), "damaged"),
    "header not JSON": (safetensors(b"{not json"), "damaged"),
    "header not UTF-8": (safetensors(b'{"\xff\xfe": 1}'), "damaged"),
    "header a list": (safetensors([1, 2]), "damaged"),
    "metadata no object": (safetensors({"__metadata__": 5}), "its metadata is no object"),
    "a dimension beyond any": (safetensors({"x": entry(shape=[0, 2**70])}), "damaged .* entry"),
    "header nested too deep": (safetensors(b'{"x":' + b"[" * 100_000), "damaged"),
    "entry not an object": (safetensors({"x": 5}), "x"),
    "entry without dtype": (safetensors({"x": {"shape": [2], "data_offsets": [0, 8]}}), "x"),
    "dtype a list": (safetensors({"x": entry(dtype=["F32"])}, bytes(8)), "x"),
    "dtype null": (safetensors({"x": entry(dtype=None)}, bytes(8)), "x"),
    "dtype unknown": (safetensors({"x": entry(dtype="F8_E4M3")}, bytes(8)), "F8_E4M3.*quantised"),
    "shape null": (safetensors({"x": entry(shape=None)}, bytes(8)), "x"),
    "shape an object": (safetensors({"x": entry(shape={}, offsets=[0, 4])}, bytes(4)), "x"),
    "shape negative": (safetensors({"x": entry(shape=[-1, -2])}, bytes(8)), "x"),
    "shape of fractions": (safetensors({"x": entry(shape=[2.0])}, bytes(8)), "x"),
    "shape of booleans": (safetensors({"x": entry(shape=[True, 2])}, bytes(8)), "x"),
    "shape overflowing": (safetensors({"x": entry(shape=[2**40, 2**40])}, bytes(8)), "fill"),
    "shape not the size": (safetensors({"x": entry(shape=[3])}, bytes(8)), "fill"),
    "offsets negative": (safetensors({"x": entry(offsets=[-8, 0])}, bytes(8)), "x"),
    "offsets backwards": (safetensors({"x": entry(offsets=[8, 0])}, bytes(8)), "fill"),
    "offsets beyond the end": (safetensors({"x": entry(offsets=[8, 16])}, bytes(8)), "damaged"),
    "offsets of one": (safetensors({"x": entry(offsets=[0])}, bytes(8)), "x"),
    "offsets overlapping": (
        safetensors({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
        "overlap|damaged",
    ),
    "offsets shared": (safetensors({"x": entry(), "y": entry()}, bytes(8)), "overlap|damaged"),
    "a name twice": (
        safetensors(
            b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            bytes(16),
        ),
        "x|damaged",
    ),
    "a hole between tensors": (
        safetensors({"x": entry(), "y": entry(offsets=[16, 24])}, bytes(24)),
        "hole|damaged",
    ),
    "bytes after the data": (safetensors({"x": entry()}, bytes(9)), "damaged"),
    "bytes missing": (safetensors({"x": entry()}, bytes(7)), "truncated"),
}


@pytest.mark.parametrize(("contents", "match"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused(contents: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(contents)
    refused(tmp_path, match)


@fuzz
@given(cut=st.integers(0, 10_000))
def test_a_file_cut_off_anywhere_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    save_file(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    refused(tmp_path)


@fuzz
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_one_changed_byte_is_refused_or_harmless(place: int, byte: int, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    save_file(TENSORS, path)
    contents = bytearray(path.read_bytes())
    contents[place % len(contents)] = byte
    path.write_bytes(contents)
    only_upcycling_errors(lambda: read_everything(tmp_path))


numbers = st.one_of(st.integers(-9, 40), st.integers(), st.booleans(), st.none(), st.floats())
anything = st.recursive(
    st.one_of(numbers, st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F64", "F32", "F16", "BF16", "I8"]), anything),
            "shape": st.one_of(st.lists(st.integers(0, 5), max_size=3), anything),
            "data_offsets": st.one_of(
                st.lists(st.integers(0, 40), min_size=2, max_size=2), anything
            ),
        }
    ),
    anything,
)
headers = st.one_of(st.dictionaries(st.text(max_size=3), entries, max_size=3), anything)


@fuzz
@given(header=headers, size=st.integers(0, 40))
def test_any_header_is_read_or_refused(header: Any, size: int, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(safetensors(header, bytes(size)))
    only_upcycling_errors(lambda: read_everything(tmp_path))


@fuzz
@given(weight_map=st.one_of(st.dictionaries(st.text(max_size=3), anything, max_size=3), anything))
def test_any_index_is_read_or_refused(weight_map: Any, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    refused(tmp_path)


def only_upcycling_errors(action: Callable[[], object]) -> None:
    try:
        action()
    except UpcyclingError as error:
        assert len(str(error)) > 20, "an error says what is wrong"


@pytest.mark.parametrize("contents", [b"", b"[]", b"{}", b"null", b"\xff", b"[" * 100_000])
def test_a_bad_index_file_is_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(contents)
    refused(tmp_path, "index.json")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin"],
)
def test_an_index_that_names_anything_but_a_plain_shard_is_refused(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):  # the files are there: it is the name that counts
        save_file({"x": torch.ones(2)}, place / WEIGHTS)
    write_index(folder, {"x": name})
    refused(folder, "not a safetensors file name")


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    (tmp_path / weight_map["c.weight"]).unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors is missing")


def test_a_tensor_that_only_the_index_names_is_refused(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    write_index(tmp_path, weight_map | {"e.weight": weight_map["a.weight"]})
    refused(tmp_path, "e.weight")


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    weight_map.pop("b.weight")
    write_index(tmp_path, weight_map)
    refused(tmp_path, "b.weight")


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    first, second = weight_map["a.weight"], weight_map["c.weight"]
    save_file({n: TENSORS[n] for n in ("a.weight", "c.weight", "d.weight")}, tmp_path / second)
    assert first != second
    refused(tmp_path, "a.weight")


def test_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file(TENSORS, tmp_path / WEIGHTS)
    refused(tmp_path, "stale")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(
    file: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(b"pickle")
    refused(tmp_path, "save_pretrained")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no weights")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no weights")


def test_specs_are_known_without_reading_data(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    for name, spec in CheckpointReader(tmp_path).specs.items():
        tensor = TENSORS[name]
        assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape))
        assert (spec.numel, spec.nbytes) == (math.prod(tensor.shape), tensor.nbytes)


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: os.truncate(path, 100),
    "written over": lambda path: path.write_bytes(path.read_bytes()),
    "replaced": lambda path: Path(shutil.copy(path, path.with_suffix(".new"))).rename(path),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    """A mapped file that was cut off would end the process with SIGBUS."""
    save_file({"x": torch.zeros(CHUNK_ELEMENTS + 1, dtype=torch.float16)}, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    pieces = reader.chunks("x")
    next(pieces)
    change(tmp_path / WEIGHTS)
    with pytest.raises(UpcyclingError, match=r"model\.safetensors changed while it was read"):
        next(pieces)
    with pytest.raises(UpcyclingError, match="changed while it was read"):
        reader.tensor("x")


def test_a_file_that_is_cut_off_in_the_very_moment_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"x": torch.zeros(100_000)}, tmp_path / WEIGHTS)
    reader, real = CheckpointReader(tmp_path), os.preadv

    def cut_off(*arguments: Any) -> int:
        os.truncate(tmp_path / WEIGHTS, 5_000)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", cut_off)
    for read in (lambda: next(reader.chunks("x")), lambda: reader.tensor("x")):
        with pytest.raises(UpcyclingError, match=r"model\.safetensors changed while it was read"):
            read()


def test_a_disk_that_cannot_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.zeros(10)}, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(UpcyclingError, match=r"model\.safetensors cannot be read: Input/output"):
        reader.tensor("x")


def test_memory_of_a_piece_is_used_again_only_when_nobody_looks_at_it(tmp_path: Path) -> None:
    whole = torch.arange(5 * CHUNK_ELEMENTS, dtype=torch.float32)
    save_file({"x": whole}, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    assert torch.equal(torch.cat(list(reader.chunks("x"))), whole)  # all are held at once
    views = [piece[7:9] for piece in reader.chunks("x")]
    assert torch.equal(torch.cat(views), whole.view(5, -1)[:, 7:9].flatten())
    del views
    assert (
        len({piece.data_ptr() for piece in reader.chunks("x")}) == 2
    )  # the next, while one is held
