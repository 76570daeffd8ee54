"""Checkpoint folders: whole and to the bit, or named and passed over; and alone in their folder."""

import json
import os
import random
import shutil
import signal
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from processes import ended, start, two_ranks

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.training.checkpoint_folders import (
    agree_on,
    checkpoint_path,
    checkpoints_in,
    keep_only,
    latest_checkpoint,
    new_checkpoint,
)
from fusion_upcycle.training.work_folder import LOCK_FILE, held

IDENTITY = {"seed": 3, "options": {"learning_rate": 0.1, "betas": (0.9, 0.95)}}


def save(folder: Path, step: int, identity: Any = None) -> Path:
    """A checkpoint of two files, one of them in a folder of its own."""
    path = checkpoint_path(folder, step)
    with new_checkpoint(path, identity or IDENTITY) as new:
        (new.folder / "state.pt").write_bytes(random.Random(step).randbytes(300))
        (new.folder / "shards").mkdir()
        (new.folder / "shards" / "0.distcp").write_bytes(random.Random(-step).randbytes(200))
    return path


def test_flipped_bits_of_the_last_one_are_found_and_the_one_before_is_used(
    tmp_path: Path,
) -> None:
    first, last = save(tmp_path, 5), save(tmp_path, 10)
    assert latest_checkpoint(tmp_path, IDENTITY) == last
    files = [path for path in last.rglob("*") if path.is_file()]
    assert len(files) == 4
    for file in files:
        whole = file.read_bytes()
        for place in range(0, len(whole), 11):  # and the bit goes round
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            file.write_bytes(flipped)
            with pytest.warns(UserWarning, match="step-000000010 is damaged") as said:
                assert latest_checkpoint(tmp_path, IDENTITY) == first, (file, place)
            assert "The run goes on from step-000000005" in str(said[0].message)
        file.write_bytes(whole)
    assert latest_checkpoint(tmp_path, IDENTITY) == last


def truncated(path: Path) -> None:
    os.truncate(path / "state.pt", 299)


def incomplete(path: Path) -> None:
    (path / "shards" / "0.distcp").unlink()


def foreign_file(path: Path) -> None:
    (path / "shards" / "1.distcp").touch()


def linked(path: Path) -> None:
    (path / "state.pt").rename(path.parent / "elsewhere")
    (path / "state.pt").symlink_to(path.parent / "elsewhere")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"state")


def nested(path: Path) -> None:
    (path / "checkpoint.json").write_text("[" * 100_000)


DAMAGES = {
    truncated: r"state\.pt differs",
    incomplete: r"shards/0\.distcp is missing",
    foreign_file: r"shards/1\.distcp was not written here",
    linked: r"state\.pt has become a link",
    empty: r"checkpoint\.json",
    a_file: "it is no folder",
    nested: r"checkpoint\.json is no record",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_wrong_with_a_checkpoint_is_named(damage: Any, tmp_path: Path) -> None:
    first, last = save(tmp_path, 5), save(tmp_path, 10)
    damage(last)
    with pytest.warns(UserWarning, match=DAMAGES[damage]):
        assert latest_checkpoint(tmp_path, IDENTITY) == first
    shutil.rmtree(first)
    with pytest.raises(UpcyclingError, match=DAMAGES[damage]) as error:
        latest_checkpoint(tmp_path, IDENTITY)
    assert "Copy one back from where you have it, or pass resume=False" in str(error.value)
    again = save(tmp_path, 10)  # in its place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path, IDENTITY) == again


def test_one_of_another_run_is_passed_over_and_of_other_settings_refused(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, IDENTITY) is None
    first = save(tmp_path, 5)
    save(tmp_path, 10, IDENTITY | {"seed": 4})
    with pytest.warns(UserWarning, match=r"step-000000010 is of a run with other .*seed was 4, is"):
        assert latest_checkpoint(tmp_path, IDENTITY) == first
    with pytest.raises(UpcyclingError, match=r"step-000000010 is of .*seed was 4, is 5\. Set"):
        latest_checkpoint(tmp_path, IDENTITY | {"seed": 5})


def test_files_of_earlier_versions_are_named(tmp_path: Path) -> None:
    (tmp_path / "step-000000005.ckpt").touch()
    with pytest.raises(UpcyclingError, match=r"05\.ckpt is of an earlier version .*resume=False"):
        latest_checkpoint(tmp_path, IDENTITY)
    keep_only(tmp_path, ())
    assert latest_checkpoint(tmp_path, IDENTITY) is None


def test_only_what_is_kept_stays_and_what_kills_left_goes(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in range(1, 5)]
    (tmp_path / ".step-000000005.incomplete").mkdir()
    (tmp_path / ".step-000000005.incomplete" / "state.pt").touch()
    keep_only(tmp_path, saved[1:3])
    assert sorted(tmp_path.iterdir()) == checkpoints_in(tmp_path) == saved[1:3]


def test_a_digest_taken_while_writing_is_not_taken_again_and_is_checked(tmp_path: Path) -> None:
    with new_checkpoint(checkpoint_path(tmp_path, 1), IDENTITY) as new:
        (new.folder / "state.pt").write_bytes(b"state")
        new.hashed["state.pt"] = "0" * 64  # no second reading finds that this is wrong
    with pytest.raises(UpcyclingError, match=r"state\.pt differs"):
        latest_checkpoint(tmp_path, IDENTITY)


# --- processes ------------------------------------------------------------------------------------


def in_two(folder: Path) -> None:
    """What one of two processes sees."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    with new_checkpoint(checkpoint_path(folder, 1), IDENTITY) as new:
        (new.folder / f"{rank}.distcp").write_bytes(b"of one process")
    (saved,) = checkpoints_in(folder)
    assert latest_checkpoint(folder, IDENTITY) == saved
    assert json.loads((saved / "checkpoint.json").read_text())["files"].keys() == {
        "0.distcp",
        "1.distcp",
    }
    agree_on([saved])
    own = folder.with_name("own of the first") if rank else folder
    with pytest.raises(UpcyclingError, match=r"\(0: step-000000001, 1: none\)\. work_folder must"):
        latest_checkpoint(own, IDENTITY)
    stale = patch.object(Path, "read_bytes", side_effect=OSError(116, "Stale file handle"))
    with (
        stale if rank else nullcontext(),  # of one, which does not leave the other waiting
        pytest.raises(UpcyclingError, match=r"No checkpoint .*Stale file handle"),
    ):
        latest_checkpoint(folder, IDENTITY)
    for broken in (0, 1):
        with (
            pytest.raises(UpcyclingError, match="No space left on device"),
            new_checkpoint(checkpoint_path(folder, 2), IDENTITY) as new,
        ):
            if rank == broken:
                raise OSError(28, "No space left on device")
    dist.barrier()
    assert list(folder.iterdir()) == [saved]
    dist.destroy_process_group()


def test_processes_save_together_fail_together_and_agree(tmp_path: Path) -> None:
    two_ranks(in_two, tmp_path / "checkpoints", folder=tmp_path)


def holding(work: Path) -> None:
    with held(work):
        (work / "ready").touch()
        time.sleep(300)


def test_a_work_folder_is_of_one_run_until_that_ends_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = start(holding, tmp_path, log=tmp_path / "log")
    while not (tmp_path / "ready").exists():
        assert other.is_alive()
        time.sleep(0.01)
    with pytest.raises(UpcyclingError, match=rf"process {other.pid} on .+, since 20.+ Wait"):
        held(tmp_path).__enter__()
    monkeypatch.setenv("RANK", "1")  # the first process of a run has it for all
    with held(tmp_path):
        pass
    monkeypatch.delenv("RANK")
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    assert ended(other, tmp_path / "log") == -signal.SIGKILL
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_bytes())["pid"] == os.getpid()
        with pytest.raises(UpcyclingError, match=rf"process {os.getpid()} on"):
            held(tmp_path).__enter__()
    assert not (tmp_path / LOCK_FILE).read_bytes()


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"), held(tmp_path):
        pass
