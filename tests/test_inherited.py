"""What a card takes over from its sources' cards, which strangers wrote."""

from pathlib import Path
from typing import Any

import pytest
from helpers import convert, merge
from huggingface_hub import ModelCard
from tiny import dense_folder

from fusion_upcycle.cli import main
from fusion_upcycle.conversion.inherited import inherited

CARD = """---
license: apache-2.0
language: [en, de]
datasets:
- org/data
- c4
pipeline_tag: text2text-generation
library_name: mlx
base_model: someone/else
tags: [secret]
---
# A model
"""


def card(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text)
    return folder


def metadata(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_a_card_takes_over_licence_language_data_and_task(tmp_path: Path) -> None:
    source = card(dense_folder(tmp_path / "dense"), CARD)
    made = convert(source, tmp_path / "moe")
    assert metadata(made.output) == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "datasets": ["org/data", "c4"],
        "pipeline_tag": "text2text-generation",
        "library_name": "transformers",  # which loads the result, whatever loaded its source
        "tags": ["moe", "sparse-upcycling", "fusion_upcycle"],
    }
    assert made.notes == ()
    assert made.record["inherited"]["license"] == "apache-2.0"


def test_without_a_card_nothing_is_said(tmp_path: Path) -> None:
    made = convert(dense_folder(tmp_path / "dense"), tmp_path / "moe")
    assert "inherited" not in made.record
    assert metadata(made.output)["pipeline_tag"] == "text-generation"
    assert metadata(made.output).keys() == {"library_name", "pipeline_tag", "tags"}


def test_sources_of_the_hub_are_base_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = dense_folder(tmp_path / "a"), dense_folder(tmp_path / "b", seed=1)
    identity = {"name": "org/a", "from_hub": True, "files": {}, "modified": 0}
    monkeypatch.setattr("fusion_upcycle.conversion.run.identity_of_source", lambda *_: identity)
    found = metadata(convert(source, tmp_path / "moe").output)
    assert (found["base_model"], found["base_model_relation"]) == ("org/a", "finetune")
    found = metadata(merge({"a": source, "b": other}, tmp_path / "merged").output)
    assert (found["base_model"], found["base_model_relation"]) == ("org/a", "merge")
    assert "merge" in found["tags"]


def test_of_several_models_all_is_joined_that_can_be(tmp_path: Path) -> None:
    folders = {
        "a": card(dense_folder(tmp_path / "a"), CARD),
        "b": card(
            dense_folder(tmp_path / "b", seed=1),
            "---\nlicense: other\nlicense_name: llama3\nlanguage: [de, fr]\ndatasets: c4\n---\n",
        ),
    }
    made = merge(folders, tmp_path / "moe")
    found = metadata(made.output)
    assert found["language"] == ["en", "de", "fr"]
    assert found["datasets"] == ["org/data", "c4"]
    assert found["pipeline_tag"] == "text-generation"  # of its class: only one says it
    assert "license" not in found
    (note,) = made.notes
    assert note.startswith("The licences of the source models differ (a: apache-2.0, b: llama3)")
    assert note in (made.output / "README.md").read_text()
    card(folders["b"], CARD)
    made = merge(folders, tmp_path / "same")
    assert metadata(made.output)["license"] == "apache-2.0"
    assert made.notes == ()


HOSTILE = {
    "no YAML": ("---\nlicense: [\n---\n", "is no YAML"),
    "code": ("---\n!!python/object/apply:os.system ['touch x']\n---\n", "is no YAML"),
    "a list": ("---\n- license\n---\n", "is no YAML"),
    "no end": ("---\nlicense: mit\n" + "x: y\n" * 20_000 + "---\n", "without an end"),
    "deep": ("---\nlicense: " + "[" * 5000 + "\n---\n", "is no YAML"),
    "an image as licence": ("---\nlicense: '![x](http://x)'\n---\n", "has a license"),
    "a mapping": ("---\nlicense: {a: b}\nlanguage: 5\n---\n", "has a license and a language"),
    "markup": ("---\nlicense_link: '<script>'\n---\n", "has a license_link"),
    "Norwegian": ("---\nlanguage: no\n---\n", "has a language"),  # false, to YAML
    "too many": (f"---\nlanguage: [{'en, ' * 600}]\n---\n", "has a language"),
    "bombs": (
        "---\na: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ndatasets: [*c, *c]\n---\n",
        "has a datasets",
    ),
}


@pytest.mark.parametrize(("text", "match"), HOSTILE.values(), ids=HOSTILE)
def test_what_no_card_says_is_left_out_with_a_note(text: str, match: str, tmp_path: Path) -> None:
    found = inherited({"source": card(tmp_path / "dense", text)})
    assert found.keys() == {"notes"}
    assert match in found["notes"][0]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["", "# A model\n", "\r\n\r\n", "--\nlicense: mit\n--\n"])
def test_cards_without_metadata_are_cards(text: str, tmp_path: Path) -> None:
    assert inherited({"source": card(tmp_path / "dense", text)}) == {}


def test_line_ends_of_windows_and_bytes_of_none(tmp_path: Path) -> None:
    path = card(tmp_path / "dense", "") / "README.md"
    path.write_bytes(b"---\r\nlicense: mit\r\n---\r\n\xff\xfe")
    assert inherited({"source": tmp_path / "dense"}) == {"license": "mit"}


def test_a_note_is_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = card(dense_folder(tmp_path / "dense"), "---\nlanguage: no\n---\n")
    main(["upcycle", str(source), str(tmp_path / "moe"), "--verify", "none", "--quiet"])
    assert "The card of the source has a language that looks like none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "said"), [("mixtral", True), ("qwen2_moe", True), ("sparse", False)]
)
def test_what_keeps_experts_in_balance_is_on_the_card(
    target: str, said: bool, tmp_path: Path
) -> None:
    made = convert(dense_folder(tmp_path / "dense"), tmp_path / "moe", target=target)
    text = (made.output / "README.md").read_text()
    assert ("set `output_router_logits` to true" in text) is said
    assert ("counts 0.001 times" in text) is said
