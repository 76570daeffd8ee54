"""A result that is no longer its source says so, and what would keep more of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_sparse
import torch
from helpers import convert, grow

from fusion_upcycle.cli import main
from fusion_upcycle.demo.models import demo_model
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.verification.function import distance
from fusion_upcycle.verification.proof import has_lost_function

LOST = "has lost the source's function: train it"


def found(folder: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Proof and card of the demo's trained model, upcycled."""
    made = convert(demo_model("base"), folder / "moe", verify="auto", **options)
    return made.record["proof"], (folder / "moe" / "README.md").read_text()


@pytest.mark.parametrize(
    ("init", "remedy"),
    [
        ({"name": "drop"}, "a smaller drop_ratio or expert_init=copy"),
        ({"name": "svd", "kept_energy": 0.5}, "a larger kept_energy or expert_init=copy"),
        ({"name": "noise", "noise_std": 2.0}, "a smaller noise_std or expert_init=copy"),
        ({"name": "subset"}, "expert_init=copy"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_lost_function_is_said_with_what_to_change(
    init: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    proof, card = found(tmp_path, expert_init=init)
    assert proof["lost"] == f"{LOST}, or choose {remedy}"
    assert f"**As it is, the model {LOST}, or choose {remedy}.**" in card
    assert proof["function"]["share_lost"] > 0.5


@pytest.mark.parametrize(
    "init", ["noise", {"name": "noise", "noise_std": 0.1}, {"name": "drop", "drop_ratio": 0.05}]
)
def test_a_source_with_a_change_is_not_lost(init: Any, tmp_path: Path) -> None:
    proof, card = found(tmp_path, expert_init=init)
    assert "lost" not in proof
    assert "lost" not in card
    assert 0 < proof["function"]["share_lost"] < 0.5


def test_the_screen_has_the_remedy_as_it_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(demo_model("base"))
    main(["upcycle", source, str(tmp_path / "a"), "--expert-init", "drop", "--quiet"])
    said = capsys.readouterr().out
    assert f"approximate: {LOST}, or choose a smaller drop_ratio or --expert-init copy; " in said
    assert "(one answer to everything: 1.3)" in said
    main(["upcycle", source, str(tmp_path / "b"), "--expert-init", "copy", "--quiet"])
    assert LOST not in capsys.readouterr().out
    main(["verify", str(tmp_path / "a"), "--quiet"])
    assert LOST in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "upcycling.json").read_text())
    assert "or expert_init=copy; " in record["proof_in_words"]


def test_remedies_go_by_what_was_asked_for() -> None:
    options = UpcyclingOptions(
        expert_init="copy",
        routing="expert_choice",
        capacity_factor=1,
        normalize_topk_prob=False,
        granularity=4,
        experts_per_token=2,
    )
    assert options.gentler == (
        "{normalize_topk_prob=true}",
        "a larger capacity_factor",
        "{experts_per_token=4}",
    )


@pytest.mark.parametrize("name", ["bert", "vit", "clip_vision_model"])
def test_encoders_and_images_lose_it_too(name: str, tmp_path: Path) -> None:
    tiny_sparse.dense_folder(tmp_path / "dense", name)
    lost = convert(
        tmp_path / "dense",
        tmp_path / "lost",
        verify="auto",
        target="sparse",
        expert_init={"name": "noise", "noise_std": 30.0},
    ).record["proof"]
    assert lost["lost"].startswith(LOST)
    kept = convert(
        tmp_path / "dense",
        tmp_path / "kept",
        verify="auto",
        target="sparse",
        expert_init={"name": "noise", "noise_std": 0.01},
    ).record["proof"]
    assert "lost" not in kept
    assert kept["function"]["share_lost"] < 0.1


@pytest.mark.parametrize(("capacity", "lost"), [(0.1, True), (1.0, False)])
def test_tokens_that_no_expert_takes_are_a_loss(
    capacity: float, lost: bool, tmp_path: Path
) -> None:
    tiny_sparse.dense_folder(tmp_path / "dense", "clip_vision_model")
    proof = convert(
        tmp_path / "dense",
        tmp_path / "moe",
        verify="auto",
        target="sparse",
        routing="expert_choice",
        capacity_factor=capacity,
        num_experts=8,
    ).record["proof"]
    assert proof.get("lost") == (f"{LOST}, or choose a larger capacity_factor" if lost else None)


def test_an_expansion_loses_it_too(tmp_path: Path) -> None:
    init = {"name": "noise", "noise_std": 3.0}
    made = grow(demo_model("moe"), tmp_path / "grown", verify="auto", expert_init=init)
    remedy = "a smaller noise_std or expert_init=copy or router_extension=split"
    assert made.record["proof"]["lost"] == f"{LOST}, or choose {remedy}"
    assert LOST in (tmp_path / "grown" / "README.md").read_text()


def test_all_is_lost_where_one_answer_would_be_as_near() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64).log()
    one = p.exp().mean(0).log().expand_as(p)
    judged = distance(p, one, logits=True)
    assert judged.share_lost == pytest.approx(1)
    assert has_lost_function(judged)
    assert distance(p, p, logits=True).share_lost == 0
    # Of a single row every other answer is as good as none: what is nearest is to say nothing.
    uniform = torch.zeros(1, 3, dtype=torch.float64)
    assert distance(p[:1], uniform, logits=True).share_lost == pytest.approx(1)


def test_all_is_lost_of_hidden_states_where_their_mean_would_be_as_near() -> None:
    hidden = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    judged = distance(hidden, hidden.mean(0).expand_as(hidden), logits=False)
    assert judged.share_lost == pytest.approx(1)
    assert judged.kl_nats is None
    assert has_lost_function(judged)


def test_answers_that_hardly_differ_are_no_loss() -> None:
    """A random model says nearly the same of everything: nothing there is lost by 0.01 nats."""
    p = torch.tensor([[0.50, 0.5], [0.51, 0.49]], dtype=torch.float64).log()
    judged = distance(p, p.flip(0), logits=True)
    assert judged.share_lost is not None
    assert judged.share_lost > 1
    assert judged.kl_nats is not None
    assert judged.kl_nats < 0.1
    assert not has_lost_function(judged)
    same = torch.zeros(2, 3)
    assert distance(same, same, logits=True).share_lost is None or math.isfinite(
        distance(same, same, logits=True).share_lost or 0
    )
