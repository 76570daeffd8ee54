"""What is written beside the training, without processes."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fusion_upcycle.training.checkpoints import CheckpointEvery
from fusion_upcycle.training.stopping import Stopping


def test_a_checkpoint_has_its_name_in_the_step_after_it_was_written(tmp_path: Path) -> None:
    seen: list[str] = []
    written: Future[dict[str, str]] = Future()

    class Saving(CheckpointEvery):
        def _written(self, trainer: Any) -> Iterator[None]:
            seen.append("begun")
            yield
            seen.append("named")

    def reduce(wishes: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "max"
        return wishes

    strategy = SimpleNamespace(reduce=reduce, root_device="cpu", saving=written)
    trainer: Any = SimpleNamespace(strategy=strategy, should_stop=False, loggers=[])
    metrics: Any = None
    stopping = Stopping()
    saving = Saving(tmp_path, {}, Path, None, metrics, every=4, minutes=0, stopping=stopping)

    def step(number: int) -> None:
        trainer.global_step = number
        module: Any = SimpleNamespace(due=lambda every: number % every == 0, take_metrics=dict)
        saving.on_train_batch_end(trainer, module, None, None, number)

    for number in (3, 4, 5):
        step(number)
    assert seen == ["begun"]
    written.set_result({})
    step(6)
    assert seen == ["begun", "named"]
    strategy.saving = Future()
    step(8)
    step(12)  # which waits for the one before
    assert seen == ["begun", "named"] * 2 + ["begun"]
