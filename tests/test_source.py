"""Where a dense model comes from: Hub ids (from a local Hub cache, offline), companion files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import dense_folder

from fusion_upcycle.checkpoint.source import copy_companions, locate
from fusion_upcycle.errors import UpcyclingError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A Hub cache that holds someone/tiny-llama as huggingface_hub lays it out: links to blobs."""
    repository = tmp_path / "hub" / "models--someone--tiny-llama"
    snapshot = repository / "snapshots" / REVISION
    source = dense_folder(tmp_path / "source")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        blob = repository / "blobs" / file.name
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return tmp_path / "hub"


@pytest.mark.early
def test_a_hub_id_is_upcycled_from_the_hub_cache(hub_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "moe"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "fusion_upcycle",
            "upcycle",
            "someone/tiny-llama",
            output,
            "--quiet",
        ],
        env=os.environ | {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "exact, proven" in run.stdout
    card = (output / "README.md").read_text()
    assert "base_model: someone/tiny-llama" in card
    assert not (output / "config.json").is_symlink()


def test_a_hub_id_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fusion_upcycle", "inspect", "someone/no-such-model"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 2
    assert "error: someone/no-such-model is not a folder here" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c", "../x y"])
def test_a_path_that_does_not_exist_is_named(source: str) -> None:
    with pytest.raises(UpcyclingError, match="does not exist"):
        locate(source)


def test_a_file_is_not_a_source(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UpcyclingError, match="is a file"):
        locate(file)


def test_companions_are_copied_and_code_is_not(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE.txt",
        "modeling_evil.py",
        "x.bin",
    ):
        (source / name).write_text(name)
    copied = copy_companions(source, output)
    assert sorted(copied) == ["LICENSE.txt", "chat_template.jinja", "tokenizer.json"]
    assert sorted(path.name for path in output.iterdir()) == sorted(copied)
