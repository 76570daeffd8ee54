"""The writer: files as the Hub has them; all or nothing; resumed after a kill."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import ended, start
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import assert_same_bits, dense_folder, dense_model, files_of, tensors_of
from torch import Tensor
from transformers import PreTrainedModel

from fusion_upcycle import MixtralForCausalLMUpscalingAlgorithm, upcycle
from fusion_upcycle.checkpoint.staging import RECORD_FILE, staging_folder
from fusion_upcycle.checkpoint.tensors import TensorSpec
from fusion_upcycle.checkpoint.writer import Shard, parse_size, plan_shards, write_shards
from fusion_upcycle.conversion import output as conversion_output
from fusion_upcycle.errors import UpcyclingError

TENSORS = {
    "embed.weight": torch.arange(40, dtype=torch.float32).view(10, 4),
    "layers.0.bf16": torch.arange(30, dtype=torch.bfloat16),
    "layers.0.f16": torch.arange(6, dtype=torch.float16).view(2, 3),
    "layers.1.f64": torch.arange(9, dtype=torch.float64),
    "norm": torch.tensor([float("nan"), -0.0, float("inf")]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}
SPECS = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
OPTIONS: dict[str, Any] = {"expert_init": "noise", "max_shard_size": "30KB", "progress": False}


def pieces(name: str) -> Iterator[Tensor]:
    """Uneven pieces, as a sink gets them."""
    yield from TENSORS[name].reshape(-1).split(7)


def write(folder: Path, max_shard_size: int | str) -> list[Shard]:
    shards = plan_shards(SPECS, max_shard_size)
    write_shards(folder, shards, pieces, lambda _: None)
    return shards


def staged(
    output: Path, *, overwrite: bool = False, total_bytes: int = 0, what: str = "this"
) -> AbstractContextManager[Path]:
    shards = [shard.file for shard in plan_shards(SPECS, 100)]
    return staging_folder(
        output, {"what": what}, total_bytes=total_bytes, overwrite=overwrite, shards=shards
    )


def finish(output: Path, text: str = "", *, overwrite: bool = False) -> None:
    """Make an output folder as a conversion does."""
    with staged(output, overwrite=overwrite) as folder:
        (folder / RECORD_FILE).write_text(text)


# --- shards -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["5GB", 200, 1])
def test_safetensors_own_reader_reads_the_same_bytes(
    max_shard_size: int | str, tmp_path: Path
) -> None:
    write(tmp_path, max_shard_size)
    assert_same_bits(tensors_of(tmp_path), TENSORS)


def test_files_carry_the_format_that_transformers_looks_for(tmp_path: Path) -> None:
    write(tmp_path, "5GB")
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_tensor_data_is_aligned(tmp_path: Path) -> None:
    write(tmp_path, 200)
    for path in tmp_path.glob("*.safetensors"):
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_one_shard_is_a_single_file_without_an_index(tmp_path: Path) -> None:
    write(tmp_path, "5GB")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_shards_are_named_and_indexed_as_on_the_hub(tmp_path: Path) -> None:
    shards = write(tmp_path, 200)
    count = len(shards)
    assert count > 1
    files = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS.values())
    assert index["weight_map"] == {
        name: file for file in files for name in load_file(tmp_path / file)
    }


def test_no_shard_exceeds_the_limit_unless_one_tensor_does() -> None:
    specs = {f"t{i}": TensorSpec(torch.float32, (size,)) for i, size in enumerate([9, 1, 30, 4, 6])}
    groups = [list(shard.specs) for shard in plan_shards(specs, 40)]
    assert groups == [["t2"], ["t0", "t1"], ["t3", "t4"]]


def test_the_planned_size_is_that_of_the_file(tmp_path: Path) -> None:
    for shard in write(tmp_path, 200):
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes


def test_progress_adds_up_to_all_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    write_shards(tmp_path, plan_shards(SPECS, 200), pieces, seen.append)
    assert sum(seen) == sum(spec.nbytes for spec in SPECS.values())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1234, 1234),
        ("1234", 1234),
        ("5GB", 5 * 10**9),
        ("1.5 GB", 1_500_000_000),
        ("200mb", 2 * 10**8),
        ("10KB", 10**4),
        ("2GiB", 2**31),
        ("3MiB", 3 * 2**20),
        ("1KiB", 1024),
    ],
)
def test_sizes_are_understood(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5TBs", "five", "-5GB", "0", 0, -1, True, None, "5 G B", "1e999GB", "nanGB"]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(UpcyclingError, match="max_shard_size"):
        parse_size(text)  # type: ignore[arg-type]


# --- all or nothing ---------------------------------------------------------------------------


def test_the_output_appears_only_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged(output) as folder:
        (folder / "file").write_text("x")
        assert not output.exists()
    assert files_of(tmp_path) == {"out/file": b"x"}


def test_missing_parent_folders_are_made(tmp_path: Path) -> None:
    finish(tmp_path / "new" / "deep" / "out")
    assert (tmp_path / "new" / "deep" / "out" / RECORD_FILE).is_file()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_neither_output_nor_staging(
    error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error), staged(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_of_a_shard_leaves_nothing(tmp_path: Path) -> None:
    def fail_at_the_norm(name: str) -> Iterator[Tensor]:
        if name == "norm":
            raise RuntimeError("disk on fire")
        return pieces(name)

    with pytest.raises(RuntimeError, match="on fire"), staged(tmp_path / "out") as folder:
        write_shards(folder, plan_shards(SPECS, 100), fail_at_the_norm, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_earlier_output(tmp_path: Path) -> None:
    finish(tmp_path / "out", "first")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert files_of(tmp_path) == {f"out/{RECORD_FILE}": b"first"}


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    finish(tmp_path / "out")
    assert (tmp_path / "out" / RECORD_FILE).is_file()


def test_an_earlier_output_is_kept_unless_overwrite_is_given(tmp_path: Path) -> None:
    finish(tmp_path / "out", "first")
    with pytest.raises(UpcyclingError, match="overwrite=True"):
        finish(tmp_path / "out", "second")
    assert files_of(tmp_path) == {f"out/{RECORD_FILE}": b"first"}


def test_overwrite_replaces_an_earlier_output_as_a_whole(tmp_path: Path) -> None:
    finish(tmp_path / "out", "first")
    (tmp_path / "out" / "stale.safetensors").write_text("stale")
    finish(tmp_path / "out", "second", overwrite=True)
    assert files_of(tmp_path) == {f"out/{RECORD_FILE}": b"second"}


def test_overwrite_succeeds_after_a_kill_between_its_two_renames(tmp_path: Path) -> None:
    finish(tmp_path / "out", "first")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "older").write_text("x")
    finish(tmp_path / "out", "second", overwrite=True)
    assert (tmp_path / "out" / RECORD_FILE).read_text() == "second"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years")
    with pytest.raises(UpcyclingError, match="not an output of fusion_upcycle"):
        finish(tmp_path / "out", overwrite=overwrite)
    assert files_of(tmp_path) == {"out/thesis.tex": b"ten years"}


def test_a_foreign_folder_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UpcyclingError, match="not an output"), staged(output):
        output.mkdir()
        (output / "thesis.tex").write_text("ten years")
    assert files_of(tmp_path) == {"out/thesis.tex": b"ten years"}


def test_a_foreign_folder_of_the_staging_name_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete" / "thesis.tex").write_text("ten years")
    with pytest.raises(UpcyclingError, match="not made here"):
        finish(tmp_path / "out")
    assert files_of(tmp_path) == {".out.incomplete/thesis.tex": b"ten years"}


def test_a_file_at_the_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UpcyclingError, match="exists"):
        finish(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "a file"


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UpcyclingError, match="file"):
        finish(tmp_path / "file" / "out")


def test_the_current_folder_can_be_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    finish(Path("."))
    assert (tmp_path / "here" / RECORD_FILE).is_file()


def test_a_link_to_an_empty_folder_can_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    finish(tmp_path / "out")
    assert (tmp_path / "out" / RECORD_FILE).is_file()


def disk(free: int, files: int = 10**6) -> SimpleNamespace:
    """A disk with so many free bytes and inodes."""
    return SimpleNamespace(f_bavail=free, f_frsize=1, f_files=10**6, f_favail=files)


def test_a_disk_without_inodes_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: disk(10**9, files=20))
    with pytest.raises(UpcyclingError, match="free inodes"), staged(tmp_path / "out"):
        pytest.fail("started to write")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: disk(10**9))
    needs = pytest.raises(UpcyclingError, match=r"2\.1 GB are needed.*1\.0 GB are free")
    with needs, staged(tmp_path / "out", total_bytes=2 * 10**9):
        pytest.fail("started to write")
    assert list(tmp_path.iterdir()) == []


def test_finished_shards_count_as_room_already_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_while_writing(tmp_path / "out")
    done = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(os, "statvfs", lambda _: disk(64 * 2**20 + 1000))
    with staged(tmp_path / "out", total_bytes=done + 1000):
        pass


def test_a_full_disk_keeps_the_finished_shards_of_a_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_while_writing(tmp_path / "out")
    done = set(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(os, "statvfs", lambda _: disk(0))
    with pytest.raises(UpcyclingError, match="free"):
        finish(tmp_path / "out")
    assert set(tmp_path.rglob("*.safetensors")) == done != set()


def test_a_disk_that_fills_up_while_writing_is_named_and_nothing_stays(tmp_path: Path) -> None:
    def full(name: str) -> Iterator[Tensor]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UpcyclingError, match="No space left"), staged(tmp_path / "out") as folder:
        write_shards(folder, plan_shards(SPECS, 100), full, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_and_does_not_disturb_the_first(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(UpcyclingError, match="Another process is writing"):
            finish(tmp_path / "out")
    assert files_of(tmp_path) == {"out/file": b"first"}


# --- resume -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for what a user sends: finished shards stay."""


def kill_while_writing(output: Path, what: str = "this") -> list[str]:
    """Leave what a run killed in its last shard leaves; returns the finished shards."""
    shards = plan_shards(SPECS, 100)

    def killed_in_the_last_shard(name: str) -> Iterator[Tensor]:
        for number, piece in enumerate(pieces(name)):
            if name in shards[-1].specs and number == 0:
                raise Killed
            yield piece

    with pytest.raises(Killed), staged(output, what=what) as folder:
        write_shards(folder, shards, killed_in_the_last_shard, lambda _: None)
    assert list(folder.glob("*.part"))
    return [shard.file for shard in shards[:-1]]


def resume(output: Path, what: str = "this") -> list[str]:
    """Write the same tensors; returns the files whose tensors were asked for again."""
    shards = plan_shards(SPECS, 100)
    asked = set()

    def noted(name: str) -> Iterator[Tensor]:
        asked.add(name)
        return pieces(name)

    with staged(output, what=what) as folder:
        write_shards(folder, shards, noted, lambda _: None)
        (folder / RECORD_FILE).write_text("{}")
    return [shard.file for shard in shards if asked & shard.specs.keys()]


def test_a_resume_writes_only_the_unfinished_shards(tmp_path: Path) -> None:
    done = kill_while_writing(tmp_path / "out")
    assert done
    assert not set(resume(tmp_path / "out")) & set(done)


def test_a_resumed_output_is_bit_identical_to_an_undisturbed_one(tmp_path: Path) -> None:
    kill_while_writing(tmp_path / "out")
    resume(tmp_path / "out")
    resume(tmp_path / "undisturbed")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_progress_of_a_resume_adds_up_to_all_bytes(tmp_path: Path) -> None:
    kill_while_writing(tmp_path / "out")
    seen: list[int] = []
    with staged(tmp_path / "out") as folder:
        write_shards(folder, plan_shards(SPECS, 100), pieces, seen.append)
    assert sum(seen) == sum(spec.nbytes for spec in SPECS.values())


def test_another_conversion_does_not_use_the_shards_of_a_killed_one(tmp_path: Path) -> None:
    kill_while_writing(tmp_path / "out", what="another")
    assert len(resume(tmp_path / "out")) == len(plan_shards(SPECS, 100))


def test_a_finished_shard_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    first = kill_while_writing(tmp_path / "out")[0]
    os.truncate(tmp_path / ".out.incomplete" / first, 20)
    assert first in resume(tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), TENSORS)


def finished(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


class DyingBar:
    """A progress bar that ends the process when some shards are written."""

    def __init__(self, staging: Path):
        self.staging, self.written = staging, 0

    def __enter__(self) -> "DyingBar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int) -> None:
        self.written += count
        if self.written > 150_000:
            while len(finished(self.staging)) < 2:
                time.sleep(0.01)
            os._exit(9)


def convert_and_die(source: Path, output: Path, staging: Path) -> None:
    conversion_output.progress_bar = lambda *_, **__: DyingBar(staging)
    upcycle(source, output, **OPTIONS)


@pytest.mark.early
def test_a_conversion_killed_for_real_is_resumed_bit_identically(tmp_path: Path) -> None:
    source, output = dense_folder(tmp_path / "dense"), tmp_path / "out"
    staging = tmp_path / ".out.incomplete"
    log = tmp_path / "log"
    assert ended(start(convert_and_die, source, output, staging, log=log), log) == 9
    log.unlink()
    assert not output.exists()
    inodes = {path.name: path.stat().st_ino for path in finished(staging)}
    assert inodes

    upcycle(source, output, **OPTIONS)
    upcycle(source, tmp_path / "fresh", **OPTIONS)
    kept = {path.name: path.stat().st_ino for path in finished(output) if path.name in inodes}
    assert kept == inodes
    assert_same_bits(tensors_of(output), tensors_of(tmp_path / "fresh"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "fresh", "out"]


#: verify=none, so that nothing but the fingerprint protects a resumed result.
UNPROVEN = OPTIONS | {"verify": "none"}


def kill_when_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the next conversion die when all its shards are written; call the result afterwards."""
    kept = folder.parent / "kept"

    def die(path: Path, *_: object) -> None:
        shutil.copytree(path.parent, kept)
        raise Killed

    monkeypatch.setattr("fusion_upcycle.conversion.output._write_json", die)

    def put_back() -> None:
        monkeypatch.undo()
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)
        assert finished(folder)

    return put_back


@pytest.mark.parametrize(
    "change",
    [
        {"expert_init": "drop"},
        {"seed": 1},
        {"max_shard_size": "31KB"},
        {"dtype": "bfloat16"},
        {"num_experts": 5},
        {"router_init": "zeros"},
    ],
    ids=str,
)
def test_a_conversion_with_other_options_starts_anew(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense_folder(tmp_path / "dense")
    kill(source, tmp_path / "out", monkeypatch)
    upcycle(source, tmp_path / "out", **UNPROVEN | change)
    upcycle(source, tmp_path / "fresh", **UNPROVEN | change)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fresh"))
    assert len(finished(tmp_path / "out")) == len(finished(tmp_path / "fresh"))


def test_a_source_that_changed_after_the_kill_is_converted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense_folder(tmp_path / "dense")
    kill(source, tmp_path / "out", monkeypatch)
    dense_folder(source, seed=1)
    upcycle(source, tmp_path / "out", **UNPROVEN)
    upcycle(source, tmp_path / "fresh", **UNPROVEN)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fresh"))


def test_a_source_replaced_after_the_kill_is_noticed_at_the_same_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense_folder(tmp_path / "dense")
    before = (source / "model.safetensors").stat()
    kill(source, tmp_path / "out", monkeypatch)
    dense_folder(source, seed=1)
    os.utime(source / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (source / "model.safetensors").stat().st_size == before.st_size
    upcycle(source, tmp_path / "out", **UNPROVEN)
    upcycle(source, tmp_path / "fresh", **UNPROVEN)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fresh"))


def test_a_live_model_does_not_use_the_shards_of_another_live_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back = kill_when_written(tmp_path / ".out.incomplete", monkeypatch)
    with pytest.raises(Killed):
        save_in_memory(dense_model(seed=0), tmp_path / "out")
    put_back()
    save_in_memory(dense_model(seed=1), tmp_path / "out")
    save_in_memory(dense_model(seed=1), tmp_path / "fresh")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fresh"))


def kill(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_back = kill_when_written(output.with_name(f".{output.name}.incomplete"), monkeypatch)
    with pytest.raises(Killed):
        upcycle(source, output, **UNPROVEN)
    put_back()


def save_in_memory(dense: PreTrainedModel, output: Path) -> None:
    MixtralForCausalLMUpscalingAlgorithm(4, 2, str(output), verify="none").run(dense)
