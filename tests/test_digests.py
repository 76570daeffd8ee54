"""Every flipped bit, missing or added file, and weakened record of an output is named."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import as_older, dense_folder, files_of
from tiny_sparse import tokenizer

from fusion_upcycle import expand, merge_into_moe, upcycle
from fusion_upcycle.checkpoint.digests import check_files, seal
from fusion_upcycle.cli import main
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.verify import verify, verify_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards, with a tokenizer, a licence and a template in a folder."""
    home = tmp_path_factory.mktemp("made")
    source = dense_folder(home / "dense", "llama")
    tokenizer().save_pretrained(source)
    (source / "LICENSE").write_text("all yours")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    upcycle(source, home / "moe", progress=False, max_shard_size="40KB")
    return home / "moe"


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "moe"))


def test_a_bit_flipped_in_any_file_is_found_and_the_file_named(output: Path) -> None:
    draw = random.Random(0)
    assert len(files_of(output)) >= 10
    for name, content in files_of(output).items():
        for _ in range(6):
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (output / name).write_bytes(flipped)
            with pytest.raises(UpcyclingError, match=name.replace(".", r"\.")):
                verify_files(output, progress=False)
        (output / name).write_bytes(content)
    assert verify_files(output, progress=False) == len(files_of(output)) - 1


def test_a_file_that_is_gone_is_found(output: Path) -> None:
    for name, content in files_of(output).items():
        (output / name).unlink()
        with pytest.raises(UpcyclingError, match=name.replace(".", r"\.")):
            verify_files(output, progress=False)
        (output / name).write_bytes(content)


STRAYS = (
    "pytorch_model.bin",
    "modeling_x.py",
    "chat_template.jinja",
    "model-00009-of-00009.safetensors",
    "adapter_config.json",
    ".hidden",
    "below/it.txt",
)


@pytest.mark.parametrize("name", STRAYS)
def test_a_file_that_was_not_written_here_is_found(name: str, output: Path) -> None:
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("{}")
    with pytest.raises(ProofError, match=f"{name} was not written here"):
        verify(output, progress=False)


def test_links_are_found(output: Path, tmp_path: Path) -> None:
    moved = (output / "config.json").rename(tmp_path / "config.json")
    (output / "config.json").symlink_to(moved)
    (output / "more").symlink_to(tmp_path)
    with pytest.raises(ProofError, match=r"more was not .*; config\.json has become a link"):
        verify_files(output, progress=False)


def weakened(output: Path, edit: Callable[[dict], object]) -> None:
    record = json.loads((output / "upcycling.json").read_text())
    edit(record)
    (output / "upcycling.json").write_text(json.dumps(record, indent=2))


EDITS = {
    "no proof": lambda record: record.pop("proof"),
    "another plan": lambda record: record["plan"].update(x=1),
    "no files": lambda record: record.pop("files"),
    "one file less": lambda record: record["files"].pop("README.md"),
    "another digest": lambda record: record["files"].update({"README.md": "0" * 64}),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_weakened_record_is_found(edit: Callable[[dict], object], output: Path) -> None:
    weakened(output, edit)
    with pytest.raises(ProofError, match=r"upcycling\.json"):
        verify(output, progress=False)


def test_coreutils_checks_the_same_list(output: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=output, check=False).returncode == 0
    (output / "LICENSE").write_text("mine")
    assert subprocess.run(command, cwd=output, check=False, capture_output=True).returncode == 1


def test_names_are_written_as_coreutils_reads_them(tmp_path: Path) -> None:
    names = ["a\nb", "a\\nb", "a b", "ä", "back\\slash", "*", "\\"]
    for name in names:
        (tmp_path / name).write_text(name)
    found: dict[str, str] = {}

    def write_record(files: dict[str, str]) -> None:
        found.update(files)
        (tmp_path / "record.json").write_text("{}")

    seal(tmp_path, "record.json", write_record)
    assert sorted(found) == sorted(names)
    assert check_files(tmp_path, found, "record.json") == len(names) + 1
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


def test_what_was_hashed_on_the_way_is_not_read_again(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fusion_upcycle.checkpoint import digests

    read: list[str] = []
    real = digests.digest
    monkeypatch.setattr(
        digests, "digest", lambda path, *rest: (read.append(path.name), real(path, *rest))[1]
    )
    again = upcycle(made.parent / "dense", tmp_path / "again", progress=False)
    assert "config.json" in read and not any(name.endswith(".safetensors") for name in read)
    assert verify_files(again.output, progress=False) > 5


def test_the_command_says_what_it_looked_at(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(output.parent / "dense", ignore_errors=True)  # no source is needed
    main(["verify", str(output), "--quick", "--quiet"])
    assert "files are as they were written" in capsys.readouterr().out
    (output / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(output), "--quick", "--quiet"])
    assert exit_.value.code == 1 and "tokenizer.json differs" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(as_older(output)), "--quick", "--quiet"])
    assert exit_.value.code == 2 and "without --quick" in capsys.readouterr().err


def test_what_the_hub_puts_beside_a_download_is_no_stray(output: Path, tmp_path: Path) -> None:
    (output / ".gitattributes").write_text("*.safetensors filter=lfs")
    (output / ".cache" / "huggingface").mkdir(parents=True)
    (output / ".cache" / "huggingface" / "x.metadata").write_text("x")
    count = verify_files(output, progress=False)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in output.iterdir() if p.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    shutil.copytree(output / "additional_chat_templates", snapshot / "additional_chat_templates")
    assert verify_files(snapshot, progress=False) == count


def test_merged_and_grown_folders_are_sealed_too(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        dense_folder(tmp_path / name, "llama", seed=seed)
    models = {name: tmp_path / name for name in ("a", "b")}
    merge_into_moe(models, tmp_path / "merged", experts_per_token=1, progress=False)
    with pytest.raises(UpcyclingError, match="verify --quick"):
        verify(tmp_path / "merged", progress=False)
    assert verify_files(tmp_path / "merged", progress=False)
    expand(tmp_path / "merged", tmp_path / "grown", num_experts=4, progress=False)
    assert verify_files(tmp_path / "grown", progress=False)
    (tmp_path / "grown" / "README.md").write_text("better")
    with pytest.raises(ProofError, match=r"README\.md differs"):
        verify(tmp_path / "grown", progress=False)


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="not an output of ours"):
        verify_files(tmp_path, progress=False)
