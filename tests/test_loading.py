"""Folders are loaded whole or refused, and never by code of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import dense_folder, edit_config
from tiny_vision import vit
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    ViTForImageClassification,
)

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.loading import as_folder, load_folder, model_type


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vit(0).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_whole_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    model = load_folder(AutoModelForImageClassification, folder)
    assert type(model) is ViTForImageClassification and not model.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), vit(0).parameters(), strict=True)
    )
    assert load_folder(AutoModelForImageClassification, folder, dtype="float16").dtype == torch.half
    assert model_type(folder) == "vit"


def test_missing_tensors_are_refused_by_name_unless_they_may_lack(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UpcyclingError, match=r"vit lacks classifier\.bias, classifier\.weight of"):
        load_folder(AutoModelForImageClassification, folder)
    model = load_folder(AutoModelForImageClassification, folder, may_lack=["classifier."])
    assert torch.equal(model.vit.layernorm.bias, tensors["vit.layernorm.bias"])
    with pytest.raises(UpcyclingError, match=r"lacks classifier\.bias"):
        load_folder(AutoModelForImageClassification, folder, may_lack=["classifier.w"])


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UpcyclingError, match=r"and \d\d more of ViTForImageClassification"):
        load_folder(AutoModelForImageClassification, folder)


def test_tensors_of_another_shape_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"classifier\.bias \(3,\), not \(5,\)"):
        load_folder(
            AutoModelForImageClassification,
            folder,
            num_labels=5,
            ignore_mismatched_sizes=True,  # it is not what decides
        )


def test_code_of_the_folder_is_never_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise AssertionError('it was run')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UpcyclingError, match="cannot be loaded by AutoModel"):
        load_folder(AutoModel, folder)
    with pytest.raises(UpcyclingError, match="trust_remote_code"):
        load_folder(AutoModel, folder, trust_remote_code=True)


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "~/no_such_folder", "a/b/c", "config"])
def test_what_cannot_be_a_hub_id_is_not_asked_of_the_hub(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "config").touch()

    class Never:
        from_pretrained = None

    for call in (lambda: load_folder(Never, name), lambda: model_type(name)):
        with pytest.raises(UpcyclingError, match="is not a folder"):
            call()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="cannot be loaded by AutoModel"):
        load_folder(AutoModel, tmp_path)
    assert model_type(tmp_path) == ""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UpcyclingError, match="cannot be loaded by AutoConfig"):
        model_type(tmp_path)


def test_configs_of_from_pretrained_are_folders(tmp_path: Path) -> None:
    assert as_folder("x") == (None, "x", {})
    entry: dict[str, Any] = {"pretrained_model_name_or_path": "x", "dtype": "float16"}
    target = "transformers.AutoModelForImageClassification.from_pretrained"
    found = as_folder({"_target_": target, **entry})
    assert found == (AutoModelForImageClassification, "x", {"dtype": "float16"})
    target = "transformers.ViTForImageClassification.from_pretrained"
    assert as_folder({"_target_": target, **entry}) == (
        ViTForImageClassification,
        "x",
        {"dtype": "float16"},
    )
    for target in ("transformers.AutoTokenizer.from_pretrained", "builtins.dict"):
        assert as_folder({"_target_": target, **entry}) is None
    assert as_folder(vit(0)) is None


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "someone/kernel"])
def test_a_config_does_not_say_which_code_a_loaded_model_runs(
    name: str, value: str, tmp_path: Path
) -> None:
    edit_config(dense_folder(tmp_path / "dense"), **{name: value})
    loaded = load_folder(AutoModelForCausalLM, tmp_path / "dense")
    assert loaded.config._attn_implementation == "sdpa"
