"""Two gloo processes on the CPU: the losses of one process, and checkpoints that both can read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import two_ranks
from tiny import load
from tiny_training import moe_model, run
from torch import Tensor

from fusion_upcycle.training.checkpoint_folders import checkpoints_in
from fusion_upcycle.training.checkpoints import CheckpointEvery
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.run import Trained

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

STEPS, CUT = 20, 10
#: Strategy -> family, fields of the dense model, options: tied weights. `fsdp` has its own tests.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp": ("mixtral", {"tie_word_embeddings": True}, {}),
}
HELD_OUT = {"again": {"_target_": "tiny_training.documents", "count": 7}}
OPTIONS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "checkpoint_every": CUT,
    "validate_every": CUT,
    "validation": HELD_OUT,
}


Run = tuple[str, dict[str, Any], Path, dict[str, Any]]  # family, fields, folder, options


def one_of_two(runs: list[Run]) -> None:
    """Train, one after the other, as one of two processes."""
    original = CheckpointEvery.on_train_batch_end

    def keep_the_first(self: Any, trainer: Any, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == CUT and trainer.is_global_zero:
            kept = self._folder.parents[1] / "kept"
            kept.mkdir()
            name = f"step-{CUT:09d}"
            shutil.copytree(self._folder / name, kept / name)

    CheckpointEvery.on_train_batch_end = keep_the_first  # type: ignore[method-assign]
    for family, fields, folder, options in runs:
        places = {"output": folder / "out"}
        trained = run(moe_model(family, **fields), folder, STEPS, devices=2, **places, **options)
        assert trained.model.num_parameters() == trained.record["parameters"]["total"]


def run_of(strategy: str, folder: Path) -> Run:
    family, fields, options = CASES[strategy]
    return family, fields, folder, OPTIONS | options | {"strategy": strategy}


def losses(folder: Path) -> list[dict[str, float]]:
    names = ("step", "lm_nats_per_token", "balance", "z", "total", "gradient_norm", "churn")
    return [{name: row[name] for name in names} for row in read_metrics(folder / "log")]


def die_at_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PretrainingModule.training_step

    def training_step(self: Any, ids: Tensor, batch_idx: int) -> None:
        if self.global_step == CUT + 3:
            raise InterruptedError
        original(self, ids, batch_idx)

    monkeypatch.setattr(PretrainingModule, "training_step", training_step)


def one_process(strategy: str, folder: Path) -> Trained:
    family, fields, options = CASES[strategy]
    return run(moe_model(family, **fields), folder, STEPS, **OPTIONS | options)


@pytest.mark.early
def test_two_processes_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, as what two processes make is looked at from all sides."""
    family, fields, options = CASES["ddp"]
    kept = {"output": tmp_path / "moments", "save_moments": True}
    run(moe_model(family, **fields), tmp_path / "before", 2, **kept)
    monkeypatch.setitem(options, "optimizer_state", str(tmp_path / "moments"))
    for strategy in CASES:
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            die_at_the_cut(patch)
            one_process(strategy, tmp_path / strategy / "one, then two")
    names = ("two", "one, then two")
    runs = [run_of(s, tmp_path / s / name) for s in CASES for name in names]
    two_ranks(one_of_two, runs, folder=tmp_path)
    for strategy in CASES:
        folder = tmp_path / strategy
        whole = one_process(strategy, folder / "one")
        expected = losses(folder / "one")
        assert len(expected) == STEPS
        for name in names:
            assert_close(losses(folder / name), expected)
            assert_same_model(folder / name / "out", whole)
        record = json.loads((folder / "one, then two" / "out" / "training.json").read_text())
        assert record["router_learning_rate"] == whole.record["router_learning_rate"]
        assert record["router_learning_rate"]["value"] < OPTIONS["learning_rate"]
        held_out = whole.record["validation"][STEPS]["again"]
        assert record["validation"][str(STEPS)]["again"] == pytest.approx(held_out, rel=1e-5)
        assert record["resumed_from"] == f"step-{CUT:09d}"
        assert_one_goes_on(strategy, folder / "two", expected)


def assert_one_goes_on(strategy: str, folder: Path, expected: list[dict[str, float]]) -> None:
    """From the checkpoint of two processes, which the program has kept."""
    (kept,) = checkpoints_in(folder / "kept")
    (folder / "kept").rename(folder / "work" / "checkpoints")
    resumed = one_process(strategy, folder)
    assert resumed.record["resumed_from"] == kept.name == f"step-{CUT:09d}"
    assert_close(losses(folder), expected)


def assert_same_model(output: Path, whole: Trained) -> None:
    made, wanted = load(output).state_dict(), whole.model.state_dict()
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.allclose(made[name], atol=1e-5), name


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for step, one in zip(found, expected, strict=True):
        assert step == pytest.approx(one, rel=1e-5)
