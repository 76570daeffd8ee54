"""Costs by arithmetic, against PyTorch's own FLOP counter and by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny import dense_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.economics import economics, embedding_parameters
from fusion_upcycle.live.cost import attention_score_flops
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_model
from fusion_upcycle.upcycling.upcycling import Upcycling

LENGTH = 24


def plan(family: str = "llama", *, model: dict[str, Any] | None = None, **options: Any) -> Any:
    dense = dense_model(family, **model or {})
    return dense, plan_model(dense, make_options(**options))


def moe_of(dense: PreTrainedModel, upcycling: Upcycling) -> PreTrainedModel:
    moe, _ = to_model(upcycling, dense, verify="none", tokenizer_file=None)
    return moe


def counted_flops(model: PreTrainedModel) -> float:
    """Per token, by PyTorch's counter; it counts attention as if it were not causal."""
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    return counter.get_total_flops() / LENGTH


def expected_flops(model: PreTrainedModel, flops: float, scores: float) -> float:
    """What the counter should say: no vectors (norms, biases), and attention to all positions."""
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    return flops - 2 * vectors + scores * (2 * LENGTH / (LENGTH + 1) - 1)


@pytest.mark.parametrize(
    ("family", "model", "options"),
    [
        ("llama", {}, {"num_experts": 5}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 12}, {}),
        ("qwen2", {}, {"shared_expert": "copy", "moe_layers": [1]}),
        ("qwen2", {}, {"shared_expert": "copy", "shared_expert_intermediate_size": 80}),
        ("qwen3", {}, {"num_experts": 8, "experts_per_token": 4, "granularity": 4}),
    ],
    ids=str,
)
def test_flops_are_those_that_pytorch_counts(
    family: str, model: dict[str, Any], options: dict[str, Any]
) -> None:
    target = {} if family != "qwen2" else {"target": "qwen2_moe"}
    dense, upcycling = plan(family, model=model, **options, **target)
    costs = economics(upcycling, LENGTH)
    scores = attention_score_flops(dense.config, LENGTH)
    moe = moe_of(dense, upcycling)
    for network, cost in ((dense, costs.dense), (moe, costs.upcycled)):
        expected = expected_flops(network, cost.flops, scores)
        assert counted_flops(network) == pytest.approx(expected, rel=1e-9)


def test_counts_bytes_and_training_by_hand() -> None:
    dense, upcycling = plan(num_experts=4, experts_per_token=2, dtype="bfloat16")
    costs = economics(upcycling, LENGTH)
    params = sum(p.numel() for p in dense.parameters())
    expert, router = 3 * 48 * 32, 4 * 32
    layers = 2
    assert costs.dense.total == costs.dense.active == params
    assert costs.dense.bytes == 4 * params  # as the source is: float32
    assert costs.upcycled.total == params + layers * (3 * expert + router)
    assert costs.upcycled.active == params + layers * (expert + router)
    assert costs.upcycled.bytes == 2 * costs.upcycled.total
    assert costs.equal_active.total == costs.equal_active.active == costs.upcycled.active
    assert costs.equal_active.bytes == 2 * costs.upcycled.active
    assert costs.equal_active.flops == costs.upcycled.flops
    assert costs.upcycled.flops - costs.dense.flops == 2 * layers * (expert + router)
    assert costs.dense.training_flops(10) == 30 * costs.dense.flops


@pytest.mark.parametrize(
    ("model", "lookup", "both"),
    [
        ({}, 67 * 32, 2 * 67 * 32),
        ({"tie_word_embeddings": True}, 0, 67 * 32),
        ({"backbone": True}, 67 * 32, 67 * 32),
    ],
    ids=str,
)
def test_tied_embeddings_are_computed_with_and_untied_ones_looked_up(
    model: dict[str, Any], lookup: int, both: int
) -> None:
    assert embedding_parameters(plan(model=model)[1]) == (lookup, both)


def scores(family: str, **fields: Any) -> Any:
    return partial(attention_score_flops, dense_model(family, **fields).config)


def test_attention_scores_grow_with_the_context_up_to_a_window() -> None:
    full = scores("llama", num_hidden_layers=3, head_dim=8)
    # 3 layers, 4 heads, queries x keys and weights x values of width 8, 2 FLOPs each
    assert full(1) == 3 * 4 * 2 * 8 * 2
    assert full(99) == full(1) * 50  # a token attends to (99 + 1) / 2 positions on the mean
    window = scores("mistral", num_hidden_layers=3, head_dim=8, sliding_window=4)
    assert window(3) == full(3)
    assert window(6) == full(1) * (1 + 2 + 3 + 4 + 4 + 4) / 6


def test_every_layer_has_its_own_kind_of_attention() -> None:
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    mixed, full = scores("qwen2", **fields), scores("qwen2")
    assert mixed(4) == full(4)
    assert full(64) / 2 < mixed(64) < full(64)
    hybrid = dense_model("qwen3_5_text", rope="mrope")  # one layer linear, one full
    assert attention_score_flops(hybrid.config, 9) == 4 * 2 * 16 * 2 * 5


def test_compressed_keys_and_values_have_two_widths() -> None:
    youtu = dense_model("youtu", num_hidden_layers=1)
    assert attention_score_flops(youtu.config, 1) == 2 * 4 * (8 + 6 + 10)


def test_a_context_without_tokens_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="context_length=0"):
        economics(plan()[1], 0)
