"""Objectives: each step is that of a loop by hand, for dense models and every routing."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.models.hf_clip import HFCLIPClassifier
from test_training_run import Killed, dying_at
from tiny import assert_same_bits
from tiny_objectives import PAIRS, Case, case, mask_tokenizer, moe, relative, run
from tiny_vision import KINDS, clip_processor, image_folder, images
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModel, CLIPModel, PreTrainedModel

from fusion_upcycle import upcycle
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.training.churn import first_taker
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.moments import load_moments
from fusion_upcycle.training.objectives import objective_for
from fusion_upcycle.training.objectives.masked_lm import MaskedWindows
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.order import ExampleOrder
from fusion_upcycle.training.parameters import count_parameters, group_of_parameters
from fusion_upcycle.training.run import Origin
from fusion_upcycle.training.seen import MEASURED

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

FAMILIES = ("vit", "clip_vision_model", "t5", "bert", "gemma2", "gpt_neox")
#: One of each objective.
OBJECTIVES = {
    "gpt_neox": "causal_lm",
    "bert": "masked_lm",
    "t5": "seq2seq",
    "vit": "image_classification",
    "clip_vision_model": "clip",
}
NO_BALANCE = {"balance_weight": 0.0, "z_weight": 0.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def losses(folder: Path) -> list[float]:
    rows = read_metrics(folder / "log")
    (name,) = [name for name in rows[0] if "_nats_per_" in name and "validation" not in name]
    return [row[name] for row in rows]


def logged(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(folder / "log")
    ]


def loaded(folder: Path) -> PreTrainedModel:
    return load_by_config(folder)


# --- each family ------------------------------------------------------------------------------

ROUTINGS = dict.fromkeys(FAMILIES, "token_choice")
ROUTINGS |= {"clip_vision_model": "expert_choice", "t5": "expert_choice", "bert": "hash"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_is_scored_and_its_folder_loads(family: str, tmp_path: Path) -> None:
    given = case(family, tmp_path)
    model, output = moe(given.dense, ROUTINGS[family]), tmp_path / "out"
    trained = run(
        given, model, tmp_path, 20, output=output, validation=given.data, learning_rate=0.02
    )
    found = losses(tmp_path)
    assert sum(found[-5:]) / 5 < 0.9 * sum(found[:3]) / 3
    (scores,) = trained.record["validation"][20].values()
    assert next(value for name, value in scores.items() if "loss" in name) < found[0]
    assert ("accuracy" in scores) == (family in ("vit", "clip_vision_model"))
    again = loaded(output)
    assert type(again) is type(model)
    assert_same_bits(again.state_dict(), trained.model.state_dict())
    config = json.loads((output / "config.json").read_text())
    assert "AutoModel" in config["auto_map"] and (output / "modeling_sparse.py").is_file()
    unit = "tokens" if given.budget == "tokens" else "examples"
    assert trained.record["cost"][f"{unit}_per_cpu_second"] > 0
    assert f"{trained.record[f'{unit}_trained']:,} {unit}" in (output / "README.md").read_text()
    assert trained.record["objective"] == OBJECTIVES.get(family, "causal_lm")


# --- by hand ----------------------------------------------------------------------------------


def by_hand_causal_lm(model: Any, batch: dict[str, Tensor], given: Case) -> Tensor:
    logits = model(input_ids=batch["ids"][:, :-1]).logits
    told = logits.log_softmax(-1).gather(-1, batch["ids"][:, 1:, None])
    return -told.mean()


def by_hand_masked_lm(model: Any, batch: dict[str, Tensor], given: Case) -> Tensor:
    labels = batch["labels"]
    told = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)[labels >= 0]
    return -told.gather(-1, labels[labels >= 0][:, None]).mean()


def by_hand_seq2seq(model: Any, batch: dict[str, Tensor], given: Case) -> Tensor:
    """Each pair alone, without padding."""
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    names = ("input_ids", "attention_mask", "labels")
    for ids, mask, labels in zip(*(batch[name] for name in names), strict=True):
        target = labels[labels >= 0][None]
        logits = model(input_ids=ids[mask == 1][None], labels=target).logits
        nats = nats + cross_entropy(logits[0], target[0], reduction="sum")
        tokens += target.numel()
    return nats / tokens


def by_hand_image_classification(model: Any, batch: dict[str, Tensor], given: Case) -> Tensor:
    return model(pixel_values=batch["pixel_values"].double(), labels=batch["labels"]).loss


def by_hand_clip(model: Any, batch: dict[str, Tensor], given: Case) -> Tensor:
    """By FusionBench's classifier, which puts our tower in the place of its own."""
    assert given.clip is not None
    whole = CLIPModel.from_pretrained(given.clip.folder).double()
    whole.vision_model = model
    judge = HFCLIPClassifier(whole, clip_processor())
    judge.set_classification_task(list(KINDS))
    return cross_entropy(judge(batch["pixel_values"].double()), batch["labels"])


def first_batch(given: Case, model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    options = make_training_options(
        **{given.budget: 999_999}, batch_size=4, **given.more, schedule="constant"
    )
    objective = objective_for(model, given.processor, options, given.clip)
    order = ExampleOrder(objective.read(given.data, folder), None, 0)
    return objective.collate([order[number] for number in range(4)])


@pytest.mark.parametrize("family", OBJECTIVES)
def test_loss_and_gradients_of_the_first_step_are_those_of_a_loop_in_float64(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = case(family, tmp_path)
    model = moe(given.dense)
    without_dropout(model)
    exact = copy.deepcopy(model).double().train()
    exact.set_experts_implementation("eager")
    by_hand: Callable[..., Tensor] = globals()[f"by_hand_{OBJECTIVES[family]}"]
    expected = by_hand(exact, first_batch(given, model, tmp_path / "data"), given)
    expected.backward()
    wanted = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    for part in (None, 1):
        found: dict[str, Tensor] = {}
        watch_gradients(monkeypatch, found)
        folder = tmp_path / f"parts_of_{part}"
        run(given, copy.deepcopy(model), folder, 1, micro_batch_size=part, **NO_BALANCE)
        assert losses(folder)[0] == pytest.approx(float(expected.detach()), rel=1e-5)
        names = sorted(wanted)
        assert set(names) <= set(found)
        assert relative([found[n] for n in names], [wanted[n] for n in names]) < 1e-4
    wanted[names[0]] = 1.5 * wanted[names[0]] + 1.0  # and another gradient would be seen
    assert relative([found[n] for n in names], [wanted[n] for n in names]) > 1e-3


def without_dropout(model: PreTrainedModel) -> None:
    """Also that of attention, which a T5's and a BERT's modules hold as numbers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("inner_dropout", "attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def watch_gradients(monkeypatch: pytest.MonkeyPatch, found: dict[str, Tensor]) -> None:
    original = PretrainingModule._clip

    def clip(self: Any, optimizer: Any) -> float:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()
        return original(self, optimizer)

    monkeypatch.setattr(PretrainingModule, "_clip", clip)


# --- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_a_run_that_dies_goes_on_to_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, masks, padding and a mixture of sources, whose draws are those of the step."""
    dropout = {"dropout_rate" if family == "t5" else "hidden_dropout_prob": 0.2}
    given = case(family, tmp_path, **dropout)
    (specification,) = given.data.values()
    given.data = {"a": specification, "b": specification}
    options = {"checkpoint_every": 2, "mixture": {"a": 0.3, "b": 0.7}}
    model = moe(given.dense)
    whole = run(given, copy.deepcopy(model), tmp_path / "whole", 5, **options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying_at(patch, 3)
        run(given, copy.deepcopy(model), tmp_path / "cut", 5, **options)
    resumed = run(given, copy.deepcopy(model), tmp_path / "cut", 5, **options)
    assert resumed.record["resumed_from"] == "step-000000002"
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())
    run(given, copy.deepcopy(model), tmp_path / "other", 5, **options | {"seed": 1})
    assert logged(tmp_path / "other") != logged(tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_examples(tmp_path: Path) -> None:
    for family in ("t5", "vit"):
        given = case(family, tmp_path / family)
        (source,) = given.data
        run(given, copy.deepcopy(given.dense), tmp_path / family, 1)
        given.data = {source: other_data(family, tmp_path)}
        with pytest.raises(UpcyclingError, match=rf"data\.{source} was"):
            run(given, given.dense, tmp_path / family, 1)


def other_data(family: str, folder: Path) -> str:
    if family == "vit":  # the same labels, and one image is another
        root = image_folder(folder / "others")
        images(1, seed=1)[0].save(next(root.rglob("00.png")))
        return str(root)
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:-1])))
    return str(folder / "x.jsonl")


# --- masks ------------------------------------------------------------------------------------


def masked_source(folder: Path, **options: Any) -> MaskedWindows:
    given = case("bert", folder)
    chosen = make_training_options(tokens=9999, batch_size=1, **{"context_length": 40} | options)
    (source,) = objective_for(given.dense, given.processor, chosen).read(given.data, folder / "c")
    assert isinstance(source, MaskedWindows)
    return source


def test_fifteen_in_a_hundred_tokens_are_told_and_masked_as_in_bert(tmp_path: Path) -> None:
    tokenizer, source = mask_tokenizer(), masked_source(tmp_path)
    begin, end, mask = (getattr(tokenizer, f"{n}_token_id") for n in ("cls", "sep", "mask"))
    kinds, chosen, plain = [0, 0, 0], 0, 0
    for number in range(600):
        example = source.example(number % len(source), number)
        ids, labels = example["input_ids"], example["labels"]
        text = torch.from_numpy(source.text.window(number % len(source), 38)[:-1].copy()).long()
        assert (ids[0], ids[-1]) == (begin, end)
        told = labels != -100
        original = torch.where(told, labels, ids)[1:-1]
        assert torch.equal(original, text)  # nothing but the told places is changed
        assert not told[0] and not told[-1] and not told[1:-1][text == end].any()
        assert int(told.sum()) == max(1, round(0.15 * int((text != end).sum())))
        there = ids[told]
        kinds[0] += int((there == mask).sum())
        kinds[1] += int((there == labels[told]).sum())
        kinds[2] += int(((there != mask) & (there != labels[told])).sum())
        chosen, plain = chosen + int(told.sum()), plain + int((text != end).sum())
    assert chosen / plain == pytest.approx(0.15, abs=0.01)
    assert [kind / chosen for kind in kinds] == pytest.approx([0.8, 0.1, 0.1], abs=0.025)


def test_masks_are_drawn_anew_in_each_pass_and_again_with_the_same_seed(tmp_path: Path) -> None:
    source, other = masked_source(tmp_path), masked_source(tmp_path, seed=1)

    def places(source: MaskedWindows, number: int) -> list[int]:
        return (source.example(0, number)["labels"] != -100).nonzero().flatten().tolist()

    assert places(source, 7) == places(source, 7)
    assert places(source, 7) != places(source, 8)
    assert places(source, 7) != places(other, 7)


def test_roberta_has_fewer_positions_than_its_table(tmp_path: Path) -> None:
    given = case("roberta", tmp_path, max_position_embeddings=300)
    limit = 300 - given.processor.pad_token_id - 1
    run(given, given.dense, tmp_path, 1, context_length=limit, batch_size=1, tokens=limit)
    with pytest.raises(UpcyclingError, match=rf"context_length={limit + 1}.*{limit} positions"):
        run(given, given.dense, tmp_path, 1, context_length=limit + 1, tokens=9999)


# --- routers ----------------------------------------------------------------------------------


def test_each_stack_of_a_t5_has_its_own_tokens_and_padding_has_none(tmp_path: Path) -> None:
    """Encoder by expert choice, decoder by token choice: balance of the decoder's layers alone."""
    given = case("t5", tmp_path)
    model = moe(given.dense, "expert_choice", capacity_factor=0.5)
    without_dropout(model)
    batch = first_batch(given, model, tmp_path / "data")
    targets = batch["labels"]
    shifted = model.prepare_decoder_input_ids_from_labels(labels=targets)
    said = {n: batch[n] for n in ("input_ids", "attention_mask")}
    routers = find_routers(model)
    assert routers.expert_choice == [True, True, False, False]
    with torch.no_grad(), routers.listening() as routed:
        model(**said, decoder_input_ids=shifted)
    kept = [batch["attention_mask"].flatten() == 1] * 2 + [targets.flatten() != -100] * 2
    assert not all(bool(k.all()) for k in kept)
    balance, z, left_out = 0.0, 0.0, {}
    layers = zip(routed.logits, routed.chosen, kept, strict=True)
    for layer, (logits, chosen, of_use) in enumerate(layers):
        z += float(logits[of_use].logsumexp(-1).square().mean()) / 4
        if layer < 2:
            taken = torch.zeros(len(logits), dtype=torch.bool)
            taken[chosen.flatten()] = True
            left_out[layer] = float((~taken & of_use).sum() / of_use.sum())
        else:
            load = chosen[of_use].flatten().bincount(minlength=4).float()
            shares = logits[of_use].softmax(-1).mean(0)
            balance += 4 * float((load / load.sum() * shares).sum()) / 2
    run(given, model, tmp_path, 1)
    (row,) = read_metrics(tmp_path / "log")
    assert row["balance"] == pytest.approx(balance, rel=1e-5)
    assert row["z"] == pytest.approx(z, rel=1e-5)
    assert max(left_out.values()) > 0
    for layer, share in left_out.items():
        assert row[f"layer_{layer}/left_out"] == pytest.approx(share)
    assert "layer_2/left_out" not in row
    expected = row["seq2seq_nats_per_token"] + 0.01 * balance + 0.001 * z
    assert row["total"] == pytest.approx(expected, rel=1e-5)


def test_where_all_experts_choose_there_is_no_balance_loss(tmp_path: Path) -> None:
    given = case("vit", tmp_path)
    run(given, moe(given.dense, "expert_choice", capacity_factor=1.0), tmp_path, 3)
    for row in read_metrics(tmp_path / "log"):
        assert row["balance"] == 0.0 and row["z"] > 0
        assert row["layer_0/load_cv"] == 0.0 and row["layer_0/left_out"] > 0
        assert 0 <= row["layer_0/churn"] <= 1


def test_hash_routing_has_no_router_and_its_experts_are_known(tmp_path: Path) -> None:
    given = case("bert", tmp_path)
    model = moe(given.dense, "hash")
    routers = find_routers(model)
    groups = group_of_parameters(model, routers)
    assert not routers and "routers" not in groups.values() and "experts" in groups.values()
    trained = run(given, model, tmp_path, 2)
    assert trained.record["router_learning_rate"] is None
    (row, _) = read_metrics(tmp_path / "log")
    assert row["balance"] == row["z"] == 0.0
    assert not any("layer" in name for name in row)


def test_in_expert_choice_the_first_expert_is_the_largest_that_took_the_token() -> None:
    logits = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 4.0]])
    assert first_taker(logits, torch.tensor([[0], [2]])).tolist() == [0, -1, 1]
    assert first_taker(logits, torch.tensor([[0, 1], [0, 2]])).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("routing", "used"), [("token_choice", 2), ("hash", 2), ("expert_choice", 1.5)]
)
def test_active_parameters_are_those_of_the_experts_that_a_token_uses(
    routing: str, used: float, tmp_path: Path
) -> None:
    more = {"capacity_factor": 1.5} if routing == "expert_choice" else {}
    model = moe(case("bert", tmp_path).dense, routing, **more)
    groups = group_of_parameters(model, find_routers(model))
    experts = sum(p.numel() for n, p in model.named_parameters() if groups[n] == "experts")
    found = count_parameters(model, find_routers(model))
    assert found["total"] - found["active"] == experts * (4 - used) / 4


GROUPS = {
    "t5": {
        "encoder.block.1.layer.0.SelfAttention.q.weight": "attention",
        "decoder.block.1.layer.1.EncDecAttention.o.weight": "attention",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "attention",
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": "ffn",
        "encoder.block.0.layer.1.layer_norm.weight": "norms",
        "shared.weight": "embeddings",
    },
    "bert": {
        "bert.encoder.layer.0.attention.self.query.bias": "attention",
        "bert.encoder.layer.0.attention.output.LayerNorm.weight": "norms",
        "bert.encoder.layer.0.output.dense.weight": "ffn",
        "bert.embeddings.position_embeddings.weight": "embeddings",
        "cls.predictions.transform.dense.weight": "others",
    },
    "vit": {
        "vit.layers.0.attention.q_proj.weight": "attention",
        "vit.layers.0.layernorm_before.bias": "norms",
        "vit.layers.0.mlp.fc1.bias": "ffn",
        "vit.embeddings.cls_token": "embeddings",
        "classifier.weight": "others",
    },
    "gpt_neox": {
        "gpt_neox.layers.0.attention.query_key_value.weight": "attention",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "ffn",
        "gpt_neox.final_layer_norm.weight": "norms",
    },
}


@pytest.mark.parametrize("family", GROUPS)
def test_groups_of_parameters_are_found_in_every_family(family: str, tmp_path: Path) -> None:
    dense = case(family, tmp_path).dense
    groups = group_of_parameters(dense, find_routers(dense))
    assert {name: groups.get(name) for name in GROUPS[family]} == GROUPS[family]
    first = moe(dense, moe_layers={"encoder": [0], "decoder": [0]} if family == "t5" else [0])
    sparse = group_of_parameters(first, find_routers(first))
    assert {"routers", "experts", "ffn"} <= set(sparse.values())
    kept = {n: group for n, group in groups.items() if n in sparse}
    assert {name: sparse[name] for name in kept} == kept


# --- moments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "t5", "bert", "gpt_neox", "gpt2"])
def test_every_family_carries_the_moments_of_its_dense_model(family: str, tmp_path: Path) -> None:
    given = case(family, tmp_path)
    dense = run(given, given.dense, tmp_path, 3, output=tmp_path / "dense", save_moments=True)
    options = {"num_experts": 3, "expert_init": "noise", "target": "sparse", "verify": "none"}
    made = upcycle(tmp_path / "dense", tmp_path / "moe", progress=False, **options)
    model = loaded(made.output)
    recorded = made.record["options"]
    moments = load_moments(tmp_path / "dense", model, recorded)
    groups = group_of_parameters(model, find_routers(model))
    fresh = {name for name in groups if name not in moments}
    assert fresh == {name for name, group in groups.items() if group == "routers"}
    own = load_moments(tmp_path / "dense", dense.model, None)
    for name, values in moments.items():
        assert float(values["step"]) == 3
        for kind in ("exp_avg", "exp_avg_sq"):
            if groups[name] != "experts":
                assert torch.equal(values[kind], own[name][kind].float()), name
            else:
                assert torch.equal(values[kind][0], values[kind][2])
                assert values[kind].any()
    if family == "gpt2":  # whose matrices lie transposed
        up = own["transformer.h.1.mlp.c_fc.weight"]["exp_avg"]
        assert torch.equal(moments["transformer.h.1.mlp.experts.up_proj"]["exp_avg"][1], up.T)
    state = {"optimizer_state": tmp_path / "dense", "origin": Origin("moe", recorded)}
    run(given, model, tmp_path / "again", 1, **state)


# --- compute ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "routing"), [("t5", "expert_choice"), ("bert", "hash")])
def test_layers_that_run_again_are_given_their_padding_and_tokens(
    family: str, routing: str, tmp_path: Path
) -> None:
    given = case(family, tmp_path)
    model = moe(given.dense, routing)
    run(given, copy.deepcopy(model), tmp_path / "plain", 2)
    run(given, copy.deepcopy(model), tmp_path / "again", 2, activation_checkpointing=True)
    pairs = zip(logged(tmp_path / "again"), logged(tmp_path / "plain"), strict=True)
    for found, expected in pairs:
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["vit", "clip_vision_model"])
def test_images_are_given_in_the_precision_of_the_model(family: str, tmp_path: Path) -> None:
    given = case(family, tmp_path)
    for precision in ("bf16-true", "bf16-mixed"):
        run(given, copy.deepcopy(given.dense), tmp_path / precision, 1, precision=precision)
    assert losses(tmp_path / "bf16-true") == pytest.approx(
        losses(tmp_path / "bf16-mixed"), rel=0.05
    )


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("bert", {"objective": "causal_lm"}, "not for a BertForMaskedLM.*by masked_lm"),
        ("gpt_neox", {"objective": "clip"}, "not for a GPTNeoX.*objective=.auto"),
        ("vit", {"tokens": 99_999, "examples": None}, "image_classification is in examples"),
        ("bert", {"examples": 99, "tokens": None}, "masked_lm is in tokens"),
        ("t5", {"attention": "document"}, "attention=document is for causal_lm"),
        ("bert", {"context_length": 65, "tokens": 999}, "longer than the model's 64 positions"),
        ("t5", {"context_length": 3}, r"target of example 1 has 4 tokens.*Raise it"),
        ("vit", {"data": {}}, "data is empty"),
        ("vit", {"data": {"x": "nowhere.parquet"}}, r"data\.x: there is no file"),
        ("t5", {"data": {"x": "nowhere.jsonl"}}, r"data\.x: there is no file"),
        ("t5", {"validation": {"x": {"path": "y", "spilt": 1}}}, r"validation\.x.*'split'"),
        ("vit", {"data": ["images"]}, r"data=\['images'\] must be a mapping"),
    ],
    ids=str,
)
def test_options_and_data_that_do_not_fit_are_refused(
    family: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = case(family, tmp_path)
    with pytest.raises(UpcyclingError, match=words):
        run(given, given.dense, tmp_path, 1, **options)


def test_models_and_processors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pictures, texts = case("vit", tmp_path / "a"), case("bert", tmp_path / "b")
    for given, other in ((pictures, texts), (texts, pictures)):
        given.processor, kept = other.processor, given.processor
        with pytest.raises(UpcyclingError, match=r"needs the model's (image proc|tok)"):
            run(given, given.dense, tmp_path, 1)
        given.processor = kept
    with pytest.raises(UpcyclingError, match="ViTModel has no head"):
        run(pictures, AutoModel.from_config(pictures.dense.config), tmp_path, 1)
    tower = case("clip_vision_model", tmp_path / "c")
    tower.clip, judge = None, tower.clip
    with pytest.raises(UpcyclingError, match='give clip_model="FOLDER"'):
        run(tower, tower.dense, tmp_path, 1)
    texts.clip = judge
    with pytest.raises(UpcyclingError, match=r"clip_model=.* is for vision towers"):
        run(texts, texts.dense, tmp_path, 1)
    maskless = case("bert", tmp_path / "d")
    maskless.processor.mask_token = None
    with pytest.raises(UpcyclingError, match="no mask token"):
        run(maskless, maskless.dense, tmp_path, 1)


def test_an_encoder_with_a_decoders_head_sees_what_it_is_to_predict(tmp_path: Path) -> None:
    from transformers import BertLMHeadModel

    given = case("bert", tmp_path)
    with pytest.raises(UpcyclingError, match=r"is_decoder=true.*AutoModelForMaskedLM"):
        run(given, BertLMHeadModel(given.dense.config), tmp_path, 1)


def test_classes_go_by_their_names_and_labels_need_one(tmp_path: Path) -> None:
    given = case("vit", tmp_path)
    model = given.dense
    model.config.id2label = {0: "owl", 1: "Cat", 2: "dog"}
    options = make_training_options(examples=99, batch_size=1)
    (source,) = objective_for(model, given.processor, options).read(given.data, tmp_path)
    assert [int(source.example(i, i)["labels"]) for i in range(12)] == [1] * 4 + [2] * 4 + [0] * 4
    model.config.id2label = {0: "owl", 1: "cat"}
    with pytest.raises(UpcyclingError, match=r"data\.kinds: the model has no class 'dog'"):
        objective_for(model, given.processor, options).read(given.data, tmp_path)
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(UpcyclingError, match=r"data\.kinds: image 8 has the label 2"):
        objective_for(model, given.processor, options).read(given.data, tmp_path)


def test_inputs_that_are_cut_are_counted(tmp_path: Path) -> None:
    given = case("t5", tmp_path)
    trained = run(given, given.dense, tmp_path, 1, context_length=8)
    facts = trained.record["data"]["sums"]
    assert facts["truncated_inputs"] == sum(len(pair["input"]) > 8 for pair in PAIRS) > 0
    assert facts["examples"] == len(PAIRS)
