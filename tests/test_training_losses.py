"""Losses, schedules and routers: pure functions against references written here."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import dense_model
from tiny_training import moe_model
from torch import Tensor

from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.routers import expert_counts, find_routers
from fusion_upcycle.training.losses import balance_loss, balanced_bias, z_loss
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.schedule import Schedule

EXPERTS, K = 8, 2


def routing(logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Load and mean probability, [L, E], of softmax top-k routers."""
    loads = [expert_counts(x.topk(K).indices, EXPERTS) for x in logits]
    return (
        torch.stack(loads) / torch.stack(loads).sum(1, keepdim=True),
        torch.stack([x.softmax(-1).mean(0) for x in logits]),
    )


def test_every_target_of_a_step_counts_the_same_on_all_devices() -> None:
    counted = [[3, 1], [8, 4]]  # targets of each part, on each of two devices
    nats = [[9.0, 2.0], [4.0, 20.0]]
    loss = 0.0
    for parts, sums in zip(counted, nats, strict=True):

        def reduce(mean: Tensor, reduce_op: str, parts: Any = parts) -> Tensor:
            assert (float(mean), reduce_op) == (sum(parts) / 2, "mean")
            return torch.tensor(sum(map(sum, counted)) / 4)

        trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))
        objective = SimpleNamespace(counted=lambda part: part)
        module: Any = SimpleNamespace(trainer=trainer, objective=objective, device="cpu")
        weights = PretrainingModule._weights(module, parts)  # type: ignore[arg-type]
        of_parts = zip(weights, sums, parts, strict=True)
        loss += sum(weight * nats / number for weight, nats, number in of_parts) / 2 / 2
    assert loss == pytest.approx(35 / 16)


def test_the_balance_loss_is_that_of_the_paper() -> None:
    logits = [torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    expected = 0.0
    for layer in logits:
        for expert in range(EXPERTS):
            f = sum(expert in row.topk(K).indices.tolist() for row in layer) / (50 * K)
            p = sum(row.softmax(0)[expert].item() for row in layer) / 50
            expected += EXPERTS * f * p / len(logits)
    assert balance_loss(*routing(logits)).item() == pytest.approx(expected, rel=1e-5)


def test_uniform_routing_gives_one() -> None:
    uniform = torch.full((3, EXPERTS), 1 / EXPERTS)
    assert balance_loss(uniform, uniform).item() == pytest.approx(1.0)


def test_layers_that_collapse_onto_different_experts_are_seen() -> None:
    """transformers' function pools them and says 2.0, as for uniform routing (its scale is K)."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = []
    for layer in range(4):
        collapsed = torch.full((32, EXPERTS), -30.0)
        collapsed[:, 2 * layer : 2 * layer + 2] = 30.0
        logits.append(collapsed)
    assert load_balancing_loss_func(tuple(logits), EXPERTS, K) == pytest.approx(2.0)
    assert balance_loss(*routing(logits)).item() == pytest.approx(EXPERTS / K)


def test_the_balance_loss_pushes_down_the_crowded_expert() -> None:
    logits = torch.zeros(1, EXPERTS, requires_grad=True)
    load = torch.full((1, EXPERTS), 0.5 / (EXPERTS - 1))
    load[0, 3] = 0.5
    balance_loss(load, logits.softmax(-1)).backward()
    assert logits.grad is not None
    assert logits.grad[0, 3] > 0
    assert (logits.grad[0, torch.arange(EXPERTS) != 3] < 0).all()


def test_the_z_loss_is_that_of_the_paper() -> None:
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    rows = logits.flatten(0, 1).tolist()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    assert z_loss(logits).item() == pytest.approx(expected, rel=1e-5)


def test_the_selection_bias_moves_towards_even_load() -> None:
    bias, load = torch.tensor([0.5, 0.0, 0.0, -0.5]), torch.tensor([0.75, 0.25, 0.0, 0.0])
    moved = balanced_bias(bias, load, 0.001)
    assert (moved - bias).tolist() == pytest.approx([-0.001, 0.0, 0.001, 0.001], abs=1e-7)


# --- schedules --------------------------------------------------------------------------------

BUDGET = 1000


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, (0.1, 5.0, 2.0)),
        (50, (0.1, 5.0, 2.0)),
        (51, (1.0, 1.0, 1.0)),
        (750, (1.0, 1.0, 1.0)),
        (751, (0.1, 0.5, 0.5)),
        (1000, (0.1, 0.5, 0.5)),
    ],
)
def test_three_phases(tokens: int, expected: tuple[float, float, float]) -> None:
    factors = Schedule("three_phase").factors(tokens, BUDGET)
    assert (factors.learning_rate, factors.balance, factors.z) == expected


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("cosine", 1, 0.02),
        ("cosine", 25, 0.5),
        ("cosine", 50, 1.0),
        ("cosine", 525, 0.55),
        ("cosine", 1000, 0.1),
        ("wsd", 25, 0.5),
        ("wsd", 50, 1.0),
        ("wsd", 800, 1.0),
        ("wsd", 900, 0.55),
        ("wsd", 1000, 0.1),
        ("constant", 1, 1.0),
        ("constant", 1000, 1.0),
    ],
)
def test_other_schedules(name: str, tokens: int, expected: float) -> None:
    factors = Schedule(name).factors(tokens, BUDGET)
    assert factors.learning_rate == pytest.approx(expected)
    assert (factors.balance, factors.z) == (1.0, 1.0)


def test_no_warmup_and_no_decay_and_nothing_but_warmup() -> None:
    assert Schedule("cosine", warmup_share=1.0).factors(BUDGET, BUDGET).learning_rate == 1.0
    without = Schedule("wsd", warmup_share=0.0, decay_share=0.0)
    assert [without.factors(t, BUDGET).learning_rate for t in (1, 999, 1000)] == [1.0, 1.0, 1.0]


# --- routers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_routers_of_every_family_are_heard(family: str) -> None:
    model = moe_model(family)
    routers = find_routers(model)
    assert list(routers.modules) == [0, 1]
    assert (routers.num_experts, routers.experts_per_token) == (4, 2)
    ids = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    with routers.listening() as routed:
        model(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)  # heard by nobody
    assert [tuple(x.shape) for x in routed.logits] == [(32, 4)] * 2
    assert [tuple(x.shape) for x in routed.chosen] == [(32, 2)] * 2
    for logits, chosen in zip(routed.logits, routed.chosen, strict=True):
        probabilities = routers.probabilities(logits)
        assert torch.allclose(probabilities.sum(-1), torch.ones(32), atol=1e-5)
        # without a selection bias the most probable experts are the chosen ones
        expected = probabilities.topk(2).indices
        assert torch.equal(chosen.sort().values, expected.sort().values)
    has_bias = ARCHITECTURES[family].routing.selection_bias is not None
    assert len(routers.selection_biases()) == (2 if has_bias else 0)


def test_layers_that_stay_dense_have_no_router() -> None:
    from fusion_upcycle import SparseUpcyclingAlgorithm

    made = SparseUpcyclingAlgorithm(4, 2, target="qwen3_moe", moe_layers="last_1").run(
        dense_model("qwen3")
    )
    assert list(find_routers(made).modules) == [1]  # type: ignore[arg-type]


def test_a_dense_model_has_no_routers() -> None:
    assert not find_routers(dense_model())


def test_an_unknown_moe_family_is_refused_by_name() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with pytest.raises(UpcyclingError, match=r"gpt_oss .*mixtral"):
        find_routers(GptOssForCausalLM(config))
