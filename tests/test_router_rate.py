"""The routers' learning rate: small against their rows, the same after a resume, warned of."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dense_model
from tiny_training import moe_model, run
from torch import Tensor
from transformers import PreTrainedModel

from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.options import meanings
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.options import TrainingOptions
from fusion_upcycle.training.router_rate import LARGEST_RATIO, fitting_rate, row_std

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are


def rows_of(model: PreTrainedModel, std: float) -> PreTrainedModel:
    """The model with router rows of this root mean square."""
    for router in find_routers(model).modules.values():
        weight = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0))
        router.weight.data = weight * (std / weight.square().mean().sqrt())
    return model


@pytest.mark.parametrize(
    ("learning_rate", "std", "expected"),
    [(1e-2, 0.02, 1e-4), (2e-5, 0.02, 2e-5), (1e-2, 10.0, 1e-2), (1e-2, 0.0, 1e-2)],
)
def test_the_rule(learning_rate: float, std: float, expected: float) -> None:
    assert fitting_rate(learning_rate, std) == pytest.approx(expected)


def test_the_options_text_says_the_ratio() -> None:
    assert f"at most {LARGEST_RATIO} of" in meanings(TrainingOptions)["router_learning_rate"]


@pytest.mark.parametrize(
    ("sizes", "smallest"), [((0.3, 0.4), 0.3), ((0.4, 0.3), 0.3), ((0.0, 0.4), 0.4), ((0, 0), 0.0)]
)
def test_the_size_of_the_rows_is_that_of_the_layer_where_it_is_smallest(
    sizes: tuple[float, float], smallest: float
) -> None:
    """One rate has to fit all layers; a layer of zeros has no size."""
    model = moe_model()
    for std, router in zip(sizes, find_routers(model).modules.values(), strict=True):
        router.weight.data.fill_(std).view(-1)[::2] *= -1  # the root mean square, not the mean
    assert row_std(find_routers(model)) == pytest.approx(smallest)


def test_routers_move_by_the_fitting_rate_and_all_else_by_the_given_one(tmp_path: Path) -> None:
    """AdamW's first step moves each weight by its learning rate."""
    model = rows_of(moe_model(), 0.02)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"schedule": "constant", "weight_decay": 0.0, "learning_rate": 1e-2}
    trained = run(model, tmp_path, 1, **options)
    for name, parameter in trained.model.named_parameters():
        step = (parameter - before[name]).abs().max().item()
        expected = 1e-4 if name.endswith("mlp.gate.weight") else 1e-2
        assert step == pytest.approx(expected, rel=0.01), name
    assert trained.record["router_learning_rate"] == {
        "value": pytest.approx(1e-4, rel=1e-6),
        "row_std": pytest.approx(0.02, rel=1e-6),
        "largest_ratio": LARGEST_RATIO,
    }


def test_the_rate_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(rows_of(moe_model(), 0.02), tmp_path, 1, progress=True)
    (line,) = [w for w in capsys.readouterr().out.splitlines() if "Router learning rate" in w]
    assert "0.0001, with rows of std 0.02" in line


def test_a_zero_router_has_no_bound(tmp_path: Path) -> None:
    trained = run(rows_of(moe_model(), 1.0), tmp_path / "some", 1)
    assert trained.record["router_learning_rate"]["value"] == pytest.approx(0.005)
    model = moe_model()
    for router in find_routers(model).modules.values():
        router.weight.data.zero_()
    found = run(model, tmp_path / "zero", 1).record["router_learning_rate"]
    assert (found["value"], found["row_std"]) == (1e-2, 0.0)


@pytest.mark.parametrize("kind", ["dense", "frozen"])
def test_without_trained_routers_there_is_none_of_it(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dense_model(vocab_size=257) if kind == "dense" else moe_model()
    frozen = ["routers"] if kind == "frozen" else []
    options = {"freeze": frozen, "router_learning_rate": 1.0, "progress": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="router_learning_rate")
        trained = run(model, tmp_path, 1, **options)
    assert trained.record["router_learning_rate"] is None
    assert "Router learning rate" not in capsys.readouterr().out


def test_a_given_rate_outside_the_rule_is_warned_of_once_with_what_fits(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="router_learning_rate") as caught:
        trained = run(rows_of(moe_model(), 0.02), tmp_path / "above", 3, router_learning_rate=0.002)
    (said,) = [str(w.message) for w in caught if "router_learning_rate=" in str(w.message)]
    for words in ("=0.002 is 0.1 of", "rows, 0.02", "0.0001 or less", "logit_std 20 times"):
        assert words in said
    assert trained.record["router_learning_rate"]["value"] == 0.002
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="router_learning_rate")
        run(rows_of(moe_model(), 0.02), tmp_path / "within", 1, router_learning_rate=9e-5)


def test_a_resumed_run_goes_on_with_the_same_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it moved the rows to another size by then."""
    original, seen = PretrainingModule.training_step, dict[int, float]()
    options = {"schedule": "constant", "checkpoint_every": 1, "learning_rate": 0.1}
    die_at: int | None = 2

    def training_step(self: Any, ids: Tensor, batch_idx: int) -> None:
        step = self.global_step
        if step == die_at:
            raise InterruptedError
        original(self, ids, batch_idx)
        for group in self.optimizers().param_groups:
            if group["names"][0].endswith("mlp.gate.weight"):
                seen[step] = group["lr"]

    monkeypatch.setattr(PretrainingModule, "training_step", training_step)
    with pytest.raises(InterruptedError):
        run(rows_of(moe_model(), 0.02), tmp_path, 4, **options)
    die_at = None
    record = run(rows_of(moe_model(), 0.02), tmp_path, 4, **options).record
    assert record["resumed_from"] == "step-000000002"
    assert record["router_learning_rate"]["value"] == pytest.approx(1e-4)
    assert seen == dict.fromkeys(range(4), record["router_learning_rate"]["value"])
