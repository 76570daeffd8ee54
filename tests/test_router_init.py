"""Router initialisers: one row for each expert."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert
from omegaconf import OmegaConf
from test_plugin import compose
from tiny import assert_same_bits, dense_folder, dense_model, edit_tensors, load, tensors_of
from torch import Generator, Tensor

from fusion_upcycle import UpcyclingOptions
from fusion_upcycle.architectures import ARCHITECTURES, OWN
from fusion_upcycle.checks import describe, make_initialiser
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.recipes import RECIPES, recipe_options
from fusion_upcycle.live.routers import find_routers, hearing_inputs
from fusion_upcycle.options import config_tree
from fusion_upcycle.router_init import LOGIT_STD, ROUTER_INITS, normal, with_default, zeros
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_folder, plan_model
from fusion_upcycle.verify import verify


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_normal_rows_have_the_given_std_and_mean_zero(std: float) -> None:
    row = normal(40_000, generator(), std=std)
    assert row.std() == pytest.approx(std, rel=0.02)
    assert abs(row.mean()) < 5 * std / 200


def test_rows_of_a_given_std_are_the_draws_of_the_generator_times_it() -> None:
    """Whatever the inputs, and as in every version so far."""
    expected = torch.randn(64, generator=generator(3)) * 0.02
    assert torch.equal(normal(64, generator(3), std=0.02, input_rms=7.0), expected)


def test_normal_has_the_documented_default() -> None:
    assert torch.equal(normal(64, generator()), normal(64, generator(), logit_std=LOGIT_STD))
    yaml = (config_tree() / "method" / "router_init" / "normal.yaml").read_text("utf-8")
    assert f"null is {LOGIT_STD}, unless std is given" in yaml


@pytest.mark.parametrize("input_rms", [1.0, 0.05, 30.0])
@pytest.mark.parametrize("logit_std", [0.3, 5.0])
def test_normal_gives_inputs_of_that_size_logits_of_that_std(
    logit_std: float, input_rms: float
) -> None:
    inputs = torch.randn(2000, 256, generator=generator(1)) * input_rms
    options = {"logit_std": logit_std, "input_rms": input_rms}
    rows = torch.stack([normal(256, generator(seed), **options) for seed in range(32)])
    assert (inputs @ rows.T).std() == pytest.approx(logit_std, rel=0.05)


def test_normal_rows_are_repeatable_and_differ_between_generators() -> None:
    assert torch.equal(normal(64, generator(1)), normal(64, generator(1)))
    assert not torch.equal(normal(64, generator(1)), normal(64, generator(2)))


@pytest.mark.parametrize("name", ["std", "logit_std"])
@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_normal_refuses_a_std_that_is_not_a_size(name: str, size: Any) -> None:
    with pytest.raises(UpcyclingError, match=f"router {name}=.*router_init=.zeros"):
        normal(8, generator(), **{name: size})


def test_normal_refuses_both_sizes() -> None:
    with pytest.raises(UpcyclingError, match=r"logit_std=1.0 and std=0.02 .*one of the two"):
        make_options(router_init={"name": "normal", "logit_std": 1.0, "std": 0.02})


@pytest.mark.parametrize("input_rms", [0.0, float("nan"), float("inf")])
def test_inputs_without_a_size_need_the_rows_own_std(input_rms: float) -> None:
    with pytest.raises(UpcyclingError, match="give the rows' own std"):
        normal(8, generator(), input_rms=input_rms)
    assert normal(8, generator(), std=0.1, input_rms=input_rms).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "recorded"),
    [
        ("normal", {"logit_std": LOGIT_STD, "std": None}),
        ({"name": "normal", "logit_std": None, "std": None}, {"logit_std": LOGIT_STD, "std": None}),
        ({"name": "normal", "logit_std": 3.0}, {"logit_std": 3.0, "std": None}),
        ({"name": "normal", "std": 0.02}, {"logit_std": None, "std": 0.02}),
    ],
    ids=str,
)
def test_a_record_says_the_size_that_was_used(spec: Any, recorded: dict[str, Any]) -> None:
    """`input_rms` is no option: it is the source's."""
    made = with_default(make_initialiser(spec, ROUTER_INITS, "router_init"))
    assert describe(made, ROUTER_INITS) == {"name": "normal", **recorded}
    again = make_options(**make_options(router_init=spec).to_json())
    assert again.to_json()["router_init"] == {"name": "normal", **recorded}
    with pytest.raises(UpcyclingError, match="Unknown option of router_init normal: 'input_rms'"):
        make_options(router_init={"name": "normal", "input_rms": 1.0})


def test_zeros_are_zeros() -> None:
    row = zeros(33, generator())
    assert row.shape == (33,)
    assert not row.any()


@pytest.mark.parametrize("init", [normal, zeros])
def test_rows_are_float32_of_the_hidden_size(init: object) -> None:
    row = init(33, generator())  # type: ignore[operator]
    assert (row.dtype, row.shape) == (torch.float32, (33,))


# --- in a conversion --------------------------------------------------------------------------

FAMILIES = ARCHITECTURES.without(OWN)  # of which test_sparse.py has every row
PAIRS = [(dense, target) for target, found in FAMILIES.items() for dense in found.dense]
#: Dense families without a norm before the FFN.
NO_NORM = {"olmo2", "olmo3"}


@pytest.mark.parametrize(("dense", "target"), PAIRS, ids=str)
def test_the_logits_at_step_0_have_the_asked_for_std_in_every_family(
    dense: str, target: str, tmp_path: Path
) -> None:
    """By transformers' own forward pass; the tiny models' norms are random, far from 1."""
    options: dict[str, Any] = {"target": target, "num_experts": 64, "experts_per_token": 2}
    model = dense_model(dense)
    router = {"name": "normal", "logit_std": 2.0}
    made, *_ = to_model(
        plan_model(model, make_options(router_init=router, **options)), model, verify="none"
    )
    routers, inputs = find_routers(made), dict[int, Tensor]()
    ids = torch.randint(67, (8, 32), generator=generator(1))
    with torch.no_grad(), hearing_inputs(routers.modules, inputs.__setitem__):
        made.eval()(ids, use_cache=False)
    assert len(inputs) == 2
    for layer, x_ND in inputs.items():
        weight_ED = routers.weight(layer).detach()
        size = x_ND.square().mean().sqrt() if dense in NO_NORM else 1.0
        assert (x_ND @ weight_ED.T).std() == pytest.approx(2.0 * float(size), rel=0.15), layer


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "qwen3_5_text"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_rows_are_the_same_bits_streamed_in_memory_and_when_verified(
    family: str, dtype: str | None, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", family)
    made = convert(source, tmp_path / "moe", dtype=dtype)
    options = UpcyclingOptions(**{**made.record["options"], "dtype": dtype})
    streamed = plan_folder(source, options)
    live = plan_model(load(source, **({"dtype": torch.bfloat16} if dtype else {})), options)
    files = tensors_of(tmp_path / "moe")
    names = [name for name in files if "gate.weight" in name]
    assert names
    for plan in (streamed, live):
        assert_same_bits({n: plan.tensor(n) for n in names}, {n: files[n] for n in names})
    verify(tmp_path / "moe", progress=False)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_norm_without_a_size_is_refused_by_name(value: float, tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    source = dense_folder(tmp_path / "dense")
    edit_tensors(source, lambda tensors: tensors[name].fill_(value))
    with pytest.raises(UpcyclingError, match=f"Router of layer 1, behind {name}: .*own std"):
        convert(source, tmp_path / "moe", verify="none")
    assert not (tmp_path / "moe").exists()
    for router in ({"name": "normal", "std": 0.1}, "zeros"):  # which do not ask for it
        options = UpcyclingOptions(router_init=router)
        row = plan_folder(source, options).tensor("model.layers.1.block_sparse_moe.gate.weight")
        assert row.isfinite().all()


def test_a_family_whose_norm_has_another_name_is_refused_when_planned(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    edit_tensors(source, lambda t: t.pop("model.layers.0.post_attention_layernorm.weight"))
    with pytest.raises(UpcyclingError, match=r"lacks .*layers\.0.*the norm before the router"):
        plan_folder(source, UpcyclingOptions())


def plain(hidden_size: int, generator: Generator) -> Tensor:
    return torch.arange(hidden_size, dtype=torch.float32)


def sized(hidden_size: int, generator: Generator, *, input_rms: float) -> Tensor:
    return torch.full((hidden_size,), input_rms)


def test_an_initialiser_of_ones_own_is_told_the_size_if_it_asks(tmp_path: Path) -> None:
    model, name = dense_model(), "model.layers.0.block_sparse_moe.gate.weight"
    row = plan_model(model, make_options(router_init=plain)).tensor(name)[0]
    assert torch.equal(row, torch.arange(32, dtype=torch.float32))
    row = plan_model(model, make_options(router_init=sized)).tensor(name)[0]
    weight = model.model.layers[0].post_attention_layernorm.weight
    assert row[0].item() == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-6)


# --- published recipes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_rows_of_std_0_02(name: str) -> None:
    router = make_options(**recipe_options(name)).to_json()["router_init"]
    assert router == {"name": "normal", "logit_std": None, "std": 0.02}


def test_another_router_can_be_chosen_for_a_recipe() -> None:
    method = compose("method=recipes/mixtral_8x7b", "method/router_init=zeros").method
    assert OmegaConf.to_container(method.router_init) == {
        "_target_": "fusion_upcycle.router_init.zeros", "_partial_": True,
    }  # fmt: skip
