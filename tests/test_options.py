"""Options: defaults, checks, and the record of what was chosen."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator

from fusion_upcycle import expert_init, router_init
from fusion_upcycle.checks import parse_dtype
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import Expert
from fusion_upcycle.upcycling.options import UpcyclingOptions, make_options


def negate(expert: Expert, generator: Generator, *, sign: float = -1.0) -> Expert:
    """A user's own initialiser."""
    return expert.map(lambda weight: weight * sign)


def test_the_defaults_are_four_exact_copies_of_which_two_are_used() -> None:
    options = UpcyclingOptions()
    assert (options.num_experts, options.experts_per_token) == (4, 2)
    assert options.expert_initialiser(3) is expert_init.copy
    assert options.preserves_function


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_experts": 1}, "num_experts=1"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": -4}, "num_experts=-4"),
        ({"num_experts": 2.0}, "num_experts=2.0"),
        ({"num_experts": "4"}, "num_experts='4'"),
        ({"num_experts": True}, "num_experts=True"),
        ({"num_experts": 2**17}, "num_experts=131072"),
        ({"experts_per_token": 0}, "experts_per_token=0"),
        ({"experts_per_token": 5}, "num_experts=4"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": None}, "seed=None"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": torch.int8}, "dtype 'int8'"),
        ({"ignore_config_fields": "field"}, r"'field' must be \[FIELD, ...\]"),
        ({"expert_init": {"noise_std": 0.1}}, "'name'"),
        ({"expert_init": {"name": "noise", "noise_std": "large"}}, "noise_std"),
        ({"expert_init": {"name": "noise", "noise_std": None}}, "noise_std"),
        ({"expert_init": {"name": "drop", "drop_ratio": "half"}}, "drop_ratio"),
        ({"expert_init": {"name": "drop", "paired": "no"}}, "paired"),
        ({"router_init": {"name": "normal", "std": "small"}}, "std"),
        ({"router_init": {"name": "normal", "std": 0}}, "router_init=.zeros"),
        ({"granularity": 0}, "granularity=0"),
        ({"granularity": 3}, "granularity=3.*divide num_experts=4"),
        ({"expert_intermediate_size": 0}, "expert_intermediate_size=0.*1 or more"),
        ({"shared_expert_intermediate_size": 2.5}, "shared_expert_intermediate_size=2.5"),
        ({"normalize_topk_prob": "false"}, "normalize_topk_prob='false'"),
        ({"expert_init": {"name": "subset", "index": 1}}, "index"),
        ({"expert_init": {"name": "noise", 5: 1}}, "'5'"),
        ({"expert_init": None}, "expert_init=None must be a name"),
        ({"expert_init": ["noise"]}, "must be a name"),
        ({"router_init": 5}, "router_init=5"),
        ({"moe_layers": 5}, "moe_layers=5 must be all"),
        ({"moe_layers": None}, "moe_layers=None"),
        ({"moe_layers": [True]}, r"moe_layers=\[True\]"),
        ({"moe_layers": [0, "a"]}, "moe_layers"),
        ({"moe_layers": {0: 1}}, "moe_layers"),
        ({"ignore_config_fields": None}, "ignore_config_fields=None"),
        ({"ignore_config_fields": [5]}, r"ignore_config_fields=\[5\]"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UpcyclingError, match=named):
        make_options(**options)


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"num_expert": 4}, "num_experts"),
        ({"top_k": 4}, "experts_per_token"),
        ({"expert_init": "nois"}, "noise"),
        ({"router_init": "zero"}, "zeros"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"expert_init": {"name": "noise", "std": 0.1}}, "noise_std"),
        ({"expert_init": {"name": "copy", "std": 0.1}}, "none"),
    ],
    ids=str,
)
def test_an_unknown_name_is_answered_with_the_known_ones(
    options: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(UpcyclingError, match=nearest):
        make_options(**options)


def test_an_initialiser_is_named_with_options() -> None:
    options = make_options(expert_init={"name": "noise", "noise_std": 0.5})
    expert = Expert(torch.eye(8), torch.eye(8), torch.eye(8))
    generator = torch.Generator().manual_seed(0)
    expected = expert_init.noise(expert, torch.Generator().manual_seed(0), noise_std=0.5)
    made = options.expert_initialiser(0)(expert, generator)
    assert torch.equal(made.up_proj_FD, expected.up_proj_FD)


def test_a_function_of_ones_own_is_used() -> None:
    options = make_options(expert_init=partial(negate, sign=-2.0))
    expert = Expert(torch.eye(4), torch.eye(4), torch.eye(4))
    made = options.expert_initialiser(0)(expert, torch.Generator())
    assert torch.equal(made.down_proj_DF, -2 * torch.eye(4))
    assert not options.preserves_function


def test_a_function_without_a_signature_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="Python function"):
        make_options(expert_init=torch.zeros)


def test_a_function_that_changes_the_shape_is_refused_at_once() -> None:
    def halve(expert: Expert, generator: Generator) -> Expert:
        return expert.map(lambda weight: weight[:2])

    with pytest.raises(UpcyclingError, match="source's shapes"):
        make_options(expert_init=halve)


def test_a_function_that_returns_no_expert_is_refused_at_once() -> None:
    with pytest.raises(UpcyclingError, match="Expert"):
        make_options(expert_init=lambda expert, generator: None)


def test_a_function_that_writes_to_its_source_is_refused_at_once() -> None:
    """In a conversion the source is a read-only file map: writing to it kills the process."""

    def scribble(expert: Expert, generator: Generator) -> Expert:
        expert.gate_proj_FD.add_(1.0)
        return expert

    with pytest.raises(UpcyclingError, match="expert_init"):
        make_options(expert_init=scribble)


def test_a_router_function_that_returns_no_row_is_refused_at_once() -> None:
    with pytest.raises(UpcyclingError, match="hidden_size"):
        make_options(router_init=lambda size, generator: torch.zeros(size, 2))


@pytest.mark.parametrize(
    ("init", "preserves"),
    [("copy", True), ("permute", True), ("noise", False), ("drop", False), (negate, False)],
)
def test_only_known_initialisers_claim_to_preserve_the_function(init: Any, preserves: bool) -> None:
    assert make_options(expert_init=init).preserves_function is preserves


def test_zero_router_is_recognised() -> None:
    assert make_options(router_init="zeros").zero_router
    assert make_options(router_init=router_init.zeros).zero_router
    assert not make_options().zero_router


def test_the_record_holds_every_option_with_its_default() -> None:
    options = make_options(expert_init="drop", dtype="torch.bfloat16", ignore_config_fields=["a"])
    assert options.to_json() == {
        "target": "auto",
        "shared_expert": "auto",
        "num_experts": 4,
        "experts_per_token": 2,
        "granularity": 1,
        "expert_intermediate_size": None,
        "moe_layers": "all",
        "routing": "token_choice",
        "router_scores": "auto",
        "capacity_factor": 2.0,
        "routing_group": "batch",
        "normalize_topk_prob": True,
        "shared_expert_intermediate_size": None,
        "expert_init": {"name": "drop", "drop_ratio": 0.5, "paired": True},
        "router_init": {"name": "normal", "logit_std": 1.0, "std": None},
        "dtype": "bfloat16",
        "seed": 0,
        "ignore_config_fields": ["a"],
        "part": "whole",
    }


def test_the_record_makes_the_same_options_again() -> None:
    options = make_options(expert_init={"name": "noise", "noise_std": 0.5}, seed=3)
    assert make_options(**options.to_json()).to_json() == options.to_json()


def test_the_record_names_a_function_of_ones_own() -> None:
    described = make_options(expert_init=negate).to_json()["expert_init"]
    assert described == {"name": f"{__name__}.negate", "sign": -1.0}


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_has_several_spellings(spelling: str | torch.dtype) -> None:
    assert parse_dtype(spelling) is torch.bfloat16


def test_no_dtype_means_that_of_the_source() -> None:
    assert parse_dtype(None) is None
