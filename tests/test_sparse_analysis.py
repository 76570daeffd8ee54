"""Routers of every routing, analysis and task pools on our own class: texts and images, one stack
or two."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import tiny_sparse
import torch
from tiny_sparse import SIX, TEXT, VISION, moe_folder, moe_model, processor_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from fusion_upcycle.analysis import analyze, write_analysis
from fusion_upcycle.analysis.collect import Collected, collect, moe_routers
from fusion_upcycle.cli import main
from fusion_upcycle.comparison.tables import FACTS
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.cost import active_parameters
from fusion_upcycle.live.inputs import image_tokens
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.models.modeling_sparse import SparseMLP
from fusion_upcycle.taskpool import ModelCostTaskPool, RoutingTaskPool

EXPERT_CHOICE = {"routing": "expert_choice", "capacity_factor": 1.5}


def blocks_of(model: PreTrainedModel) -> list[Any]:
    """MoE blocks in order, found without any code of ours."""
    return [module for module in model.modules() if isinstance(module, SparseMLP)]


def watch(model: PreTrainedModel) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """For each router what it says, pass by pass."""
    seen: list[list[Any]] = []
    for block in blocks_of(model):
        said: list[Any] = []
        seen.append(said)
        block.gate.register_forward_hook(lambda _, args, output, said=said: said.append(output))
    return seen


def collected(name: str, model: PreTrainedModel, **more: Any) -> Collected:
    options = {"tokens": 1000, "sample": 9} | more
    data = tiny_sparse.data(name)
    return collect(model, moe_routers(model), processor_of(name), data, **options)


# --- routers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, EXPERT_CHOICE, {"routing": "hash"}])
@torch.no_grad()
def test_where_tokens_are_sent_whoever_chooses(options: dict[str, Any]) -> None:
    model = moe_model("t5", **options)
    said = watch(model) if options.get("routing") != "hash" else []
    routers = find_routers(model)
    given = tiny.inputs(model)
    with routers.listening() as heard:
        model(**given)
    routers.close()
    assert routers.layers == [0, 1, 2, 3]
    assert routers.stacks == {"encoder": [0, 1], "decoder": [2, 3]}
    found = routers.sent(heard)
    for layer, (sent_NE, logits_NE) in enumerate(zip(found, heard.logits, strict=True)):
        ids = given["decoder_input_ids" if layer > 1 else "input_ids"].flatten()
        expected = torch.zeros(len(ids), 4)
        if not said:
            chosen = blocks_of(model)[layer].hash_table[ids]
            pairs = [(n, int(e)) for n, row in enumerate(chosen) for e in row]
            shares = routers.probabilities(logits_NE)
            torch.testing.assert_close(shares, sent_NE / 2)
        elif options and layer < 2:
            [(_, _, tokens_EC)] = said[layer]
            pairs = [(int(n), e) for e, row in enumerate(tokens_EC) for n in row]
            assert tokens_EC.shape == (4, 9)  # 1.5 * 22 / 4, rounded up
        else:
            best = said[layer][0][0].topk(2, -1).indices
            pairs = [(n, int(e)) for n, row in enumerate(best) for e in row]
        for n, e in pairs:
            expected[n, e] += 1
        assert torch.equal(sent_NE, expected)


def test_active_parameters_of_every_routing() -> None:
    for options, mean in (({}, (2, 2)), (EXPERT_CHOICE, (1.5, 2)), ({"routing": "hash"}, (2, 2))):
        model = moe_model("t5", **options)
        assert [*find_routers(model).experts_on_average.values()] == [
            *(mean[0],) * 2,
            *(mean[1],) * 2,
        ]
        held = [sum(p.numel() for p in block.experts.parameters()) for block in blocks_of(model)]
        idle = sum(h * (4 - mean[place > 1]) / 4 for place, h in enumerate(held))
        assert active_parameters(model) == model.num_parameters() - idle


# --- what is counted ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIX)
@torch.no_grad()
def test_counts_are_those_of_each_document_or_image_alone(name: str) -> None:
    """Without batches or padding; of a T5 the halves of each document, by hand."""
    model = moe_model(name)
    found = collected(name, model)
    said = watch(model)
    expected = torch.zeros(len(blocks_of(model)), 2, 4, dtype=torch.int64)
    tokens = torch.zeros(len(blocks_of(model)), 2, dtype=torch.int64)
    for domain, every in enumerate(tiny_sparse.data(name).values()):
        for one in every:
            given, skipped = alone(name, one)
            model(**given)
            for layer, passes in enumerate(said):
                [(logits_NE, _, _)] = passes
                passes.clear()
                first = skipped["decoder" if name == "t5" and layer > 1 else ""]
                for row in logits_NE[first:].topk(2, -1).indices.flatten().tolist():
                    expected[layer, domain, row] += 1
                tokens[layer, domain] += len(logits_NE) - first
    assert torch.equal(found.counts.chosen_LDCE.sum(2), expected)
    assert torch.equal(found.counts.unit_LDUE.sum(2), expected)
    assert torch.equal(found.counts.tokens_LD, tokens)
    assert not found.counts.left_out_LD.any()
    assert {rows.shape for rows in found.inputs.values()} == {(9, 32)}
    classes = found.counts.class_tokens()
    if name in VISION:
        assert not classes
    else:
        total = sum(len(text) for texts in tiny_sparse.data(name).values() for text in texts)
        assert sum(classes.values()) == total  # a token for each letter
        assert classes["punctuation"] == 3


def alone(name: str, one: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """A document or image as a model is given it, and tokens at the start that do not count."""
    if name in VISION:
        pixels = tiny_sparse.processor()(images=[one.convert("RGB")], return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"]}, {"": 0}
    tokenizer = tiny_sparse.tokenizer()
    ids = tokenizer(one)["input_ids"]
    if name == "t5":
        middle = (len(ids) + 1) // 2
        given = {"input_ids": ids[:middle], "decoder_input_ids": [0, *ids[middle:]]}
        return {key: torch.tensor([value]) for key, value in given.items()}, {"": 0, "decoder": 1}
    return {"input_ids": torch.tensor([[tokenizer.eos_token_id, *ids]])}, {"": 1}


@pytest.mark.parametrize("name", ["vit", "bert"])
@torch.no_grad()
def test_expert_choice_counts_what_experts_took_and_no_padding(name: str) -> None:
    model = moe_model(name, routing="expert_choice", capacity_factor=1)
    said = watch(model)
    found = collected(name, model)
    starts = 0 if name == "vit" else 1
    for layer, passes in enumerate(said):
        # The first one image is to see how many tokens it has.
        for domain, (logits_NE, weights_EC, tokens_EC) in enumerate(passes[-2:]):
            rows = len(tiny_sparse.data(name)["ab"[domain]])
            length = len(logits_NE) // rows
            of_use = (weights_EC > 0) & (tokens_EC % length >= starts)
            assert found.counts.chosen_LDCE[layer, domain].sum() == of_use.sum()
            assert found.counts.chosen_LDCE[layer, domain].sum(0).tolist() == of_use.sum(1).tolist()
            taken = tokens_EC[of_use].unique()
            left_out = found.counts.tokens_LD[layer, domain] - len(taken)
            assert found.counts.left_out_LD[layer, domain] == left_out
    assert found.counts.left_out_LD.any()


@pytest.mark.parametrize("name", ["gpt_neox", "t5"])
@torch.no_grad()
def test_tables_are_counted_too(name: str) -> None:
    model = moe_model(name, routing="hash")
    found = collected(name, model)
    table = blocks_of(model)[0].hash_table
    expected = torch.zeros(2, 4, dtype=torch.int64)
    for domain, texts in enumerate(tiny_sparse.data(name).values()):
        for text in texts:
            ids = tiny_sparse.tokenizer()(text)["input_ids"]
            ids = ids[: (len(ids) + 1) // 2] if name == "t5" else ids
            expected[domain] += torch.bincount(table[ids].flatten(), minlength=4)
    assert torch.equal(found.counts.chosen_LDCE[0].sum(1), expected)
    assert found.counts.to_json()["0"]["token_entropy_bits"] == pytest.approx(1)  # of two


# --- the page -------------------------------------------------------------------------------------


def test_the_page_of_images_and_expert_choice(tmp_path: Path) -> None:
    model = moe_model("vit", **EXPERT_CHOICE)
    analysis = analyze(
        model, tiny_sparse.processor(), tiny_sparse.data("vit"), sample=20, permutations=20
    )
    assert analysis.record["model"] == {
        "model_type": "sparse_vit",
        "num_experts": 4,
        "experts_per_token": 1.5,
        "routing": "expert_choice",
    }
    assert analysis.record["domains"]["a"] == {"images": 5, "tokens": 5 * 17}
    assert analysis.record["information"]["unit"] == "image"
    page = write_analysis(analysis, tmp_path).read_text()
    assert "4 experts, 1.5 per token on average, as experts choose tokens" in page
    assert "a (85 tokens of 5 images)" in page
    assert "taken by none / %" in page
    assert "Tokens by class" not in page and "| layer | cosine | up | down | CKA" in page


def test_images_are_spread_over_a_domain() -> None:
    found = collected("vit", moe_model("vit"), tokens=3 * 17 + 5)
    assert found.material.domains["a"] == {"images": 3, "tokens": 51}
    assert found.material.chosen["a"] == [0, 1, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_the_command_reads_what_the_model_takes(name: str, tmp_path: Path) -> None:
    moe_folder(tmp_path, name)
    for domain, found in tiny_sparse.data(name).items():
        folder = tmp_path / "data" / domain / "deeper" if name == "vit" else tmp_path / domain
        folder.mkdir(parents=True)
        for number, one in enumerate(found):
            if name == "vit":
                one.save(folder / f"{number}.png")
            else:
                (folder / f"{number}.txt").write_text(one)
    root = tmp_path / "data" if name == "vit" else tmp_path
    command = ["analyze", str(tmp_path / "moe"), "--output", str(tmp_path / "page"), "--quiet"]
    main([*command, "--data", f"a={root / 'a'}", "--data", f"b={root / 'b'}"])
    page = (tmp_path / "page" / "index.md").read_text()
    said = "Images: a (85 tokens of 5 images)" if name == "vit" else "3 documents"
    assert said in page and "Experts of moe" in page


def test_what_cannot_be_analysed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = moe_model("vit"), tiny_sparse.processor()
    for wrong, match in (
        ({}, "There are no images: name at least one domain"),
        ({"a": []}, "There are no images of a"),
        ({"a": ["text"]}, "takes images, and of a there are texts"),
    ):
        with pytest.raises(UpcyclingError, match=match):
            analyze(model, processor, wrong)
    moe_folder(tmp_path, "vit")
    (tmp_path / "data").mkdir()
    command = ["analyze", str(tmp_path / "moe"), "--output", str(tmp_path / "page"), "--quiet"]
    for name, content, match in (
        ("a.txt", "text", "has no images"),
        ("a.png", "no picture", "cannot be read as an image"),
    ):
        (tmp_path / "data" / name).write_text(content)
        with pytest.raises(SystemExit):
            main([*command, "--data", f"a={tmp_path / 'data'}"])
        assert match in " ".join(capsys.readouterr().err.split())


# --- task pools -----------------------------------------------------------------------------------


def routing_pool(name: str, folder: Path) -> RoutingTaskPool:
    if name in VISION:
        pairs = {
            key: [(image, 0) for image in all_] for key, all_ in tiny_sparse.data(name).items()
        }
        return RoutingTaskPool(images=pairs, processor=tiny_sparse.processor())
    tiny_sparse.tokenizer().save_pretrained(folder / "tokenizer")
    texts = {
        key: {"_target_": f"{__name__}.documents", "name": name, "domain": key} for key in "ab"
    }
    return RoutingTaskPool(texts, tokenizer=str(folder / "tokenizer"))


def documents(name: str, domain: str) -> list[str]:
    return tiny_sparse.data(name)[domain]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in SIX), ("vit", EXPERT_CHOICE), ("bert", {"routing": "hash"})],
)
def test_the_routing_pool_is_the_analysis(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = moe_model(name, **options)
    found = routing_pool(name, tmp_path).evaluate(model)["routing"]
    counts = collected(name, model).counts
    layers = [*counts.to_json().values()]
    assert found["experts"] == 4 * len(layers)
    assert found.keys() <= {fact for part, fact, *_ in FACTS if part == "routing"}
    for key, of in (("load_cv", "load_cv"), ("entropy_bits", "token_entropy_bits")):
        mean = sum(layer[of] for layer in layers) / len(layers)
        assert found[key] == pytest.approx(mean, abs=1e-12), key
    assert ("left_out" in found) == (options == EXPERT_CHOICE)
    if options == EXPERT_CHOICE:
        assert found["left_out"] == pytest.approx(
            sum(layer["left_out"] for layer in layers) / len(layers)
        )
        assert found["left_out"] > 0


def test_the_routing_pool_wants_what_the_model_takes(tmp_path: Path) -> None:
    for name, model, match in (
        ("bert", "vit", r"takes images, and taskpool\.texts is given"),
        ("vit", "bert", r"takes texts, and taskpool\.images is given"),
    ):
        with pytest.raises(UpcyclingError, match=match):
            routing_pool(name, tmp_path).evaluate(moe_model(model))
    with pytest.raises(UpcyclingError, match="both given"):
        RoutingTaskPool({"a": "a.txt"}, images={"a": "a"})
    with pytest.raises(UpcyclingError, match=r"taskpool\.texts is empty"):
        RoutingTaskPool()
    images: Mapping[str, Any] = {"a": [(tiny_sparse.data("vit")["a"][0], 0)]}
    with pytest.raises(UpcyclingError, match=r"no image processor: set taskpool\.processor"):
        RoutingTaskPool(images=images).evaluate(moe_model("vit"))


@pytest.mark.parametrize("name", SIX)
def test_flops_are_those_that_torch_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = moe_model(name)
    model.set_attn_implementation("eager")
    cost = ModelCostTaskPool(prompt_tokens=32, new_tokens=2, repeats=1).evaluate(model)["cost"]
    length, generates = 32, name in ("t5", "gemma2", "gpt_neox")
    assert ("decode_tokens_per_second" in cost) == generates
    assert ("tokens_per_image" in cost) == (name in VISION)
    if name in VISION:
        length = image_tokens(model)
        assert cost["tokens_per_image"] == length == 17
        given: dict[str, Tensor] = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    else:
        given = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
        if name == "t5":
            given["decoder_input_ids"] = given["input_ids"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**given)
    # torch counts no norms and biases, and causal attention as a square.
    none = sum(vectors(parameter, key) for key, parameter in model.named_parameters())
    expected = cost["flops_per_token"] - 2 * none + not_attended(name, length)
    found = counter.get_total_flops() / length
    # The class token of images is made of no patch.
    assert found == pytest.approx(expected, rel=6e-3 if name in VISION else 1e-9)


def vectors(parameter: Tensor, name: str) -> float:
    """Active parameters that are no matrix."""
    if ".experts." in name:
        return parameter.numel() / 2 if "bias" in name else 0
    return parameter.numel() if parameter.ndim < 2 else 0


def not_attended(name: str, length: int) -> float:
    """FLOPs per token of scores that causal attention has no use for, of 4 heads of 8."""
    seen = range(1, length + 1)  # by each token of a causal model
    reaches = {"t5": (length, length), "gpt_neox": (length, length), "gemma2": (8, length)}
    attended = [sum(min(n, reach) for n in seen) / length for reach in reaches.get(name, ())]
    return sum(2 * 2 * 32 * (length - mean) for mean in attended)


@pytest.mark.parametrize("name", TEXT)
def test_what_costs_are_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert choice takes part with fewer experts, where the family can have it."""
    monkeypatch.chdir(tmp_path)
    pool = ModelCostTaskPool(prompt_tokens=8, new_tokens=2, repeats=1)
    hashed = pool.evaluate(moe_model(name, routing="hash"))["cost"]
    assert hashed["active_parameters"] < hashed["total_parameters"]
    if name in ("bert", "t5"):
        model = moe_model(name, **EXPERT_CHOICE)
        fewer = pool.evaluate(model)["cost"]
        held = sum(p.numel() for p in blocks_of(model)[0].experts.parameters())
        routers = sum(block.gate.weight.numel() for block in blocks_of(model))
        expected = hashed["active_parameters"] + routers - 2 * held * 0.5 / 4
        assert fewer["active_parameters"] == expected
