"""Expert upcycling from folder to folder: what is refused, recorded and proven again."""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import convert, grow
from safetensors.torch import load_file, save_file
from tiny import as_older, dense_folder, edit_config, edit_tensors, load, tensors_of
from tiny_moe import moe_folder
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.expansion.options import ExpansionOptions, make_expansion_options
from fusion_upcycle.expansion.plan import plan_expansion
from fusion_upcycle.expert_init import EXPERT_INITS, noise
from fusion_upcycle.experts import Expert
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.verify import verify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return moe_folder(tmp_path / "moe", "mixtral")


def refuses(source: Path, match: str, **options: Any) -> None:
    helpers.refused(grow, source, match, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"num_experts": 3},
            r"less than the 4 experts.*Choose num_experts=4 or more",
        ),
        (
            {"num_experts": 13, "selection": "random"},
            "max_copies=3 = 12. Pass max_copies=4",
        ),
        ({"num_experts": 6, "multiplier": 2}, r"num_experts=6 and multiplier=2.*Give one"),
        ({"multiplier": 0}, "multiplier=0 must be a whole number"),
        ({"num_experts": 5.0}, r"num_experts=5.0 must be"),
        ({"seed": "1"}, "seed='1'"),
        ({"metric": "gradsquared"}, "Unknown metric 'gradsquared'. Did you mean 'grad_squared'"),
        ({"selection": "best"}, "Unknown selection 'best'"),
        ({"selection": "greedy"}, r"selection=greedy goes by importance scores.*there are none"),
        ({"router_extension": "nois"}, "Unknown router_extension 'nois'. Did you mean 'noise'"),
        ({"router_extension": 3}, "router_extension=3 must be a name"),
        ({"router_extension": {"name": "noise", "std": 1}}, "option of router_extension noise"),
        ({"router_extension": "split"}, r"router_extension=split.*calibration text"),
        ({"router_extension": "bias"}, r"mixtral has no selection bias.*router_extension=.noise"),
        ({"router_extension": lambda *_: 3}, "must return a row for each new expert"),
        ({"expert_init": "subset"}, "Unknown expert_init 'subset'"),
        ({"expert_init": "qwen2"}, "Unknown expert_init 'qwen2'"),
        ({"expert_init": {"name": "svd", "kept_energy": 2}}, "kept_energy=2"),
        ({"experts_per_token": 9}, "experts_per_token=9 is more than the 8 experts"),
        ({"experts": 8}, "Unknown option 'experts'"),
        ({"num_experts": 10**9}, "more than the 65,536 possible"),
        ({"verify": "all"}, "Unknown verify mode 'all'"),
        ({"new_moments": "zero"}, "Unknown new_moments 'zero'"),
        ({"scores": "nowhere.json"}, r"no importance scores at nowhere.json"),
    ],
    # A function's text has its address, which differs between the workers of a run.
    ids=lambda value: str(value).split(" at 0x")[0],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], match: str, source: Path) -> None:
    refuses(source, match, **options)


def test_a_dense_model_is_told_of_sparse_upcycling(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "llama")
    refuses(dense, r"dense 'llama' model.*sparse_upcycling")


def test_an_moe_of_an_unknown_family_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=67,
        num_local_experts=4,
        layer_types=["full_attention"],
    )
    config.quantization_config = None
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    refuses(tmp_path / "moe", r"'gpt_oss'.*biases.*interleaved.*Supported: mixtral, .*olmoe")


def test_nllb_moe_is_refused_as_long_as_its_class_is_broken(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "nllb-moe", d_model=16, num_experts=4, moe_token_dropout=0.0, expert_capacity=64
    )
    torch.manual_seed(0)
    block, x_ND = NllbMoeSparseMLP(config, 24).eval(), torch.randn(20, 16)
    with torch.no_grad():
        found = block(x_ND[None])[0]
        _, weights_NE, _ = block.router(x_ND)
        w_N2 = weights_NE.topk(2).values  # of the experts that were chosen, whichever they are
        one, zero = block.experts["expert_1"](x_ND), block.experts["expert_0"](x_ND)
        every_token = w_N2[:, :1] * one + w_N2[:, 1:] * zero
    # Where this fails, transformers has repaired it: `_BROKEN` may lose its entry.
    torch.testing.assert_close(found, every_token)

    (tmp_path / "moe").mkdir()
    config.save_pretrained(tmp_path / "moe")
    refuses(tmp_path / "moe", "'nllb-moe' model, which cannot be expanded.*w1 . expert 1")
    dense = dense_folder(tmp_path / "dense", "llama")
    with pytest.raises(UpcyclingError, match=r"target=nllb_moe.*w1 . expert 1.*another target"):
        convert(dense, tmp_path / "out", target="nllb_moe")


def test_a_variant_whose_router_is_another_is_refused(tmp_path: Path) -> None:
    """Its rows would be extended, and its balance watched, as those of a softmax."""
    moe_folder(tmp_path / "moe", "cohere2_moe", expert_selection_fn="sigmoid")
    refuses(tmp_path / "moe", "expert_selection_fn='sigmoid' is not known here")
    with pytest.raises(UpcyclingError, match="expert_selection_fn='sigmoid'"):
        find_routers(load(tmp_path / "moe"))


def test_a_number_of_experts_per_token_for_each_layer_is_refused(tmp_path: Path) -> None:
    moe_folder(tmp_path / "moe", "hunyuan_v1_moe")
    edit_config(tmp_path / "moe", moe_topk=[2, 1])
    refuses(tmp_path / "moe", r"moe_topk=\[2, 1\] is not known here, only int is")


def test_a_family_that_can_only_be_expanded_is_no_target(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "olmo2")
    with pytest.raises(UpcyclingError, match=r"no dense model becomes a olmoe.*flex_olmo"):
        convert(dense, tmp_path / "out", target="olmoe")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"'mxfp4'.*dequantise it first"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, r"code of its own \(auto_map\)"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "Only causal language models"),
        ({"num_local_experts": 3}, r"num_experts|has no place|calls for"),
        ({"intermediate_size": 25}, "the config belongs to another model"),
        ({"num_hidden_layers": 3}, r"lacks tensor model.layers.2"),
        ({"num_hidden_layers": 1}, r"model.layers.1.* has no place"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
    ids=str,
)
def test_a_config_that_says_something_else(
    fields: dict[str, Any], match: str, source: Path
) -> None:
    edit_config(source, **fields)
    refuses(source, match)


def test_a_tensor_that_is_left_over_is_named_with_the_remedy(source: Path) -> None:
    edit_tensors(source, lambda t: t.update({"model.layers.2.mtp.weight": torch.zeros(3)}))
    refuses(source, r"model.layers.2.mtp.weight \[3\] has no place.*save_pretrained")


def test_grouped_routing_is_refused_but_not_its_identity(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "deepseek_v3", n_group=2, topk_group=1)
    refuses(source, "n_group=2", num_experts=6)
    assert grow(source, tmp_path / "out", num_experts=4, verify="auto").proof.holds


def test_a_model_without_moe_layers_is_refused(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "qwen3_moe", mlp_only_layers=[0, 1])
    refuses(source, "every layer dense")


def test_noise_on_a_bias_that_is_zero_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "glm4_moe")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(source, lambda t: t[name].zero_())
    refuses(source, "same for all experts", router_extension="bias")


@pytest.mark.parametrize(
    ("rows", "biases", "match"),
    [
        ({0: torch.zeros(8, 32)}, None, r"of layers \[0\].*are \[0, 1\]. Give \[8, 32\]"),
        (
            {0: torch.zeros(8, 32), 1: torch.zeros(7, 32)},
            None,
            r"of layer 1.*\[7, 32\]. Give \[8, 32\]",
        ),
        (dict.fromkeys((0, 1), torch.zeros(8, 32)), {0: torch.zeros(8)}, "selection bias. Leave"),
    ],
    ids=["layers", "shape", "biases"],
)
def test_router_rows_of_another_shape_are_refused(
    rows: Any, biases: Any, match: str, source: Path
) -> None:
    refuses(source, match, multiplier=2, router_rows=rows, selection_biases=biases)


def test_scores_of_other_layers_are_refused(source: Path) -> None:
    options = make_expansion_options(selection="greedy", multiplier=2)
    for scores in ({0: [1.0] * 4}, {0: [1.0] * 4, 1: [1.0] * 5}):
        with pytest.raises(UpcyclingError, match="of another model"):
            plan_expansion(CheckpointReader(source), read_config(source), options, scores=scores)


def test_an_output_is_not_written_over_its_source(source: Path, tmp_path: Path) -> None:
    first = grow(source, tmp_path / "first").output
    with pytest.raises(UpcyclingError, match="is the source itself"):
        grow(first, first, overwrite=True)


def test_an_initialiser_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "mixtral", dtype=torch.float16)

    def explode(expert: Expert, generator: torch.Generator) -> Expert:
        return expert.map(lambda weight: weight * 1e9)

    refuses(source, "Choose other options of it, or a source in float32", expert_init=explode)


def test_options_come_back_from_their_record() -> None:
    for extension in ("noise", {"name": "fit", "steps": 20}):
        options = ExpansionOptions(
            num_experts=6, expert_init={"name": "drop"}, router_extension=extension, seed=5
        )
        again = make_expansion_options(**json.loads(json.dumps(options.to_json())))
        assert again.to_json() == options.to_json()
    assert options.to_json()["router_extension"] == {
        "name": "fit",
        "steps": 20,
        "min_copy_share": 0.6,
    }
    assert options.to_json()["expert_init"] == {"name": "drop", "drop_ratio": 0.5, "paired": True}


def test_the_record_and_the_card_say_what_was_made(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").write_text("{}")
    done = grow(source, tmp_path / "out", num_experts=6, max_copies=4, verify="auto")
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record == json.loads(json.dumps(done.record))
    assert record["method"] == "expert upcycling"
    assert record["num_experts"] == {"before": 4, "after": 6}
    assert record["plan"] == {"0": [0, 1, 2, 3, 0, 1], "1": [0, 1, 2, 3, 0, 1]}
    assert record["proof"]["claim"] == "approximate"
    assert "top-k picks them together" in record["proof"]["reason"]
    expert = 3 * 24 * 32
    model = load(tmp_path / "out")
    assert record["parameters"] == {
        "source": load(source).num_parameters(),
        "source_active": load(source).num_parameters() - 2 * 2 * expert,
        "total": model.num_parameters(),
        "active": model.num_parameters() - 2 * 4 * expert,
    }
    assert sorted(record["copied_files"]) == ["generation_config.json", "tokenizer_config.json"]
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "grown from `moe`",
        "each of 2 MoE layers went from 4 to 6",
        "| router extension | noise (noise_std=0.01) |",
        "| max copies | 4 |",
        "differs from its source before training",
    ):
        assert said in card, said
    assert "dense" not in card and "metric" not in card


def test_shard_size_and_order_change_no_bit(source: Path, tmp_path: Path) -> None:
    options = {"num_experts": 7, "expert_init": "noise"}
    grow(source, tmp_path / "one", **options)
    grow(source, tmp_path / "many", max_shard_size="9KB", **options)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    options["seed"] = 1
    grow(source, tmp_path / "other", **options)
    name = "model.layers.1.block_sparse_moe.experts.4.w1.weight"
    assert not torch.equal(tensors_of(tmp_path / "other")[name], one[name])


def test_a_damaged_output_fails_the_second_proof(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    grow(source, output, num_experts=5, expert_init="noise")
    assert verify(output, progress=False).details["restricted"] is not None
    path = as_older(output) / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.block_sparse_moe.experts.4.w3.weight"
    save_file(tensors | {name: tensors[name] * 1.001}, path)
    with pytest.raises(ProofError, match=f"{name} differs"):
        verify(output, progress=False)
    save_file(tensors, path)
    edit_config(output, num_experts_per_tok=3)
    with pytest.raises(ProofError, match="num_experts_per_tok=3, not 2"):
        verify(output, progress=False)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"plan": {"0": [0, 1, 2, 3, 9]}}, "duplication plan"),
        ({"plan": None}, "damaged"),
        ({"options": {"num_experts": 5, "x": 1}}, "Unknown option 'x'"),
        ({"source": {"name": 7}}, "cannot be used"),
    ],
    ids=str,
)
def test_a_damaged_record_is_an_error_that_says_so(
    fields: dict[str, Any], match: str, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    grow(source, output, num_experts=5)
    record = json.loads((as_older(output) / "upcycling.json").read_text())
    (output / "upcycling.json").write_text(json.dumps(record | fields))
    with pytest.raises(UpcyclingError, match=match):
        verify(output, progress=False)


def test_the_record_of_an_older_version_is_read(source: Path, tmp_path: Path) -> None:
    made = grow(source, tmp_path / "out", num_experts=5)
    path = as_older(made.output) / "upcycling.json"
    options = json.loads(path.read_text())["options"] | {"temperature": 1.0}
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"options": options}))
    assert verify(made.output, progress=False).tensors
    fit = {"name": "fit", "after_split": True}
    for gone, said in (
        ({"router_extension": fit}, "after_split=True"),
        ({"selection": "proportional"}, "selection=proportional"),
        ({"metric": "fisher"}, "metric=fisher"),
    ):
        path.write_text(json.dumps(record | {"options": options | gone}))
        with pytest.raises(UpcyclingError, match=rf"^The record.*older version with {said}"):
            verify(made.output, progress=False)


def test_an_initialiser_of_a_package_may_have_any_option(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is named as an option of ours that is gone."""

    def warm(expert: Expert, generator: torch.Generator, *, temperature: float = 0.5) -> Expert:
        return noise(expert, generator, noise_std=temperature)

    monkeypatch.setitem(EXPERT_INITS, "warm", warm)
    for temperature in (1.0, 2.0):
        init = {"name": "warm", "temperature": temperature}
        made = grow(source, tmp_path / f"{temperature}", num_experts=5, expert_init=init)
        assert verify(made.output, progress=False).tensors


def test_calibration_begins_when_the_tokenizer_is_known_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = moe_folder(tmp_path / "moe", "mixtral", vocab_size=128)
    byte_tokenizer(64).save_pretrained(source)
    monkeypatch.setattr("fusion_upcycle.expansion.run.prepare", lambda *_, **__: pytest.fail("run"))
    with pytest.raises(
        UpcyclingError, match=r"tokenizer\.json gives token id \d+, but.* 128 embed"
    ):
        grow(source, tmp_path / "out")


def test_an_initialiser_of_ones_own_cannot_be_proven_again(source: Path, tmp_path: Path) -> None:
    def mine(expert: Expert, generator: torch.Generator) -> Expert:
        return noise(expert, generator)

    grow(source, tmp_path / "out", num_experts=5, expert_init=mine)
    with pytest.raises(UpcyclingError, match="function of your own"):
        verify(tmp_path / "out", progress=False)
