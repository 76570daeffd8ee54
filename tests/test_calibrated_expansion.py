"""Expansions that read text: router rows of `split` and `fit`, and importance that is measured."""

import json
import tempfile
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import grow
from safetensors.torch import save_file
from tiny import as_older, assert_same_bits, load, logits_of, tensors_of
from tiny_moe import FAMILIES, moe_folder, moe_model

from fusion_upcycle import expand_model, folder_importance
from fusion_upcycle.checkpoint.moments import write_moments
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.expansion.router.fit import FittedRows
from fusion_upcycle.importance.run import write_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.verify import verify

TEXT = " ".join(f"{n} times {n} is {n * n}," for n in range(400))
FIT = {"name": "fit", "steps": 3}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """`calibration` and its size."""
    (tmp_path / "sums.txt").write_text(TEXT)
    return {
        "calibration": {"sums": str(tmp_path / "sums.txt")},
        "calibration_tokens": 1000,
        "context_length": 50,
    }


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fit within `split`, which has no option for them."""
    monkeypatch.setattr("fusion_upcycle.expansion.router.neutral._STEPS", 20)


def byte_moe(folder: Path, family: str = "mixtral", **kwargs: Any) -> Path:
    """A tiny MoE that reads bytes."""
    moe_folder(folder, family, **{"vocab_size": 257} | kwargs)
    byte_tokenizer(64).save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return byte_moe(tmp_path / "moe")


def refuses(source: Path, match: str, **options: Any) -> None:
    """Both paths say so, and leave nothing behind."""
    helpers.refused(grow, source, match, **options)
    with pytest.raises(UpcyclingError, match=match):
        expand_model(load(source), tokenizer=source, **options)


#: One of each kind of routing: softmax, sigmoid with a selection bias, softmax with one in a router
#: that stays in float32. Softmax without renormalisation is that of the OLMoE further below.
KINDS = ("mixtral", "deepseek_v3", "ernie4_5_moe")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(
            pytest.param(
                family,
                {"num_experts": 6, "router_extension": FIT},
                marks=[] if family in KINDS else pytest.mark.full,
            )
            for family in FAMILIES
        ),
        ("mixtral", {"multiplier": 2, "router_extension": "split"}),
        ("granitemoe", {"multiplier": 3, "router_extension": "split"}),
        ("glm4_moe", {"multiplier": 3, "router_extension": "split"}),
        ("ernie4_5_moe", {"multiplier": 2, "router_extension": "split"}),
        ("olmoe", {"num_experts": 6, "router_extension": FIT, "selection": "greedy"}),
    ],
    ids=str,
)
def test_a_folder_and_a_live_model_get_the_same_bits(
    family: str, options: dict[str, Any], data: dict[str, Any], tmp_path: Path
) -> None:
    source = byte_moe(tmp_path / "moe", family)
    options = options | data | {"calibration_tokens": 200}
    made = grow(source, tmp_path / "out", verify="auto", **options)
    live = expand_model(load(source), tokenizer=source, verify="none", **options)
    assert_same_bits(live.model.state_dict(), load(tmp_path / "out").state_dict())
    assert json.loads(json.dumps(live.about["router"])) == made.record["router"]
    assert made.proof.details["restricted"] is not None  # the source is within the result


def test_the_record_says_what_the_router_does(
    source: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    options = {"router_extension": {"name": "split", "mixed_share": 0.1}}
    made = grow(source, tmp_path / "out", verify="auto", **data, **options)
    router = made.record["router"]
    assert router["tokens"] == 1000
    assert router["calibration"]["texts"]["sums"]["sequences"] == 20
    assert router["layers"].keys() == {"0", "1"}
    for layer in router["layers"].values():
        assert layer["one_group_share"] == pytest.approx(0.9, abs=0.02)
        assert 0 < layer["smallest_copy_share"] <= 1
        assert layer["margin"] > 0 and layer["weight_error"] < 0.2
        assert len(layer["copy_shares"]) == 8
    assert made.record["options"]["router_extension"] == options["router_extension"]
    assert "only nearly" in made.proof.details["reason"]
    assert verify(tmp_path / "out", progress=False).function == made.proof.function


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_routers_made_of_text_are_proven_again_too(
    family: str, data: dict[str, Any], tmp_path: Path
) -> None:
    """No draw tells what they should be; their record does, and the source what the biases are."""
    source, output = byte_moe(tmp_path / "moe", family), tmp_path / "out"
    grow(source, output, router_extension=FIT, **data)
    tensors = tensors_of(as_older(output))
    router = next(n for n in sorted(tensors, reverse=True) if n.endswith("gate.weight"))
    biases = [n for n in tensors if n.endswith(("correction_bias", "statics.e_score_bias"))]
    assert len(biases) == (0 if family == "mixtral" else 1), tensors.keys()
    for name in [router, *biases]:
        changed = tensors[name].clone().view(8, -1)
        changed[[4, 5]] = changed[[5, 4]]
        save_file(tensors | {name: changed.view(tensors[name].shape)}, output / "model.safetensors")
        with pytest.raises(ProofError, match="router" if name == router else f"{name} differs"):
            verify(output, progress=False)
    save_file(tensors, output / "model.safetensors")
    verify(output, progress=False)


def test_a_split_sigmoid_router_is_proven_with_its_biases(
    data: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, output = byte_moe(tmp_path / "moe", "glm4_moe"), tmp_path / "out"
    made = grow(source, output, router_extension="split", verify="auto", **data)
    assert "train on with bias_update_rate=0" in caplog.text
    assert all(0 < layer["score_scale"] < 1 for layer in made.record["router"]["layers"].values())
    tensors = tensors_of(output)
    biases = [name for name in tensors if name.endswith("correction_bias")]
    assert len(biases) == 1 and not any(tensors[name].any() for name in biases)
    assert verify(output, progress=False).function == made.proof.function
    as_older(output)
    perturbed = [name for name in tensors if ".experts." in name or ".gate." in name]
    assert len(perturbed) == 8 * 3 + 2  # every expert of the MoE layer, router and bias
    for name in perturbed:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 0.01
        save_file(tensors | {name: changed}, output / "model.safetensors")
        with pytest.raises(ProofError):
            verify(output, progress=False)


def test_a_copy_that_is_hardly_in_use_is_warned_of(
    source: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def dying(*args: Any, **kwargs: Any) -> FittedRows:
        rows_MD = torch.cat([args[0], args[0] - 100 * args[1].mean(0)])
        return FittedRows(rows_MD, 0, 0.0, 0.0)

    expand_model(load(source), tokenizer=source, router_extension=FIT, verify="none", **data)
    assert not caplog.records
    monkeypatch.setattr("fusion_upcycle.expansion.calibration.fit_rows", dying)
    expand_model(load(source), tokenizer=source, router_extension=FIT, verify="none", **data)
    assert "gets 0.0" in caplog.text and ": 0, 1." in caplog.text


def test_a_source_that_is_not_finite_or_has_one_expert(
    source: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    broken = load(source)
    broken.model.layers[1].mlp.gate.weight.data[0, 0] = torch.nan
    broken.model.norm.weight.data[:] = torch.nan
    broken.model.layers[0].post_attention_layernorm.weight.data[:] = torch.nan
    with pytest.raises(UpcyclingError, match=r"layer 0.*not finite"):
        expand_model(broken, tokenizer=source, router_extension=FIT, **data)
    single = {"num_local_experts": 1, "num_experts_per_tok": 1}
    one = byte_moe(tmp_path / "one" / "moe", **single)
    for extension in ("split", "fit"):
        refuses(one, "the source has one. Choose", router_extension=extension, **data)


def test_router_inputs_take_no_memory_and_leave_no_file(
    source: Path, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are mapped from files without a name, beside the output."""
    places: list[Path] = []

    real = tempfile.TemporaryFile

    def temporary(dir: Path) -> Any:
        places.append(dir)
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    (tmp_path / "there").mkdir()
    grow(source, tmp_path / "there" / "new" / "out", router_extension="split", **data)
    assert places == [tmp_path / "there"] * 2
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["new"]
    monkeypatch.setattr("fusion_upcycle.expansion.router.inputs._COPIES", 10**12)
    refuses(
        source, r"1,000 calibration tokens.*of memory.*Take fewer", router_extension="split", **data
    )


def test_split_and_fit_keep_the_function_better_than_copies_do(
    source: Path, data: dict[str, Any]
) -> None:
    ids = byte_tokenizer(64)(TEXT[:50], return_tensors="pt")["input_ids"]
    expected = logits_of(load(source), ids)
    distance = {}
    for name, extension in {"copy": "copy", "split": "split", "fit": FIT | {"steps": 40}}.items():
        text = {} if name == "copy" else data
        made = expand_model(
            load(source), tokenizer=source, router_extension=extension, verify="none", **text
        )
        distance[name] = float((logits_of(made.model, ids) - expected).norm())
    assert distance["split"] < 0.7 * distance["copy"]
    assert distance["fit"] < 0.7 * distance["copy"]


def test_expanding_by_nothing_is_the_identity(
    source: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    for extension in ("split", "fit"):
        for text in ({}, data):
            options = {"num_experts": 4, "router_extension": extension, "verify": "auto"} | text
            made = grow(source, tmp_path / "out", overwrite=True, **options)
            assert made.proof.holds and "router" not in made.record
            assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(source))


def test_rows_are_rounded_before_they_are_reported(data: dict[str, Any], tmp_path: Path) -> None:
    source = byte_moe(tmp_path / "moe", dtype=torch.bfloat16)
    made = grow(source, tmp_path / "out", router_extension="split", **data)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert all(layer["weight_error"] < 0.2 for layer in made.record["router"]["layers"].values())


def test_importance_is_measured_where_a_selection_needs_it(
    source: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    options = {"num_experts": 6, "selection": "greedy", "metric": "saliency"}
    made = grow(source, tmp_path / "out", **data, **options)
    scores = Importance.load(tmp_path / "out" / "importance")
    assert (tmp_path / "out" / "importance" / "importance.png").is_file()
    assert made.record["importance"]["metric"] == "saliency"
    best = [max(range(4), key=values.__getitem__) for values in scores.scores("saliency").values()]
    assert [plan[4:] for plan in made.record["plan"].values()] == [[e, e] for e in best]
    # The same scores, measured beforehand.
    kwargs = {"tokens": 1000, "context_length": 50, "progress": False}
    found = folder_importance(source, data["calibration"], tmp_path / "scores", **kwargs)
    assert found.scores("saliency") == scores.scores("saliency")
    again = grow(source, tmp_path / "again", scores=tmp_path / "scores", **options)
    assert again.record["plan"] == made.record["plan"]
    assert not (tmp_path / "again" / "importance").exists()
    live = expand_model(load(source), tokenizer=source, verify="none", **data, **options)
    assert live.measured is not None
    assert_same_bits(live.model.state_dict(), load(tmp_path / "again").state_dict())


@pytest.mark.parametrize(
    ("extension", "match"),
    [
        ({"name": "split", "margin": 6}, "Unknown option of router_extension split: 'margin'"),
        ({"name": "split", "mixed_share": 1}, "mixed_share=1 must be between 0 and 1"),
        ({"name": "fit", "min_copy_share": 1}, "min_copy_share=1 must be at least 0 and below 1"),
        ({"name": "fit", "steps": 0}, "steps=0 of router_extension=fit must be 1 or more"),
        ({"name": "fit", "steps": True}, "steps=True"),
    ],
    ids=str,
)
def test_options_of_split_and_fit_are_checked_before_anything_is_read(
    extension: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=match):
        grow(tmp_path / "nowhere", tmp_path / "out", router_extension=extension)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said before a model runs on any text."""
    for name in (
        "run.score_folder",
        "live.measure_importance",
        "calibration.folder_router_inputs",
    ):
        monkeypatch.setattr(f"fusion_upcycle.expansion.{name}", lambda *_, **__: pytest.fail("ran"))


@pytest.mark.usefixtures("nothing_runs")
def test_split_of_a_plan_of_unequal_copies_names_the_remedy(
    source: Path, data: dict[str, Any]
) -> None:
    match = r"layer 0 has \[2, 2, 1, 1\] places.*Choose router_extension=.fit"
    refuses(source, match, num_experts=6, router_extension="split", **data)
    scored = {"selection": "greedy", "router_extension": "split", **data}
    refuses(source, "selection=greedy gives some more", num_experts=8, **scored)
    copies = {"selection": "random", "max_copies": 3, "router_extension": "split", **data}
    refuses(source, r"layer 0 has \[.*Choose router_extension=.fit", num_experts=8, **copies)


@pytest.mark.usefixtures("nothing_runs")
def test_split_of_plain_sigmoid_scores_names_the_remedy(
    data: dict[str, Any], tmp_path: Path
) -> None:
    source = byte_moe(tmp_path / "moe", "glm4_moe", norm_topk_prob=False)
    match = r"sigmoid scores that are not divided.*Choose router_extension=.fit"
    refuses(source, match, router_extension="split", **data)
    scores = {"selection": "greedy", "max_copies": 2, "router_extension": "split"}
    refuses(source, match, **scores, **data)


@pytest.mark.usefixtures("nothing_runs")
def test_moments_that_are_missing_or_of_another_model_are_refused_first(
    source: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    options = {"num_experts": 6, "selection": "greedy", "router_extension": "fit"} | data
    refuses(source, "has no training/optimizer", optimizer_state=tmp_path / "x", **options)
    # The same shapes, other weights: a fine-tuned sibling.
    sibling = byte_moe(tmp_path / "sibling", seed=1)
    moments = {
        name: {"exp_avg": p, "exp_avg_sq": p.square(), "step": torch.tensor(1.0)}
        for name, p in load(sibling).named_parameters()
    }
    write_moments(moments, sibling)
    refuses(source, "is of a mixtral.*but the source is", optimizer_state=sibling, **options)
    (sibling / "training" / "optimizer.safetensors").write_bytes(b"broken")
    refuses(source, "not a whole safetensors file", optimizer_state=sibling, **options)


def test_text_that_is_missing_or_that_nothing_reads(source: Path, data: dict[str, Any]) -> None:
    refuses(source, "router_extension=fit.*there is none", router_extension="fit")
    refuses(source, "nothing would read it: no scores are needed", **data)
    refuses(source, "selection=greedy goes by importance", selection="greedy")
    scores = folder_importance(source, data["calibration"], tokens=100, context_length=50)
    options = {"selection": "greedy", "scores": scores}
    refuses(source, "nothing would read it: the importance scores are given", **data, **options)


def test_text_that_cannot_be_used(source: Path, data: dict[str, Any], tmp_path: Path) -> None:
    split = {"router_extension": "split"}
    refuses(
        source, "does not fill one sequence", **data | {"calibration": short(tmp_path)}, **split
    )
    refuses(source, "there is no file", **data | {"calibration": {"a": "none.txt"}}, **split)
    refuses(source, "from 2 to the model's 64", **data | {"context_length": 65}, **split)
    refuses(source, "context_length=0 must be", **data | {"context_length": 0}, **split)
    refuses(source, "tokens=0 of the calibration", **data | {"calibration_tokens": 0}, **split)
    with pytest.raises(UpcyclingError, match=r"there is none: name the folder.*\(tokenizer\)"):
        expand_model(load(source), **data, **split)
    small = byte_moe(tmp_path / "small" / "moe", vocab_size=250)  # enough for the proof's text
    Path(data["calibration"]["sums"]).write_text("🙂" * 300)
    refuses(small, "gives token id 253, but the model has 250 embeddings", **data, **split)
    (source / "tokenizer.json").unlink()
    refuses(source, r"needs the model's tokenizer\.json", **data, **split)


def short(folder: Path) -> dict[str, str]:
    (folder / "short.txt").write_text("short")
    return {"short": str(folder / "short.txt")}


@pytest.mark.usefixtures("nothing_runs")
def test_what_stands_in_the_way_is_said_before_experts_are_scored(
    source: Path, data: dict[str, Any]
) -> None:
    refuses(source, "Pass max_copies=4", num_experts=13, selection="greedy", **data)
    refuses(source, "is less than the 4", num_experts=3, selection="greedy", **data)


def test_scores_of_another_model_are_refused_by_name(
    source: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    other = byte_moe(tmp_path / "other", seed=1)
    write_importance(
        folder_importance(other, data["calibration"], tokens=100, context_length=50),
        tmp_path / "scores",
    )
    options = {"selection": "greedy", "scores": tmp_path / "scores"}
    refuses(source, r"scores are of a mixtral of 2 layers.*but the model given is", **options)


def test_a_backbone_has_no_loss_to_score_experts_by(data: dict[str, Any], tmp_path: Path) -> None:
    moe_model("mixtral", vocab_size=257, backbone=True).save_pretrained(tmp_path / "moe")
    byte_tokenizer(64).save_pretrained(tmp_path / "moe")
    with pytest.raises(
        UpcyclingError, match="MixtralModel does not predict tokens, and importance"
    ):
        folder_importance(tmp_path / "moe", data["calibration"])
    backbone = moe_model("mixtral", vocab_size=257, backbone=True)
    with pytest.raises(UpcyclingError, match="MixtralModel does not predict tokens"):
        expand_model(backbone, tokenizer=tmp_path / "moe", selection="greedy", **data)


def test_scores_that_could_not_be_written_are_not_measured(
    source: Path, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fusion_upcycle.importance.run.score_folder", lambda *_, **__: pytest.fail("ran")
    )
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UpcyclingError, match=f"{output} must be a folder, and .*file is"):
            folder_importance(source, data["calibration"], output)
