"""Which experts are duplicated: properties of every selection, and the rule of each."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.selection import NEEDS_SCORES, SELECTIONS, select

score = st.one_of(st.just(0.0), st.floats(1e-30, 1e30))


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[int, list[float]], int, dict[str, Any]]:
    """Scores of one to three layers, M, and options that can be met."""
    experts = draw(st.integers(1, 9))
    layers = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True))
    scores = {layer: draw(st.lists(score, min_size=experts, max_size=experts)) for layer in layers}
    max_copies = draw(st.integers(1, 4))
    options = {
        "selection": draw(st.sampled_from(sorted(SELECTIONS))),
        "max_copies": max_copies,
        "seed": draw(st.integers(0, 3)),
    }
    return scores, draw(st.integers(experts, experts * max_copies)), options


@settings(max_examples=200, deadline=None)
@given(requests())
def test_every_plan_keeps_the_originals_first_and_no_expert_beyond_its_places(
    request: tuple[dict[int, list[float]], int, dict[str, Any]],
) -> None:
    scores, total, options = request
    plan = select(scores, total, **options)
    assert plan == select(scores, total, **options)  # deterministic
    assert list(plan.source_experts) == list(scores)
    for layer, experts in plan.source_experts.items():
        count = len(scores[layer])
        assert len(experts) == total
        assert experts[:count] == tuple(range(count))
        assert set(experts) == set(range(count))
        places = Counter(experts).values()
        if options["selection"] == "uniform":
            assert max(places) - min(places) <= 1
        else:
            assert max(places) <= options["max_copies"]
        # Copy group by copy group, each by the index of the source expert.
        groups = list(zip(plan.copy_index(layer), experts, strict=True))
        assert groups == sorted(groups)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_as_many_experts_as_there_are_is_the_identity(selection: str) -> None:
    plan = select({3: [0.0, 5.0, 1.0]}, 3, selection=selection)
    assert plan.source_experts == {3: (0, 1, 2)}


def test_uniform_is_round_robin_and_not_capped() -> None:
    plan = select({0: [0.0] * 3}, 11, selection="uniform", max_copies=1)
    assert plan.source_experts == {0: (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1)}


def test_greedy_fills_the_best_expert_first() -> None:
    plan = select({0: [1.0, 9.0, 5.0, 2.0]}, 7, selection="greedy", max_copies=3)
    assert plan.source_experts == {0: (0, 1, 2, 3, 1, 2, 1)}  # two more of 1, one more of 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_the_control_has_the_copy_counts_of_greedy(
    experts: int, max_copies: int, data: st.DataObject
) -> None:
    total = data.draw(st.integers(experts, experts * max_copies))
    greedy, control = (
        select({0: [float(i) for i in range(experts)]}, total, selection=s, max_copies=max_copies)
        for s in ("greedy", "control")
    )
    counts = [sorted(Counter(p.source_experts[0]).values()) for p in (greedy, control)]
    assert counts[0] == counts[1]


def test_the_control_copies_all_experts_alike() -> None:
    plan = select({layer: [0.0, 9.0, 1.0] for layer in range(900)}, 5, selection="control")
    found = Counter(experts[3] for experts in plan.source_experts.values())
    assert all(abs(found[expert] / 900 - 1 / 3) < 0.06 for expert in range(3))


def test_random_draws_all_experts_alike() -> None:
    plan = select({layer: [1.0, 3.0] for layer in range(600)}, 3, selection="random")
    share_of_the_second = sum(experts[2] for experts in plan.source_experts.values()) / 600
    assert abs(share_of_the_second - 0.5) < 0.07


def test_the_seed_and_the_layer_change_the_draws() -> None:
    scores = {layer: [1.0] * 8 for layer in range(4)}
    first, other = (select(scores, 12, selection="random", seed=seed) for seed in (0, 1))
    assert first != other
    assert len(set(first.source_experts.values())) > 1
    alone = select({2: [1.0] * 8}, 12, selection="random")
    assert alone.source_experts[2] == first.source_experts[2]


def test_scores_may_be_tensors() -> None:
    plan = select({0: torch.tensor([1.0, 2.0])}, 3, selection="greedy")
    assert plan.source_experts == {0: (0, 1, 1)}


@pytest.mark.parametrize(
    ("total", "options", "match"),
    [
        (2, {}, "num_experts=2 is less than the 3 experts that layer 5 has"),
        (10, {"selection": "greedy"}, r"max_copies=3 = 9. Pass max_copies=4 or more"),
        (10, {"selection": "random"}, 'or choose selection="uniform"'),
        (4, {"selection": "gready"}, "Did you mean 'greedy'"),
        (4, {"selection": "greedy", "max_copies": 0}, "max_copies=0"),
        (4, {"selection": "greedy", "max_copies": "3"}, "max_copies='3'"),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_refused_by_name(
    total: int, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(UpcyclingError, match=match):
        select({5: [1.0, 2.0, 3.0]}, total, **options)


@pytest.mark.parametrize("selection", sorted(NEEDS_SCORES))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_no_scores_are_refused(selection: str, value: float) -> None:
    with pytest.raises(UpcyclingError, match="scores of layer 0"):
        select({0: [1.0, value]}, 3, selection=selection)
