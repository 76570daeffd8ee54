"""Fine-grained experts: what is cut from the FFN, what it computes, and what is claimed of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert
from tiny import assert_same_bits, dense_folder, dense_model, load, logits_of, tensors_of

from fusion_upcycle import SparseUpcyclingAlgorithm, UpcyclingOptions, upcycle
from fusion_upcycle.architectures import ARCHITECTURES, OWN, architecture_for
from fusion_upcycle.architectures.layout import empty_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.upcycling.run import plan_model
from fusion_upcycle.upcycling.shards import Sharding

QWEN2_SHARDS = {"expert_init": "qwen2", "expert_intermediate_size": 20}
F48 = {"qwen3": {"head_dim": 8}}


def test_shuffled_copies_use_every_neuron_equally_often() -> None:
    sharding = Sharding(24, 10, 12, shuffled=True)  # 120 neurons: five copies of 24
    drawn = torch.cat([torch.as_tensor(sharding.neurons(0, 2, e)) for e in range(12)])
    assert torch.equal(torch.bincount(drawn), torch.full((24,), 5))
    assert torch.equal(drawn[:24].sort().values, torch.arange(24))
    assert not torch.equal(drawn[:24], drawn[24:48])
    other_layer = torch.as_tensor(sharding.neurons(0, 3, 0))
    assert not torch.equal(drawn[:10], other_layer)


#: options -> whether the result is claimed, and proven, to be exact
GRANULAR: list[tuple[str, str, dict[str, Any], bool]] = [
    ("llama", "mixtral", {"granularity": 2, "experts_per_token": 2}, True),
    ("llama", "mixtral", {"granularity": 4, "num_experts": 8, "experts_per_token": 4}, True),
    ("llama", "mixtral", {"granularity": 2, "num_experts": 8, "experts_per_token": 4}, True),
    ("llama", "mixtral", {"expert_intermediate_size": 24}, True),
    ("llama", "mixtral", {"granularity": 2, "expert_init": "permute"}, True),
    ("llama", "mixtral", {"granularity": 2, "experts_per_token": 3}, False),
    ("llama", "mixtral", {"granularity": 2, "router_init": "zeros"}, False),
    ("llama", "mixtral", {"granularity": 2, "expert_init": "noise"}, False),
    ("llama", "mixtral", {"expert_init": "subset"}, False),
    ("llama", "mixtral", {"expert_init": "qwen2", "expert_intermediate_size": 20}, False),
    ("granite", "granitemoe", {"granularity": 2}, True),
    ("granite", "granitemoe", {"granularity": 2, "expert_init": "noise"}, False),
    ("olmo2", "flex_olmo", {"granularity": 2}, True),
    ("qwen2", "qwen2_moe", {"granularity": 4, "experts_per_token": 4}, True),
    ("qwen2", "qwen2_moe", {"shared_expert_intermediate_size": 60, "granularity": 2}, True),
    ("qwen2", "qwen2_moe", {"shared_expert": "zero", "shared_expert_intermediate_size": 20}, True),
    (
        "qwen2",
        "qwen2_moe",
        {
            "expert_init": "qwen2",
            "expert_intermediate_size": 20,
            "shared_expert_intermediate_size": 60,
        },
        False,
    ),
    ("qwen3", "glm4_moe", {"granularity": 2, "shared_expert": "copy"}, True),
    (
        "qwen3",
        "glm4_moe",
        {"granularity": 2, "shared_expert": "copy", "shared_expert_intermediate_size": 72},
        True,
    ),
    ("ernie4_5", "ernie4_5_moe", {"granularity": 2, "shared_expert": "copy"}, True),
    # without renormalisation: exact with a zero router, or with all experts
    ("qwen3", "qwen3_moe", {"normalize_topk_prob": False}, False),
    ("qwen3", "qwen3_moe", {"normalize_topk_prob": False, "router_init": "zeros"}, True),
    ("qwen3", "qwen3_moe", {"normalize_topk_prob": False, "experts_per_token": 4}, True),
    ("qwen3", "glm4_moe", {"normalize_topk_prob": False, "router_init": "zeros"}, True),
    ("qwen3", "glm4_moe", {"normalize_topk_prob": False, "experts_per_token": 4}, False),
    ("olmo2", "flex_olmo", {"normalize_topk_prob": False, "router_init": "zeros"}, True),
    # some layers stay dense
    ("qwen2", "qwen2_moe", {"moe_layers": "last_1"}, True),
    ("qwen3", "qwen3_moe", {"moe_layers": [0], "granularity": 2}, True),
    ("qwen3", "glm4_moe", {"moe_layers": "last_1", "shared_expert": "zero"}, True),
    ("youtu", "deepseek_v3", {"moe_layers": [1]}, True),
    ("ernie4_5", "ernie4_5_moe", {"moe_layers": "every_2"}, True),
    ("lfm2", "lfm2_moe", {"moe_layers": "last_1"}, True),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {"granularity": 2, "shared_expert": "zero"}, True),
]


@pytest.mark.parametrize(("family", "target", "options", "exact"), GRANULAR, ids=str)
def test_what_is_claimed_holds(
    family: str, target: str, options: dict[str, Any], exact: bool, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", family, **F48.get(family, {}))
    options = options | {"target": target}
    converted = upcycle(source, tmp_path / "moe", progress=False, **options)
    assert converted.proof.claim == ("exact" if exact else "approximate")
    reference, moe = logits_of(load(source)), load(tmp_path / "moe")
    difference = (logits_of(moe) - reference).abs().max() / reference.abs().max()
    # A rule that says approximate is not exact by chance either: else it claims too little.
    # (A zero router may happen to take whole groups, which nobody promises.)
    if exact or options.get("router_init") != "zeros":
        assert (difference <= 1e-4) == exact
    options = {"num_experts": 4, "experts_per_token": 2, "verify": "none"} | options
    live = SparseUpcyclingAlgorithm(**options)
    assert_same_bits(live.run(load(source)).state_dict(), moe.state_dict())


def test_a_group_shares_its_router_row(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    convert(source, tmp_path / "moe", num_experts=8, granularity=4)
    router = tensors_of(tmp_path / "moe")["model.layers.1.block_sparse_moe.gate.weight"]
    assert len(router.unique(dim=0)) == 2
    assert torch.equal(router[0], router[3])
    assert not torch.equal(router[3], router[4])


def test_dense_layers_keep_their_tensors(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "qwen3", head_dim=8)
    convert(source, tmp_path / "moe", moe_layers="last_1", granularity=2)
    before, after = tensors_of(source), tensors_of(tmp_path / "moe")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name], after[name])
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in after


#: Scales that bfloat16 rounds: 3, 1/3, 1.5, 2/3.
ROUNDED: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"num_experts": 6, "experts_per_token": 3, "granularity": 3}),
    ("qwen2", {"shared_expert_intermediate_size": 144}),
    ("qwen2", {"shared_expert_intermediate_size": 120}),
    ("qwen2", {"num_experts": 6, "normalize_topk_prob": False, "router_init": "zeros"}),
    (
        "qwen3",
        {
            "target": "glm4_moe",
            "experts_per_token": 3,
            "normalize_topk_prob": False,
            "router_init": "zeros",
        },
    ),
    (
        "qwen2",
        {"num_experts": 6, "experts_per_token": 3, "granularity": 3, "expert_init": "noise"},
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "options"), ROUNDED, ids=str)
def test_scales_that_half_precision_rounds_are_proven_before_that(
    family: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", family, dtype=dtype, **F48.get(family, {}))
    proof = upcycle(source, tmp_path / "moe", progress=False, **options).proof
    if "expert_init" in options:
        assert proof.claim == "approximate"
        return
    assert proof.holds and proof.details["rounded"]
    assert "rounding of scaled weights" in str(proof)
    assert proof.function is not None
    assert 1e-5 < proof.function["max_abs"] / proof.function["scale"] < 0.03


def test_a_scale_of_a_power_of_two_is_not_called_rounded(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "qwen2", dtype=torch.bfloat16)
    options = {"granularity": 2, "shared_expert_intermediate_size": 96, "progress": False}
    assert upcycle(source, tmp_path / "moe", **options).proof.details["rounded"] is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_live_model_in_half_precision_is_proven_in_a_wider_dtype(dtype: str) -> None:
    dense = dense_model("llama", dtype=torch.bfloat16)
    moe = SparseUpcyclingAlgorithm(4, 2, dtype=dtype).run(dense)
    assert moe is not None and str(moe.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_experts": 8, "expert_init": "subset"}, "float16 cannot hold"),
        ({"expert_init": {"name": "noise", "noise_std": 1e300}}, "float16 cannot hold"),
        (
            {
                "target": "qwen2_moe",
                "num_experts": 16,
                "normalize_topk_prob": False,
                "router_init": "zeros",
                "shared_expert": "zero",
            },
            "times 8, the exactness scale",
        ),
    ],
    ids=str,
)
def test_values_beyond_the_dtype_are_refused(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    dense = dense_model("llama", dtype=torch.float16)
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight[0, 0] = 3e4
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(UpcyclingError, match=match):
        upcycle(tmp_path / "dense", tmp_path / "moe", verify="none", progress=False, **options)


def test_a_model_that_is_not_finite_is_not_proven(tmp_path: Path) -> None:
    dense = dense_model("llama")
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    dense.save_pretrained(tmp_path / "dense")
    for expert_init in ("copy", "drop"):
        with pytest.raises(UpcyclingError, match=r"w2\.weight .* has a value that is not"):
            upcycle(tmp_path / "dense", tmp_path / "moe", expert_init=expert_init, progress=False)


@pytest.mark.parametrize(
    ("asked", "layers"),
    [("all", range(6)), ("every_2", [1, 3, 5]), ("every_3", [2, 5]), ("last_2", [4, 5])],
)
def test_which_layers_a_spelling_means(asked: str, layers: Sequence[int]) -> None:
    dense = dense_model("qwen3", head_dim=8, num_hidden_layers=6)
    options = UpcyclingOptions(moe_layers=asked)
    assert list(plan_model(dense, options).plan.source_experts) == list(layers)


@pytest.mark.parametrize("options", [{}, {"expert_init": "noise"}, QWEN2_SHARDS], ids=str)
def test_every_layer_expert_and_seed_has_draws_of_its_own(options: dict[str, Any]) -> None:
    dense = dense_model("qwen3", head_dim=8)
    seen = []
    for seed in (0, 1):
        plan = plan_model(dense, UpcyclingOptions(seed=seed, **options))
        for layer in (0, 1):
            at = f"model.layers.{layer}.mlp."
            seen += list(plan.tensor(f"{at}gate.weight"))
            if options:
                parts = (plan.tensor(f"{at}experts.{e}.up_proj.weight") for e in range(4))
                seen += [part.sum(1)[:16].repeat(2) for part in parts]
    rows = torch.stack(seen)
    assert len(rows.unique(dim=0)) == len(rows)


def test_parameters_are_those_of_transformers() -> None:
    dense = dense_model("qwen3", head_dim=8)
    plan = plan_model(dense, UpcyclingOptions(moe_layers="last_1", granularity=2))
    model = empty_model(plan.config)
    assert plan.parameters["total"] == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert plan.parameters["active"] == plan.parameters["total"] - experts // 2


@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        ("llama", {"granularity": 64, "num_experts": 64}, "48 neurons: granularity=64"),
        ("llama", {"granularity": 5, "num_experts": 5}, "48 neurons: granularity=5"),
        ("llama", {"granularity": 2, "expert_intermediate_size": 16}, "granularity=2"),
        ("llama", {"expert_intermediate_size": 20}, 'expert_init="qwen2"'),
        ("llama", {"expert_intermediate_size": 8}, "num_experts=4 must be a multiple of 6"),
        (
            "llama",
            {"granularity": 2, "expert_init": "qwen2"},
            "leave granularity at 1",
        ),
        (
            "llama",
            {"expert_init": "qwen2", "expert_intermediate_size": 18},
            "rows of 72 bytes.*multiple of 4",
        ),
        ("llama", {"normalize_topk_prob": False}, "mixtral always divides"),
        ("llama", {"moe_layers": "last_1"}, "mixtral makes every layer an MoE"),
        ("llama", {"moe_layers": "every_2", "target": "glm4_moe"}, None),
        ("llama", {"moe_layers": [0], "target": "glm4_moe"}, "glm4_moe cannot say these"),
        ("qwen3", {"moe_layers": "first_1"}, "must be all, every_N"),
        ("qwen3", {"moe_layers": "last_3"}, "2 layers only"),
        ("qwen3", {"moe_layers": [2]}, "layers 0 to 1"),
        ("qwen3", {"moe_layers": [0, 0]}, "each once"),
        ("qwen3", {"moe_layers": []}, "must name layers, and names none"),
        ("llama", {"shared_expert_intermediate_size": 60}, "there is no shared expert"),
        ("qwen2", {"shared_expert_intermediate_size": 20}, "no room for a copy.*48 neurons"),
        (
            "qwen2",
            {
                "target": "glm4_moe",
                "shared_expert": "copy",
                "shared_expert_intermediate_size": 60,
            },
            "60 is no multiple",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(
    family: str, options: dict[str, Any], match: str | None
) -> None:
    dense = dense_model(family, **F48.get(family, {}))
    algorithm = SparseUpcyclingAlgorithm(
        **{
            "num_experts": 4,
            "experts_per_token": 2,
            "verify": "none",
            "target": architecture_for(family).name,
        }
        | options
    )
    if match is None:
        assert algorithm.run(dense) is not None
        return
    with pytest.raises(UpcyclingError, match=match):
        algorithm.run(dense)


def test_every_family_that_can_keep_layers_dense_is_tried() -> None:
    families = ARCHITECTURES.without(OWN)  # of which test_sparse_routing.py has more
    able = {name for name, family in families.items() if family.moe_layer_fields}
    assert able == {target for _, target, options, _ in GRANULAR if "moe_layers" in options}
