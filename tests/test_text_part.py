"""The text part of models of text and images, and of Qwen3.5's text half as it is saved again."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fusion_bench.modelpool import CausalLMPool
from helpers import convert, merge
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import dense_folder, edit_config, load, tensors_of, token_ids

from fusion_upcycle import SparseUpcyclingAlgorithm
from fusion_upcycle.architectures.text_part import text_config
from fusion_upcycle.cli import main
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.verify import verify

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 1234.0}
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

#: Family -> its name in transformers, of the text model, of the images; class of the result.
WHOLES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "qwen3_5": ("Qwen3_5", LINEAR, QWEN | {"num_position_embeddings": 16}, "Qwen3_5Moe"),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 8}, IMAGES, "SparseGemma3"),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "head_dim": 8},
        IMAGES | {"model_type": "pixtral"},
        "Mixtral",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
        QWEN | {"fullatt_block_indexes": [0]},
        "Qwen2Moe",
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"head_dim": 8, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
        QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "Qwen3Moe",
    ),
    "llava": (
        "Llava",
        {"model_type": "llama"},
        IMAGES | {"model_type": "clip_vision_model", "projection_dim": 16},
        "Mixtral",
    ),
}


@cache
def whole(family: str) -> Any:
    name, text, images, _ = WHOLES[family]
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT | text,
        vision_config=images,
        **({"mm_tokens_per_image": 4} if family == "gemma3" else {}),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():  # norms too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def saved(family: str, folder: Path) -> Path:
    whole(family).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("family", WHOLES)
def test_the_text_part_is_taken_when_asked_for(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    source, out = saved(family, tmp_path / "whole"), tmp_path / "moe"
    run = ["upcycle", str(source), str(out), "--quiet"]
    with pytest.raises(SystemExit):
        main(run)
    remedy = re.search(
        r"text part \(a \w+\) can be taken: pass (--part text)\.", capsys.readouterr().err
    )
    assert remedy is not None
    main([*run, *shlex.split(remedy[1])])
    assert re.search(r"left out of the result is .*vis\w+ \(\d+ tensors\)", caplog.text)
    assert (out / "tokenizer_config.json").is_file() and (
        out / "preprocessor_config.json"
    ).is_file()
    made = load(out)
    assert type(made).__name__ == f"{WHOLES[family][3]}ForCausalLM"
    with torch.no_grad():  # of the whole model, run on text
        ids = token_ids()
        expected, found = whole(family)(input_ids=ids).logits, made(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    if family in ("qwen3_5", "gemma3"):  # against transformers' text class with these weights
        assert verify(out, mode="logits", progress=False).holds


def test_it_is_taken_in_fusionbench_and_in_merges(tmp_path: Path) -> None:
    source = saved("mistral3", tmp_path / "whole")
    pool = CausalLMPool(OmegaConf.create({"_pretrained_": str(source)}), tokenizer=None)
    out = tmp_path / "moe"
    options: dict[str, Any] = {"verify": "none", "return_model": False}
    with pytest.raises(UpcyclingError, match='can be taken: pass part="text"'):
        SparseUpcyclingAlgorithm(4, 2, str(out), **options).run(pool)
    SparseUpcyclingAlgorithm(4, 2, str(out), part="text", **options).run(pool)
    with pytest.raises(UpcyclingError, match=r'pass save_checkpoint="FOLDER"'):
        SparseUpcyclingAlgorithm(4, 2, part="text").run(whole("mistral3"))

    other = tmp_path / "text"  # a fine-tune of the text model by itself
    text = transformers.MistralForCausalLM(text_config(whole("mistral3").config))
    text.save_pretrained(other)
    made = merge({"a": source, "b": other}, tmp_path / "merged", part="text").output
    experts = tensors_of(made)
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    own = whole("mistral3").state_dict()["model.language_model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(experts[name.format(0)], own)
    theirs = text.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(experts[name.format(1)], theirs)


def test_a_part_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    source = saved("qwen3_vl", tmp_path / "whole")
    tensors = load_file(source / "model.safetensors")
    more = tensors | {"model.language_model.layers.0.mlp.extra.weight": torch.ones(2)}
    save_file(more, source / "model.safetensors")
    with pytest.raises(UpcyclingError, match=r"layers\.0\.mlp\.extra\.weight \[2\] has no place"):
        convert(source, tmp_path / "moe", part="text")
    tensors.pop("model.language_model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UpcyclingError, match="text part, a qwen3, is not there"):
        convert(source, tmp_path / "moe", part="text")
    edit_config(source, quantization_config={"quant_method": "awq"})
    with pytest.raises(UpcyclingError):
        convert(source, tmp_path / "moe", part="text")


@pytest.mark.parametrize("verify", ["layers", "logits"])
def test_the_text_half_of_a_qwen3_5_under_the_names_of_the_whole(
    verify: str, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "half", "qwen3_5_text")
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors_of(source).items()
    }
    save_file(tensors, source / "model.safetensors")
    made = convert(source, tmp_path / "moe", verify=verify)
    assert made.proof.holds and made.record["class"] == "Qwen3_5MoeForCausalLM"


def test_an_moe_is_pointed_to_expand(tmp_path: Path) -> None:
    made = convert(dense_folder(tmp_path / "dense"), tmp_path / "moe").output
    with pytest.raises(
        UpcyclingError, match=r"'mixtral' model, an MoE already.*fusion_upcycle expand"
    ):
        convert(made, tmp_path / "two")
    made = convert(dense_folder(tmp_path / "d"), tmp_path / "own", target="sparse").output
    with pytest.raises(UpcyclingError, match=r"an MoE already.*fusion_upcycle expand"):
        convert(made, tmp_path / "two")
