"""Weight files under other names than transformers looks for: read as it does, or named."""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import convert, refused
from safetensors.torch import save_file
from tiny import dense_folder, tensors_of
from transformers import AutoModelForCausalLM

from fusion_upcycle.errors import UpcyclingError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama, in a folder whose name needs quotes in a shell."""
    return dense_folder(tmp_path / "it's a dense")


def renamed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None


def native(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weight = {"layers.0.attention.wq.weight": torch.zeros(2, 2)}
    save_file(weight, folder / "consolidated.safetensors")


def pickled(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).touch()

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (pickled("training_args.bin", "optimizer.pt", "rng_state_0.pth"), "has no weights"),
        (pickled("pytorch_model.bin", "training_args.bin"), r"pickled weights.*python -c"),
        (pickled("model.Q4_K_M.gguf"), r"in model\.Q4_K_M\.gguf.*dequantize=True"),
        (native, r"only consolidated\.safetensors.*Mistral's own layout"),
        (renamed("model-00001-of-00003.safetensors"), r"no model\.safetensors\.index\.json"),
    ],
)
def test_what_cannot_be_read_is_named(
    edit: Callable[[Path], None], match: str, source: Path
) -> None:
    edit(source)
    refused(convert, source, match)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00001.safetensors", "consolidated.safetensors", "weights.safetensors"]
)
def test_weights_under_another_name_are_found_by_the_remedy(name: str, source: Path) -> None:
    renamed(name)(source)
    with pytest.raises(UpcyclingError, match="Rename it: mv") as error:
        convert(source, source.parent / "moe")
    command = str(error.value).partition("Rename it: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    convert(source, source.parent / "moe")


def test_pickled_weights_are_converted_by_the_remedy(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    with pytest.raises(UpcyclingError) as error:
        convert(source, source.parent / "moe")
    words = shlex.split(str(error.value).partition("once: ")[2].replace("folder's", ""))
    exec(words[2], {})  # the code of `python -c`
    (made,) = source.parent.glob("*-safetensors")
    assert tensors_of(made).keys() == model.state_dict().keys()


def test_a_stale_index_is_passed_over_as_transformers_does(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = "model-00001-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors_of(source), shard)}
    (source / INDEX).write_text(json.dumps(index))
    assert convert(source, source.parent / "moe", verify="logits").proof.holds
    assert f"names files that are not there ({shard})" in caplog.text
    (source / shard).write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(UpcyclingError, match=f"weights twice.*{shard}.*stale"):
        convert(source, source.parent / "two")
    index["weight_map"] = dict.fromkeys(tensors_of(source), "model.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    (source / shard).unlink()
    caplog.clear()
    convert(source, source.parent / "three")
    assert not caplog.text
