"""Sparse upcycling from folder to folder: exact, complete, equal to the live one, or refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import convert
from safetensors.torch import load_file, save_file
from tiny import (
    LENGTH,
    ROPES,
    WINDOW,
    assert_same_bits,
    dense_folder,
    dense_model,
    edit_config,
    edit_tensors,
    files_of,
    load,
    logits_of,
    tensors_of,
    token_ids,
)
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

from fusion_upcycle import UpcyclingOptions
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import generator_for
from fusion_upcycle.router_init import normal
from fusion_upcycle.upcycling.run import plan_model

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def live(dense: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return to_model(plan_model(dense, UpcyclingOptions(**options)), dense, verify="none")[0]


def relative_difference(source: Path, output: Path, ids: Tensor | None = None) -> float:
    """Of the logits of both folders in float32, by transformers' own forward pass."""
    reference = logits_of(load(source, dtype=FP32), ids)
    found = logits_of(load(output, dtype=FP32), ids)
    return ((found - reference).abs().max() / reference.abs().max()).item()


def refused(source: Path, match: str | None = None, **options: Any) -> None:
    helpers.refused(convert, source, match, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama in float32, which a test may damage."""
    return dense_folder(tmp_path / "dense")


# --- the same function ------------------------------------------------------------------------

MATRIX: list[tuple[str, torch.dtype, str, dict[str, Any]]] = [
    ("llama", FP32, "default", {}),
    ("llama", BF16, "default", {"tie_word_embeddings": True}),
    ("llama", FP16, "linear", {}),
    ("llama", FP32, "dynamic", {"tie_word_embeddings": True}),
    ("llama", BF16, "yarn", {"head_dim": 12}),
    ("llama", FP32, "llama3", {"head_dim": 12, "tie_word_embeddings": True}),
    ("llama", FP32, "yarn", {"num_key_value_heads": 4}),
    ("llama", FP16, "llama3", {"num_key_value_heads": 1}),
    ("llama", FP32, "default", {"hidden_act": "gelu"}),
    ("mistral", FP32, "default", {}),
    ("mistral", BF16, "default", {"sliding_window": None}),
    ("mistral", FP16, "default", {"tie_word_embeddings": True}),
    ("mistral", FP32, "linear", {"sliding_window": None, "tie_word_embeddings": True}),
    ("mistral", BF16, "dynamic", {}),
    ("mistral", FP32, "yarn", {"head_dim": 12}),
    ("mistral", FP16, "llama3", {"head_dim": 12, "sliding_window": 5}),
]


@pytest.mark.parametrize(
    ("family", "dtype", "rope", "fields"),
    MATRIX,
    ids=lambda v: v if isinstance(v, str) else str(v).removeprefix("torch."),
)
def test_the_result_computes_the_dense_function(
    family: str, dtype: torch.dtype, rope: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", family, dtype=dtype, rope=rope, **fields)
    converted = convert(source, tmp_path / "out", verify="auto")
    assert converted.proof.holds
    assert relative_difference(source, tmp_path / "out") < 1e-4


#: The others of tiny.py are those of single families.
LLAMA_ROPES = {*ROPES} - {"longrope", "mrope"}


def test_the_matrix_reaches_every_family_dtype_and_rope_type() -> None:
    families, dtypes, ropes, _ = zip(*MATRIX, strict=True)
    assert {*families} == {"llama", "mistral"}
    assert {*dtypes} == {FP32, BF16, FP16}
    assert {*ropes} == LLAMA_ROPES


@pytest.mark.parametrize("rope", sorted(LLAMA_ROPES - {"default"}))
def test_the_rope_types_of_the_matrix_change_the_tiny_model(rope: str) -> None:
    """Otherwise a rope that gets lost would go unnoticed above."""
    assert not torch.allclose(logits_of(dense_model(rope=rope)), logits_of(dense_model()))


def test_the_sliding_window_of_the_matrix_changes_the_tiny_model() -> None:
    assert LENGTH > 2 * WINDOW
    full = dense_model("mistral", sliding_window=None)
    assert not torch.allclose(logits_of(dense_model("mistral")), logits_of(full))


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_zero_router_gives_bit_identical_logits_in_half_precision(
    experts_per_token: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", "mistral", dtype=dtype)
    convert(source, tmp_path / "out", router_init="zeros", experts_per_token=experts_per_token)
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(load(source)))


@pytest.mark.parametrize("experts_per_token", [1, 3, 5])
def test_any_top_k_is_exact(experts_per_token: int, source: Path, tmp_path: Path) -> None:
    options = {"num_experts": 5, "experts_per_token": experts_per_token}
    convert(source, tmp_path / "out", router_init={"name": "normal", "std": 1.0}, **options)
    assert relative_difference(source, tmp_path / "out") < 1e-4


def test_permuted_experts_are_exact(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out", expert_init="permute", verify="auto").proof.holds
    assert relative_difference(source, tmp_path / "out") < 1e-4


@pytest.mark.parametrize("expert_init", ["noise", "drop"])
def test_changed_experts_are_reported_as_approximate_with_their_distance(
    expert_init: str, source: Path, tmp_path: Path
) -> None:
    proof = convert(source, tmp_path / "out", expert_init=expert_init, verify="auto").proof
    assert (proof.claim, proof.holds) == ("approximate", None)
    assert proof.function is not None
    assert proof.function["max_abs"] > 1e-3
    assert proof.function["kl_nats"] > 0


def test_greedy_generation_of_64_tokens_is_that_of_the_dense_model(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out")
    prompt = token_ids(length=8, batch=1)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    texts = [load(folder).generate(prompt, **options) for folder in (source, tmp_path / "out")]
    assert texts[0].shape == (1, 72)
    assert torch.equal(*texts)


def test_a_backbone_becomes_a_backbone(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "mistral", backbone=True)
    assert convert(source, tmp_path / "out").record["class"] == "MixtralModel"
    models = [AutoModel.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    with torch.no_grad():
        states = [model.eval()(token_ids()).last_hidden_state for model in models]
    assert (states[0] - states[1]).abs().max() < 1e-4 * states[0].abs().max()


# --- the folder -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_misses_no_key_and_expects_no_other(
    tied: bool, max_shard_size: str, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", tie_word_embeddings=tied)
    convert(source, tmp_path / "out", max_shard_size=max_shard_size)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is MixtralForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("tied", [False, True])
def test_saving_the_loaded_model_again_gives_the_same_tensors(tied: bool, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", tie_word_embeddings=tied)
    convert(source, tmp_path / "out", expert_init="noise")
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))


def test_every_expert_tensor_is_named_as_vllm_and_llama_cpp_read_it(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out")
    dense, moe = tensors_of(source), tensors_of(tmp_path / "out")
    for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        for layer in range(2):
            for expert in range(4):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{new}.weight"
                assert torch.equal(moe.pop(name), dense[f"model.layers.{layer}.mlp.{old}.weight"])
    assert not any("experts" in name for name in moe)


def test_every_tensor_but_the_ffn_is_carried_bit_by_bit(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", expert_init="drop")
    dense, moe = tensors_of(source), tensors_of(tmp_path / "out")
    assert_same_bits(
        {n: t for n, t in moe.items() if "block_sparse_moe" not in n},
        {n: t for n, t in dense.items() if "mlp" not in n},
    )


def test_router_rows_are_those_of_the_initialiser(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", router_init={"name": "normal", "std": 0.3}, seed=8)
    rows = [normal(32, generator_for(8, 1, expert, "router"), std=0.3) for expert in range(4)]
    router = tensors_of(tmp_path / "out")["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(router, torch.stack(rows))


def test_experts_do_not_depend_on_how_many_there_are(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "small", expert_init="noise", num_experts=3)
    convert(source, tmp_path / "large", expert_init="noise", num_experts=6)
    small, large = tensors_of(tmp_path / "small"), tensors_of(tmp_path / "large")
    assert_same_bits(
        {n: large[n] for n in small if "gate" not in n},
        {n: small[n] for n in small if "gate" not in n},
    )


def test_noisy_experts_differ_from_each_other_and_between_layers(tmp_path: Path) -> None:
    def same_layers(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if "layers.1." in name:
                tensors[name] = tensors[name.replace("layers.1.", "layers.0.")].clone()

    source = dense_folder(tmp_path / "dense")
    edit_tensors(source, same_layers)
    convert(source, tmp_path / "out", expert_init="noise")
    made = [t for n, t in tensors_of(tmp_path / "out").items() if n.endswith("w1.weight")]
    for i, a in enumerate(made):
        assert not any(torch.equal(a, b) for b in made[:i])


def test_another_seed_changes_routers_and_experts_only(source: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        convert(source, tmp_path / f"out{seed}", expert_init="noise", seed=seed)
    first, second = tensors_of(tmp_path / "out0"), tensors_of(tmp_path / "out1")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) == ("block_sparse_moe" not in name)


CONFIG_FIELDS = {
    "rms_norm_eps": 3e-3,
    "vocab_size": 67,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "pad_token_id": 7,
    "sliding_window": WINDOW,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
}


@pytest.mark.parametrize(("field", "value"), CONFIG_FIELDS.items())
def test_config_fields_are_carried(field: str, value: object, tmp_path: Path) -> None:
    convert(dense_folder(tmp_path / "dense", "mistral"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[field] == value


def test_config_json_has_old_and_new_spellings(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", rope="yarn", dtype=BF16)
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 3456.0
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_scaling"]["factor"] == 4.0


def test_the_spelling_of_older_transformers_is_understood(source: Path, tmp_path: Path) -> None:
    old = {"rope_theta": 987.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    edit_config(source, rope_parameters=None, dtype=None, torch_dtype="float32", **old)
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 987.0, "rope_type": "linear", "factor": 3.0}
    assert relative_difference(source, tmp_path / "out") < 1e-4


def test_tokenizer_and_licence_files_are_copied_as_they_are(source: Path, tmp_path: Path) -> None:
    companions = {
        "tokenizer_config.json": b'{"a": 1}',
        "chat_template.jinja": "{{ größer }}".encode(),
        "LICENSE.txt": b"free",
        "tokenizer.model": b"\x00\xff\r\n",
        "additional_chat_templates/tool.jinja": b"{{ tool }}",
    }
    for name, contents in companions.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(contents)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    convert(source, tmp_path / "out")
    copied = files_of(tmp_path / "out")
    assert companions.items() <= copied.items()
    assert "modeling_evil.py" not in copied


def test_the_record_counts_parameters_as_pytorch_does(source: Path, tmp_path: Path) -> None:
    counts = convert(source, tmp_path / "out").record["parameters"]
    dense, moe = load(source), load(tmp_path / "out")
    assert counts["dense"] == dense.num_parameters()
    assert counts["total"] == moe.num_parameters()
    assert counts["active"] == counts["total"] - 2 * 2 * 3 * 48 * 32  # 2 idle experts, 2 layers


def test_the_record_on_disk_repeats_the_conversion(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", expert_init="drop", seed=4, dtype="bfloat16")
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    convert(source, tmp_path / "again", **record["options"])
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))


def test_the_model_card_says_what_was_made_and_proven(source: Path, tmp_path: Path) -> None:
    options = {"expert_init": "noise", "seed": 77, "verify": "auto"}
    converted = convert(source, tmp_path / "out", **options)
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("noise (noise_std=0.01)", "| seed | 77 |", "MixtralForCausalLM", "approximate"):
        assert said in card
    assert f"{converted.record['parameters']['total']:,}" in card


# --- streaming and live, shards, casts --------------------------------------------------------


@pytest.mark.parametrize("expert_init", ["copy", "noise", "drop", "permute"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_streamed_folder_equals_the_live_model_bit_by_bit(
    expert_init: str, dtype: str | None, source: Path, tmp_path: Path
) -> None:
    options = {"expert_init": expert_init, "dtype": dtype, "seed": 3}
    convert(source, tmp_path / "out", max_shard_size="30KB", **options)
    made = live(load(source), **options)
    assert_same_bits(load(tmp_path / "out").state_dict(), made.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_the_live_model_has_the_config_that_the_folder_has(tied: bool, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "mistral", rope="yarn", tie_word_embeddings=tied)
    convert(source, tmp_path / "out")
    ignored = {"_name_or_path", "transformers_version"}
    folder, model = (m.config.to_dict() for m in (load(tmp_path / "out"), live(load(source))))
    assert {k: v for k, v in folder.items() if k not in ignored} == {
        k: v for k, v in model.items() if k not in ignored
    }


def test_a_tied_live_model_is_tied(tmp_path: Path) -> None:
    made = live(dense_model(tie_word_embeddings=True))
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_the_live_source_is_left_as_it_was(tmp_path: Path) -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    config = dense.config.to_dict()
    made = live(dense)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)  # shares no memory with the source
    assert_same_bits(dict(dense.state_dict()), before)
    assert dense.config.to_dict() == config


@pytest.mark.parametrize("max_shard_size", ["20KB", "100KB"])
def test_shard_size_changes_no_tensor(max_shard_size: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "one", expert_init="noise")
    convert(source, tmp_path / "many", expert_init="noise", max_shard_size=max_shard_size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert_same_bits(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))


def test_a_source_of_several_shards_gives_the_same_tensors(source: Path, tmp_path: Path) -> None:
    sharded = dense_folder(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for folder in (source, sharded):
        convert(folder, tmp_path / f"{folder.name}-out", expert_init="noise")
    assert_same_bits(tensors_of(tmp_path / "sharded-out"), tensors_of(tmp_path / "dense-out"))


def test_shards_of_any_name_that_the_index_gives_are_read(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "weights-a.safetensors")
    weight_map = dict.fromkeys(load_file(source / "weights-a.safetensors"), "weights-a.safetensors")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert convert(source, tmp_path / "out", verify="auto").proof.holds


def test_tensors_larger_than_a_piece_are_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole", expert_init="noise", dtype="bfloat16")
    for module in ("checkpoint.reader", "conversion.conversion", "live.tensors"):
        monkeypatch.setattr(f"fusion_upcycle.{module}.CHUNK_ELEMENTS", 100)
    convert(source, tmp_path / "pieces", expert_init="noise", dtype="bfloat16")
    assert_same_bits(tensors_of(tmp_path / "pieces"), tensors_of(tmp_path / "whole"))


def test_a_cast_comes_before_initialising_as_in_a_model_loaded_in_that_dtype(
    source: Path, tmp_path: Path
) -> None:
    load(source, dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    convert(tmp_path / "rounded", tmp_path / "expected", expert_init="noise")
    convert(source, tmp_path / "cast", expert_init="noise", dtype="bfloat16")
    assert_same_bits(tensors_of(tmp_path / "cast"), tensors_of(tmp_path / "expected"))


def test_a_source_of_mixed_dtypes_becomes_what_its_config_says(
    source: Path, tmp_path: Path
) -> None:
    def norms_in_bfloat16(tensors: dict[str, Tensor]) -> None:
        tensors |= {n: t.bfloat16() for n, t in tensors.items() if "norm" in n}

    edit_tensors(source, norms_in_bfloat16)
    assert convert(source, tmp_path / "out", verify="auto").proof.holds
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {FP32}
    assert_same_bits(load(tmp_path / "out").state_dict(), live(load(source)).state_dict())


def test_float64_is_kept(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", dtype=torch.float64)
    proof = convert(source, tmp_path / "out", verify="auto").proof
    assert proof.holds
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float64}


def test_rotary_buffers_of_old_checkpoints_are_left_out(source: Path, tmp_path: Path) -> None:
    def with_buffers(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(source, with_buffers)
    assert convert(source, tmp_path / "out", verify="auto").proof.holds
    assert not any("inv_freq" in name for name in tensors_of(tmp_path / "out"))


def test_an_equal_second_copy_of_tied_embeddings_is_left_out(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", tie_word_embeddings=True)
    edit_tensors(
        source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert convert(source, tmp_path / "out", verify="auto").proof.holds
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_untied_lm_head_and_embeddings_stay_two(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    assert not torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])


# --- refused ----------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "attention bias": ({"attention_bias": True}, "attention_bias=True.*no biases"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=True.*no biases"),
    "a field of the MoE": ({"router_jitter_noise": 0.1}, r'=\["router_jitter_noise"\]'),
    "nearly a known field": (
        {"rope_thetta": 2.0},
        r'rope_thetta=2.0.*nearly rope_theta.*\["rope_thetta"\]',
    ),
    "quantised by MLX": ({"quantization": {"bits": 4}}, "quantization=.*quantised"),
    "another masking": ({"is_causal": False}, "field is_causal=False"),
    "sliding window in a Llama": ({"sliding_window": 6}, "sliding_window"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "rope type": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "factor": 2.0,
                "original_max_position_embeddings": 16,
            }
        },
        "longrope.*Supported: default, linear",
    ),
    "rope without its factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "factor",
    ),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantised.*dequantise"),
    "4 bits": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantised",
    ),
    "remote code": ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
    "class of another family": ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    "no class": ({"architectures": None}, "architectures"),
    "bloom": ({"model_type": "bloom"}, "bloom.*Supported: .*llama, ministral"),
    "already an MoE": ({"model_type": "mixtral"}, "mixtral.*an MoE already.*expand"),
    "no model type": ({"model_type": None}, "model_type"),
    "fewer layers": ({"num_hidden_layers": 1}, "layers.1"),
    "more layers": ({"num_hidden_layers": 3}, "layers.2.*incomplete"),
    "another width": ({"hidden_size": 64, "head_dim": 8}, r"shape \[48, 32\].*\[48, 64\]"),
    "another FFN width": ({"intermediate_size": 50}, r"\[48, 32\].*\[50, 32\]"),
    "another vocabulary": ({"vocab_size": 70}, r"\[67, 32\].*\[70, 32\]"),
    "tied, but not equal": ({"tie_word_embeddings": True}, "tie_word_embeddings=true.*lm_head"),
}


@pytest.mark.parametrize(("fields", "match"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_cannot_be_carried_over_is_refused_by_name(
    fields: dict[str, Any], match: str, source: Path
) -> None:
    edit_config(source, **fields)
    refused(source, match, **({} if "model_type" in fields else {"target": "mixtral"}))


BROKEN_CONFIGS: dict[str, dict[str, Any]] = {
    "hidden_size of text": {"hidden_size": "wide"},
    "eps of text": {"rms_norm_eps": "1e-5"},
    "architectures of text": {"architectures": "LlamaForCausalLM"},
    "two architectures": {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
    "unknown dtype": {"dtype": "float5"},
    "dtype of integers": {"dtype": "int8"},
    "dtype of 8 bits": {"dtype": "float8_e4m3fn"},
    "unknown activation": {"hidden_act": "swoosh"},
    "heads that do not divide": {"num_attention_heads": 5},
    "no heads": {"num_key_value_heads": 0},
    "rope of text": {"rope_parameters": "default"},
    "padding outside the vocabulary": {"pad_token_id": 1000},
}


@pytest.mark.parametrize("fields", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_config_that_makes_no_model_is_refused(fields: dict[str, Any], source: Path) -> None:
    edit_config(source, **fields)
    refused(source, r"config\.json|" + next(iter(fields)))


@pytest.mark.parametrize("contents", [b"", b"[]", b"{", b"\xff\xfe", b'"llama"', b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(contents: bytes, source: Path) -> None:
    (source / "config.json").write_bytes(contents)
    refused(source, "config.json")


def test_a_missing_config_is_refused(source: Path) -> None:
    (source / "config.json").unlink()
    refused(source, "no config.json")


def test_an_adapter_is_refused_with_the_remedy(source: Path) -> None:
    (source / "config.json").rename(source / "adapter_config.json")
    refused(source, "is a PEFT adapter")


def test_an_unknown_field_is_accepted_when_declared_without_effect(
    source: Path, tmp_path: Path
) -> None:
    edit_config(source, my_note="hello")
    assert convert(
        source, tmp_path / "out", ignore_config_fields=["my_note"], verify="auto"
    ).proof.holds


#: What is in config.json of models that people have, and in none of transformers' classes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2": {
        "_model_name_or_path": "x",
        "is_llama_config": True,
        "rope_interleaved": False,
        "max_sequence_length": 8192,
        "unk_token_id": 0,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}, "use_external_data": 1},
    },
    "Falcon3": {"activation": "swiglu", "mlp_bias": False, "head_dim": 8},
    "unsloth": {"unsloth_version": "2026.1", "unsloth_fixed": True, "torch_dtype": "float32"},
}


@pytest.mark.parametrize("target", ["auto", "sparse"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_need_no_ignored_field(
    model: str, target: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(source, **PUBLISHED[model])
    made = convert(source, tmp_path / "moe", target=target, verify="layers")
    assert made.proof.holds
    (said,) = [record.getMessage() for record in caplog.records if "unknown" in record.message]
    known = ("mlp_bias", "head_dim", "torch_dtype")
    for name, value in PUBLISHED[model].items():
        assert (f"{name}={value!r}" in said) == (name not in known)


@pytest.mark.parametrize("field", ["attention_bias", "sliding_window"])
def test_a_field_with_a_meaning_cannot_be_ignored(field: str, source: Path) -> None:
    edit_config(source, **{field: 6 if field == "sliding_window" else True})
    refused(source, field, ignore_config_fields=[field], target="mixtral")


def test_a_field_without_effect_is_dropped_silently(source: Path, tmp_path: Path) -> None:
    edit_config(source, pretraining_tp=2, _name_or_path="somewhere")
    assert convert(source, tmp_path / "out", verify="auto").proof.holds


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        r"q_proj\.bias \[32\] has no place in MixtralForCausalLM",
    ),
    "an adapter's matrix": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}),
        r"lora_A\.weight",
    ),
    "an FFN bias": (
        lambda t: t.update({"model.layers.1.mlp.down_proj.bias": torch.ones(32)}),
        r"down_proj\.bias",
    ),
    "no FFN matrix": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks.*up_proj"),
    "no norm": (lambda t: t.pop("model.norm.weight"), r"lacks tensor model\.norm\.weight"),
    "no lm_head": (lambda t: t.pop("lm_head.weight"), "tie_word_embeddings=true"),
    "a transposed matrix": (
        lambda t: t.update(
            {"model.layers.0.mlp.down_proj.weight": t["model.layers.0.mlp.down_proj.weight"].T}
        ),
        r"down_proj.weight has shape \[48, 32\].*\[32, 48\]",
    ),
    "names without their prefix": (
        lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)],
        "lacks tensor model.layers.0",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "I8.*quantised",
    ),
}


@pytest.mark.parametrize(("edit", "match"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object], match: str, source: Path
) -> None:
    edit_tensors(source, edit)
    refused(source, match)


def test_mixed_dtypes_without_a_word_in_the_config_are_refused(source: Path) -> None:
    edit_config(source, dtype=None)
    edit_tensors(source, lambda t: t.update({"model.norm.weight": torch.ones(32).half()}))
    refused(source, "mixes dtypes.*dtype=")


@pytest.mark.parametrize("expert_init", ["copy", "noise"])
def test_values_beyond_float16_are_refused_by_name(expert_init: str, source: Path) -> None:
    def overflow(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5

    edit_tensors(source, overflow)
    refused(source, r"up_proj\.weight.*float16.*bfloat16", dtype="float16", expert_init=expert_init)


def test_nan_in_the_source_does_not_pass_as_proven(source: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] = math.nan

    edit_tensors(source, poison)
    refused(source, "not a number", verify="logits")


def test_the_source_is_never_the_output(source: Path) -> None:
    before = files_of(source)
    for output in (source, source / ".." / source.name):
        with pytest.raises(UpcyclingError):
            convert(source, output, overwrite=True)
    assert files_of(source) == before


def test_the_source_is_never_overwritten_even_if_it_looks_like_an_output(source: Path) -> None:
    (source / "upcycling.json").write_text("{}")
    before = files_of(source)
    with pytest.raises(UpcyclingError, match="is the source itself"):
        convert(source, source, overwrite=True)
    assert files_of(source) == before


def test_an_earlier_output_that_holds_the_source_is_not_replaced(tmp_path: Path) -> None:
    outer = dense_folder(tmp_path / "base")
    convert(outer, tmp_path / "out")
    inner = tmp_path / "out" / "dense"
    shutil.copytree(outer, inner)
    before = files_of(inner)
    with pytest.raises(UpcyclingError, match="source"):
        convert(inner, tmp_path / "out", overwrite=True)
    assert files_of(inner) == before


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1},
        {"experts_per_token": 9},
        {"expert_init": "nosie"},
        {"expert_init": {"name": "drop", "drop_ratio": 2}},
        {"router_init": {"name": "normal", "std": 0}},
        {"dtype": "int8"},
        {"verify": "yes"},
        {"max_shard_size": "large"},
        {"nmu_experts": 4},
    ],
    ids=str,
)
def test_a_bad_option_leaves_nothing_behind(options: dict[str, Any], source: Path) -> None:
    refused(source, **options)


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_as_source_is_refused(source: Path) -> None:
    with pytest.raises(UpcyclingError, match="Give the folder"):
        convert(source / "model.safetensors", source.parent / "out")


def test_pickled_weights_are_refused(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, "pickled")


def test_a_quantised_tensor_beside_good_ones_is_refused(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 32).to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors")
    refused(source, "F8_E4M3.*quantised")
