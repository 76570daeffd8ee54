"""The task pools beside perplexity: several at once, cost, routing, and how sure a loss is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fusion_bench.compat.taskpool import TaskPoolFactory
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from omegaconf import OmegaConf
from tiny_moe import FAMILIES, moe_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers import MixtralForCausalLM as Mixtral

from fusion_upcycle.demo import demo_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.cost import active_parameters, attention_score_flops, looked_up_parameters
from fusion_upcycle.taskpool import ModelCostTaskPool, RoutingTaskPool, SeveralTaskPools
from fusion_upcycle.texts.bootstrap import block_bootstrap, spread

SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def mixtral(**changes: Any) -> Mixtral:
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, **changes)
    return Mixtral(config).eval()


class Counting:
    """A pool that says what it was given."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._program: Any = None
        self._fabric_instance: Any = None

    def evaluate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return self.value if self.value is None else {"task": {"seen": self.value}}


def test_several_pools_are_composed_on_the_command_line() -> None:
    cfg = initialize_hydra_config(
        "fabric_model_fusion",
        [
            "taskpool=several",
            "+taskpool@taskpool.pools.ppl=CausalLMPerplexityTaskPool/demo",
            "+taskpool@taskpool.pools.cost=ModelCostTaskPool/cost",
            "+taskpool@taskpool.pools.routing=RoutingTaskPool/demo",
        ],
    )
    pools = SeveralTaskPools(cfg.taskpool.pools)._pools
    found = {name: type(pool).__name__ for name, pool in pools.items()}
    assert found == {
        "ppl": "CausalLMPerplexityTaskPool",
        "cost": "ModelCostTaskPool",
        "routing": "RoutingTaskPool",
    }


def test_each_pool_gives_its_report_and_knows_the_program() -> None:
    here = f"{__name__}.Counting"
    nodes = {name: {"_target_": here, "value": name} for name in ("a", "b")}
    several = SeveralTaskPools(OmegaConf.create(nodes))
    several._program = program = SimpleNamespace(fabric="the fabric")
    model = torch.nn.Linear(1, 1)
    assert several.evaluate(model) == {n: {"task": {"seen": n}} for n in ("a", "b")}
    for pool in several._pools.values():
        assert pool._program is program
        assert pool._fabric_instance == "the fabric"


def test_no_pool_and_a_pool_without_report_are_refused_by_name() -> None:
    with pytest.raises(UpcyclingError, match=r"taskpool\.pools is empty"):
        SeveralTaskPools({})
    silent = SeveralTaskPools({"quiet": {"_target_": f"{__name__}.Counting", "value": None}})
    with pytest.raises(UpcyclingError, match=r"taskpool\.pools\.quiet: Counting gives no report"):
        silent.evaluate(torch.nn.Linear(1, 1))


class Failing:
    """A pool of somebody else that fails, where it is made or later."""

    def __init__(self, at_once: bool) -> None:
        if at_once:
            raise ImportError("no such library")

    def evaluate(self, model: Any) -> Any:
        raise KeyError("acc")


def test_a_pool_that_fails_is_named() -> None:
    def pools(**options: Any) -> SeveralTaskPools:
        return SeveralTaskPools({"bad": options})

    here = f"{__name__}.Failing"
    with pytest.raises(RuntimeError, match=r"taskpool\.pools\.bad: .*no such library"):
        pools(_target_=here, at_once=True)
    with pytest.raises(RuntimeError, match=r"taskpool\.pools\.bad: KeyError: 'acc'"):
        pools(_target_=here, at_once=False).evaluate(torch.nn.Linear(1, 1))
    cost = "fusion_upcycle.taskpool.ModelCostTaskPool"
    with pytest.raises(UpcyclingError, match=r"taskpool\.pools\.bad: taskpool\.repeats=0"):
        pools(_target_=cost, repeats=0)


def test_pools_of_fusion_bench_without_a_target_are_made_its_old_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TaskPoolFactory._taskpool_types, "old", lambda cfg: Counting(cfg.value))
    several = SeveralTaskPools(OmegaConf.create({"a": {"type": "old", "value": 3}}))
    assert several.evaluate(torch.nn.Linear(2, 1)) == {"a": {"task": {"seen": 3}}}


def test_active_parameters_leave_out_experts_that_a_token_is_not_sent_to() -> None:
    model = mixtral()
    expert = 3 * 16 * 24
    assert active_parameters(model) == model.num_parameters() - 2 * (4 - 2) * expert
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert active_parameters(dense) == dense.num_parameters()


def test_active_parameters_of_lists_of_experts_as_fusion_bench_makes_them() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    layer: Any = torch.nn.Module()
    layer.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16, bias=False) for _ in range(4))
    layer.top_k = 1
    before = model.num_parameters()
    model.model.layers[0].mlp.more = layer
    assert active_parameters(model) == before + 16 * 16


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_a_hand_count(tied: bool) -> None:
    model = mixtral(tie_word_embeddings=tied)
    cost = ModelCostTaskPool(prompt_tokens=32, new_tokens=4, repeats=1).evaluate(model)["cost"]
    attention = 4 * 16 * 16
    ffn = 2 * 3 * 16 * 24 + 4 * 16  # two experts and the router
    norms = 2 * 16
    head = 257 * 16
    products = 2 * (attention + ffn + norms) + 16 + head  # norms count as inspect counts them
    scores = 2 * (2 * 2 * (8 + 8) * (32 + 1) / 2)
    assert cost["flops_per_token"] == 2 * products + scores
    assert looked_up_parameters(model) == (0 if tied else 257 * 16)
    assert cost["total_parameters"] == model.num_parameters()
    assert cost["bytes"] == 4 * model.num_parameters()


NOT_COUNTED_ALIKE = {"qwen3_5_moe_text", "lfm2_moe"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_COUNTED_ALIKE])
def test_flops_of_every_family_are_those_that_torch_counts(family: str) -> None:
    # torch counts the whole square of attention scores, no norms, and one expert after the other
    # only; states of linear attention (qwen3_5) are left out of ours, and padding of convolutions
    # (lfm2), of which torch counts outputs too.
    model, length = moe_model(family).eval(), 32
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    pool = ModelCostTaskPool(prompt_tokens=length, new_tokens=1, repeats=1)
    ours = pool.evaluate(model)["cost"]["flops_per_token"]
    scores = attention_score_flops(model.config, length)
    named = model.named_parameters()
    not_products = sum(p.numel() for name, p in named if p.dim() < 2 or "bias" in name)
    expected = ours - 2 * not_products - scores + scores * 2 * length / (length + 1)
    assert counter.get_total_flops() / length == pytest.approx(expected, rel=1e-9)


def test_cost_measures_and_leaves_the_model_as_it_was() -> None:
    model = mixtral().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = ModelCostTaskPool(prompt_tokens=16, new_tokens=2, repeats=1).evaluate(model)
    cost = report["cost"]
    assert cost["prefill_tokens_per_second"] > 0 and cost["decode_tokens_per_second"] > 0
    assert cost["peak_memory_bytes"] > 10**7
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    json.dumps(report, allow_nan=False)


def test_reading_and_going_on_have_their_own_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A prompt of 10 s and steps of 1 s, the first round of 100 s more.
    times = iter([0, 110, 114, 200, 210, 214, 300, 310, 314, 400, 410, 414])
    monkeypatch.setattr("fusion_upcycle.taskpool.model_cost.time.perf_counter", times.__next__)
    seconds = ModelCostTaskPool(repeats=3)._speed(mixtral(), prompt=8, new=4)
    assert seconds[:2] == (10, 4)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch_size", "repeats"])
def test_cost_refuses_numbers_below_one(name: str) -> None:
    with pytest.raises(UpcyclingError, match=rf"taskpool\.{name}=0"):
        ModelCostTaskPool(**{name: 0})


def routing_pool(**options: Any) -> RoutingTaskPool:
    text = {"_target_": "fusion_upcycle.demo.domain_text", "split": "test"}
    texts = {domain: {**text, "domain": domain} for domain in ("prose", "arithmetic")}
    return RoutingTaskPool(texts, tokens=2000, tokenizer=str(demo_model("base")), **options)


def test_routing_of_a_trained_moe_is_that_of_the_analysis() -> None:
    from fusion_upcycle.analysis import analyze
    from fusion_upcycle.demo import domain_text

    tokenizer = AutoTokenizer.from_pretrained(demo_model("moe"))
    model = Mixtral.from_pretrained(demo_model("moe"))
    found = routing_pool().evaluate(model)["routing"]
    texts = {domain: domain_text(domain, "test") for domain in ("prose", "arithmetic")}
    record = analyze(model, tokenizer, texts, tokens=2000, permutations=200).record
    layers = list(record["layers"].values())
    assert found["load_cv"] == pytest.approx(np.mean([layer["load_cv"] for layer in layers]))
    assert found["dead_experts"] == sum(layer["dead_experts"] for layer in layers)
    assert found["experts"] == 16 * len(layers)
    excess = [layer["excess_bits"] for layer in record["information"]["layers"].values()]
    assert found["specialisation_bits"] == pytest.approx(np.mean(excess))
    assert found["specialisation_bits"] > 0.01  # prose and sums go to different experts
    entropy = np.mean([layer["token_entropy_bits"] for layer in layers])
    assert found["entropy_bits"] == pytest.approx(entropy)


def test_a_dense_model_has_no_routing() -> None:
    report = routing_pool().evaluate(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    assert report["routing"] == {}
    assert list(report) == ["routing", "model_info"]  # by which reports of several are known


def test_routing_leaves_no_hooks() -> None:
    model = moe_model("mixtral")
    routing = RoutingTaskPool({"a": {"_target_": f"{__name__}.no_text"}}, tokenizer=None)
    with pytest.raises(UpcyclingError, match="There is no tokenizer"):
        routing.evaluate(model)
    assert not any(module._forward_hooks for module in model.modules())


def no_text() -> list[str]:
    return []


@pytest.mark.parametrize("pool", [RoutingTaskPool, ModelCostTaskPool])
def test_unknown_options_are_refused_with_a_suggestion(pool: Any) -> None:
    given = {"texts": {"a": "b"}} if pool is RoutingTaskPool else {}
    with pytest.raises(UpcyclingError, match="Unknown option of"):
        pool(**given, tokenz=1)


def test_the_bootstrap_finds_the_standard_error_of_independent_windows() -> None:
    generator = np.random.default_rng(1)
    nats = generator.normal(200, 30, size=400)
    means = block_bootstrap(nats.tolist(), [100] * 400)
    assert means is not None
    found = spread(means)
    expected = nats.std(ddof=1) / 100 / 20  # of the mean of 400, per token
    assert found.stderr == pytest.approx(expected, rel=0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.15)
    assert found.low < nats.mean() / 100 < found.high


def test_the_bootstrap_weighs_windows_by_their_tokens() -> None:
    means = block_bootstrap([10.0, 0.0, 10.0, 0.0], [10, 30, 10, 30])
    assert means is not None
    # Of four draws, j of the dear kind: 10 j / (10 j + 30 (4 - j)).
    possible = [10 * j / (10 * j + 30 * (4 - j)) for j in range(5)]
    assert all(np.isclose(possible, mean).any() for mean in means)
    assert len(set(means.round(9))) == 5


def test_many_windows_become_blocks_of_neighbours_and_one_window_has_no_error() -> None:
    # Neighbours that cancel each other: as blocks of two they do not spread.
    means = block_bootstrap([0.0, 2.0] * 1000, [1] * 2000)
    assert means is not None and means.std() < 1e-12
    assert block_bootstrap([1.0], [10]) is None
    assert block_bootstrap([1.0, 0.0], [10, 0]) is None


def test_the_same_seed_gives_the_same_error() -> None:
    first, second = (block_bootstrap([1.0, 2.0, 4.0], [1, 1, 1], seed=3) for _ in range(2))
    assert first is not None and second is not None and (first == second).all()


def test_a_pool_of_folders_has_these_models_only(tmp_path: Path) -> None:
    cfg = initialize_hydra_config(
        "fabric_model_fusion",
        [
            "modelpool=CausalLMPool/folders",
            f"++modelpool.models={{a: {tmp_path}}}",
            f"modelpool.tokenizer={tmp_path}",
        ],
    )
    assert dict(cfg.modelpool.models) == {"a": str(tmp_path)}
