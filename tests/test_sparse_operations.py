"""Expansion, importance, merging and moments of our own class, on six families that are not alike.

Two are given images, a T5 has two stacks, a BERT is no causal model, GPT-NeoX has two matrices with
biases, Gemma 2 three without. What one generic code does for all rows is tried on all rows.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import tiny_sparse
import torch
from helpers import grow, merge, refused
from tiny import assert_same_bits, edit_config, tensors_of
from tiny_sparse import SIX, TEXT, VISION, dense_folder, load, moe_folder, text_files
from torch import Tensor
from transformers import PreTrainedModel

import fusion_upcycle.models as models
from fusion_upcycle.architectures import moe_family
from fusion_upcycle.checkpoint.moments import write_moments
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.live import expand_model
from fusion_upcycle.expansion.router.inputs import live_router_inputs
from fusion_upcycle.importance.accumulators import weight_norms
from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.importance.run import folder_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.identity import folder_identity, live_identity
from fusion_upcycle.live.routers import hearing_inputs
from fusion_upcycle.merging.options import make_merging_options
from fusion_upcycle.merging.run import plan_models
from fusion_upcycle.models.modeling_sparse import FAMILIES, SparseMLP
from fusion_upcycle.texts.windows import Sequences
from fusion_upcycle.training.moments import load_moments
from fusion_upcycle.verify import verify


class Source:
    """An MoE of one family: its folder, and the model that was loaded of it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder / "moe"
        self.model = moe_folder(folder, name)
        self.texts = text_files(folder)

    def live(self) -> PreTrainedModel:
        return load(self.folder, self.model)


@pytest.fixture(scope="module", params=SIX)
def source(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Source]:
    yield Source(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=TEXT)
def reader(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Source]:
    yield Source(request.param, tmp_path_factory.mktemp(request.param))


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return tensors_of(folder)


# --- expansion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["copy", "noise", "permute"])
def test_an_expansion_in_memory_has_the_bits_of_that_of_its_folder(
    source: Source, init: str, tmp_path: Path
) -> None:
    options = {"num_experts": 5, "expert_init": init, "router_extension": "copy"}
    proven = init == "noise"  # the proof is the same for all
    made = grow(source.folder, tmp_path / "big", verify="layers" if proven else "none", **options)
    if proven:
        assert made.proof.claim == "approximate"  # copies are chosen together
        assert made.record["proof"]["restricted"]["max_abs"] <= 1e-4
        again = verify(made.output, progress=False, mode="layers").to_json()
        assert again["function"] == made.record["proof"]["function"]
    assert made.record["num_experts"] == {"before": 3, "after": 5}
    live = expand_model(source.live(), verify="none", **options)
    before, after = tensors_of(source.folder), tensors_of(made.output)
    assert_same_bits(saved(live.model, tmp_path / "live"), after)
    by_hand(before, after, made.record["plan"], same=init == "copy")
    loaded = load(made.output, source.model)
    assert loaded.config.num_experts == 5
    assert tiny.output(loaded, **tiny.inputs(loaded)).isfinite().all()


def by_hand(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    plan: Mapping[str, list[int]],
    *,
    same: bool,
) -> None:
    """Originals, copies, routers and all else, by the names in the files."""
    experts = {name for name in after if ".experts." in name}
    assert experts
    layers = sorted({name.partition(".experts.")[0] for name in experts}, key=stack_order)
    for block, origins in zip(layers, plan.values(), strict=True):
        for name in experts:
            if not name.startswith(f"{block}.experts."):
                continue
            number, _, part = name.removeprefix(f"{block}.experts.").partition(".")
            origin = before[f"{block}.experts.{origins[int(number)]}.{part}"]
            if int(number) < 3 or same:
                assert torch.equal(after[name], origin), name
            elif part.endswith("weight"):
                assert not torch.equal(after[name], origin), name
        router = f"{block}.gate.weight"
        assert torch.equal(after[router], before[router][origins])
        experts -= {name for name in experts if name.startswith(f"{block}.experts.")}
    assert not experts
    for name in after.keys() - before.keys():
        assert ".experts." in name, name
    rest = [n for n in after if ".experts." not in n and not n.endswith("gate.weight")]
    assert all(torch.equal(after[name], before[name]) for name in rest)


def stack_order(block: str) -> tuple[bool, list[int]]:
    return "decoder." in block, [int(part) for part in block.split(".") if part.isdigit()]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_row_is_expanded(model_type: str, tmp_path: Path) -> None:
    """Streamed and proven; of a random MoE, without a dense model."""
    kind: Any = models.model_class(type(dense := tiny.dense(model_type)))
    fields = dense.config.to_dict() | {"num_experts": 2}
    del fields["model_type"]
    config = models.config_class(type(dense.config))(**fields)
    torch.manual_seed(0)
    made = kind._from_config(config)
    tiny.shake(made)
    made.save_pretrained(tmp_path / "moe")
    big = grow(tmp_path / "moe", tmp_path / "big", num_experts=3, verify="layers")
    assert big.record["proof"]["restricted"]["max_abs"] < 1e-4
    assert big.record["family"] == f"sparse_{model_type}"


def test_the_identity_of_a_live_model_is_that_of_its_folder(source: Source) -> None:
    """By its own class, not by the dense one that it is made of."""
    assert live_identity(source.model) == folder_identity(source.folder)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"routing": "expert_choice"}, r"moe_routing=expert_choice.*each would take fewer tokens"),
        ({"routing": "hash"}, r"moe_routing=hash.*a table of token ids has no router"),
    ],
)
def test_other_routings_are_not_expanded(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    moe = moe_folder(tmp_path, "bert", **options)
    refused(grow, tmp_path / "moe", match)
    with pytest.raises(UpcyclingError, match=match):
        expand_model(moe)
    with pytest.raises(UpcyclingError, match=match):
        measure_importance(moe, {"a": ["a" * 99]}, tmp_path / "moe" / "tokenizer.json")


@pytest.mark.parametrize("names", [None, ["BertForMaskedLM"], ["SparseViTModel"]])
def test_a_folder_that_names_another_class_is_refused(names: Any, tmp_path: Path) -> None:
    moe_folder(tmp_path, "bert")
    edit_config(tmp_path / "moe", architectures=names)
    refused(grow, tmp_path / "moe", "architectures=.* is no class of such a model")


# --- importance and calibrated routers ------------------------------------------------------------


def test_gradients_are_those_of_the_model_s_own_loss(
    reader: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' loss of labels made here, of what the model was seen to be given."""
    given: list[dict[str, Tensor]] = []
    model = reader.live()
    model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    text = {"a": [tiny_sparse.PROSE * 2]}
    options = {"tokens": 48, "context_length": 24}
    found = measure_importance(model, text, reader.folder / "tokenizer.json", **options)
    ids_T = torch.tensor(tiny_sparse.tokenizer()(text["a"][0])["input_ids"])
    windows = ids_T[:48].view(2, 1, 24)
    own = reader.live()
    expected: dict[int, Tensor] = {}
    for window, seen in zip(windows, given, strict=True):
        own.zero_grad()
        own(**labelled(reader.name, window, seen), use_cache=False).loss.backward()
        blocks = [module for module in own.modules() if isinstance(module, SparseMLP)]
        for layer, block in enumerate(blocks):
            squares = [p.grad.square().flatten(1).sum(1) for p in block.experts.parameters()]
            expected[layer] = expected.get(layer, torch.zeros(3)) + torch.stack(squares).sum(0)
    assert found.metrics["grad_squared"].keys() == expected.keys()
    for layer, scores in found.metrics["grad_squared"].items():
        torch.testing.assert_close(torch.tensor(scores), expected[layer], rtol=1e-4, atol=1e-9)
        assert sum(found.metrics["load"][layer]) == pytest.approx(2)  # of a token, top-2
    norms = found.metrics["weight_norm"][0]
    parts = [value for name, value in tensors_of(reader.folder).items() if first_expert(name)]
    assert norms[0] == pytest.approx(float(sum(part.norm() for part in parts)), rel=1e-5)


def first_expert(name: str) -> bool:
    """Of the first layer; a T5's decoder is none."""
    return "experts.0." in name and "decoder." not in name and stack_order(name)[1][0] == 0


def labelled(name: str, window: Tensor, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs and labels by which transformers computes the loss that was meant."""
    if name == "bert":
        masked = seen["input_ids"] == tiny_sparse.tokenizer().mask_token_id
        assert masked.sum() == round(0.15 * window.numel())
        assert torch.equal(seen["input_ids"][~masked], window[~masked])
        return {"input_ids": seen["input_ids"], "labels": window.masked_fill(~masked, -100)}
    if name == "t5":
        return {"input_ids": window[:, :12], "labels": window[:, 12:]}
    return {"input_ids": window, "labels": window}


def test_scores_and_router_rows_made_of_text(
    reader: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_upcycle.importance.run.save_importance_map", lambda *_: [])
    options: dict[str, Any] = {
        "num_experts": 5,
        "selection": "greedy",
        "router_extension": {"name": "fit", "steps": 1},
        "calibration": reader.texts,
        "calibration_tokens": 96,
        "context_length": 24,
    }
    made = grow(reader.folder, tmp_path / "big", **options)
    scores = Importance.load(made.output / "importance")
    for layer, values in scores.metrics["grad_squared"].items():
        best = max(range(3), key=values.__getitem__)
        assert best in made.record["plan"][str(layer)][3:]
    layers = made.record["router"]["layers"]
    assert len(layers) == len(made.record["plan"]) == (4 if reader.name == "t5" else 2)
    live = expand_model(reader.live(), tokenizer=reader.folder, verify="none", **options)
    assert_same_bits(saved(live.model, tmp_path / "live"), tensors_of(made.output))


def test_what_routers_see_of_a_window(reader: Source) -> None:
    """Of a T5 the encoder's the first half, and the decoder's what comes before the second."""
    model, ids = reader.live(), torch.arange(5, 25).view(2, 10)
    given = {"input_ids": ids}
    if reader.name == "t5":
        start = torch.zeros(2, 1, dtype=torch.int64)
        given = {
            "input_ids": ids[:, :5],
            "decoder_input_ids": torch.cat([start, ids[:, 5:9]], 1),
        }
    routers = moe_family(model.config).layer_modules(model, gate_of(model))
    expected: dict[int, Tensor] = {}
    with torch.no_grad(), hearing_inputs(routers, lambda layer, x: expected.update({layer: x})):
        model(**given)
    found = live_router_inputs(model, Sequences({"a": ids}, ""))
    assert found.keys() == expected.keys()
    for layer, seen in found.items():
        torch.testing.assert_close(seen.inputs_ND, expected[layer], rtol=1e-5, atol=1e-6)


def gate_of(model: PreTrainedModel) -> str:
    return moe_family(model.config).router_name.removesuffix(".weight")


def test_heads_of_other_names_predict_tokens_too(tmp_path: Path) -> None:
    moe_folder(tmp_path, "gpt2")  # an LMHeadModel
    texts = text_files(tmp_path)
    options = {"tokens": 48, "context_length": 24, "progress": False}
    scores = folder_importance(tmp_path / "moe", texts, **options)
    assert scores.model == folder_identity(tmp_path / "moe")


def test_the_biases_of_gate_and_up_count_apart() -> None:
    bias_EF = torch.tensor([[3.0, 4.0, 5.0, 12.0], [0.0, 0.0, 1.0, 0.0]])
    assert weight_norms("gate_up_proj_bias", bias_EF).tolist() == [[5, 0], [13, 1]]
    assert weight_norms("up_proj_bias", bias_EF)[:, 1].tolist() == [1]


@pytest.mark.parametrize("name", VISION)
def test_models_of_images_have_no_scores_and_the_remedy_is_said(name: str, tmp_path: Path) -> None:
    moe, texts = moe_folder(tmp_path, name), text_files(tmp_path)
    for options in ({"selection": "greedy"}, {"router_extension": "split"}):
        refused(grow, tmp_path / "moe", 'selection="uniform"', calibration=texts, **options)
    with pytest.raises(UpcyclingError, match=r"takes pixel_values.*selection=.uniform"):
        measure_importance(moe, {"a": ["text"]}, tmp_path / "a.txt")
    with pytest.raises(UpcyclingError, match=r"takes pixel_values.*selection=.uniform"):
        folder_importance(tmp_path / "moe", texts, progress=False)
    # Without any text, the usual way.
    assert grow(tmp_path / "moe", tmp_path / "big").record["options"]["selection"] == "uniform"


def test_a_masked_lm_needs_the_token_that_masks(tmp_path: Path) -> None:
    moe = moe_folder(tmp_path, "bert")
    file = tmp_path / "moe" / "tokenizer.json"
    file.write_text(file.read_text().replace("[MASK]", "[BLIND]"))
    with pytest.raises(UpcyclingError, match=r"has no token \[MASK\] or <mask>"):
        measure_importance(moe, {"a": ["a" * 99]}, file, tokens=24, context_length=24)


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SIX, "gpt2"])  # whose matrices lie transposed
def test_several_fine_tunes_become_one_moe(name: str, tmp_path: Path) -> None:
    dense = {
        key: dense_folder(tmp_path / key, name, seed=seed) for key, seed in (("a", 1), ("b", 2))
    }
    options = {"target": "sparse", "experts_per_token": 1, "router_init": "normal"}
    folders = {key: tmp_path / key for key in dense}
    made = merge(folders, tmp_path / "moe", verify="layers", **options)
    found = made.record["proof"]["experts"]
    assert all(found[key]["max_abs"] <= 1e-4 * found[key]["scale"] for key in dense)
    merging = plan_models(dense, make_merging_options(**options), texts={})
    moe, _ = to_model(merging, dense["a"], verify="none")
    assert_same_bits(saved(moe, tmp_path / "live"), tensors_of(made.output))
    loaded = load(made.output, dense["a"])
    for expert, key in enumerate(dense):
        expected = tiny.output(of_both(dense, key, tmp_path), **tiny.inputs(loaded))
        chosen = tiny.output(only(loaded, expert), **tiny.inputs(loaded))
        other = tiny.output(only(loaded, 1 - expert), **tiny.inputs(loaded))
        scale = expected.abs().max()
        assert (chosen - expected).abs().max() <= 1e-5 * max(1, scale)
        assert (other - expected).abs().max() > 1e-3 * scale


def of_both(dense: dict[str, PreTrainedModel], key: str, folder: Path) -> PreTrainedModel:
    """The mean of both models, with the FFNs of one."""
    made = type(dense[key]).from_pretrained(folder / key).eval()
    kept = tensors_of(folder / "moe")
    names = {*tensors_of(folder / key)}
    files = {other: tensors_of(folder / other) for other in dense}
    mean = {
        name: torch.stack([f[name].double() for f in files.values()]).mean(0).float()
        if name in kept
        else files[key][name]
        for name in names
    }
    folder = folder / f"mean-{key}"
    made.save_pretrained(folder)
    from safetensors.torch import save_file

    save_file(mean, folder / "model.safetensors", {"format": "pt"})
    return type(made).from_pretrained(folder).eval()


def only(moe: PreTrainedModel, expert: int) -> PreTrainedModel:
    """The same model that sends every token to one expert."""
    for module in moe.modules():
        if isinstance(module, SparseMLP):
            module.gate.forward = sending_to(expert)
    return moe


def sending_to(expert: int) -> Any:
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten(0, -2)
        ones = flat.new_ones(len(flat), 1)
        return flat.new_zeros(len(flat), 2), ones, torch.full(ones.shape, expert)

    return forward


@pytest.mark.parametrize("name", TEXT)
def test_a_prototype_router_reads_each_model_s_own_texts(name: str, tmp_path: Path) -> None:
    texts = text_files(tmp_path)
    dense = {
        key: dense_folder(tmp_path / key, name, seed=seed) for key, seed in (("a", 1), ("b", 2))
    }
    options = {"target": "sparse", "router_init": "prototype", "calibration_tokens": 256}
    folders = {key: tmp_path / key for key in dense}
    made = merge(folders, tmp_path / "moe", calibration=texts, **options)
    read = {key: [Path(path).read_text()] for key, path in texts.items()}
    file = tmp_path / "a" / "tokenizer.json"
    merging = plan_models(dense, make_merging_options(**options), texts=read, tokenizer_file=file)
    moe, _ = to_model(merging, dense["a"], verify="none")
    assert_same_bits(saved(moe, tmp_path / "live"), tensors_of(made.output))
    routers = [t for n, t in tensors_of(made.output).items() if n.endswith("gate.weight")]
    assert len(routers) == (4 if name == "t5" else 2)
    for rows in routers:  # two of a contrast
        torch.testing.assert_close(rows[0], -rows[1])
        assert rows.abs().max() > 0


def test_a_prototype_router_of_models_of_images_is_refused(tmp_path: Path) -> None:
    texts, folders = text_files(tmp_path), {}
    for key in ("a", "b"):
        dense_folder(tmp_path / key, "vit")
        folders[key] = tmp_path / key
    with pytest.raises(UpcyclingError, match=r"vit models are given images.*router_init=.normal"):
        merge(folders, tmp_path / "moe", router_init="prototype", calibration=texts)


# --- AdamW's moments ------------------------------------------------------------------------------


def as_moments(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """The weights in the place of their moments: what is done to these must be done to those."""
    return {
        name: {
            "exp_avg": p.detach().clone(),
            "exp_avg_sq": p.detach() ** 2,
            "step": torch.tensor(3.0),
        }
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "routing"),
    [*((name, "token_choice") for name in (*SIX, "gpt2")), ("bert", "hash"), ("t5", "hash")],
)
def test_moments_go_where_the_weights_go(name: str, routing: str, tmp_path: Path) -> None:
    moe = moe_folder(tmp_path, name, expert_init="copy", routing=routing)
    dense = type(tiny.dense(name)).from_pretrained(tmp_path / "dense")
    write_moments(as_moments(dense), tmp_path / "dense")
    record: Any = {"target": "sparse", "num_experts": 3, "routing": routing}
    found = load_moments(tmp_path / "dense", moe, record)
    weights = dict(moe.named_parameters())
    assert {n for n in weights if not n.endswith("gate.weight")} == found.keys()
    for parameter, moments in found.items():
        assert torch.equal(moments["exp_avg"], weights[parameter]), parameter
        assert torch.equal(moments["exp_avg_sq"], weights[parameter] ** 2), parameter


def test_moments_are_expanded_with_their_model(source: Source, tmp_path: Path) -> None:
    new = "reset" if source.name == "bert" else "copy"
    before = source.live()
    write_moments(as_moments(before), source.folder)
    made = grow(
        source.folder,
        tmp_path / "big",
        num_experts=5,
        router_extension="copy",
        optimizer_state=source.folder,
        new_moments=new,
    )
    after = load(made.output, before)
    found = load_moments(made.output, after, None)
    assert found.keys() == dict(after.named_parameters()).keys()
    for name, weight in after.named_parameters():
        moment = found[name]["exp_avg"]
        if ".experts." in name or name.endswith("gate.weight"):
            assert torch.equal(moment[:3], weight[:3]), name
            expected = weight[3:] if new == "copy" else torch.zeros_like(weight[3:])
            assert torch.equal(moment[3:], expected), name
        else:
            assert torch.equal(moment, weight), name
