"""Every family: the same function, the same bits from both sinks, loadable, refused by name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert
from tiny import (
    ROPES,
    assert_same_bits,
    dense_folder,
    dense_model,
    edit_config,
    edit_tensors,
    load,
    logits_of,
    tensors_of,
)
from transformers import AutoConfig

from fusion_upcycle import SparseUpcyclingAlgorithm
from fusion_upcycle.architectures import ARCHITECTURES, OWN, architecture_for
from fusion_upcycle.conversion.run import Converted
from fusion_upcycle.errors import UpcyclingError

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
LONGROPE = {"rope": "longrope", "original_max_position_embeddings": 16}
#: Never scales queries, so that it can be longer than it was.
MINISTRAL3 = dict(
    dense_model("ministral3").config.rope_parameters,
    original_max_position_embeddings=16,
    llama_4_scaling_beta=0.0,
)
WINDOW = {"use_sliding_window": True, "sliding_window": 12}

#: (source, its fields, target, options of the conversion)
MATRIX: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("llama", {}, "mixtral", {}),
    ("mistral", {"tie_word_embeddings": True}, "mixtral", {}),
    ("llama", {"rope": "llama3", "head_dim": 12}, "qwen2_moe", {"shared_expert": "copy"}),
    ("qwen2", {}, "qwen2_moe", {"shared_expert": "copy"}),
    ("qwen2", {"tie_word_embeddings": True}, "qwen2_moe", {"shared_expert": "zero"}),
    ("qwen2", {"rope": "yarn"}, "qwen2_moe", {"shared_expert": "none"}),
    # one layer of each kind of attention
    ("qwen2", WINDOW | {"max_window_layers": 1}, "qwen2_moe", {}),
    ("seed_oss", {"rope": "yarn"}, "qwen2_moe", {}),
    ("seed_oss", {"tie_word_embeddings": True}, "qwen2_moe", {"shared_expert": "none"}),
    ("qwen3", {"head_dim": 12, "attention_bias": True}, "qwen3_moe", {}),
    ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope": "linear"}, "qwen3_moe", {}),
    ("qwen3", WINDOW | {"head_dim": 8, "max_window_layers": 0}, "qwen3_moe", {}),
    ("olmo2", {}, "flex_olmo", {}),
    ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}, "flex_olmo", {}),
    ("olmo2", {"rope": "yarn"}, "flex_olmo", {}),
    ("olmo3", {}, "flex_olmo", {}),
    ("olmo3", {"tie_word_embeddings": True, "rope": "yarn"}, "flex_olmo", {}),
    ("phi3", {"sliding_window": 12}, "mixtral", {}),
    ("phi3", LONGROPE, "mixtral", {}),
    ("ministral3", {}, "mixtral", {}),
    ("ministral3", {"rope_parameters": MINISTRAL3, "sliding_window": None}, "mixtral", {}),
    ("granite", {}, "granitemoe", {}),
    ("granite", {"attention_bias": True, "tie_word_embeddings": True}, "granitemoe", {}),
    ("llama", {"attention_bias": True, "head_dim": 12}, "granitemoe", {}),
    ("ernie4_5", {}, "ernie4_5_moe", {}),
    ("ernie4_5", {"tie_word_embeddings": True}, "ernie4_5_moe", {"shared_expert": "copy"}),
    ("ernie4_5", {"rope": "linear"}, "ernie4_5_moe", {"shared_expert": "zero"}),
    ("qwen3", {"head_dim": 12}, "glm4_moe", {}),
    ("qwen2", {"tie_word_embeddings": True}, "glm4_moe", {"shared_expert": "copy"}),
    ("llama", {"rope": "llama3"}, "glm4_moe", {"shared_expert": "zero"}),
    ("youtu", {}, "deepseek_v3", {}),
    ("youtu", {"q_lora_rank": None, "rope": "yarn"}, "deepseek_v3", {"shared_expert": "copy"}),
    ("cohere2", {}, "cohere2_moe", {}),
    ("cohere2", {"attention_bias": True, "tie_word_embeddings": True}, "cohere2_moe", {}),
    ("cohere", {}, "cohere2_moe", {}),
    ("cohere", {"attention_bias": True, "rope": "dynamic"}, "cohere2_moe", {}),
    ("cohere2", {"rope": "yarn"}, "cohere2_moe", {}),
    ("lfm2", {}, "lfm2_moe", {}),
    ("lfm2", {"conv_bias": True, "tie_word_embeddings": True, "rope": "yarn"}, "lfm2_moe", {}),
    ("lfm2", {"block_auto_adjust_ff_dim": False, "intermediate_size": 48}, "lfm2_moe", {}),
    ("hunyuan_v1_dense", {"tie_word_embeddings": True}, "hunyuan_v1_moe", {}),
    (
        "hunyuan_v1_dense",
        {"attention_bias": True, "rope_parameters": ROPES["dynamic"] | {"alpha": 7.0}},
        "hunyuan_v1_moe",
        {"shared_expert": "none"},
    ),
    ("qwen3_5_text", {"rope": "mrope"}, "qwen3_5_moe_text", {}),
    ("qwen3_5_text", {"attention_bias": True}, "qwen3_5_moe_text", {"shared_expert": "none"}),
]


@dataclass(frozen=True)
class Row:
    """A row of the matrix, and its one conversion with a proof, which several checks look at."""

    family: str
    fields: dict[str, Any]
    options: dict[str, Any]
    source: Path
    made: Converted


@pytest.fixture(scope="module", params=MATRIX, ids=str)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Row:
    family, fields, target, options = request.param
    options = options | {"target": target}
    folder = tmp_path_factory.mktemp("row")
    source = dense_folder(folder / "dense", family, **fields)
    made = convert(source, folder / "moe", verify="auto", **options)
    return Row(family, fields, options, source, made)


def test_every_family_and_every_source_of_it_is_in_the_matrix() -> None:
    pairs = {(target, source) for source, _, target, _ in MATRIX}
    families = ARCHITECTURES.without(OWN)  # of which test_sparse.py has every row
    assert pairs == {(name, dense) for name, a in families.items() for dense in a.dense}


def test_the_function_is_kept_and_the_output_loads(row: Row) -> None:
    assert row.made.proof.holds
    # Independently of our proof: transformers' own forward passes, longer than the window.
    moe, info = load_with_info(row.made.output)
    assert moe.config.model_type == row.options["target"]
    assert not any(info.values()), info
    reference = logits_of(load(row.source))
    assert (logits_of(moe) - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_the_function_is_kept_in_bfloat16(row: Row, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", row.family, dtype=BF16, **row.fields)
    assert convert(source, tmp_path / "moe", verify="auto", **row.options).proof.holds
    moe, info = load_with_info(tmp_path / "moe")
    assert moe.dtype == BF16 and not any(info.values()), info


def test_a_zero_router_is_exact_in_float64(row: Row, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", row.family, dtype=FP64, **row.fields)
    convert(source, tmp_path / "moe", router_init="zeros", dtype=FP64, **row.options)
    moe = load(tmp_path / "moe")
    moe.set_experts_implementation("eager")  # the default one has no float64
    reference = logits_of(load(source))
    # LFM2-MoE divides by the sum of the scores plus 1e-6.
    tolerance = 5e-6 if row.options["target"] == "lfm2_moe" else 1e-9
    assert (logits_of(moe) - reference).abs().max() <= tolerance * reference.abs().max()


def test_the_live_model_has_the_bits_of_the_streamed_one(row: Row, tmp_path: Path) -> None:
    dense = load(row.source)
    live = SparseUpcyclingAlgorithm(4, 2, verify="layers", **row.options).run(dense)
    assert live is not None
    assert_same_bits(load(row.made.output).state_dict(), live.state_dict())
    live.save_pretrained(tmp_path / "saved")
    assert_same_bits(tensors_of(tmp_path / "saved"), tensors_of(row.made.output))
    # Experts that differ: none is in the place of another.
    options = row.options | {"expert_init": "noise", "verify": "none"}
    convert(row.source, tmp_path / "noise", **options)
    live = SparseUpcyclingAlgorithm(4, 2, **options).run(dense)
    assert live is not None
    assert_same_bits(load(tmp_path / "noise").state_dict(), live.state_dict())


@pytest.mark.parametrize(("family", "target"), [("qwen3", "qwen3_moe"), ("olmo2", "flex_olmo")])
def test_backbones_become_backbones(family: str, target: str) -> None:
    dense = dense_model(family, backbone=True, **({"head_dim": 8} if family == "qwen3" else {}))
    moe = SparseUpcyclingAlgorithm(4, 2).run(dense)
    assert type(moe).__name__.endswith("Model")
    assert moe is not None and moe.config.model_type == target


def test_a_llama_gets_the_biases_that_readers_of_qwen2_moe_expect(tmp_path: Path) -> None:
    """vLLM and llama.cpp take them for granted, whatever `qkv_bias` says."""
    source = dense_folder(tmp_path / "dense", "llama")
    convert(source, tmp_path / "moe", target="qwen2_moe")
    assert load(tmp_path / "moe").config.qkv_bias
    written = tensors_of(tmp_path / "moe")
    for x, size in (("q", 32), ("k", 16), ("v", 16)):
        bias = written[f"model.layers.1.self_attn.{x}_proj.bias"]
        assert torch.equal(bias, torch.zeros(size))


def test_older_readers_are_told_that_whole_heads_are_rotated(tmp_path: Path) -> None:
    """transformers 4 takes half of a head for GLM-4.5 unless this field says otherwise."""
    source = dense_folder(tmp_path / "dense", "qwen3")
    convert(source, tmp_path / "moe", target="glm4_moe")
    assert (
        json.loads((tmp_path / "moe" / "config.json").read_text())["partial_rotary_factor"] == 1.0
    )


def test_both_spellings_of_the_number_of_experts_are_written(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "qwen3", head_dim=8)
    convert(source, tmp_path / "moe")
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == 4
    assert written["norm_topk_prob"] is True


@pytest.mark.parametrize(
    ("family", "fields", "options", "match"),
    [
        ("llama", {"attention_bias": True}, {"target": "qwen2_moe"}, "attention_bias=True"),
        ("qwen2", {}, {"target": "mixtral"}, "'qwen2'.* to mixtral.*llama, ministral3, mistral"),
        ("llama", {}, {"target": "mixtrall"}, "Did you mean 'mixtral'"),
        ("llama", {}, {"shared_expert": "copy"}, "mixtral has no shared expert"),
        ("qwen2", {}, {"shared_expert": "half"}, "Unknown shared_expert 'half'"),
        (
            "qwen3",
            WINDOW | {"head_dim": 8, "max_window_layers": 1},
            {},
            "layer_types mixes.*full_attention.*sliding_attention",
        ),
        ("seed_oss", {"residual_dropout": 0.1}, {}, "residual_dropout=0.1.*no such dropout"),
        ("seed_oss", {"sliding_window": 12}, {}, "sliding_window=12.*ignores it"),
        ("seed_oss", {"attention_bias": False}, {}, "attention_bias=False.*is a Llama"),
        ("seed_oss", {"attention_out_bias": True}, {}, "attention_out_bias=True"),
        ("seed_oss", {"mlp_bias": True}, {}, "mlp_bias=True"),
        ("phi3", {"resid_pdrop": 0.1}, {}, "resid_pdrop=0.1"),
        ("phi3", {"partial_rotary_factor": 0.75}, {}, "partial_rotary_factor=0.75"),
        (
            "ministral3",
            {"max_position_embeddings": 65},
            {},
            "from position 64 on.*llama_4_scaling_beta=0.3.*of up to 64 tokens",
        ),
        (
            "olmo3",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 12},
            {},
            r"layer_types gives layers \[1\] a sliding window of 12",
        ),
        ("hunyuan_v1_dense", {"use_cla": True}, {}, "use_cla=True.*own class ignores it"),
        ("hunyuan_v1_dense", {}, {"granularity": 2}, "as a routed one: 24, not 48.*zero"),
        ("lfm2", {"use_pos_enc": False}, {}, "use_pos_enc=False.*own class ignores it"),
        ("cohere", {"use_qk_norm": True}, {}, "use_qk_norm=True.*no norms on q and k"),
        ("cohere2", {"use_qk_norm": True}, {}, "use_qk_norm=True.*own class ignores it"),
        ("cohere2", {"rms_norm_eps": 1e-5}, {}, "rms_norm_eps=1e-05.*remove it"),
        ("granite", {"mlp_bias": True}, {}, "mlp_bias=True"),
        ("llama", {"mlp_bias": True}, {"target": "granitemoe"}, "mlp_bias=True"),
        ("ernie4_5", {"use_bias": True}, {}, "use_bias=True"),
        ("qwen3", {"attention_bias": True}, {"target": "glm4_moe"}, "attention_bias=True"),
        ("qwen2", WINDOW | {"max_window_layers": 1}, {"target": "glm4_moe"}, "layer_types mixes"),
        (
            "qwen2",
            WINDOW | {"max_window_layers": 0},
            {"target": "glm4_moe"},
            "sliding window of 12.*Choose a target that has one",
        ),
    ],
    ids=str,
)
def test_what_a_family_cannot_express_is_refused_by_name(
    family: str, fields: dict[str, Any], options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", family, **fields)
    with pytest.raises(UpcyclingError, match=match):
        convert(source, tmp_path / "moe", **{"target": architecture_for(family).name} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


#: Fields of published configs, beside those of `random_dense`.
PUBLISHED: dict[str, dict[str, Any]] = {
    "phi3": {
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 64,
        "resid_pdrop": 0.0,
    },
    "qwen2": {"use_mrope": False, "max_window_layers": 21, "use_sliding_window": False},
    "llama": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "pretraining_tp": 1,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    },
    "youtu": {"mlp_bias": False},
    "lfm2": {
        "block_dim": 32,
        "block_ff_dim": 68,
        "block_mlp_init_scale": 1.0,
        "block_norm_eps": 1e-5,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "conv_dim": 32,
        "conv_dim_out": 32,
        "conv_use_xavier_init": True,
        "full_attn_idxs": [1],
        "num_heads": 4,
        "use_pos_enc": True,
    },
    "cohere2": {
        "cache_implementation": "hybrid",
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "sliding_window_pattern": 4,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
        "use_qk_norm": False,
    },
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_published_configs_carry_along_is_accepted(family: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", family)
    edit_config(source, **PUBLISHED[family])
    assert convert(source, tmp_path / "moe", verify="auto").proof.holds


def test_code_in_a_repository_is_accepted_only_where_transformers_has_it(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "llama")
    edit_config(source, auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    with pytest.raises(UpcyclingError, match=r"auto_map.*ignore_config_fields=\[\"auto_map\"\]"):
        convert(source, tmp_path / "moe")
    options = {"ignore_config_fields": ["auto_map"], "verify": "auto"}
    assert convert(source, tmp_path / "moe", **options).proof.holds


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_padding_row_that_transformers_would_zero_is_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", "youtu", dtype=dtype)
    edit_tensors(source, lambda t: t["model.embed_tokens.weight"][7].fill_(0.5))
    with pytest.raises(UpcyclingError, match=r"Row 7 \(pad_token_id\).*not zero"):
        convert(source, tmp_path / "moe")


def test_the_model_card_names_every_option_that_is_not_a_default(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "qwen3")
    options = {"moe_layers": "last_1", "granularity": 2, "router_init": "zeros"}
    convert(source, tmp_path / "moe", verify="auto", **options)
    card = (tmp_path / "moe" / "README.md").read_text()
    for said in ("FFN of each of 1 layers", "| granularity | 2 |", "| moe layers | last_1 |"):
        assert said in card
    assert "| router init | zeros |" in card
    assert "What was asked for does not keep the function" in card
    assert "normalize" not in card


def test_all_fields_that_no_class_knows_are_named_at_once_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = dense_folder(tmp_path / "dense", "llama")
    edit_config(source, novel=1, use_mrope=True)
    assert convert(source, tmp_path / "moe", verify="auto").proof.holds
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "novel=1, use_mrope=True. Neither LlamaConfig nor MixtralConfig has it" in said
    assert (
        not {"novel", "use_mrope"} & json.loads((tmp_path / "moe/config.json").read_text()).keys()
    )


@pytest.mark.parametrize(
    ("fields", "width"),
    [({}, 48), ({"block_ffn_dim_multiplier": 1.4}, 64), ({"block_auto_adjust_ff_dim": False}, 68)],
    ids=str,
)
def test_the_width_of_an_lfm2s_ffn_is_reckoned_as_its_class_does(
    fields: dict[str, Any], width: int, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", "lfm2", **fields)
    options = {"moe_layers": "last_1", "verify": "layers"}
    assert convert(source, tmp_path / "moe", **options).proof.holds
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.intermediate_size, config.moe_intermediate_size) == (width, width)
    assert config.num_dense_layers == 1


PAIRS = sorted({(source, target) for source, _, target, _ in MATRIX})
every_pair = pytest.mark.parametrize(("family", "target"), PAIRS)


@every_pair
def test_the_config_says_what_was_asked_for(family: str, target: str, tmp_path: Path) -> None:
    """Identical experts give the same function for any k, so that the proof would not notice."""
    source = dense_folder(tmp_path / "dense", family, attention_dropout=0.125)
    options: dict[str, Any] = {"num_experts": 6, "experts_per_token": 3, "granularity": 3}
    if target == "hunyuan_v1_moe":
        options["shared_expert"] = "zero"
    convert(source, tmp_path / "moe", target=target, **options)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert config.num_experts_per_tok == 3
    assert getattr(config, ARCHITECTURES[target].experts_field) == 6
    assert config.attention_dropout == 0.125 or "ernie" in family
    assert getattr(config, "n_group", 1) == getattr(config, "topk_group", 1) == 1
    assert getattr(config, "norm_topk_prob", True) is True
    model = load(tmp_path / "moe")
    experts = model.get_submodule("model.layers.1." + ARCHITECTURES[target].experts_module)
    assert experts.down_proj.shape == (6, 32, 16)


@every_pair
def test_a_field_of_no_class_is_said_and_left_out_by_every_family(
    family: str, target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = dense_folder(tmp_path / "dense", family)
    edit_config(source, novel_scale=2.0)
    convert(source, tmp_path / "moe", target=target)
    assert "novel_scale=2.0. Neither" in caplog.text
    assert "novel_scale" not in (tmp_path / "moe/config.json").read_text()


@every_pair
def test_an_unknown_rope_type_is_refused_by_every_family(
    family: str, target: str, tmp_path: Path
) -> None:
    # phi3 alone has longrope; its config class refuses most others itself.
    rope = "linear" if family == "phi3" else "longrope"
    source = dense_folder(tmp_path / "dense", family)
    edit_config(source, rope_parameters=ROPES[rope])
    with pytest.raises(UpcyclingError, match=rope):
        convert(source, tmp_path / "moe", target=target)


@pytest.mark.parametrize("name", ["llama_4_scaling_beta", "factor"])
def test_a_ministral3_says_how_far_its_rope_and_queries_go(name: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "ministral3")
    edit_config(source, rope_parameters=MINISTRAL3 | {name: None})
    with pytest.raises(UpcyclingError, match=f"rope_parameters does not say {name}"):
        convert(source, tmp_path / "moe", target="mixtral")


MINICPM = {
    "model_type": "minicpm",
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
}


def minicpm_folder(folder: Path) -> Path:
    """A MiniCPM checkpoint: Llama's tensors, a config of its own."""
    dense_folder(folder, "llama", tie_word_embeddings=True)
    edit_config(folder, **MINICPM, attention_bias=None, mlp_bias=None, pretraining_tp=None)
    return folder


def test_minicpm_is_read_as_granite(tmp_path: Path) -> None:
    """Against MiniCPM's equations, written down here: transformers has no class of it."""
    source = minicpm_folder(tmp_path / "dense")
    proof = convert(source, tmp_path / "moe", verify="auto").proof
    assert proof.holds
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == "granitemoe"
    llama = dense_model("llama", tie_word_embeddings=True)
    scale = 1.4 / 2**0.5  # of both branches in each of two layers
    for layer in llama.model.layers:
        for module in (layer.self_attn, layer.mlp):
            module.register_forward_hook(
                lambda _, __, out: (
                    (out[0] * scale, *out[1:]) if isinstance(out, tuple) else out * scale
                )
            )
    llama.model.embed_tokens.register_forward_hook(lambda _, __, out: out * 12)
    llama.model.norm.register_forward_hook(lambda _, __, out: out / (32 / 8))
    reference = logits_of(llama)
    assert (logits_of(moe) - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"scale_emb": None}, "scale_emb is missing"),
        ({"num_experts": 8}, "MoE already"),
        ({"novel": 1}, "unknown field novel=1"),
    ],
    ids=str,
)
def test_what_a_minicpm_config_must_say(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    source = minicpm_folder(tmp_path / "dense")
    edit_config(source, **fields)
    with pytest.raises(UpcyclingError, match=match):
        convert(source, tmp_path / "moe")


def load_with_info(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval(), {key: info[key] for key in ("missing_keys", "unexpected_keys")}
