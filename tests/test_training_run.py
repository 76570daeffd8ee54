"""Whole training runs: resumable to the bit, crash-safe, every option does what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_bits, dense_model, load, logits_of
from tiny_training import DATA, OPTIONS, TOKENIZER, documents, moe_model, run
from torch import Tensor

import fusion_upcycle.training.module as module_file
from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.texts.perplexity import perplexity
from fusion_upcycle.training.checkpoint_folders import checkpoints_in
from fusion_upcycle.training.checkpoints import STATE_FILE, load_state
from fusion_upcycle.training.fit import document_positions, prepare
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.options import GROUPS, make_training_options
from fusion_upcycle.training.parameters import group_of_parameters, optimizer_groups
from fusion_upcycle.training.router_rate import RouterRate

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

LOSSES = ("lm_nats_per_token", "balance", "z", "total", "gradient_norm", "learning_rate")


def losses(folder: Path) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in LOSSES) for row in read_metrics(folder / "log")]


class Killed(BaseException):
    """Stands for the power cut in tests that need not lose the process."""


def dying_at(monkeypatch: pytest.MonkeyPatch, step: int) -> pytest.MonkeyPatch:
    """Let the run die when it has taken `step` steps."""
    original = PretrainingModule.training_step

    def training_step(self: Any, ids: Tensor, batch_idx: int) -> None:
        if self.global_step == step:
            raise Killed
        original(self, ids, batch_idx)

    monkeypatch.setattr(PretrainingModule, "training_step", training_step)
    return monkeypatch


# --- resuming ---------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_step_after_any_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(moe_model("glm4_moe"), tmp_path / "whole", 7, bias_update_rate=0.01)
    for step in (1, 2, 6):
        folder = tmp_path / str(step)
        options: dict[str, Any] = {"checkpoint_every": 1, "bias_update_rate": 0.01}
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dying_at(patch, step)
            run(moe_model("glm4_moe"), folder, 7, **options)
        resumed = run(moe_model("glm4_moe"), folder, 7, **options)
        assert resumed.record["resumed_from"] == f"step-{step:09d}"
        assert losses(folder) == losses(tmp_path / "whole")
        assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())


def test_a_finished_run_is_only_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(dense_model(vocab_size=257), tmp_path, 6)
    dying_at(monkeypatch, 6)
    again = run(dense_model(vocab_size=257), tmp_path, 6)
    assert again.record["final"] == first.record["final"]
    assert_same_bits(again.model.state_dict(), first.model.state_dict())


def test_a_checkpoint_of_another_order_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fusion_upcycle.training.run.ORDER_VERSION", 1)
        run(dense_model(vocab_size=257), tmp_path, 2)
    words = r"order of examples was version 1, is 2 .*pass resume=False"
    with pytest.raises(UpcyclingError, match=words):
        run(dense_model(vocab_size=257), tmp_path, 2)


def test_resume_false_starts_over(tmp_path: Path) -> None:
    run(dense_model(vocab_size=257), tmp_path, 6)
    again = run(dense_model(vocab_size=257), tmp_path, 6, seed=1, resume=False)
    assert again.record["resumed_from"] is None


def test_a_checkpoint_of_other_settings_is_refused_with_the_fields(tmp_path: Path) -> None:
    run(dense_model(vocab_size=257), tmp_path, 6)
    with pytest.raises(
        UpcyclingError, match=r"options\.learning_rate was 0\.01, is 0\.02"
    ) as error:
        run(dense_model(vocab_size=257), tmp_path, 6, learning_rate=0.02, weight_decay=0.3)
    assert "options.weight_decay was 0.1, is 0.3" in str(error.value)
    assert "resume=False" in str(error.value)
    other = {"numbers": DATA["numbers"] | {"count": 9}}
    with pytest.raises(UpcyclingError, match=r"data\.numbers was"):
        run(dense_model(vocab_size=257), tmp_path, 6, data=other)
    for fields in ({"seed": 1}, {"rms_norm_eps": 1e-2}):  # other weights; the same, used otherwise
        with pytest.raises(UpcyclingError, match=r"model was"):
            run(dense_model(vocab_size=257, **fields), tmp_path, 6)
    run(dense_model(vocab_size=257), tmp_path, 6, micro_batch_size=2, log_every=3)


# --- what is trained --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_learns_and_its_routers_get_the_balance_gradient(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, float] = {}
    original = PretrainingModule._clip

    def clip(self: Any, optimizer: Any) -> float:
        for name, parameter in self.model.named_parameters():
            if self._groups[name] == "routers" and parameter.requires_grad:
                seen[name] = float(parameter.grad.norm())
        return original(self, optimizer)

    # Nothing but the balance loss reaches the routers.
    monkeypatch.setattr(
        module_file, "cross_entropy", lambda logits, targets: 0.0 * logits.float().sum()
    )
    monkeypatch.setattr(PretrainingModule, "_clip", clip)
    run(moe_model(family), tmp_path, 1, z_weight=0.0)
    assert len(seen) == 2
    assert all(norm > 1e-8 for norm in seen.values()), seen


def test_the_logged_losses_are_those_of_the_model(tmp_path: Path) -> None:
    model = moe_model()
    windows = module_inputs(tmp_path)
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        routers = find_routers(model)
        with routers.listening() as routed:
            model(input_ids=windows[:, :-1], use_cache=False)
    lm = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean().item()
    balance = 0.0
    for layer in routed.logits:
        counts = layer.topk(2).indices.flatten().bincount(minlength=4)
        balance += 4 * float((counts / counts.sum() * layer.softmax(-1).mean(0)).sum()) / 2
    z = sum(float(layer.logsumexp(-1).square().mean()) for layer in routed.logits) / 2
    run(model, tmp_path, 1, schedule="constant")
    (row,) = read_metrics(tmp_path / "log")
    assert row["lm_nats_per_token"] == pytest.approx(lm, rel=1e-5)
    assert row["balance"] == pytest.approx(balance, rel=1e-5)
    assert row["z"] == pytest.approx(z, rel=1e-5)
    assert row["total"] == pytest.approx(lm + 0.01 * balance + 0.001 * z, rel=1e-5)
    assert row["tokens"] == 64


def test_the_balance_loss_takes_the_load_of_all_micro_batches_so_far(tmp_path: Path) -> None:
    model, expected = moe_model(), 0.0
    routers = find_routers(model)
    counts = torch.zeros(2, 4)
    for part in module_inputs(tmp_path).split(2):
        with torch.no_grad(), routers.listening() as routed:
            model(input_ids=part[:, :-1], use_cache=False)
        for layer, logits in enumerate(routed.logits):
            counts[layer] += logits.topk(2).indices.flatten().bincount(minlength=4)
            load = counts[layer] / counts[layer].sum()
            expected += 4 * float((load * logits.softmax(-1).mean(0)).sum()) / 2 / 2
    run(model, tmp_path, 1, micro_batch_size=2)
    (row,) = read_metrics(tmp_path / "log")
    assert row["balance"] == pytest.approx(expected, rel=1e-5)


def module_inputs(folder: Path) -> Tensor:
    """The windows of the first step."""
    from fusion_upcycle.training.data import pack_sources
    from fusion_upcycle.training.objectives.texts import Windows
    from fusion_upcycle.training.order import ExampleOrder

    texts = pack_sources(DATA, TOKENIZER, folder / "work" / "data", separator=256)
    order = ExampleOrder([Windows(text, OPTIONS["context_length"]) for text in texts], None, 0)
    return torch.stack([order[i]["ids"] for i in range(OPTIONS["batch_size"])])


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_training_lowers_the_held_out_loss_and_the_folder_loads(model: str, tmp_path: Path) -> None:
    made = dense_model(vocab_size=257) if model == "dense" else moe_model()
    scoring = {"context_length": 16, "stride": 8}
    before = perplexity(made, TOKENIZER, documents(3), **scoring)
    validation = {"few": DATA["numbers"] | {"count": 3}}
    output = tmp_path / "out"
    trained = run(made, tmp_path, 12, output=output, validation=validation, validate_every=5)
    loaded = load(output)
    after = perplexity(loaded, TOKENIZER, documents(3), **scoring)
    assert after["bits_per_byte"] < 0.8 * before["bits_per_byte"]
    scores = trained.record["validation"]
    assert list(scores) == [5, 10, 12]
    assert scores[12]["few"] == pytest.approx(after)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "log")}
    assert rows[12]["validation/few/bits_per_byte"] == pytest.approx(after["bits_per_byte"])
    assert_same_bits(loaded.state_dict(), trained.model.state_dict())
    record = json.loads((output / "training.json").read_text())
    assert record["tokens_trained"] == 12 * 64
    assert record["data"]["numbers"]["documents"] == 8
    assert record["parameters"]["total"] == made.num_parameters()
    assert (record["parameters"]["active"] < record["parameters"]["total"]) == (model == "moe")
    assert "768 tokens" in (output / "README.md").read_text()
    assert {"tokenizer.json", "generation_config.json"} <= {p.name for p in output.iterdir()}
    assert not checkpoints_in(tmp_path / "work" / "checkpoints")


def test_an_export_that_fails_leaves_no_folder_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("fusion_upcycle.training.export._model_card", _die)
        run(moe_model(), tmp_path, 6, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    dying_at(monkeypatch, 6)
    run(moe_model(), tmp_path, 6, output=tmp_path / "out")
    assert (tmp_path / "out" / "training.json").is_file()
    monkeypatch.undo()
    with pytest.raises(UpcyclingError, match="overwrite=True"):
        run(moe_model(), tmp_path, 6, output=tmp_path / "out")
    run(moe_model(), tmp_path, 5, output=tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 5


def _die(*_: Any) -> None:
    raise Killed


@pytest.mark.parametrize("group", GROUPS)
def test_a_frozen_group_stays_as_it_is_and_nothing_else(group: str, tmp_path: Path) -> None:
    model = moe_model("qwen2_moe")
    groups = group_of_parameters(model, find_routers(model))
    assert set(groups.values()) == set(GROUPS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = run(model, tmp_path, 2, freeze=[group]).model
    unchanged = {n for n, p in trained.named_parameters() if torch.equal(p, before[n])}
    assert unchanged == {name for name in groups if groups[name] == group}
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_selection_biases_move_by_the_load_and_stay_float32(tmp_path: Path) -> None:
    for family in ("glm4_moe", "ernie4_5_moe"):
        model = moe_model(family).bfloat16()
        for bias in find_routers(model).selection_biases():
            bias.data = bias.data.float()
        trained = run(model, tmp_path / family, 3, bias_update_rate=0.001).model
        for bias in find_routers(trained).selection_biases():
            assert bias.dtype == torch.float32
            thousandths = bias.flatten() * 1000
            assert torch.allclose(thousandths, thousandths.round(), atol=1e-3)
            assert 0 < thousandths.abs().max() < 3.5


def biases_of(model: Any) -> list[Tensor]:
    return [bias.clone() for bias in find_routers(model).selection_biases()]


def test_selection_biases_are_held_still_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"bias_update_rate": 0.01, "bias_update_after": 0.5}
    whole = run(moe_model("glm4_moe"), tmp_path / "whole", 6, **options).model
    for bias in biases_of(whole):  # moved in steps 4, 5 and 6
        assert 0.01 < bias.abs().max() < 0.035
    for step in (3, 4):
        folder, model = tmp_path / str(step), moe_model("glm4_moe")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dying_at(patch, step)
            run(model, folder, 6, checkpoint_every=1, **options)
        assert [bool(bias.any()) for bias in biases_of(model)] == [step == 4] * 2
        resumed = run(moe_model("glm4_moe"), folder, 6, checkpoint_every=1, **options)
        assert resumed.record["resumed_from"] == f"step-{step:09d}"
        assert_same_bits(resumed.model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_neox"])
def test_learning_rates_of_routers_and_decay_of_matrices_only(family: str) -> None:
    model = moe_model(family) if family in ARCHITECTURES else moe_model("sparse", family)
    options = make_training_options(tokens=9999, batch_size=1, router_learning_rate=0.5)
    routers = find_routers(model)
    kinds, rate = group_of_parameters(model, routers), RouterRate.of(routers, options)
    groups = optimizer_groups(model, kinds, options, rate)
    sizes = dict(model.named_parameters())
    for group in groups:
        is_router = [name.endswith(("mlp.gate.weight", "router.weight")) for name in group["names"]]
        assert all(is_router) or not any(is_router)
        assert group["learning_rate"] == (0.5 if all(is_router) else 2e-5)
        for name in group["names"]:
            none = "norm" in name or name.endswith("bias")  # those of experts are packed, [E, F]
            assert group["weight_decay"] == (0.0 if none else 0.1), name
    assert sum(len(group["names"]) for group in groups) == len(sizes)


# --- attention --------------------------------------------------------------------------------


#: With layers that cannot tell documents apart, and are refused.
MIXING = {"qwen3_5_moe_text", "lfm2_moe"}


@pytest.mark.parametrize("family", [f for f in ARCHITECTURES if f not in MIXING])
def test_document_attention_is_a_forward_pass_for_each_document(family: str) -> None:
    model = moe_model(family)
    first, second = ([256, *text] for text in (range(40, 50), range(60, 66)))
    ids = torch.tensor([[*first, *second]])
    positions = document_positions(ids, 256)
    assert positions.tolist() == [[*range(11), *range(7)]]
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    apart = torch.cat([logits_of(model, torch.tensor([part]))[0] for part in (first, second)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert not torch.allclose(logits_of(model, ids)[0], apart, atol=1e-3)


def test_document_attention_trains_on_documents_apart(tmp_path: Path) -> None:
    run(moe_model(), tmp_path / "causal", 1)
    run(moe_model(), tmp_path / "document", 1, attention="document")
    windows = module_inputs(tmp_path / "causal")
    inputs, positions = windows[:, :-1], document_positions(windows[:, :-1], 256)
    with torch.no_grad():
        logits = moe_model()(input_ids=inputs, position_ids=positions, use_cache=False).logits
    expected = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean().item()
    (row,) = read_metrics(tmp_path / "document" / "log")
    assert row["lm_nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert losses(tmp_path / "causal") != losses(tmp_path / "document")


# --- compute ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"experts_implementation": "eager"},
        {"experts_implementation": "batched_mm"},
    ],
    ids=str,
)
def test_ways_to_compute_give_the_same_losses(options: dict[str, Any], tmp_path: Path) -> None:
    run(moe_model(), tmp_path / "plain", 4)
    run(moe_model(), tmp_path / "other", 4, **options)
    for found, expected in zip(losses(tmp_path / "other"), losses(tmp_path / "plain"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_compiled_model_is_heard_and_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:  # inductor takes a minute
        graphs.append(graph)
        return graph.forward

    run(moe_model(), tmp_path / "plain", 2)
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiled(m, backend=backend))
    run(moe_model(), tmp_path / "compiled", 2, compile=True)
    assert len(graphs) == 1
    pairs = zip(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), strict=True)
    for found, expected in pairs:
        assert found == pytest.approx(expected, rel=1e-4)


def test_accumulation_changes_nothing_but_the_balance_loss(tmp_path: Path) -> None:
    run(moe_model(), tmp_path / "whole", 4, balance_weight=0.0)
    run(moe_model(), tmp_path / "parts", 4, balance_weight=0.0, micro_batch_size=1)
    for folder in ("whole", "parts"):
        rows = read_metrics(tmp_path / folder / "log")
        assert len(rows) == 4
    pairs = zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True)
    for whole, parts in pairs:
        for name, a, b in zip(LOSSES, whole, parts, strict=True):
            assert name == "balance" or a == pytest.approx(b, rel=1e-4), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_learns_and_gives_the_dtype_back(
    precision: str, given: torch.dtype, tmp_path: Path
) -> None:
    model = moe_model("glm4_moe").to(given)
    if precision == "bf16-mixed":
        with pytest.raises(UpcyclingError, match=r"bf16-mixed.*grouped_mm in float32.*fsdp"):
            run(moe_model("glm4_moe"), tmp_path, 8, precision=precision)
        model.set_experts_implementation("eager")
    trained = run(model, tmp_path, 8, precision=precision, learning_rate=0.02)
    assert trained.model.dtype == given
    found = losses(tmp_path)
    assert found[-1][0] < found[0][0] - 0.5


@pytest.mark.parametrize("family", ["glm4_moe", "lfm2_moe", "ernie4_5_moe"])
def test_selection_biases_stay_float32_as_transformers_loads_them(family: str) -> None:
    model = moe_model(family)
    before = [bias.fill_(1.001).clone() for bias in find_routers(model).selection_biases()]
    prepare(model, make_training_options(tokens=9999, batch_size=1, precision="bf16-true"))
    assert model.dtype == torch.bfloat16
    for bias, exact in zip(find_routers(model).selection_biases(), before, strict=True):
        assert torch.equal(bias, exact)


# --- what goes wrong --------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = module_file.cross_entropy, 0

    def cross_entropy(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls == 8 else 1.0)

    monkeypatch.setattr(module_file, "cross_entropy", cross_entropy)
    with pytest.raises(UpcyclingError, match=r"Step 7 \(windows 28 to 31 .*nan.*learning rate"):
        run(moe_model(), tmp_path, 12)
    (left,) = checkpoints_in(tmp_path / "work" / "checkpoints")
    weights = load_state(left / STATE_FILE)["state_dict"].values()
    assert left.name == "step-000000005"
    assert all(tensor.isfinite().all() for tensor in weights)


def test_unbalanced_routers_are_warned_of_once(tmp_path: Path) -> None:
    model = moe_model()
    for router in find_routers(model).modules.values():
        router.weight.data[0] *= 30  # one expert has it all or nothing
    with pytest.warns(UserWarning, match=r"layer 0: .*balance_weight") as caught:
        trained = run(model, tmp_path, 6, learning_rate=1e-5)
    assert len([w for w in caught if "Routers out of balance" in str(w.message)]) == 1
    assert "layer 0" in trained.record["router_warning"]


def test_routing_is_logged_for_every_layer_and_expert(tmp_path: Path) -> None:
    run(moe_model(), tmp_path, 6, log_every=3)
    rows = read_metrics(tmp_path / "log")
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        for layer in range(2):
            shares = [row[f"layer_{layer}/load_{expert}"] for expert in range(4)]
            assert sum(shares) == pytest.approx(1.0)
            variation = torch.tensor(shares).std(correction=0).item() / 0.25
            assert row[f"layer_{layer}/load_cv"] == pytest.approx(variation, rel=1e-4)
            assert 0 < row[f"layer_{layer}/router_entropy_bits"] <= 2
            assert row[f"layer_{layer}/dead_experts"] == sum(share < 0.02 for share in shares)
            assert row[f"layer_{layer}/balance_drop"] >= 0
    assert list((tmp_path / "log" / "tensorboard").rglob("events*"))


def test_the_progress_bar_shows_loss_and_speed_also_of_a_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying_at(patch, 2)
        run(moe_model(), tmp_path, 3, checkpoint_every=1)
    capsys.readouterr()
    run(moe_model(), tmp_path, 3, checkpoint_every=1, progress=True)
    said = capsys.readouterr()
    assert "training: 100%" in said.out + said.err
    assert "lm_nats_per_token=" in said.out + said.err
    assert "tokens_per_second=" in said.out + said.err
    assert not any(word in said.out + said.err for word in ("v_num", "Epoch", "GPU", "litlogger"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 63}, "tokens=63 is less than one step.*tokens=64 or more"),
        ({"tokens": None}, "tokens=None and examples=None: one of the two"),
        ({"examples": 9}, "tokens=6400 and examples=9: one of the two"),
        ({"objective": "lm"}, "objective 'lm'.*causal_lm"),
        ({"learning_rat": 1}, "learning_rat.*Did you mean 'learning_rate'"),
        ({"learning_rate": 0}, "learning_rate=0 must be a number, above 0"),
        ({"learning_rate": "1"}, "learning_rate='1' must be a number"),
        ({"schedule": "linear"}, "schedule 'linear'.*three_phase"),
        ({"precision": "16"}, "precision '16'.*bf16-mixed"),
        ({"strategy": "deepspeed"}, "strategy 'deepspeed'.*fsdp"),
        ({"attention": "sliding"}, "attention 'sliding'.*document"),
        ({"freeze": "routers"}, "freeze='routers' must be a list"),
        ({"freeze": ["router"]}, "'router'.*Did you mean 'routers'"),
        ({"batch_size": 3, "devices": 2}, "batch_size=3.*2 device"),
        ({"micro_batch_size": 3}, "micro_batch_size=3"),
        ({"betas": [0.9]}, "two numbers"),
        ({"betas": [0.9, 1.0]}, "below 1"),
        ({"warmup_share": 0.9, "schedule": "wsd"}, "more than the whole budget"),
        ({"bias_update_after": 0.5}, "Pass bias_update_rate=0.001"),
        ({"bias_update_after": 1.5, "bias_update_rate": 0.001}, "bias_update_after=1.5"),
        ({"final_share": 1.5}, "at most 1"),
        ({"mixture": {"a": 0}}, r"mixture\.a=0"),
        ({"compile": "yes"}, "true or false"),
        ({"log_every": -1}, "log_every=-1"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused_by_name(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UpcyclingError, match=words):
        make_training_options(**{"tokens": 6400} | OPTIONS | options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias_update_rate": 0.1}, "mixtral has no selection bias"),
        ({"freeze": list(GROUPS)}, "no parameter"),
        ({"context_length": 65}, "longer than the model's 64 positions"),
        ({"experts_implementation": "fast"}, "experts_implementation=fast"),
        ({"mixture": {"other": 1.0}}, "'other'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_model_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=words):
        run(moe_model(), tmp_path, **options)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"256.*67 embeddings.*tokenizer"):
        run(dense_model(), tmp_path)
    with pytest.raises(UpcyclingError, match="LlamaModel does not predict tokens"):
        run(dense_model(vocab_size=257, backbone=True), tmp_path)
    for family, kind in (("qwen3_5_moe_text", "linear_attention"), ("lfm2_moe", "conv")):
        with pytest.raises(UpcyclingError, match=f"attention=document.*{kind}"):
            run(moe_model(family), tmp_path, attention="document")


def test_checkpoints_run_no_code_when_loaded(tmp_path: Path) -> None:
    path = tmp_path / STATE_FILE
    torch.save({"model": Killed}, path)
    with pytest.raises(Exception, match=r"Weights only|weights_only"):
        load_state(path)
