"""The duplication plan, and the one source of randomness."""

import itertools
import json
from typing import Any

import pytest
import torch

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import DuplicationPlan, generator_for


def test_a_large_moe_has_no_two_experts_with_the_same_seed() -> None:
    seeds = {
        generator_for(0, layer, expert, "expert").initial_seed()
        for layer, expert in itertools.product(range(256), range(512))
    }
    assert len(seeds) == 256 * 512


def test_a_large_moe_has_no_two_experts_with_the_same_first_draws() -> None:
    # initial_seed() shows what was asked for; only draws show what torch kept of it.
    draws = {
        torch.rand(3, dtype=torch.float64, generator=generator_for(0, layer, expert, "e"))
        .numpy()
        .tobytes()
        for layer, expert in itertools.product(range(0, 256, 8), range(0, 512, 4))
    }
    assert len(draws) == 32 * 128


@pytest.mark.parametrize("other", [(1, 2, 3, "expert"), (0, 2, 3, "router"), (0, 3, 2, "expert")])
def test_seed_role_layer_and_expert_each_change_the_draws(other: tuple[int, int, int, str]) -> None:
    draw = torch.randn(64, generator=generator_for(0, 2, 3, "expert"))
    assert not torch.isclose(draw, torch.randn(64, generator=generator_for(*other))).any()


def test_draws_of_neighbours_are_uncorrelated() -> None:
    rows = [torch.randn(4000, generator=generator_for(0, 0, e, "expert")) for e in range(16)]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4000**0.5


def test_draws_do_not_depend_on_the_order_of_conversion() -> None:
    places = list(itertools.product(range(3), range(4)))

    def draw(layer: int, expert: int) -> list[float]:
        return torch.randn(5, generator=generator_for(7, layer, expert, "expert")).tolist()

    forward = {place: draw(*place) for place in places}
    assert {place: draw(*place) for place in reversed(places)} == forward


def test_a_dense_plan_copies_the_only_expert_everywhere() -> None:
    plan = DuplicationPlan.from_dense([0, 2], num_experts=4)
    assert plan.source_experts == {0: (0, 0, 0, 0), 2: (0, 0, 0, 0)}


def test_a_plan_as_json_names_layers_as_text() -> None:
    assert DuplicationPlan({0: (0, 1), 5: (1, 1)}).to_json() == {"0": [0, 1], "5": [1, 1]}


def test_a_plan_comes_back_from_json() -> None:
    plan = DuplicationPlan({0: (0, 1, 0), 5: (0, 1, 1)})
    assert DuplicationPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("data", [None, {"a": [0]}, {"0": 3}, {"0": [-1]}, {"0": ["x"]}], ids=str)
def test_a_damaged_plan_is_refused(data: Any) -> None:
    with pytest.raises(UpcyclingError, match=r"plan.* is damaged"):
        DuplicationPlan.from_json(data)


def test_each_expert_knows_which_copy_it_is() -> None:
    assert DuplicationPlan({0: (0, 1, 1, 0, 1)}).copy_index(0) == (0, 0, 1, 1, 2)


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ({0: (0, 1)}, r"of layers \[0\].*MoE layers are \[0, 2\]"),
        ({0: (0, 1), 2: (0, 1, 1)}, r"different sizes \(\[2, 3\] experts\)"),
        ({0: (1, 0, 0), 2: (0, 1, 1)}, "layer 0 is .* must begin with the source's experts"),
        ({0: (0, 1, 2), 2: (0, 1, 1)}, "layer 0 is"),
        ({0: (0,), 2: (0,)}, "layer 0 is"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_expand_the_model_is_refused(
    plan: dict[int, tuple[int, ...]], match: str
) -> None:
    with pytest.raises(UpcyclingError, match=match):
        DuplicationPlan(plan).check_expansion([0, 2], 2)
