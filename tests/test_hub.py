"""Uploading to the Hub, which no test reaches: checked before, done after, repeatable."""

import shlex
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from click.testing import CliRunner
from fusion_bench.modelpool import CausalLMPool
from helpers import convert, grow, merge, refused
from huggingface_hub.cli.hf import app
from huggingface_hub.errors import HfHubHTTPError
from tiny import dense_folder, files_of

from fusion_upcycle.cli import main
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.method import SparseUpcyclingAlgorithm


class Hub:
    """`HfApi` that keeps what it was told."""

    told: ClassVar[list[tuple[Any, ...]]] = []
    broken: ClassVar[str | None] = None

    def whoami(self) -> dict[str, str]:
        return self._do("whoami")

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        self._do("create_repo", repository, private, exist_ok)
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._do("upload_folder", repo_id, folder_path, sorted(files_of(folder_path)))

    def _do(self, *what: Any) -> Any:
        if self.broken == what[0]:
            raise OSError("no way\nthere")
        self.told.append(what)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(Hub, "told", [])
    return Hub


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return dense_folder(tmp_path / "dense")


def test_the_proven_folder_is_uploaded(source: Path, tmp_path: Path, hub: type[Hub]) -> None:
    made = convert(source, tmp_path / "moe", push_to_hub="me/moe", verify="auto")
    assert made.uploaded == "https://huggingface.co/me/moe"
    assert made.notes == ("Uploaded: https://huggingface.co/me/moe",)
    asked, created, (what, *uploaded) = hub.told
    assert (asked, created) == (("whoami",), ("create_repo", "me/moe", True, True))
    # Under its own name, with everything: the record is written last.
    assert what == "upload_folder"
    assert uploaded == ["me/moe", made.output, sorted(files_of(made.output))]
    assert "upcycling.json" in uploaded[2]


def test_nothing_is_asked_of_the_hub_otherwise(
    source: Path, tmp_path: Path, hub: type[Hub]
) -> None:
    assert convert(source, tmp_path / "moe").uploaded is None
    assert hub.told == []


@pytest.mark.parametrize(
    "name", ["moe", "a/b/c", "me/", "/moe", "me/mo e", "me/x..y", "me/x.git", 5, "", "me/moe\n"]
)
def test_what_is_no_repository_is_refused_before_any_work(
    name: Any, source: Path, hub: type[Hub]
) -> None:
    refused(convert, source, "is not the name of a repository.*ORG/NAME", push_to_hub=name)
    assert hub.told == []


def test_without_a_token_nothing_is_begun(
    source: Path, monkeypatch: pytest.MonkeyPatch, hub: type[Hub]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(convert, source, "no token.*hf auth login.*HF_TOKEN", push_to_hub="me/moe")


def test_a_token_that_the_hub_does_not_take_is_refused_before_any_work(
    source: Path, monkeypatch: pytest.MonkeyPatch, hub: type[Hub]
) -> None:
    monkeypatch.setattr(hub, "broken", "whoami")
    refused(convert, source, "does not take the token.*no way there", push_to_hub="me/moe")


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(
    step: str, source: Path, monkeypatch: pytest.MonkeyPatch, hub: type[Hub]
) -> None:
    monkeypatch.setattr(hub, "broken", step)
    output = source.parent / "the moe"
    with pytest.raises(UpcyclingError, match="is complete, and was not uploaded") as error:
        convert(source, output, push_to_hub="me/moe")
    assert {"config.json", "upcycling.json", "README.md"} <= files_of(output).keys()
    command = shlex.split(str(error.value).rpartition(": ")[2])
    assert command == ["hf", "upload", "--private", "me/moe", str(output), "."]
    # The Hub's own program takes it.
    api = MagicMock()
    monkeypatch.setattr("huggingface_hub.cli.upload.get_hf_api", lambda **_: api)
    found = CliRunner().invoke(app, command[1:])
    assert found.exit_code == 0, found.output
    assert api.create_repo.call_args.kwargs["private"] is True
    told = api.upload_folder.call_args.kwargs
    assert (told["folder_path"], told["path_in_repo"]) == (str(output), ".")


def test_the_command_line_and_merges_and_expansions_upload(
    source: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--verify", "none", "--quiet", "--push-to-hub"]
    main(["upcycle", str(source), str(tmp_path / "a"), *arguments, "me/a"])
    assert "Uploaded: https://huggingface.co/me/a\nOutput: " in capsys.readouterr().out
    other = dense_folder(tmp_path / "other", seed=1)
    merge({"x": source, "y": other}, tmp_path / "b", push_to_hub="me/b")
    grow(tmp_path / "a", tmp_path / "c", push_to_hub="me/c")
    assert [told[1] for told in hub.told if told[0] == "upload_folder"] == ["me/a", "me/b", "me/c"]


@pytest.mark.parametrize("streamed", [True, False])
def test_fusion_bench_uploads(streamed: bool, source: Path, tmp_path: Path, hub: type[Hub]) -> None:
    pool = CausalLMPool({"_pretrained_": str(source)}, tokenizer=None)
    options: dict[str, Any] = {"verify": "none", "return_model": False, "push_to_hub": "me/moe"}
    method = SparseUpcyclingAlgorithm(4, 2, str(tmp_path / "moe"), **options)
    method.run(pool if streamed else pool.load_model("_pretrained_"))
    assert [told[0] for told in hub.told][-2:] == ["create_repo", "upload_folder"]
    with pytest.raises(UpcyclingError, match=r"there is none.*save_checkpoint"):
        SparseUpcyclingAlgorithm(4, 2, push_to_hub="me/moe")


def test_errors_of_the_hub_are_errors_of_os() -> None:
    """What `upload` catches covers them, whatever the version."""
    assert issubclass(HfHubHTTPError, OSError)
