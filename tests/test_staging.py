"""An output appears whole or not at all, and stays; `tests/faults` has what kills and errors do."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import files_of

from fusion_upcycle.checkpoint import durable
from fusion_upcycle.checkpoint.durable import exchange, make_folder, sync_tree
from fusion_upcycle.checkpoint.staging import RECORD_FILE, staging_folder
from fusion_upcycle.errors import UpcyclingError


def write(output: Path, text: str, overwrite: bool = True) -> None:
    """An output of three files, one of them in a folder."""
    fingerprint = {"text": text}
    with staging_folder(output, fingerprint, total_bytes=0, overwrite=overwrite) as folder:
        for name in ("weights", "inner/template", RECORD_FILE):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def contents(text: str) -> dict[str, bytes]:
    return {name: text.encode() for name in ("weights", "inner/template", RECORD_FILE)}


def test_an_old_output_that_is_back_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-x")  # killed between two renames
    with pytest.raises(UpcyclingError, match=r"exists\. Pass overwrite=True"):
        write(tmp_path / "out", "new", overwrite=False)
    assert files_of(tmp_path) == {f"out/{name}": text for name, text in contents("old").items()}


def test_what_others_put_beside_an_output_stays(tmp_path: Path) -> None:
    theirs = tmp_path / ".out.replaced-by-hand"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    write(tmp_path / "out", "new")
    assert (theirs / "notes.txt").read_text() == "mine"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """("sync" | "rename" | "remove", path) in order, as the system is asked for them."""
    seen: list[tuple[str, str]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def path_of(name: Any, dir_fd: int | None = None) -> str:
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}") + "/"
        return folder + os.fspath(name)

    def synced(descriptor: int) -> None:
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(old: Any, new: Any, **kwargs: Any) -> None:
        seen.append(("rename", path_of(new)))
        rename(old, new, **kwargs)

    def removed(path: Any, *, dir_fd: int | None = None) -> None:
        seen.append(("remove", path_of(path, dir_fd)))
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "unlink", removed)
    yield seen


def test_folders_that_are_made_are_on_the_disk(
    events: list[tuple[str, str]], tmp_path: Path
) -> None:
    events.clear()  # pytest moves a link
    make_folder(tmp_path / "a" / "b")
    assert events == [("sync", str(tmp_path / "a")), ("sync", str(tmp_path))]
    (tmp_path / "a" / "b" / "file").write_text("x")
    events.clear()
    sync_tree(tmp_path / "a")
    assert [Path(path).name for _, path in events] == ["file", "b", "a"]


def test_names_are_exchanged_in_one_step_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "nowhere")
    monkeypatch.setattr(durable.sys, "platform", "darwin")
    assert not exchange(tmp_path / "a", tmp_path / "b")


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    durable.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        durable.sync(tmp_path / "file")


def test_a_failure_leaves_nothing_even_where_removing_fails_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("busy")

    with (
        pytest.raises(KeyError),
        monkeypatch.context() as patch,
        staging_folder(tmp_path / "out", {"a": 1}, total_bytes=0, overwrite=False) as folder,
    ):
        (folder / "weights").write_text("x")
        patch.setattr(shutil, "rmtree", fail)
        patch.setattr(Path, "unlink", fail)
        raise KeyError
    write(tmp_path / "out", "new")  # the next run knows what is left as ours
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
