"""MoE merging: experts from several models, a router from their texts, every mismatch by name."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_vision
import torch
from fusion_bench.modelpool import CausalLMPool
from helpers import merge
from omegaconf import OmegaConf
from test_families import MATRIX
from test_method import run
from tiny import (
    assert_same_bits,
    dense_folder,
    dense_model,
    edit_config,
    edit_tensors,
    files_of,
    load,
    logits_of,
    tensors_of,
)
from torch import Tensor, nn
from transformers import MixtralModel, PreTrainedModel

from fusion_upcycle import (
    MixtralForCausalLMMergingAlgorithm,
    MixtralMoEMergingAlgorithm,
    MoEMergingAlgorithm,
)
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, StateDictSource
from fusion_upcycle.cli import main
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.experts import generator_for
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.merging.merging import BASE, DenseModel
from fusion_upcycle.merging.options import MergingOptions
from fusion_upcycle.merging.plan import plan_merging
from fusion_upcycle.merging.prototypes import Moments, prototype
from fusion_upcycle.merging.source import MergeSource
from fusion_upcycle.router_init import normal
from fusion_upcycle.verification.function import Models, take_sample
from fusion_upcycle.verify import verify

BF16 = torch.bfloat16
#: One source and one set of options of each family, from the matrix of the families.
FAMILIES = list(
    {(target, family): (family, fields, target) for family, fields, target, _ in MATRIX}.values()
)


def folders(tmp_path: Path, *names: str, family: str = "llama", **fields: Any) -> dict[str, Path]:
    """Dense folders of one shape with different weights."""
    return {
        name: dense_folder(tmp_path / name, family, seed=seed, **fields)
        for seed, name in enumerate(names)
    }


def mean_model(models: list[PreTrainedModel], shared: list[PreTrainedModel]) -> PreTrainedModel:
    """The first model with the mean of the weights of `shared`, by plain arithmetic."""
    states = [model.state_dict() for model in shared]
    models[0].load_state_dict(
        {name: sum(s[name].double() for s in states).float() / len(states) for name in states[0]}
    )
    return models[0]


class Mixture(nn.Module):
    """Top-k of FFNs, written down once more: softmax, the k largest, divided by their sum."""

    def __init__(self, ffns: list[nn.Module], router_ED: Tensor, k: int):
        super().__init__()
        self.ffns, self.router_ED, self.k = nn.ModuleList(ffns), router_ED, k

    def forward(self, x: Tensor) -> Tensor:
        top = (x @ self.router_ED.T).softmax(-1).topk(self.k)
        weights = top.values / top.values.sum(-1, keepdim=True)
        outputs = torch.stack([ffn(x) for ffn in self.ffns], dim=-2)
        chosen = outputs.gather(-2, top.indices[..., None].expand(*top.indices.shape, x.shape[-1]))
        return (weights[..., None] * chosen).sum(-2)


# --- the function -----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["average", "base"])
@pytest.mark.parametrize("base_expert", [False, True])
def test_the_moe_is_the_mixture_of_the_models_ffns(
    shared: str, base_expert: bool, tmp_path: Path
) -> None:
    models = folders(tmp_path, BASE, "one", "two")
    router = {"name": "normal", "std": 1.0}
    merge(models, tmp_path / "moe", shared=shared, base_expert=base_expert, router_init=router)
    made, files = load(tmp_path / "moe"), tensors_of(tmp_path / "moe")

    dense = {name: load(folder) for name, folder in models.items()}
    experts = [name for name in dense if name != BASE or base_expert]
    names = [BASE] if shared == "base" else experts
    expected = mean_model([load(models[BASE])], [dense[name] for name in names])
    for index, layer in enumerate(expected.model.layers):
        rows = files[f"model.layers.{index}.block_sparse_moe.gate.weight"]
        assert len(rows) == len(experts)
        layer.mlp = Mixture([dense[name].model.layers[index].mlp for name in experts], rows, 2)
    found, reference = logits_of(made), logits_of(expected)
    assert (found - reference).abs().max() <= 1e-4 * reference.abs().max()
    assert (logits_of(dense["one"]) - reference).abs().max() > 0.1 * reference.abs().max()


@pytest.mark.parametrize(("family", "fields", "target"), FAMILIES, ids=str)
def test_identical_models_merge_into_their_own_function(
    family: str, fields: dict[str, Any], target: str, tmp_path: Path
) -> None:
    one = dense_folder(tmp_path / "one", family, **fields)
    merge({"one": one, "two": one, "three": one}, tmp_path / "moe", target=target)
    expected = logits_of(load(one))
    assert (logits_of(load(tmp_path / "moe")) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("family", "fields", "target"), FAMILIES, ids=str)
def test_every_family_merges_and_each_models_experts_are_its_ffns(
    family: str, fields: dict[str, Any], target: str, tmp_path: Path
) -> None:
    models = folders(tmp_path, "one", "two", family=family, **fields)
    made = merge(models, tmp_path / "moe", target=target, expert_init="permute", verify="auto")
    found = made.proof.details
    assert found["experts"].keys() == found["sources"].keys() == {"one", "two"}
    assert made.proof.holds is None and made.proof.claim == "approximate"
    assert all(far["max_abs"] > 0.01 * far["scale"] for far in found["sources"].values())


def test_copies_of_a_models_ffn_share_its_place(tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two")
    record = merge(models, tmp_path / "moe", experts_per_model=2).record
    assert record["experts"] == {"one": [0, 1], "two": [2, 3]}
    found = tensors_of(tmp_path / "moe")
    for expert, model in enumerate(("one", "one", "two", "two")):
        assert torch.equal(
            found[f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"],
            tensors_of(models[model])["model.layers.1.mlp.gate_proj.weight"],
        )


def test_layers_that_stay_dense_are_averaged(tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two", family="qwen2")
    merge(models, tmp_path / "moe", moe_layers=[1])
    name = "model.layers.0.mlp.up_proj.weight"
    mean = sum(tensors_of(folder)[name].double() for folder in models.values()) / 2
    assert torch.equal(tensors_of(tmp_path / "moe")[name], mean.float())


@pytest.mark.parametrize("options", [{"expert_init": "noise"}, {"normalize_topk_prob": False}])
def test_what_is_not_exact_is_proven_but_for_that(options: dict[str, Any], tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two", family="qwen2")
    made = merge(models, tmp_path / "moe", verify="auto", **options)
    experts = made.proof.details["experts"]
    assert all(found["max_abs"] <= 1e-4 * found["scale"] for found in experts.values())


def test_experts_of_the_wrong_model_are_found(tmp_path: Path) -> None:
    models = {
        name: DenseModel(read_config(folder), CheckpointReader(folder))
        for name, folder in folders(tmp_path, "one", "two").items()
    }
    merging = plan_merging(models, MergingOptions())
    swapped = replace(merging, experts=["two", "one"])
    sample = take_sample(None, merging.config)
    never = Models(pytest.fail, pytest.fail)
    with pytest.raises(ProofError, match="NOT exact"):
        swapped.prove(merging, mode="layers", sample=sample, models=never)


# --- the two sinks ----------------------------------------------------------------------------


def pool(
    models: dict[str, Path], tokenizer: Path | None = None, **model_kwargs: Any
) -> CausalLMPool:
    return CausalLMPool(
        OmegaConf.create({name: str(folder) for name, folder in models.items()}),
        tokenizer=None if tokenizer is None else str(tokenizer),
        model_kwargs=OmegaConf.create(model_kwargs),
    )


@pytest.mark.parametrize("shared", ["average", "base"])
def test_streaming_and_memory_give_the_same_bits_in_the_pools_dtype(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pool(folders(tmp_path, BASE, "one", "two"), torch_dtype="bfloat16")
    live = MoEMergingAlgorithm(2, shared=shared).run(models)
    live_saved = MoEMergingAlgorithm(2, str(tmp_path / "live"), shared=shared)
    live_saved.run({name: models.load_model(name) for name in models.all_model_names})
    monkeypatch.setattr(CausalLMPool, "load_model", lambda *_: pytest.fail("loaded a model"))
    streamed = MoEMergingAlgorithm(2, str(tmp_path / "out"), shared=shared).run(models)
    assert live is not None and streamed is not None and live.dtype == BF16
    assert_same_bits(streamed.state_dict(), live.state_dict())
    assert_same_bits(tensors_of(tmp_path / "live"), tensors_of(tmp_path / "out"))


def test_means_are_computed_in_pieces_and_rounded_once() -> None:
    size = CHUNK_ELEMENTS + 3
    values = [torch.full((size,), value) for value in (0.1, 0.2, 0.4)]
    sources = {str(i): StateDictSource({"x": value}) for i, value in enumerate(values)}
    names = list(sources)
    source = MergeSource(
        sources,
        main="0",
        vocabularies={},
        kept=[],
        experts=names,
        shared=names,
        dtypes={},
        dtype=torch.float32,
    )
    expected = (sum(value.double() for value in values) / 3).float()
    assert [len(chunk) for chunk in source.chunks("x")] == [CHUNK_ELEMENTS, 3]
    assert torch.equal(torch.cat(list(source.chunks("x", 5))), expected[5:])
    assert torch.equal(source.tensor("x"), expected)


def test_the_record_and_the_card_name_all_models_and_verify_says_why_not(tmp_path: Path) -> None:
    models = folders(tmp_path, BASE, "one", "two")
    made = merge(models, tmp_path / "moe", shared="base", verify="auto")
    record = json.loads((tmp_path / "moe" / "upcycling.json").read_text())
    assert record == json.loads(json.dumps(made.record))
    assert record["method"] == "MoE merging"
    assert list(record["sources"]) == [BASE, "one", "two"]
    assert record["options"]["shared"] == "base"
    assert record["parameters"]["dense"] == load(models["one"]).num_parameters()
    assert record["proof"]["tensors"]["bit_equal_to_source"] > 0
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "- one: `one`, experts [0]" in card and "all else is the base model's" in card
    assert str(tmp_path) not in card
    with pytest.raises(UpcyclingError, match="a merge of several models"):
        verify(tmp_path / "moe", progress=False)


# --- what does not fit ------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a config field": (
        lambda folder: edit_config(folder, rms_norm_eps=1e-5),
        r"Model two differs from model one .*: rms_norm_eps=1e-05, not 0\.003",
    ),
    "a shape": (
        lambda folder: dense_folder(folder, hidden_size=64),
        "Model two differs from model one .*hidden_size=64, not 32",
    ),
    "a shape that config.json does not tell": (
        lambda folder: edit_tensors(
            folder, lambda t: t.update({"model.norm.weight": torch.ones(31)})
        ),
        r"model\.norm\.weight of model two has shape \[31\], that of model one \[32\]",
    ),
    "a family": (
        lambda folder: dense_folder(folder, "mistral"),
        "architectures=.*MistralForCausalLM.*, not .*LlamaForCausalLM",
    ),
    "a tensor": (
        lambda folder: edit_tensors(folder, lambda t: t.pop("model.norm.weight")),
        r"Model one has a tensor model\.norm\.weight, model two has not",
    ),
    "a dtype": (
        lambda folder: dense_folder(folder, dtype=BF16, seed=1),
        r"different dtypes \(float32: one; bfloat16: two\).*dtype=",
    ),
    "a tokenizer": (
        lambda folder: _edit_tokenizer(folder, "normalizer", {"type": "NFC"}),
        "Model two has another tokenizer than model one: normalizer differs",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"Models \['two'\] have no tokenizer\.json, others have \(one\)",
    ),
}


def _edit_tokenizer(folder: Path, field: str, value: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_differs_is_refused_by_name(what: str, tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two", vocab_size=257)
    change, match = REFUSED[what]
    for folder in models.values():
        byte_tokenizer(64).save_pretrained(folder)
    change(models["two"])
    if "vocab_size" not in match and what in ("a shape", "a family", "a dtype"):
        edit_config(models["two"], vocab_size=257)
    with pytest.raises(UpcyclingError, match=match):
        merge(models, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["one"], {}, r"two or more.*\['one'\]"),
        ([BASE, "one"], {}, "base_expert=True"),
        ([], {}, r"two or more models that give experts, and there are \[\]"),
        (["one", "two"], {"shared": "base"}, "shared=base.*need the base model"),
        (["one", "two"], {"base_expert": True}, "base_expert=true need the base model"),
        (["one", "two"], {"shared": "mean"}, "Unknown shared 'mean'"),
        (["one", "two"], {"base_expert": "no"}, "base_expert='no' must be true or false"),
        (["one", "two"], {"experts_per_model": 0}, "experts_per_model=0.*1 or more"),
        (["one", "two"], {"calibration_tokens": 8}, "calibration_tokens=8.*256 or more"),
        (["one", "two"], {"experts_per_token": 3}, "experts_per_token=3"),
        (["one", "two"], {"num_experts": 2}, "Unknown option 'num_experts'"),
        (["one", "two"], {"router_init": {"name": "prototype", "ridge": 0}}, "ridge=0"),
        (["one", "two"], {"router_init": {"name": "prototype", "logit_std": "1"}}, "logit_std='1'"),
        (["one", "two"], {"router_init": "prototypes"}, "Did you mean 'prototype'"),
        (["one", "two"], {"calibration": {"one": "x.txt"}}, "x.txt"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(
    names: list[str], options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=match):
        merge(folders(tmp_path, *names), tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()


def test_an_output_that_is_one_of_the_models_is_refused(tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two")
    before = files_of(tmp_path)
    with pytest.raises(UpcyclingError, match="is model two itself"):
        merge(models, models["two"], overwrite=True)
    assert files_of(tmp_path) == before


# --- the prototype router ---------------------------------------------------------------------

TEXTS = {"one": ["abcab cabca " * 300], "two": ["0123 4567 89 " * 300]}


@pytest.fixture
def speakers(tmp_path: Path) -> dict[str, Path]:
    """Two models with a byte tokenizer, and a text file of each in the same folder."""
    models = folders(tmp_path, "one", "two", vocab_size=257)
    for name, folder in models.items():
        byte_tokenizer(64).save_pretrained(folder)
        (folder / "text.txt").write_text(TEXTS[name][0])
    return models


def calibration(models: dict[str, Path]) -> dict[str, str]:
    return {name: str(folder / "text.txt") for name, folder in models.items()}


def router_inputs(model: PreTrainedModel, ids: Tensor, module: str = "mlp") -> list[Tensor]:
    """[T, D] of each layer, by hooks in transformers' own forward pass."""
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.get_submodule(module).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(0, 1))
        )
    logits_of(model, ids)
    return seen


def windows(name: str, starts: list[int]) -> Tensor:
    """64 tokens of a model's text from each of these characters, one token per character."""
    texts = [TEXTS[name][0][start : start + 64] for start in starts]
    return torch.tensor(byte_tokenizer(64)(texts)["input_ids"])


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("expert_init", ["copy", "noise"])
def test_each_text_is_routed_to_its_models_experts(
    whiten: bool, expert_init: str, speakers: dict[str, Path], tmp_path: Path
) -> None:
    merge(
        speakers,
        tmp_path / "moe",
        calibration=calibration(speakers),
        calibration_tokens=1024,
        router_init={"name": "prototype", "whiten": whiten, "logit_std": 3.0},
        expert_init=expert_init,
    )
    moe, files = load(tmp_path / "moe"), tensors_of(tmp_path / "moe")
    rows = files["model.layers.0.block_sparse_moe.gate.weight"]
    hits = [
        (router_inputs(moe, windows(name, [7, 100, 200]))[0] @ rows.T).argmax(-1).eq(expert)
        for expert, name in enumerate(speakers)
    ]
    assert torch.cat(hits).float().mean() > 0.9


def test_a_t5s_routers_know_what_encoder_and_decoder_read(tmp_path: Path) -> None:
    speakers = {name: tiny_vision.t5(seed) for seed, name in enumerate(TEXTS)}
    models = tiny_vision.save(speakers, byte_tokenizer(64), tmp_path)
    merge(
        models,
        tmp_path / "moe",
        calibration={name: {"_target_": f"{__name__}.text_of", "name": name} for name in TEXTS},
        calibration_tokens=1024,
        router_init={"name": "prototype", "logit_std": 3.0},
    )
    moe = load_by_config(tmp_path / "moe")
    seen: list[tuple[str, Tensor]] = []

    def hear(part: str, gate: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
        seen.append((part, (args[0] @ gate.weight.T).argmax(-1)))

    for part, module in moe.named_modules():
        if part.endswith(".gate"):
            module.register_forward_hook(partial(hear, part))
    for expert, name in enumerate(TEXTS):
        seen.clear()
        ids = windows(name, [7, 100, 200])
        moe(input_ids=ids, decoder_input_ids=ids)
        for part, experts in seen:
            assert experts.eq(expert).float().mean() > 0.9, part
        assert {part.split(".")[0] for part, _ in seen} == {"encoder", "decoder"}


def text_of(name: str) -> list[str]:
    return TEXTS[name]


def test_the_logits_have_the_stated_standard_deviation(
    speakers: dict[str, Path], tmp_path: Path
) -> None:
    merge(
        speakers,
        tmp_path / "moe",
        calibration=calibration(speakers),
        calibration_tokens=1024,
        router_init={"name": "prototype", "logit_std": 2.5},
    )
    files = tensors_of(tmp_path / "moe")
    record = json.loads((tmp_path / "moe" / "upcycling.json").read_text())
    assert record["calibration"]["one"]["windows"] == [16, 64]
    dense = {name: load(folder) for name, folder in speakers.items()}
    mean = mean_model([load(speakers["one"])], list(dense.values())).state_dict()
    seen = []
    for name, model in dense.items():
        own = {key: value for key, value in model.state_dict().items() if ".mlp." in key}
        model.load_state_dict(mean | own)
        last = len(TEXTS[name][0]) - 64 * 16
        ids = windows(name, [round(last * i / 15) for i in range(16)])
        seen.append(router_inputs(model, ids))
    for layer, inputs in enumerate(zip(*seen, strict=True)):
        rows = files[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert (torch.cat(inputs) @ rows.T).std() == pytest.approx(2.5, rel=1e-3)


def test_copies_of_a_models_ffn_share_its_prototype(
    speakers: dict[str, Path], tmp_path: Path
) -> None:
    options = {"calibration": calibration(speakers), "router_init": "prototype"}
    merge(speakers, tmp_path / "single", calibration_tokens=256, **options)
    merge(speakers, tmp_path / "double", calibration_tokens=256, experts_per_model=2, **options)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    single, double = (tensors_of(tmp_path / made)[name] for made in ("single", "double"))
    assert torch.equal(double, single.repeat_interleave(2, dim=0))


def test_whitening_looks_past_a_direction_that_says_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    loud = torch.tensor([30.0, 1.0, 1.0])
    shift = torch.tensor([3.0, 1.5, 0.0])  # the loud direction looks like the largest difference
    moments, texts = Moments.empty(2, 3), []
    for model, sign in enumerate((1, -1)):
        texts.append(torch.randn(4000, 3, generator=generator) * loud + sign * shift)
        moments.add(model, texts[-1], share=1.0)

    def accuracy(rows: Tensor) -> float:
        hits = [(x @ rows.T).argmax(-1).eq(i).float().mean() for i, x in enumerate(texts)]
        return float(sum(hits) / 2)

    assert accuracy(prototype(moments)) > 0.9
    assert accuracy(prototype(moments, whiten=False)) < 0.7


def test_moments_do_not_depend_on_the_batches() -> None:
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = Moments.empty(2, 3), Moments.empty(2, 3)
    whole.add(0, inputs, share=1.0)
    for part in inputs.split(4):
        parts.add(0, part, share=1 / 3)
    assert torch.allclose(whole.means_ND, parts.means_ND)
    assert torch.allclose(whole.second_DD, parts.second_DD)
    assert torch.allclose(whole.second_DD.float(), inputs.T @ inputs / 12 / 2)


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ({"one": TEXTS["one"]}, r'none for two .*"two": "FILE"'),
        (TEXTS | {"three": ["x"]}, r"names \['three'\]"),
        (TEXTS | {"two": ["short"]}, "text two does not fill one sequence of 64 tokens"),
    ],
    ids=["missing", "unknown", "short"],
)
def test_calibration_texts_that_do_not_fit_are_refused_by_name(
    texts: dict[str, list[str]], match: str, speakers: dict[str, Path], tmp_path: Path
) -> None:
    files = {}
    for name, (text,) in texts.items():
        files[name] = str(tmp_path / f"{name}.txt")
        Path(files[name]).write_text(text)
    with pytest.raises(UpcyclingError, match=match):
        merge(speakers, tmp_path / "moe", calibration=files, router_init="prototype")


def test_texts_with_ids_that_the_models_have_not_are_refused(tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two", vocab_size=250)  # enough for the proof's text
    for folder in models.values():
        byte_tokenizer(64).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("🙂" * 300)
    texts = dict.fromkeys(models, str(tmp_path / "text.txt"))
    with pytest.raises(
        UpcyclingError, match=r"tokenizer\.json gives token id 253, but.* 250 embed"
    ):
        merge(models, tmp_path / "moe", calibration=texts, router_init="prototype")


def test_a_tokenizer_of_another_model_is_refused_before_texts_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = folders(tmp_path, "one", "two", vocab_size=128)  # enough for these texts
    for folder in models.values():
        byte_tokenizer(64).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("a" * 3000)
    texts = dict.fromkeys(models, str(tmp_path / "text.txt"))
    monkeypatch.setattr(
        "fusion_upcycle.merging.calibration.router_moments", lambda *_, **__: pytest.fail("run")
    )
    with pytest.raises(
        UpcyclingError, match=r"tokenizer\.json gives token id \d+, but.* 128 embed"
    ):
        merge(models, tmp_path / "moe", calibration=texts, router_init="prototype")


def test_texts_that_nothing_reads_are_refused(speakers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="router_init is not prototype"):
        merge(speakers, tmp_path / "moe", calibration=calibration(speakers))


def test_the_same_text_for_all_is_refused(speakers: dict[str, Path], tmp_path: Path) -> None:
    one = {"one": speakers["one"], "two": speakers["one"]}
    same = dict.fromkeys(one, str(speakers["one"] / "text.txt"))
    with pytest.raises(UpcyclingError, match="texts of its own"):
        merge(one, tmp_path / "moe", calibration=same, router_init="prototype")


def test_a_short_text_gives_all_its_windows(speakers: dict[str, Path], tmp_path: Path) -> None:
    (speakers["one"] / "text.txt").write_text(TEXTS["one"][0][:300])
    options = {"calibration": calibration(speakers), "router_init": "prototype"}
    made = merge(speakers, tmp_path / "moe", **options)
    assert made.record["calibration"]["one"]["windows"] == [4, 64]


def test_a_prototype_router_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x" * 2000)
    models = folders(tmp_path, "one", "two")
    options = {"calibration": dict.fromkeys(models, str(text)), "router_init": "prototype"}
    with pytest.raises(UpcyclingError, match=r"none at .*one/tokenizer\.json: put it there"):
        merge(models, tmp_path / "moe", **options)


# --- the command line and FusionBench -----------------------------------------------------------


def test_the_command_merges_as_the_function_does(
    speakers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--model={name}={folder}" for name, folder in speakers.items()]
    flags += [f"--calibration={name}={path}" for name, path in calibration(speakers).items()]
    router = "--router-init=prototype,logit_std=2.0"
    options = {"router_init": {"name": "prototype", "logit_std": 2.0}, "calibration_tokens": 512}
    merge(speakers, tmp_path / "function", calibration=calibration(speakers), **options)
    main(["merge", str(tmp_path / "cli"), *flags, router, "--calibration-tokens=512", "--quiet"])
    assert_same_bits(tensors_of(tmp_path / "cli"), tensors_of(tmp_path / "function"))
    assert f"Output: {tmp_path / 'cli'}" in capsys.readouterr().out


def test_the_command_has_a_flag_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    shown = capsys.readouterr().out
    for field in fields(MergingOptions):
        assert f"--{field.name.replace('_', '-')}" in shown


@pytest.mark.parametrize("flags", [["--model=x"], ["--model=a=x", "--model=a=y"]])
def test_a_model_without_a_name_of_its_own_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["merge", str(tmp_path / "out"), *flags])
    assert exit_.value.code == 2
    assert "is not NAME=PATH" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mixtral_moe_merging", "moe_merging"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_run_of_fusion_bench_merges_its_pool(
    method: str,
    streaming: bool,
    speakers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ",".join(f"{name}: {path}" for name, path in calibration(speakers).items())
    models = ",".join(f"{name}: {path}" for name, path in speakers.items())
    result = run(
        tmp_path / "run",
        f"method={method}",
        "~modelpool.models._pretrained_",
        f"+modelpool.models={{{models}}}",
        f"modelpool.tokenizer={speakers['one']}",
        *([f"method.save_checkpoint={tmp_path / 'out'}"] if streaming else []),
        "method/router_init=prototype",
        "method.router_init.logit_std=2.0",
        f"method.calibration={{{texts}}}",
        "method.calibration_tokens=512",
    )
    assert type(result["merged_model"]).__name__ == "MixtralForCausalLM"
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())["method"]
    assert record["options"]["router_init"]["logit_std"] == 2.0
    assert record["experts"] == {"one": [0], "two": [1]}
    assert record["calibration"].keys() == {"one", "two"}
    options = {"router_init": {"name": "prototype", "logit_std": 2.0}, "calibration_tokens": 512}
    merge(speakers, tmp_path / "moe", calibration=calibration(speakers), **options)
    assert_same_bits(result["merged_model"].state_dict(), load(tmp_path / "moe").state_dict())


def test_backbones_merge_into_a_backbone() -> None:
    models = {name: dense_model(backbone=True, seed=i) for i, name in enumerate(("one", "two"))}
    assert type(MixtralMoEMergingAlgorithm(2).run(models)) is MixtralModel
    with pytest.raises(UpcyclingError, match="into MixtralMoEMergingAlgorithm"):
        MixtralForCausalLMMergingAlgorithm(2).run(models)


def test_an_unknown_option_of_the_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UpcyclingError, match="Did you mean 'experts_per_model'"):
        MoEMergingAlgorithm(2, expert_per_model=1)
    with pytest.raises(UpcyclingError, match="target of MixtralMoEMergingAlgorithm"):
        MixtralMoEMergingAlgorithm(2, target="qwen2_moe")


def test_a_pool_in_memory_is_checked_for_its_tokenizers(speakers: dict[str, Path]) -> None:
    _edit_tokenizer(speakers["two"], "normalizer", {"type": "NFC"})
    with pytest.raises(UpcyclingError, match="Model two has another tokenizer"):
        MoEMergingAlgorithm(2).run(pool(speakers))


@pytest.mark.parametrize("shared", ["average", "base"])
def test_the_routers_size_is_that_of_the_shared_norm(shared: str, tmp_path: Path) -> None:
    models = folders(tmp_path, BASE, "one", "two")
    merge(models, tmp_path / "moe", shared=shared, router_init={"name": "normal", "logit_std": 3.0})
    made = tensors_of(tmp_path / "moe")
    for layer in range(2):
        norm = made[f"model.layers.{layer}.post_attention_layernorm.weight"].double()
        std = 3.0 / norm.square().sum().sqrt().item()
        rows = [normal(32, generator_for(0, layer, i, "router"), std=std) for i in range(2)]
        router = made[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.allclose(router, torch.stack(rows), rtol=1e-6)
