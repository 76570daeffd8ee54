"""What is written beside the training, without processes."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from fusion_upcycle.training.checkpoints import CheckpointEvery
from fusion_upcycle.training.stopping import Stopping


class Saving(CheckpointEvery):
    """That tells what it does, of a process whose part is written beside the training."""

    def __init__(self, folder: Path, every: int, minutes: float):
        metrics: Any = None
        given: Any = {"every": every, "minutes": minutes, "stopping": Stopping()}
        super().__init__(folder, {}, Path, None, metrics, **given)
        self.seen: list[str] = []
        self.part: Future[dict[str, str]] = Future()

    def _written(self, trainer: Any) -> Iterator[None]:
        self.seen.append("begun")
        yield
        self.seen.append("named")

    def step(self, number: int) -> None:
        strategy = SimpleNamespace(reduce=_reduce, root_device="cpu", saving=self.part)
        trainer: Any = SimpleNamespace(strategy=strategy, should_stop=False, loggers=[])
        due: Any = lambda every: every and number % every == 0  # noqa: E731
        module: Any = SimpleNamespace(due=due, take_metrics=dict)
        self.on_train_batch_end(trainer, module, None, None, number)


def _reduce(wishes: Tensor, reduce_op: str) -> Tensor:
    assert reduce_op == "max"
    return wishes


def test_a_checkpoint_has_its_name_in_the_step_after_it_was_written(tmp_path: Path) -> None:
    saving = Saving(tmp_path, every=4, minutes=0)
    for number in (3, 4, 5):
        saving.step(number)
    assert saving.seen == ["begun"]
    saving.part.set_result({})
    saving.step(6)
    assert saving.seen == ["begun", "named"]
    saving.part = Future()
    saving.step(8)
    saving.step(12)  # which waits for the one before
    assert saving.seen == ["begun", "named"] * 2 + ["begun"]


def test_one_that_takes_its_time_is_not_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    saving = Saving(tmp_path, every=0, minutes=1)
    for clock[0] in (59.0, 60.0, 61.0, 119.0):
        saving.step(1)
    assert saving.seen == ["begun"]
    clock[0] = 120.0
    saving.step(1)
    assert saving.seen == ["begun", "named", "begun"]
