"""Bounds of routing: texts sent to their own expert, and tokens sent to any."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dense_model
from transformers import PreTrainedModel

from fusion_upcycle import MoEMergingAlgorithm
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.sending import sending
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.taskpool import CausalLMPerplexityTaskPool

TEXTS = {"one": "abcab cabca " * 30, "two": "0123 4567 89 " * 30}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {
        name: dense_model(seed=seed, vocab_size=257)
        for seed, name in enumerate([BASE, "one", "two"])
    }


def moe_of(models: dict[str, PreTrainedModel], **options: Any) -> PreTrainedModel:
    options = {"shared": "base", "router_init": {"name": "normal", "logit_std": 3.0}} | options
    made = MoEMergingAlgorithm(2, verify="none", **options).run(models)
    assert made is not None
    return made.eval()


def pool(folder: Path, **options: Any) -> CausalLMPerplexityTaskPool:
    byte_tokenizer(64).save_pretrained(folder / "tokenizer")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    texts = {name: str(folder / f"{name}.txt") for name in TEXTS}
    return CausalLMPerplexityTaskPool(texts, tokenizer=str(folder / "tokenizer"), **options)


def losses(report: dict[str, Any]) -> list[float]:
    return [report[name]["loss_nats_per_token"] for name in TEXTS]


def test_each_text_is_scored_by_the_dense_model_of_its_own_expert(
    models: dict[str, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moe = moe_of(models)
    routed = losses(pool(tmp_path).evaluate(moe))
    found = losses(pool(tmp_path, experts={"one": 0, "two": 1}).evaluate(moe))
    expected = []
    for place, name in enumerate(TEXTS):
        dense = dense_model(seed=0, vocab_size=257)
        own = {k: v for k, v in models[name].state_dict().items() if ".mlp." in k}
        dense.load_state_dict(models[BASE].state_dict() | own)
        expected.append(losses(pool(tmp_path).evaluate(dense))[place])
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(routed, rel=1e-3)
    assert losses(pool(tmp_path).evaluate(moe)) == routed  # nothing stays of it


def test_experts_at_random_are_drawn_evenly_and_the_same_again(
    models: dict[str, PreTrainedModel],
) -> None:
    moe = moe_of(models | {"three": dense_model(seed=3, vocab_size=257)})
    heard: list[Any] = []
    ids = torch.randint(257, (4, 60), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        with sending(moe, None), torch.no_grad():
            # Hooks are called in their order, each with what the one before it gave.
            handles = [
                layer.mlp.gate.register_forward_hook(lambda _, __, out: heard.append(out))
                for layer in moe.model.layers
            ]
            moe(ids)
            for handle in handles:
                handle.remove()
    first, second, again, _ = (chosen for _, _, chosen in heard)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert all((weights - 0.5).abs().max() < 1e-6 for _, weights, _ in heard)
    assert (first[:, 0] != first[:, 1]).all()
    shares = torch.bincount(first.flatten(), minlength=3) / len(first)
    assert (shares - 2 / 3).abs().max() < 0.1


@pytest.mark.parametrize(
    ("experts", "match"),
    [
        ("oracle", r"experts='oracle' must be random.*\{one: 0, two: 1\}"),
        ({"one": 0}, r"\{one: 0, two: 1\}"),
        ({"one": 0, "two": True}, "must be random"),
    ],
)
def test_experts_that_are_not_of_each_text_are_refused(
    experts: Any, match: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=match):
        pool(tmp_path, experts=experts)


def test_models_that_have_no_such_expert_are_refused(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(UpcyclingError, match="expert 2 is not one of the 2 experts, 0 to 1"):
        sending(moe_of(models), 2).__enter__()
    with pytest.raises(UpcyclingError, match="LlamaForCausalLM has no routers"):
        sending(models[BASE], 0).__enter__()
