"""New router rows that keep the function: groups of tokens, split, fit, and what they do."""

from dataclasses import replace

import pytest
import torch
from tiny import token_ids
from tiny_moe import FAMILIES, moe_folder, moe_model
from torch import Tensor

from fusion_upcycle.architectures.routing import RoutingRule, routing_rule
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.router.fit import fit_rows
from fusion_upcycle.expansion.router.groups import find_groups
from fusion_upcycle.expansion.router.inputs import folder_router_inputs, live_router_inputs
from fusion_upcycle.expansion.router.neutral import lowered, neutral_rows, neutral_rule
from fusion_upcycle.expansion.router.rows import copy_shares, rows_report, weight_error
from fusion_upcycle.expansion.router.split import split_rows
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.texts.windows import Sequences

D, E, N = 24, 4, 2048
RULE = RoutingRule(2)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the fit take as long as the tokens of a batch."""
    monkeypatch.setattr("fusion_upcycle.expansion.router.fit.BATCH_TOKENS", 1024)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden_states(classes: int = 8) -> Tensor:
    """[N, D]: tokens of some classes, as hidden states are: a mean, a class, and the rest."""
    g = generator(3)
    centres = 2 * torch.randn(classes, D, generator=g)
    kind = torch.randint(classes, (N,), generator=g)
    return 1.5 + centres[kind] + torch.randn(N, D, generator=g)


def router(inputs_ND: Tensor) -> Tensor:
    """[E, D], with logits of a trained router's size."""
    weight_ED = torch.randn(E, D, generator=generator(5))
    return weight_ED / (inputs_ND @ weight_ED.T).std(-1).mean()


@pytest.fixture(scope="module")
def inputs_ND() -> Tensor:
    return hidden_states()


@pytest.fixture(scope="module")
def weight_ED(inputs_ND: Tensor) -> Tensor:
    return router(inputs_ND)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_are_equal_and_nearly_two_valued(inputs_ND: Tensor, groups: int) -> None:
    found = find_groups(inputs_ND, groups, generator())
    values_NG = inputs_ND @ found.directions_GD.T
    shares_G = torch.bincount(values_NG.argmax(-1), minlength=groups) / N
    assert (shares_G * groups - 1).abs().max() < 0.1
    # Targets are 1 - 1/G and -1/G: without structure, regression would leave most of the variance.
    assert found.residual < 0.35 * (1 / groups) * (1 - 1 / groups)
    assert (inputs_ND @ found.constant_D - 1).abs().mean() < 0.2


def test_groups_part_the_tokens_of_each_class(inputs_ND: Tensor) -> None:
    """A group that took all tokens of one expert would leave one of its copies without any."""
    classes_N = (inputs_ND @ find_groups(inputs_ND, 2, generator()).directions_GD[0] > 0).long()
    directions_GD = find_groups(inputs_ND, 2, generator(), classes_N).directions_GD
    winners_N = (inputs_ND @ directions_GD.T).argmax(-1)
    for kind in (0, 1):
        assert 0.25 < winners_N[classes_N == kind].float().mean() < 0.75


@pytest.mark.parametrize("multiplier", [2, 3, 4])
def test_split_is_exact_where_the_top_k_is_of_one_group(
    inputs_ND: Tensor, weight_ED: Tensor, multiplier: int
) -> None:
    split = split_rows(weight_ED, inputs_ND, multiplier, RULE, generator(), mixed_share=0.02)
    weights_NK, chosen_NK = RULE.route(inputs_ND @ weight_ED.T)
    new_weights_NK, new_chosen_NK = RULE.route(inputs_ND @ split.rows_MD.T)
    groups_NK = new_chosen_NK // E
    inside_N = (groups_NK == groups_NK[:, :1]).all(-1)
    assert inside_N.float().mean() == pytest.approx(0.98, abs=0.003)  # as was asked for
    assert torch.equal((new_chosen_NK % E)[inside_N], chosen_NK[inside_N])
    torch.testing.assert_close(new_weights_NK[inside_N], weights_NK[inside_N], atol=2e-5, rtol=2e-4)
    shares_G = torch.bincount(groups_NK[:, 0], minlength=multiplier) / N
    assert (shares_G * multiplier - 1).abs().max() < 0.1
    assert split.margin > 0


def test_split_at_top_1_uses_all_copies(inputs_ND: Tensor, weight_ED: Tensor) -> None:
    rows_MD = split_rows(weight_ED, inputs_ND, 2, RoutingRule(1), generator()).rows_MD
    report = rows_report(weight_ED, rows_MD, inputs_ND, (*range(E), *range(E)), RoutingRule(1))
    assert report.weight_error == 0.0
    assert report.smallest_copy_share is not None and report.smallest_copy_share > 0.5


def test_less_mixing_means_a_larger_margin_and_a_smaller_error(
    inputs_ND: Tensor, weight_ED: Tensor
) -> None:
    plan = (*range(E), *range(E))
    splits = [
        split_rows(weight_ED, inputs_ND, 2, RULE, generator(), mixed_share=share)
        for share in (0.3, 0.1, 0.02)
    ]
    reports = [rows_report(weight_ED, s.rows_MD, inputs_ND, plan, RULE) for s in splits]
    assert splits[0].margin < splits[1].margin < splits[2].margin
    errors = [report.weight_error for report in reports]
    assert errors[0] > errors[1] > errors[2]
    assert [r.one_group_share for r in reports] == pytest.approx([0.7, 0.9, 0.98], abs=0.003)
    copied = rows_report(weight_ED, weight_ED.repeat(2, 1), inputs_ND, plan, RULE)
    assert errors[2] < 0.1 * copied.weight_error


@pytest.mark.parametrize(
    "plan", [(0, 1, 2, 3, 1, 2), (0, 1, 2, 3, 2, 2, 0), (0, 1, 2, 3, 0, 1, 2, 3)]
)
def test_fit_keeps_the_routing_and_all_copies_in_use(
    inputs_ND: Tensor, weight_ED: Tensor, plan: tuple[int, ...]
) -> None:
    fitted = fit_rows(weight_ED, inputs_ND, plan, RULE, generator(), steps=200)
    report = rows_report(weight_ED, fitted.rows_MD, inputs_ND, plan, RULE)
    copied = rows_report(weight_ED, weight_ED[list(plan)], inputs_ND, plan, RULE)
    assert report.weight_error < 0.2 * copied.weight_error
    assert report.smallest_copy_share is not None and report.smallest_copy_share >= 0.6
    assert fitted.error == pytest.approx(report.weight_error, rel=1e-4)
    start = fit_rows(weight_ED, inputs_ND, plan, RULE, generator(), steps=0)
    assert fitted.error < start.error < 0.5 * copied.weight_error


def test_fit_brings_dying_copies_back(inputs_ND: Tensor, weight_ED: Tensor) -> None:
    """The function is kept best by copies that nothing chooses: no win."""
    plan = (0, 1, 2, 3, 2, 2, 0)
    start_MD = weight_ED[list(plan)]
    start_MD[E:] -= torch.linalg.lstsq(inputs_ND, torch.ones(N, 1)).solution[:, 0]  # logits - 1
    before = rows_report(weight_ED, start_MD, inputs_ND, plan, RULE)
    assert before.smallest_copy_share is not None and before.smallest_copy_share < 0.1
    fitted = fit_rows(
        weight_ED,
        inputs_ND,
        plan,
        RULE,
        generator(),
        start_MD=start_MD,
        steps=200,
        min_copy_share=0.0,  # so that the best rows are not chosen by their shares
    )
    assert fitted.step > 0
    assert fitted.smallest_copy_share is not None and fitted.smallest_copy_share > 0.35


def test_fit_polishes_a_split(inputs_ND: Tensor, weight_ED: Tensor) -> None:
    split = split_rows(weight_ED, inputs_ND, 2, RULE, generator(), mixed_share=0.2)
    plan = (*range(E), *range(E))
    fitted = fit_rows(
        weight_ED, inputs_ND, plan, RULE, generator(), start_MD=split.rows_MD, steps=150
    )
    before = rows_report(weight_ED, split.rows_MD, inputs_ND, plan, RULE)
    assert fitted.error < 0.7 * before.weight_error


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(2, "softmax", normalised=False),
        RoutingRule(2, "sigmoid", scale=2.5, selection_bias_E=torch.tensor([0.1, 0.0, -0.1, 0.0])),
        RoutingRule(2, "softmax", selection_bias_E=torch.tensor([0.05, 0.0, -0.05, 0.0])),
        RoutingRule(1),
        RoutingRule(3),
    ],
    ids=["not normalised", "deepseek", "ernie", "top-1", "top-3"],
)
def test_fit_takes_every_kind_of_routing(
    inputs_ND: Tensor, weight_ED: Tensor, rule: RoutingRule
) -> None:
    plan = (0, 1, 2, 3, 0, 1, 2, 3)
    fitted = fit_rows(weight_ED, inputs_ND, plan, rule, generator(), steps=150)
    report = rows_report(weight_ED, fitted.rows_MD, inputs_ND, plan, rule)
    copied = rows_report(weight_ED, weight_ED[list(plan)], inputs_ND, plan, rule)
    # At top-1 copies with equal rows keep the function, but only the first is ever chosen.
    assert report.weight_error < (0.07 if rule == RoutingRule(1) else 0.25 * copied.weight_error)
    assert report.smallest_copy_share is not None and report.smallest_copy_share >= 0.6


def test_dead_copies_are_seen(inputs_ND: Tensor, weight_ED: Tensor) -> None:
    dead = torch.cat([weight_ED, weight_ED - 10 * inputs_ND.mean(0)])
    report = rows_report(weight_ED, dead, inputs_ND, (*range(E), *range(E)), RULE)
    assert report.weight_error < 1e-6 and report.smallest_copy_share == 0.0
    assert report.one_group_share == 1.0


def test_copy_shares() -> None:
    chosen_NK = torch.tensor([0, 0, 0, 2, 1]).repeat(30)[:, None]
    shares = copy_shares(chosen_NK, (0, 1, 0)).tolist()
    assert shares[0] == 1.5 and shares[2] == 0.5 and shares[1] != shares[1]
    assert copy_shares(chosen_NK[:10], (0, 1, 0)).isnan().all()  # too few tokens to say


#: Sigmoid scores, a selection bias, both.
FEEL_SHIFTS = [
    RoutingRule(2, "sigmoid"),
    RoutingRule(2, "softmax", selection_bias_E=torch.tensor([0.05, 0.0, -0.05, 0.0])),
    RoutingRule(2, "sigmoid", scale=2.5, selection_bias_E=torch.tensor([0.1, 0.0, -0.1, 0.0])),
]


@pytest.mark.parametrize("rule", FEEL_SHIFTS, ids=["sigmoid", "ernie", "deepseek"])
def test_split_of_routers_that_feel_a_shift(
    inputs_ND: Tensor, weight_ED: Tensor, rule: RoutingRule
) -> None:
    split = split_rows(weight_ED, inputs_ND, 2, rule, generator())
    plan, bias_M = (*range(E), *range(E)), split.selection_bias_M
    assert (bias_M is None) == (rule.selection_bias_E is None)
    assert bias_M is None or torch.equal(bias_M, torch.zeros(2 * E))
    new_rule = replace(rule, selection_bias_E=bias_M)
    report = rows_report(weight_ED, split.rows_MD, inputs_ND, plan, rule, new_rule)
    copied = rows_report(weight_ED, weight_ED.repeat(2, 1), inputs_ND, plan, rule)
    assert report.weight_error < 0.15 * copied.weight_error
    assert report.one_group_share is not None and report.one_group_share > 0.95
    assert report.smallest_copy_share is not None and report.smallest_copy_share > 0.4
    # Scores become small only where they are sigmoids, and no smaller than they have to be.
    if rule.scores == "softmax":
        assert split.score_scale is None
    else:
        assert split.score_scale is not None and 1e-4 < split.score_scale < 0.5


def test_rows_that_are_lowered_route_as_softmax_does(inputs_ND: Tensor, weight_ED: Tensor) -> None:
    rule = RoutingRule(2, "sigmoid", selection_bias_E=torch.tensor([0.1, 0.0, -0.1, 0.0]))
    rows_ED = neutral_rows(weight_ED, inputs_ND, rule, generator()).rows_MD
    low = lowered(rows_ED, inputs_ND, weight_ED, rule, range(E))
    weights_NK, chosen_NK = neutral_rule(rule).route(inputs_ND @ rows_ED.T)
    found = RoutingRule(2, "sigmoid").route(inputs_ND @ low.rows_MD.T)
    assert weight_error((weights_NK, chosen_NK), found, range(E), E) < 0.01
    assert weight_error(rule.route(inputs_ND @ weight_ED.T), found, range(E), E) < 0.05


def test_split_refuses_weights_that_are_scores_as_they_are() -> None:
    rule = RoutingRule(2, "sigmoid", normalised=False)
    with pytest.raises(UpcyclingError, match=r"norm_topk_prob=false.*router_extension=.fit"):
        split_rows(torch.ones(4, D), torch.ones(8, D), 2, rule, generator())


def test_options_are_checked() -> None:
    with pytest.raises(UpcyclingError, match="mixed_share=1"):
        split_rows(torch.ones(4, D), torch.ones(8, D), 2, RULE, generator(), mixed_share=1)
    with pytest.raises(UpcyclingError, match="min_copy_share=-1"):
        fit_rows(
            torch.ones(4, D), torch.ones(8, D), (0, 1, 2, 3), RULE, generator(), min_copy_share=-1
        )


def test_the_same_seed_gives_the_same_rows(inputs_ND: Tensor, weight_ED: Tensor) -> None:
    def rows(seed: int) -> Tensor:
        return fit_rows(
            weight_ED, inputs_ND, (0, 1, 2, 3, 3), RULE, generator(seed), steps=10
        ).rows_MD

    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalised", [True, False])
def test_routing_is_that_of_transformers(family: str, normalised: bool) -> None:
    fields = {} if family in ("mixtral", "granitemoe") else {"norm_topk_prob": normalised}
    model = moe_model(family, **fields)
    inputs = live_router_inputs(model, sequences())
    routers = find_routers(model)
    biases = dict(zip(routers.modules, routers.selection_biases(), strict=False))
    for layer, module in routers.modules.items():
        given = {"expert_bias": biases[layer]} if family == "lfm2_moe" else {}
        seen = inputs[layer]
        logits_NE = seen.inputs_ND @ seen.weight_ED.T
        weights_NK, chosen_NK = seen.rule.route(logits_NE)
        with torch.no_grad():
            logits, weights, chosen = module(seen.inputs_ND, **given)
        torch.testing.assert_close(logits_NE, logits, atol=1e-5, rtol=1e-5)
        order, expected_order = chosen_NK.argsort(-1), chosen.argsort(-1)
        assert torch.equal(chosen_NK.gather(1, order), chosen.gather(1, expected_order))
        torch.testing.assert_close(weights_NK.gather(1, order), weights.gather(1, expected_order))
    routers.close()


def test_groups_of_experts_are_refused() -> None:
    config = moe_model("deepseek_v3", n_group=2, topk_group=1).config
    with pytest.raises(UpcyclingError, match="n_group"):
        routing_rule(config, torch.zeros(4))


def sequences(high: int = 0) -> Sequences:
    ids = token_ids(length=20, batch=6) + high
    return Sequences({"a": ids[:4], "b": ids[4:]}, "")


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "granitemoe"])
def test_router_inputs_of_folder_and_model_are_the_same(tmp_path, family: str) -> None:
    folder = moe_folder(tmp_path / "moe", family)
    live = live_router_inputs(moe_model(family), sequences())
    streamed = folder_router_inputs(read_config(folder), CheckpointReader(folder), sequences())
    assert live.keys() == streamed.keys()
    for layer, seen in live.items():
        assert seen.inputs_ND.shape == (6 * 20, 32)
        torch.testing.assert_close(streamed[layer].inputs_ND, seen.inputs_ND)
        assert torch.equal(streamed[layer].weight_ED, seen.weight_ED)
        bias_E = seen.rule.selection_bias_E
        if bias_E is not None:
            assert torch.equal(streamed[layer].rule.selection_bias_E, bias_E)
        assert replace(streamed[layer].rule, selection_bias_E=None) == replace(
            seen.rule, selection_bias_E=None
        )


def test_router_inputs_leave_the_model_as_it_was() -> None:
    model = moe_model("mixtral").train()
    live_router_inputs(model, sequences())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(UpcyclingError, match="token id"):
        live_router_inputs(model, sequences(high=1))
