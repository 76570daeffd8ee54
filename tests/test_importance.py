"""Importance scores against plain autograd with the whole gradient kept, and their file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import two_ranks
from tiny_moe import moe_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.importance import accumulators
from fusion_upcycle.importance.figure import save_importance_map
from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.identity import folder_identity, live_identity
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.texts.windows import Sequences, calibration_sequences

TEXTS = {"words": ["of experts and routers " * 9], "numbers": ["12 + 30 = 42; 7 * 6 = 42. " * 9]}
LENGTH, TOKENS = 16, 96


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(64).save_pretrained(folder)
    return folder / "tokenizer.json"


def model_of(family: str = "mixtral", **fields: Any) -> Any:
    return moe_model(family, vocab_size=300, **fields)


def measured(model: Any, tokenizer_file: Path, **options: Any) -> Importance:
    return measure_importance(
        model, TEXTS, tokenizer_file, tokens=TOKENS, context_length=LENGTH, **options
    )


def sequences_of(tokenizer_file: Path) -> Sequences:
    return calibration_sequences(TEXTS, tokenizer_file, tokens=TOKENS, context_length=LENGTH)


def plainly(model: Any, sequences: Sequences) -> dict[str, dict[int, Tensor]]:
    """The scores by their definitions, all gradients kept."""
    model.eval().requires_grad_(True)
    routers = find_routers(model)
    layers = list(routers.modules)
    found = {
        metric: {layer: torch.zeros(routers.num_experts) for layer in layers}
        for metric in ("grad_squared", "saliency", "weight_norm", "load")
    }

    def parts(layer: int) -> list[tuple[Tensor, Any]]:
        assert routers.architecture is not None
        path = f"layers.{layer}.{routers.architecture.experts_module}."
        mine = [p for name, p in model.named_parameters() if path in name]
        assert len(mine) == 2
        return [(p.detach().float(), p.grad) for p in mine]

    for ids_T in (row for ids in sequences.ids.values() for row in ids):
        with routers.listening() as routed:
            logits = model(input_ids=ids_T[None]).logits[0, :-1]
        model.zero_grad()
        cross_entropy(logits.float(), ids_T[1:]).backward()
        for layer, chosen in zip(layers, routed.chosen, strict=True):
            found["load"][layer] += chosen.flatten().bincount(minlength=routers.num_experts)
            for weight, grad in parts(layer):
                grad = grad.float()
                found["grad_squared"][layer] += grad.square().sum((1, 2))
                found["saliency"][layer] += (weight * grad).abs().sum((1, 2))
    for layer in layers:
        found["load"][layer] /= sequences.tokens
        (gate_up, _), (down, _) = parts(layer)
        if gate_up.shape[1] < down.shape[1] and gate_up.shape[2] != down.shape[1]:
            gate_up, down = down, gate_up
        for matrix in (*gate_up.chunk(2, dim=1), down):
            found["weight_norm"][layer] += matrix.flatten(1).norm(dim=1)
    routers.close()
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "deepseek_v3", "olmoe"])
def test_scores_are_those_of_whole_gradients(
    family: str, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulators, "_ELEMENTS", 2000)  # more than one piece
    model = model_of(family)
    found = measured(model, tokenizer_file)
    for metric, layers in plainly(model, sequences_of(tokenizer_file)).items():
        assert found.metrics[metric].keys() == layers.keys()
        for layer, expected in layers.items():
            scores = torch.tensor(found.metrics[metric][layer])
            assert torch.allclose(scores, expected, rtol=1e-4), (metric, layer)
            assert len(set(scores.tolist())) == len(scores)


def test_sums_are_float32_in_a_bfloat16_model(tokenizer_file: Path) -> None:
    model = model_of(dtype=torch.bfloat16)
    found = measured(model, tokenizer_file)
    for metric, layers in plainly(model, sequences_of(tokenizer_file)).items():
        for layer, expected in layers.items():
            assert torch.allclose(torch.tensor(found.metrics[metric][layer]), expected, rtol=1e-3)


def test_gradients_are_freed_as_they_appear_and_the_model_is_left_as_it_was(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(num_hidden_layers=4).train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    alive = []
    original = accumulators.ExpertSums._adding

    def adding(self: Any, name: str) -> Any:
        add = original(self, name)

        def watched(parameter: Tensor) -> None:
            alive.append(sum(p.grad is not None for p in model.parameters()))
            add(parameter)

        return watched

    monkeypatch.setattr(accumulators.ExpertSums, "_adding", adding)
    measured(model, tokenizer_file)
    assert alive and max(alive) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_expert_without_tokens_scores_zero_and_is_reported(
    tokenizer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -100
    found = measured(model, tokenizer_file)
    assert found.unreached == {1: [2]}
    assert found.metrics["grad_squared"][1][2] == found.metrics["load"][1][2] == 0
    assert found.metrics["weight_norm"][1][2] > 0
    assert "layer 1: [2]" in caplog.text


def test_a_missing_gradient_is_an_error_by_name(tokenizer_file: Path) -> None:
    model = model_of()
    experts = model.model.layers[0].mlp.experts
    forward = experts.forward
    experts.forward = lambda *args, **kwargs: forward(*args, **kwargs).detach()
    with pytest.raises(UpcyclingError, match=r"layers\.0\.mlp\.experts.* got no gradient"):
        measured(model, tokenizer_file)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_file_goes_round_and_is_of_one_model(tokenizer_file: Path, tmp_path: Path) -> None:
    model = model_of()
    found = measured(model, tokenizer_file)
    model.save_pretrained(tmp_path / "model")
    loaded = Importance.load(found.save(tmp_path).parent)
    assert loaded == found
    written = json.loads((tmp_path / "importance.json").read_text())
    written["metrics"]["fisher"] = written["metrics"]["load"]  # of an older version
    (tmp_path / "old.json").write_text(json.dumps(written))
    assert Importance.load(tmp_path / "old.json") == found
    loaded.check(folder_identity(tmp_path / "model"))
    half = model_of().to(torch.bfloat16)
    loaded.check(live_identity(half))  # the same model, loaded in another dtype
    with pytest.raises(UpcyclingError, match=r"scores are of a mixtral .* but the model given is"):
        loaded.check(live_identity(model_of(seed=1)))
    with pytest.raises(UpcyclingError, match=r"experts, top-2 and .*, top-1 and "):
        loaded.check(live_identity(model_of(num_experts_per_tok=1)))
    of_older_version = {k: v for k, v in found.model.items() if k != "experts_per_token"}
    replace(found, model=of_older_version).check(live_identity(model))
    with pytest.raises(UpcyclingError, match="grad_squared"):
        loaded.scores("gradient")
    images = save_importance_map(found, tmp_path)
    assert {path.suffix for path in images} == {".png", ".svg"}
    assert all(path.stat().st_size for path in images)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(format="another"),
        lambda c: c["metrics"]["load"].update({"0": [1.0, -1.0, 0.0, 0.0]}),
        lambda c: c["metrics"]["load"].update({"0": [10**400, 0, 0, 0]}),
        lambda c: c["metrics"]["load"].update({"00": [1.0, 1.0, 1.0, 1.0]}),
        lambda c: c["metrics"]["load"].pop("0"),
        lambda c: c["metrics"].update(beauty=c["metrics"]["load"]),
        lambda c: c["model"].pop("model_type"),
        lambda c: c.update(calibration=[1, 2]),
        lambda c: c.update(tokens="many"),
        lambda c: c.update(metrics={}),
    ],
)
def test_damaged_scores_are_refused(damage: Any, tmp_path: Path) -> None:
    identity = live_identity(model_of())
    metrics = {name: {0: [0.5] * 4, 1: [0.5] * 4} for name in ("load", "saliency")}
    path = Importance(metrics, 9, {}, identity, {}).save(tmp_path)
    Importance.load(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UpcyclingError):
        Importance.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UpcyclingError, match="cannot be read"):
        Importance.load(path)


def test_what_cannot_be_measured(tokenizer_file: Path) -> None:
    model = model_of()
    with pytest.raises(UpcyclingError, match="words"):
        measure_importance(
            model, {"words": ["short"]}, tokenizer_file, tokens=64, context_length=LENGTH
        )
    with pytest.raises(UpcyclingError, match="belongs to the model"):
        measured(moe_model("mixtral"), tokenizer_file)
    with pytest.raises(UpcyclingError, match="MixtralModel does not predict tokens"):
        measured(model_of(backbone=True), tokenizer_file)
    for wrong in (0, -1, 1, True, "16"):  # 0 is not the default
        options: dict[str, Any] = {"context_length": wrong}
        with pytest.raises(UpcyclingError, match=f"context_length={wrong!r} must be a whole"):
            measure_importance(model, TEXTS, tokenizer_file, **options)
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    with pytest.raises(UpcyclingError, match="gradients already"):
        measured(model, tokenizer_file)


def measure_sharded(tokenizer_file: Path, folder: Path) -> None:
    """As one of two processes."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = model_of()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    found = measured(model, tokenizer_file)
    if torch.distributed.get_rank() == 0:
        found.save(folder)
    torch.distributed.destroy_process_group()


@pytest.mark.early
def test_two_processes_of_a_sharded_model_give_the_scores_of_one(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    two_ranks(measure_sharded, tokenizer_file, tmp_path, folder=tmp_path)
    sharded, whole = Importance.load(tmp_path), measured(model_of(), tokenizer_file)
    assert sharded.model == whole.model
    for metric, layers in whole.metrics.items():
        for layer, scores in layers.items():
            assert sharded.metrics[metric][layer] == pytest.approx(scores, rel=1e-5)
