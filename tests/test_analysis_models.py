"""Analysis of live models of every family, against transformers' own outputs."""

from typing import Any

import pytest
import torch
from tiny import PreTrainedModel, dense_model
from torch import Tensor

from fusion_upcycle.analysis import Analysis, analyze, compare
from fusion_upcycle.analysis.collect import collect, moe_routers
from fusion_upcycle.analysis.similarity import (
    output_cka,
    similarity_to_json,
    weight_cosines,
)
from fusion_upcycle.analysis.token_classes import TOKEN_CLASSES, TokenClasses
from fusion_upcycle.architectures import ARCHITECTURES, moe_family
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.demo import domain_text
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import EXPERT_PARTS
from fusion_upcycle.live.experts import find_experts
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_model

TOKENIZER = byte_tokenizer(64)
TEXTS = {name: domain_text(name, "test")[:6] for name in ("prose", "arithmetic")}


def moe_model(
    target: str = "mixtral", expert_init: Any = "drop", **options: Any
) -> PreTrainedModel:
    """A tiny random MoE of a family, 4 experts, top-2, that reads bytes."""
    dense = dense_model(next(iter(ARCHITECTURES[target].dense)), vocab_size=257)
    options = {"target": target, "expert_init": expert_init} | options
    moe, _ = to_model(plan_model(dense, make_options(**options)), dense, verify="none")
    return moe


def analysis_of(model: PreTrainedModel, **options: Any) -> Analysis:
    options = {"tokens": 300, "sample": 40, "permutations": 50} | options
    return analyze(model, TOKENIZER, TEXTS, **options)


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_family(target: str) -> None:
    model = moe_model(target)
    record = analysis_of(model).record
    assert record["model"] == {
        "model_type": model.config.model_type, "num_experts": 4, "experts_per_token": 2,
    }  # fmt: skip
    assert list(record["layers"]) == ["0", "1"]
    for layer in record["layers"].values():
        assert sum(layer["load"]) == pytest.approx(1)
        assert 0 < layer["top1_margin"] < 1
        assert 0 < layer["token_entropy_bits"] <= layer["router_entropy_bits"] <= 2
        assert 0 < layer["output_cka"]["mean"] < 0.999
        assert layer["weight_cosine"]["mean"] < 0.9
    assert record["information"]["unit"] == "document"


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_cosines_are_those_of_the_tensors_in_the_files(target: str) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    model = moe_model(target)
    family = moe_family(model.config)
    parts = [part for part in EXPERT_PARTS if part in family.parts]
    files = revert_weight_conversion(model, model.state_dict())
    flat = []
    for expert in range(4):
        places = [family.place(expert, part, 48 * 32) for part in parts]
        tensors = [files[f"model.layers.1.{name}"].flatten()[a:b] for name, a, b in places]
        flat.append(torch.cat(tensors).double())
    by_hand = [[torch.cosine_similarity(a, b, dim=0) for b in flat] for a in flat]
    found = weight_cosines(find_experts(model, moe_routers(model))[1])["all"]
    torch.testing.assert_close(found, torch.tensor(by_hand, dtype=torch.float64))


def test_counts_are_those_of_transformers_router_outputs() -> None:
    """One document at a time, without windows or padding of ours, from Mixtral's router logits."""
    model = moe_model()
    texts = {"a": ["One (1) + two == Three.", "f(x) = 7"], "b": ["Zwölf\n"]}
    counts = collect(model, moe_routers(model), TOKENIZER, texts, tokens=1000, sample=10).counts
    classes, expected = TokenClasses(TOKENIZER), torch.zeros_like(counts.chosen_LDCE)
    probability = torch.zeros_like(counts.probability_LDE)
    for domain, documents in enumerate(texts.values()):
        for document in documents:
            ids = [TOKENIZER.eos_token_id, *TOKENIZER(document)["input_ids"]]
            with torch.no_grad():
                output = model(torch.tensor([ids]), output_router_logits=True)
            kinds = classes(torch.tensor(ids))
            for layer, logits in enumerate(output.router_logits):
                probability[layer, domain] += logits[1:].softmax(-1).double().sum(0)
                for token in range(1, len(ids)):
                    for expert in logits[token].topk(2).indices:
                        expected[layer, domain, kinds[token], expert] += 1
    assert torch.equal(counts.chosen_LDCE, expected)
    torch.testing.assert_close(counts.probability_LDE, probability, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts.unit_LDUE.sum(2), expected.sum(2))
    assert counts.tokens_LD.tolist() == [[31, 7]] * 2
    assert counts.class_tokens()["bracket"] == 4
    assert set(counts.class_tokens()) <= set(TOKEN_CLASSES)


def test_padding_batches_and_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe_model("glm4_moe")
    batched = analysis_of(model)
    monkeypatch.setattr("fusion_upcycle.analysis.passes.BATCH_SIZE", 1)
    single = analysis_of(model)
    assert torch.equal(batched.counts.chosen_LDCE, single.counts.chosen_LDCE)
    assert torch.equal(batched.counts.unit_LDUE, single.counts.unit_LDUE)


def test_size_does_not_depend_on_the_number_of_tokens() -> None:
    model = moe_model()
    small, large = (
        collect(model, moe_routers(model), TOKENIZER, TEXTS, tokens=tokens, sample=20)
        for tokens in (100, 3000)
    )
    for name, tensor in vars(small.counts).items():
        if isinstance(tensor, Tensor):
            assert tensor.shape == getattr(large.counts, name).shape
    assert {rows.shape for rows in (*small.inputs.values(), *large.inputs.values())} == {(20, 32)}


def test_modes_are_as_before_and_no_hook_of_ours_stays() -> None:
    model = moe_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    analysis_of(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_are_what_the_router_sees() -> None:
    model = moe_model()
    kept = collect(model, moe_routers(model), TOKENIZER, {"a": ["abc"]}, tokens=9, sample=9).inputs
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.gate.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(torch.tensor([[TOKENIZER.eos_token_id, *TOKENIZER("abc")["input_ids"]]]))
    hook.remove()
    torch.testing.assert_close(kept[1], seen[0][1:])


def test_backbone() -> None:
    record = analysis_of(moe_model().model).record
    assert list(record["layers"]) == ["0", "1"]


def test_half_precision() -> None:
    record = analysis_of(moe_model("glm4_moe", "copy", dtype="bfloat16")).record
    for layer in record["layers"].values():
        assert layer["output_cka"]["mean"] == pytest.approx(1)


def test_weights_that_are_not_numbers_are_named() -> None:
    model = moe_model()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = float("nan")
    with pytest.raises(UpcyclingError, match=r"layer\(s\) \[1\].*not finite"):
        analysis_of(model)


def test_one_domain() -> None:
    record = analyze(moe_model(), TOKENIZER, {"a": ["Some text."]}).record
    assert record["information"] is None
    assert record["cka_tokens"] == 10  # all there are


def test_what_cannot_be_analysed() -> None:
    dense = dense_model(vocab_size=257)
    with pytest.raises(UpcyclingError, match=r"llama model is dense.*Give a Mixture"):
        analysis_of(dense)
    small = dense_model(vocab_size=67)
    moe, _ = to_model(plan_model(small, make_options()), small, verify="none")
    with pytest.raises(UpcyclingError, match=r"token id \d+, but the model has 67 embeddings"):
        analysis_of(moe)
    for wrong in ({"sample": 1}, {"permutations": 0}):
        with pytest.raises(UpcyclingError, match=r"sample=.*permutations="):
            analysis_of(moe_model(), **wrong)


# --- similarity -----------------------------------------------------------------------------------


def similarities(model: PreTrainedModel) -> dict[str, Any]:
    experts = find_experts(model, moe_routers(model))[0]
    inputs = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    return similarity_to_json(experts, inputs)


def test_copies_are_the_same_and_others_are_not() -> None:
    same = similarities(moe_model(expert_init="copy"))
    assert same["weight_cosine"]["mean"] == pytest.approx(1, abs=1e-12)
    assert same["output_cka"]["mean"] == pytest.approx(1, abs=1e-12)
    assert same["output_cka"]["matrix"][0][3] == 1
    noisy = similarities(moe_model(expert_init={"name": "noise", "noise_std": 0.1}))
    # Independent noise of a tenth of the standard deviation: 1 / (1 + 0.01), for a mean of zero.
    assert noisy["weight_cosine"]["mean"] == pytest.approx(1 / 1.01, abs=2e-3)
    assert noisy["weight_cosine"]["gate_proj_FD"] == pytest.approx(1 / 1.01, abs=4e-3)
    assert 0.9 < noisy["output_cka"]["mean"] < 0.9999
    permuted = similarities(moe_model(expert_init="permute"))
    assert permuted["weight_cosine"]["mean"] < 0.2  # other weights, the same function
    assert permuted["output_cka"]["mean"] == pytest.approx(1, abs=1e-6)
    assert permuted["output_cka_floor"] < 0.3


def test_outputs_are_those_of_each_expert_alone() -> None:
    """SwiGLU written out, and CKA by feature covariances instead of Gram matrices."""
    experts = find_experts(model := moe_model(), moe_routers(model))[0]
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up @ down.T).detach().double())
    centred = [y - y.mean(0) for y in outputs]
    by_hand = torch.tensor(
        [
            [
                ((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()
                for b in centred
            ]
            for a in centred
        ],
        dtype=torch.float64,
    )
    found, _ = output_cka(experts, x)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6)


def test_many_experts_are_summarised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_upcycle.analysis.similarity.LARGEST_MATRIX", 3)
    found = similarities(moe_model())
    assert "matrix" not in found["weight_cosine"]
    assert "matrix" not in found["output_cka"]
    assert found["output_cka"]["mean"] > 0


# --- before and after -----------------------------------------------------------------------------


def test_compare_says_that_copies_diverged() -> None:
    before, after = (analysis_of(moe_model(expert_init=init)) for init in ("copy", "drop"))
    found = compare(before, after)
    for layer in ("0", "1"):
        assert found["before"][layer]["weight_cosine"] == pytest.approx(1)
        assert found["after"][layer]["weight_cosine"] < 0.9
        assert found["after"][layer]["output_cka"] < found["before"][layer]["output_cka"]
    # The first router is the same and sees the same.
    assert found["information"]["0"]["gain_bits"] == 0
    assert not found["information"]["0"]["specialised"]


def test_what_does_not_compare() -> None:
    four, six = analysis_of(moe_model()), analysis_of(moe_model(num_experts=6))
    with pytest.raises(UpcyclingError, match="experts are 6 and 4"):
        compare(six, four)
    with pytest.raises(UpcyclingError, match="their texts are"):
        compare(four, analysis_of(moe_model(), tokens=200))
