"""The published recipes: complete, composable, and counting what was published."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import fusion_bench.scripts.cli  # noqa: F401  (the Hydra plugin looks for it)
import pytest
import torch
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import dense_folder, dense_model
from torch import Tensor
from torch.nn.functional import silu

from fusion_upcycle import SparseUpcyclingAlgorithm
from fusion_upcycle.architectures.layout import empty_model
from fusion_upcycle.architectures.weightless import WeightlessSource
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.recipes import RECIPES, find_recipe, plan_recipe, recipe_options
from fusion_upcycle.upcycling.options import UpcyclingOptions, make_options
from fusion_upcycle.upcycling.plan import plan_upcycling
from fusion_upcycle.upcycling.run import plan_folder, plan_model
from fusion_upcycle.upcycling.upcycling import Upcycling

FOLDER = Path(__file__).resolve().parents[1] / "config" / "method" / "recipes"
every_recipe = pytest.mark.parametrize("name", RECIPES)

#: Published: total and active parameters. Beside the table of the package, on purpose: from the
#: design page, whose sources are mistral.ai/news/mixtral-of-experts, FusionBench's documentation,
#: arXiv 2404.06395, qwenlm.github.io/blog/qwen-moe, arXiv 2407.10671 and arXiv 2406.06563.
PUBLISHED: dict[str, tuple[str | None, str | None]] = {
    "mixtral_8x7b": ("46.7B", "12.9B"),
    "mistral_7b_4_experts": ("24.15B", None),
    "minicpm_moe": ("13.6B", "4B"),  # without embeddings; with them 13.9B and 4.3B
    "qwen1_5_moe_a2_7b": ("14.3B", "2.7B"),
    "qwen2_57b_a14b": ("57B", "14B"),
    "skywork_moe": ("146B", "22B"),  # without embeddings; with them 146B and 23B
    "nemotron_e8g8t8": (None, None),
    "llama_3_e8t2": (None, None),
    "llm_jp_3_8x1_8b": ("9.27B", "2.92B"),  # model card
    "innovator_7b": (None, "13.3B"),  # arXiv 2507.18671; its 53.3B in all come out as 53.2B
    **{f"sparse_upcycling_t5_{size}": (None, None) for size in ("base", "large", "xl")},
    **{f"sparse_upcycling_vit_{size}": (None, None) for size in ("b16", "l16")},
}

#: The paper's own models: parameters of the dense checkpoint as its model card has them; and of the
#: MoE layers of 32 experts, the parameters of an FFN by its shape, and how many there are.
PAPER = {
    "sparse_upcycling_t5_base": (247_577_856, 3 * 768 * 2048, 12),
    "sparse_upcycling_t5_large": (783_150_080, 3 * 1024 * 2816, 24),
    "sparse_upcycling_t5_xl": (2_849_757_184, 3 * 2048 * 5120, 24),
    "sparse_upcycling_vit_b16": (86_567_656, 2 * 768 * 3072 + 768 + 3072, 6),
    "sparse_upcycling_vit_l16": (304_326_632, 2 * 1024 * 4096 + 1024 + 4096, 12),
}


@cache
def planned(name: str) -> Upcycling:
    return plan_recipe(name, make_options(**recipe_options(name)))


def parameters_of_transformers(upcycling: Upcycling) -> tuple[int, int, int]:
    """Total, active and embedding parameters of transformers' own model, on the meta device."""
    model = empty_model(upcycling.config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    if upcycling.config.tie_word_embeddings:
        del sizes["lm_head.weight"]  # the meta device unties it
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    options = upcycling.options
    idle = experts * (options.num_experts - options.experts_per_token) // options.num_experts
    embeddings = sum(
        size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name
    )
    return total, total - idle, embeddings


def to_digits_of(published: str, count: int) -> str:
    """46702792704 as 46.7B, if that is how many digits were published."""
    return f"{count / 1e9:.{len(published.rstrip('B').partition('.')[2])}f}B"


def test_every_recipe_has_its_file_and_every_dense_config_its_recipe() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(RECIPES) == set(PUBLISHED)
    on_disk = {path.parent.name for path in FOLDER.glob("dense/*/config.json")}
    assert on_disk == {recipe.dense for recipe in RECIPES.values()}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_models_count_what_they_must(name: str) -> None:
    """Sparse Upcycling's own: half of the FFNs become 32 experts, of which a token uses two."""
    dense, ffn, layers = PAPER[name]
    counts, plan = planned(name).parameters, planned(name)
    routers = layers * 32 * plan.resolved.hidden_size
    assert counts["dense"] == dense
    assert counts["total"] == dense + 31 * ffn * layers + routers
    assert counts["active"] == dense + ffn * layers + routers
    assert len(plan.plan.source_experts) == layers
    assert (plan.options.routing, plan.options.capacity_factor) == ("expert_choice", 2.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in PAPER])
def test_a_recipe_counts_what_was_published(name: str) -> None:
    total, active, embeddings = parameters_of_transformers(planned(name))
    counts, recipe = planned(name).parameters, RECIPES[name]
    assert (counts["total"], counts["active"]) == (total, active)
    assert (recipe.total, recipe.active) == PUBLISHED[name]
    for published, count in zip(PUBLISHED[name], (total, active), strict=True):
        if published is not None:
            counted = count if recipe.with_embeddings else count - embeddings
            assert to_digits_of(published, counted) == published


@pytest.mark.parametrize(
    ("name", "active"), [("minicpm_moe", "4.3B"), ("skywork_moe", "22.7B")], ids=str
)
def test_two_publishers_left_the_embeddings_out(name: str, active: str) -> None:
    assert not RECIPES[name].with_embeddings
    assert to_digits_of(active, planned(name).parameters["active"]) == active


@every_recipe
def test_a_recipe_is_a_method_of_fusion_bench(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = initialize_hydra_config("fabric_model_fusion", [f"method=recipes/{name}"])
    assert type(instantiate(config.method, _recursive_=False)) is SparseUpcyclingAlgorithm
    own = set(OmegaConf.load(FOLDER / f"{name}.yaml")) - {"defaults"}
    assert own <= set(recipe_options(name))  # nothing that the command line would not see
    for option in own:
        assert getattr(make_options(**recipe_options(name)), option) == config.method[option]


def test_a_recipe_takes_overrides_like_any_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["method=recipes/qwen2_57b_a14b", "method/expert_init=noise", "method.seed=3"]
    method = initialize_hydra_config("fabric_model_fusion", overrides).method
    assert method.expert_init._target_ == "fusion_upcycle.expert_init.noise"
    assert (method.seed, method.num_experts) == (3, 64)


def test_drop_upcycling_s_model_counts_to_the_parameter() -> None:
    """But for embeddings, of which the published count leaves out those of no token."""
    total, active, embeddings = parameters_of_transformers(planned("llm_jp_3_8x1_8b"))
    assert total - embeddings == 8_858_863_616
    idle_rows = 24 * 6 * 2048  # of routers, which the published count leaves out too
    assert active - embeddings - idle_rows == 2_924_279_808 - 407_498_752
    assert planned("llm_jp_3_8x1_8b").options.to_json()["expert_init"]["drop_ratio"] == 0.5


def test_llama_3_has_eight_whole_ffns_of_which_two_are_used() -> None:
    counts, ffn = planned("llama_3_e8t2").parameters, 32 * 3 * 4096 * 14336
    assert counts["dense"] == 8_030_261_248  # as its model card has it
    routers = 32 * 8 * 4096
    assert counts["total"] == counts["dense"] + 7 * ffn + routers
    assert counts["active"] == counts["dense"] + ffn + routers


def test_innovator_cuts_the_ffn_into_eighths_beside_a_shared_one() -> None:
    plan, ffn = planned("innovator_7b"), 28 * 3 * 3584 * 18944
    assert plan.resolved.expert_size * 8 == 18944
    routers = 28 * 3584 * (64 + 1)  # and the gate of the shared expert
    assert plan.parameters["total"] == plan.parameters["dense"] + 8 * ffn + routers
    assert f"{plan.parameters['total'] / 1e9:.1f}" == "53.2"


@every_recipe
def test_a_recipe_is_exact_unless_it_draws_neurons_anew(name: str) -> None:
    drawn = "qwen" in name or name in PAPER or name == "llm_jp_3_8x1_8b"
    assert planned(name).claims_exact == (not drawn)


def test_virtual_groups_hold_one_of_each_shard() -> None:
    resolved = planned("nemotron_e8g8t8").resolved
    assert (resolved.sharding.granularity, resolved.expert_size) == (8, 3072)
    assert resolved.asked.experts_per_token % resolved.sharding.granularity == 0


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    for function in (find_recipe, recipe_options):
        with pytest.raises(UpcyclingError, match="Did you mean 'mixtral_8x7b'"):
            function("mixtral8x7")


# --- shared experts that are wider than the dense FFN -----------------------------------------


@pytest.mark.parametrize(
    ("name", "dense_size", "size"),
    [("qwen1_5_moe_a2_7b", 5504, 5632), ("qwen2_57b_a14b", 18944, 20480)],
)
def test_a_wider_shared_expert_is_the_ffn_and_some_of_its_neurons_again(
    name: str, dense_size: int, size: int
) -> None:
    """At the published widths, with 8 hidden dimensions and one layer."""
    dense = dense_model(
        "qwen2",
        dtype=torch.float64,
        hidden_size=8,
        intermediate_size=dense_size,
        num_hidden_layers=1,
    )
    options: dict[str, Any] = recipe_options(name) | {"dtype": "float64"}
    upcycling = plan_model(dense, make_options(**options))
    tensors = [
        upcycling.tensor(f"model.layers.0.mlp.shared_expert.{part}_proj.weight")
        for part in ("gate", "up", "down")
    ]
    assert [list(t.shape) for t in tensors] == [[size, 8], [size, 8], [8, size]]
    mlp = dense.model.layers[0].mlp
    source = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    extra = size - dense_size
    for made, weight in zip(tensors[:2], source[:2], strict=True):
        assert torch.equal(made, torch.cat([weight, weight[:extra]]))
    halved = source[2][:, :extra] / 2
    assert torch.equal(tensors[2], torch.cat([halved, source[2][:, extra:], halved], dim=1))
    x = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (ffn(x, tensors) - ffn(x, source)).abs().max() <= 1e-12 * ffn(x, source).abs().max()
    # The gate lets half of it through.
    assert not upcycling.tensor("model.layers.0.mlp.shared_expert_gate.weight").any()


def ffn(x: Tensor, weights: list[Tensor]) -> Tensor:
    gate, up, down = weights
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


# --- a source without weights -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "granite"])
def test_a_config_alone_is_planned_like_the_checkpoint(family: str, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path, family, tie_word_embeddings=family == "granite")
    options = UpcyclingOptions(num_experts=3)
    real, config = plan_folder(folder, options), read_config(folder)
    planned = plan_upcycling(WeightlessSource(config), config, options)
    assert planned.specs == real.specs
    assert planned.parameters == real.parameters
    assert planned.total_bytes == real.total_bytes


def test_a_config_alone_cannot_be_converted(tmp_path: Path) -> None:
    config = read_config(dense_folder(tmp_path))
    upcycling = plan_upcycling(WeightlessSource(config), config, UpcyclingOptions())
    for name in upcycling.specs:
        if "gate.weight" not in name:
            with pytest.raises(UpcyclingError, match="LlamaForCausalLM cannot be read"):
                upcycling.tensor(name)
            with pytest.raises(UpcyclingError, match="folder of a checkpoint"):
                list(upcycling.chunks(name))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("dense/*/config.json")), ids=str)
def test_dense_configs_are_small_and_say_their_class_and_dtype(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 1000
    assert config["torch_dtype"] in ("bfloat16", "float32")
    assert len(config["architectures"]) == 1
