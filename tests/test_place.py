"""Where no output could appear is refused before anything is written; strangers' files stay out."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import convert
from tiny import dense_folder, files_of

from fusion_upcycle import upcycle
from fusion_upcycle.checkpoint import place
from fusion_upcycle.checkpoint.staging import RECORD_FILE, staging_folder
from fusion_upcycle.cli import main
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.verify import verify


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("models") / "dense")


def refused(output: Path, match: str) -> None:
    """Before the block, and nothing is left of the attempt."""
    before = sorted(output.parent.iterdir())
    with (
        pytest.raises(UpcyclingError, match=match),
        staging_folder(output, {}, total_bytes=0, overwrite=True),
    ):
        pytest.fail("started to write")
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_refused(kind: str, tmp_path: Path) -> None:
    output, other = tmp_path / "out put\\", tmp_path / "other"
    output.mkdir()
    other.mkdir()
    how = ["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", str(other)]
    if subprocess.run(["mount", *how, output], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        refused(output, "is a mount point, .* Choose a folder below it")
        with staging_folder(output / "out", {}, total_bytes=0, overwrite=False) as staging:
            (staging / RECORD_FILE).touch()
        assert (output / "out" / RECORD_FILE).exists()
    finally:
        subprocess.run(["umount", output], check=True)


def test_where_the_system_does_not_tell_its_mounts_they_are_those_of_other_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "_MOUNTS", tmp_path / "not on this system")
    assert not place.is_mount_point(tmp_path) and place.is_mount_point(Path("/"))


def test_names_that_no_file_system_or_record_can_hold_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 230), "is too long")
    refused(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), r"caf\\xe9 is not UTF-8")


def test_a_source_that_is_not_utf_8_is_refused_in_one_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le")
    os.symlink(dense, source)
    with pytest.raises(SystemExit) as ended:
        main(["upcycle", source, str(tmp_path / "out")])
    assert ended.value.code == 2 and r"mod\xe8le is not UTF-8" in capsys.readouterr().err
    link = tmp_path / "model"
    link.symlink_to(source)  # the way out that it says
    convert(link, tmp_path / "out")


def test_links_that_lead_in_a_circle_are_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UpcyclingError, match=r"a"):
        convert(dense, tmp_path / "a" / "out")


def test_a_link_in_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / ".out.incomplete").symlink_to(theirs)
    refused(tmp_path / "out", "is a link, and was not made here")


def test_what_others_put_into_a_staging_folder_does_not_land_in_the_output(tmp_path: Path) -> None:
    fingerprint, shards = {"a": 1}, ["kept", "linked", "folder"]

    def stage(stop: bool) -> None:
        with staging_folder(
            tmp_path / "out", fingerprint, total_bytes=0, overwrite=False, shards=shards
        ) as staging:
            if stop:
                (staging / "kept").write_text("kept")
                (staging / "theirs.txt").write_text("x")
                (staging / "linked").symlink_to(tmp_path)
                (staging / "half.part").mkdir()
                (staging / "half.part" / "x").touch()
                (staging / "folder").mkdir()
                (staging / RECORD_FILE).touch()
                raise KeyboardInterrupt
            assert files_of(staging).keys() == {"kept", "conversion.json"}
            (staging / RECORD_FILE).touch()

    with pytest.raises(KeyboardInterrupt) as stopped:
        stage(True)
    assert "are kept in" in stopped.value.__notes__[0]
    stage(False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["kept", RECORD_FILE]


def test_an_output_is_proven_from_wherever_one_stands(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dense.parent)
    upcycle("dense", tmp_path / "out", progress=False)
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert record["source"]["name"] == str(dense)
    monkeypatch.chdir(tmp_path)
    assert verify(tmp_path / "out", progress=False).mode == "layers"
