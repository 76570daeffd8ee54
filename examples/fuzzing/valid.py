"""Valid files of every kind: a tiny Llama's, those of what is made of it, and written by hand."""

import atexit
import base64
import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save_file

from fusion_upcycle import expand, merge_into_moe, upcycle
from fusion_upcycle.demo.random_models import random_dense
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.report.progress import loading_bars

FAMILIES = ("llama", "mistral", "qwen3", "olmo2", "granite", "cohere2")
_TEXT = "Nobody spoke until Karlsruhe, where a boy asked whether 17 * 23 is 391; it is.\n"


@cache
def models() -> Path:
    """A folder of models: `dense`, `other`, and `moe`, `grown` and `merged` made of them."""
    root = Path(mkdtemp(prefix="fuzz-valid-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with loading_bars(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _make(root)
    return root


def _make(root: Path) -> None:
    for seed, name in enumerate(("dense", "other")):
        small = {"vocab_size": 257, "max_position_embeddings": 256}
        random_dense("llama", seed=seed, **small).save_pretrained(root / name)
        byte_tokenizer(64).save_pretrained(root / name)
    quick: dict[str, Any] = {"verify": "none", "progress": False}
    upcycle(root / "dense", root / "moe", num_experts=4, **quick)
    for name, text in (("dense", _TEXT), ("other", _TEXT[::-1].upper())):
        (root / f"{name}.txt").write_text(text * 40)
    merge_into_moe(
        {name: root / name for name in ("dense", "other")},
        root / "merged",
        router_init="prototype",
        calibration={name: str(root / f"{name}.txt") for name in ("dense", "other")},
        statistics=True,
        calibration_tokens=256,
        **quick,
    )
    expand(root / "moe", root / "grown", num_experts=6, **quick)


@cache
def configs() -> list[dict[str, Any]]:
    """`config.json` of dense models, one of images and text among them."""
    found = []
    for family in FAMILIES:
        model = random_dense(family)
        found.append(json.loads(model.config.to_json_string(use_diff=False)))
    text = found[0]
    whole = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**text, "model_type": "gemma3_text", "architectures": None},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 16,
        },
    }
    images = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 32, "image_size": 32, "patch_size": 16, "num_channels": 3},
        "id2label": {"0": "cat", "1": "dog"},
    }
    return [*found, whole, images]


def read(name: str) -> Any:
    """A JSON file of one of the models."""
    return json.loads((models() / name).read_bytes())


def header_of(file: Path) -> list[Any]:
    """A safetensors file for `mutation.as_safetensors`."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return [json.loads(data[8 : 8 + length]), len(data) - 8 - length, None]


SMALL_HEADER = [
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F16", "shape": [0, 5], "data_offsets": [32, 32]},
    },
    32,
    None,
]


def tokenizers() -> list[dict[str, Any]]:
    """Tokenizers of the kinds that there are, with normalisers, templates and added tokens."""
    own = read("dense/tokenizer.json")
    vocab = {token: number for number, token in enumerate(["[UNK]", "a", "b", "ab", "##b", "t"])}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    common: dict[str, Any] = {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[UNK]",
        },
        "added_tokens": [{"id": 0, "content": "[UNK]", "special": True, **added}],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "a"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "ab"},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "b"},
                {"type": "NFKC"},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[UNK]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"[UNK]": {"id": "[UNK]", "ids": [0], "tokens": ["[UNK]"]}},
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
    }
    kinds: list[dict[str, Any]] = [
        {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "unk_token": "[UNK]"},
        {
            "type": "WordPiece",
            "vocab": vocab,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        {"type": "Unigram", "unk_id": 0, "vocab": [[t, -1.0] for t in vocab]},
        {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    ]
    return [own, *({**common, "model": model} for model in kinds)]


def sentencepiece() -> bytes:
    """A `tokenizer.model` of a few pieces, and its specs."""

    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2, len(value)]) + value

    def piece(text: str, kind: int) -> bytes:
        return field(1, field(1, text.encode()) + b"\x15\0\0\x80\xbf" + bytes([0x18, kind]))

    pieces = [piece("<unk>", 2), piece("<s>", 3), piece("a", 1), piece("b", 1), piece("ab", 1)]
    return b"".join(pieces) + field(2, b"\x18\x02") + field(3, field(2, b"\0\0\0\0"))


def tekken() -> dict[str, Any]:
    """Mistral's own format."""
    return {
        "config": {
            "pattern": r"\p{L}+",
            "default_vocab_size": 6,
            "default_num_special_tokens": 2,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
            for i, t in enumerate((b"a", b"b", b"ab", b"t"))
        ],
        "special_tokens": [{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "</s>"}],
    }


SCORES: dict[str, Any] = {
    "format": "fusion_upcycle importance 1",
    "metrics": {"grad_squared": {"0": [1.0, 2.0], "1": [0.5, 0.25]}},
    "tokens": 128,
    "calibration": {"tokenizer_sha256": "0", "texts": {}},
    "model": {
        "model_type": "mixtral",
        "parameters": 1000,
        "num_experts": 2,
        "experts_per_token": 1,
        "num_layers": 2,
        "sha256": "0" * 64,
        "name": "x",
    },
    "unreached": {"0": [], "1": [1]},
    "versions": {},
}


def moments(folder: Path) -> list[Any]:
    """AdamW's moments of one parameter."""
    tensors = {f"w/{kind}": torch.ones(2, 3) for kind in ("exp_avg", "exp_avg_sq")}
    save_file({**tensors, "w/step": torch.tensor(3.0)}, folder / "moments.safetensors")
    return header_of(folder / "moments.safetensors")


ADAPTER: dict[str, Any] = {
    "base_model_name_or_path": "dense",
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["up_proj", "q_proj"],
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {".*q_proj": 4},
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "layers_to_transform": None,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


def adapter_weights(folder: Path) -> list[Any]:
    """Pairs of matrices for one module of each layer of `dense`."""
    config = read("dense/config.json")
    wide, inner = config["hidden_size"], config["intermediate_size"]
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        module = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        tensors[f"{module}.lora_A.weight"] = torch.ones(4, wide)
        tensors[f"{module}.lora_B.weight"] = torch.ones(inner, 4)
    save_file(tensors, folder / "adapter.safetensors")
    return header_of(folder / "adapter.safetensors")


CARD = b"""---
license: mit
license_name: x
language:
- en
- de
datasets: [a/b, c]
pipeline_tag: text-generation
---
# A model
"""

RUN: dict[str, Any] = {
    "schema": 1,
    "benchmark": {
        "purpose": "test",
        "experiment": "e",
        "row": "Average",
        "settings": {"method.scaling": 0.3},
        "position": 1,
        "group": "Model Merging",
        "reference": None,
        "models": ["a", "b"],
        "subset": False,
        "seed": 0,
        "trials": 3,
        "tasks": {"pool": {"metric": "accuracy", "better": "higher", "unseen": ["c"]}},
        "error": None,
        "arguments": ["method=x"],
        "status": "done",
        "costs": {"wall_seconds": 3.5},
        "report": {
            "pool": {
                "a": {"accuracy": 0.5, "accuracy_stderr": 0.01},
                "b": {"accuracy": 0.75},
                "average": {"accuracy": 0.625},
                "model_info": {"all_params": 100, "trainable_params": 100},
                "cost": {"total_parameters": 100, "flops_per_token": 1e6},
                "routing": {"load_cv": 0.1, "experts": 4},
            }
        },
    },
    "method": {"proof": {"holds": True, "function": {"max_abs": 1e-7}}},
}

LM_EVAL: dict[str, Any] = {
    "results": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "arc"}},
    "group_subtasks": {"g": ["arc"]},
    "model_name": "x",
}

PROGRAM: dict[str, Any] = {"mnist": {"accuracy": 0.9, "loss": 0.3}, "average": {"accuracy": 0.9}}
