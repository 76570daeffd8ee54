"""Churn: which tokens change experts, without a trace in what is trained; and its figure."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_bits, dense_model
from tiny_training import moe_model, run
from torch import Tensor

from fusion_upcycle.report import drawing
from fusion_upcycle.training import figure
from fusion_upcycle.training.churn import RouterChurn, first_expert
from fusion_upcycle.training.figure import routing_figure, save_routing
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.objectives.base import Batch

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

#: A rate at which the tiny routers' tokens do change experts.
OPTIONS: dict[str, Any] = {"learning_rate": 0.03, "schedule": "constant"}


def churn_of(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name == "step" or "churn" in name}
        for row in read_metrics(folder / "log")
    ]


def test_the_first_expert_is_the_chosen_one_of_the_largest_weight() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0], [9.0, 1.0, 2.0, -3.0]])
    chosen = torch.tensor([[2, 1], [3, 1], [2, 1]])  # in any order; a bias left out the 9
    assert first_expert(logits, chosen).tolist() == [1, 1, 2]


@pytest.mark.parametrize("attention", ["causal", "document"])
def test_churn_is_the_share_of_the_first_window_that_changed(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a forward pass of one's own before the first step, and after every second."""
    seen: list[Tensor] = []
    window: list[Batch] = []
    original = PretrainingModule.training_step

    def look(self: Any) -> None:
        routers = self.routers
        with torch.no_grad(), routers.listening() as routed:
            self.model.eval()(**self.objective.inputs(self.model, window[0]))
        self.model.train()
        seen.append(torch.stack([logits.argmax(1) for logits in routed.logits]))

    def training_step(self: Any, ids: Batch, batch_idx: int) -> None:
        if not window:
            window.append({"ids": ids["ids"][:1]})
            look(self)
        original(self, ids, batch_idx)
        if self.global_step % 2 == 0:
            look(self)

    monkeypatch.setattr(PretrainingModule, "training_step", training_step)
    run(moe_model(), tmp_path, 6, log_every=2, attention=attention, **OPTIONS)
    expected = [(b != a).float().mean(1) for a, b in pairwise(seen)]
    found = churn_of(tmp_path)
    assert [row["step"] for row in found] == [2, 4, 6]
    assert sum(row["churn"] for row in found) > 0
    for row, churn_L in zip(found, expected, strict=True):
        assert row["layer_0/churn"] == pytest.approx(churn_L[0].item())
        assert row["layer_1/churn"] == pytest.approx(churn_L[1].item())
        assert row["churn"] == pytest.approx(churn_L.mean().item())


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "granitemoe"])
def test_looking_leaves_no_trace(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose draws a look must not take."""
    fields = {"attention_dropout": 0.3}
    looked = run(moe_model(family, **fields), tmp_path / "looked", 5, **OPTIONS)
    states: list[bool] = []
    look = RouterChurn._look

    def watched(self: Any, trainer: Any, module: Any) -> Tensor:
        state, counts = torch.get_rng_state(), module.routing.counts.clone()
        modes = [m.training for m in module.modules()]
        found = look(self, trainer, module)
        states.append(
            torch.equal(state, torch.get_rng_state())
            and torch.equal(counts, module.routing.counts)
            and modes == [m.training for m in module.modules()]
        )
        return found

    monkeypatch.setattr(RouterChurn, "_look", watched)
    run(moe_model(family, **fields), tmp_path / "watched", 5, **OPTIONS)
    assert states == [True] * 6
    monkeypatch.setattr(RouterChurn, "_look", lambda *_: torch.zeros(2, 1))
    blind = run(moe_model(family, **fields), tmp_path / "blind", 5, **OPTIONS)
    assert_same_bits(looked.model.state_dict(), blind.model.state_dict())
    assert sum(row["churn"] for row in churn_of(tmp_path / "looked")) > 0


def test_a_resumed_run_logs_the_same_churn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last look was at step 3, the checkpoint at step 4, the next look at step 6."""
    options = OPTIONS | {"log_every": 3, "checkpoint_every": 4}
    run(moe_model(), tmp_path / "whole", 9, **options)
    original = PretrainingModule.training_step

    def training_step(self: Any, ids: Tensor, batch_idx: int) -> None:
        if self.global_step == 5:
            raise InterruptedError
        original(self, ids, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(PretrainingModule, "training_step", training_step)
        run(moe_model(), tmp_path / "cut", 9, **options)
    assert run(moe_model(), tmp_path / "cut", 9, **options).record["resumed_from"]
    assert churn_of(tmp_path / "cut") == churn_of(tmp_path / "whole")
    assert churn_of(tmp_path / "whole")[1]["churn"] > 0


def test_a_router_that_stands_still_has_no_churn(tmp_path: Path) -> None:
    run(moe_model(), tmp_path, 3, learning_rate=1e-12)
    assert [row["churn"] for row in churn_of(tmp_path)] == [0.0] * 3


def test_a_dense_model_has_neither_churn_nor_figure(tmp_path: Path) -> None:
    run(dense_model(vocab_size=257), tmp_path, 3, figure=True)
    assert not any("churn" in row for row in read_metrics(tmp_path / "log"))
    assert not (tmp_path / "log" / "routing.png").exists()


# --- the figure -------------------------------------------------------------------------------


def test_the_figure_lies_beside_the_log_and_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(moe_model(), tmp_path, 4, progress=True, figure=True)
    path = tmp_path / "log" / "routing.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".svg").is_file()
    assert f"Routing: {path}" in capsys.readouterr().out


def test_the_figure_shows_mean_and_largest_of_the_layers() -> None:
    rows = [
        {"step": 5.0 * i, "layer_0/load_cv": 0.2, "layer_3/load_cv": 0.4 + i, "churn": 0.5}
        | {"layer_0/churn": 0.1 * i, "layer_3/churn": 0.3 * i}
        for i in range(3)
    ]
    loads, churn = routing_figure(rows).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in loads.lines}
    assert drawn["mean over layers"] == pytest.approx([0.3, 0.8, 1.3])
    assert drawn["largest of a layer"] == pytest.approx([0.4, 1.4, 2.4])
    assert list(churn.lines[0].get_ydata()) == pytest.approx([0.0, 0.2, 0.4])
    assert list(churn.lines[0].get_xdata()) == [0.0, 5.0, 10.0]
    assert churn.get_xlabel() == "step"


def test_no_figure_of_one_entry_or_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(moe_model(), tmp_path / "one", 3, log_every=0, figure=True)
    assert not (tmp_path / "one" / "log" / "routing.png").exists()
    monkeypatch.setattr(figure, "has_matplotlib", lambda: False)
    run(moe_model(), tmp_path / "two", 2, figure=True)
    assert not (tmp_path / "two" / "log" / "routing.png").exists()
    assert drawing.has_matplotlib() and save_routing(tmp_path / "one" / "log") is None
