"""Two gloo processes on the CPU: the losses of one process, and checkpoints that both can read."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import load
from tiny_training import moe_model, run
from torch import Tensor

from fusion_upcycle.training.checkpoints import checkpoints_in
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.run import Trained

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

STEPS, CUT = 20, 10
#: Strategy -> family, fields of the dense model, options: tied weights; a bias that is a parameter.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp": ("mixtral", {"tie_word_embeddings": True}, {}),
    "fsdp": ("ernie4_5_moe", {}, {"bias_update_rate": 0.001}),
}
OPTIONS = {"learning_rate": 3e-3, "checkpoint_every": CUT}

PROGRAM = """
import json, os, sys
from pathlib import Path
from tiny_training import moe_model, run

from fusion_upcycle.training.checkpoints import CheckpointEvery
original = CheckpointEvery.on_train_batch_end
def keep_the_first(self, trainer, *arguments):
    original(self, trainer, *arguments)
    if trainer.global_step == 10 and trainer.is_global_zero:
        kept = self._folder.parents[1] / "kept"
        kept.mkdir()
        os.link(self._folder / "step-000000010.ckpt", kept / "step-000000010.ckpt")
CheckpointEvery.on_train_batch_end = keep_the_first

for family, fields, folder, steps, options in json.loads(sys.argv[1]):
    model = moe_model(family, **fields)
    trained = run(model, Path(folder), steps, devices=2, output=Path(folder) / "out", **options)
    assert trained.model.num_parameters() == trained.record["parameters"]["total"]
"""


def two_processes(runs: list[tuple[str, Path]]) -> None:
    """Train by a strategy in a folder, one after the other, as torchrun would start it."""
    arguments = []
    for strategy, folder in runs:
        family, fields, options = CASES[strategy]
        options = OPTIONS | options | {"strategy": strategy}
        arguments.append([family, fields, str(folder), STEPS, options])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    shared |= {"TORCHELASTIC_RUN_ID": "test"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
            cwd=Path(__file__).parent,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def losses(folder: Path) -> list[dict[str, float]]:
    names = ("step", "lm_nats_per_token", "balance", "z", "total", "gradient_norm")
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


def test_two_processes_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, as two processes take their time to start."""
    family, fields, options = CASES["fsdp"]
    run(moe_model(family, **fields), tmp_path / "before", 2, output=tmp_path / "moments")
    monkeypatch.setitem(options, "optimizer_state", str(tmp_path / "moments"))
    for strategy in CASES:
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            die_at_the_cut(patch)
            one_process(strategy, tmp_path / strategy / "one, then two")
    names = ("two", "one, then two")
    two_processes([(s, tmp_path / s / name) for s in CASES for name in names])
    for strategy in CASES:
        folder = tmp_path / strategy
        whole = one_process(strategy, folder / "one")
        expected = losses(folder / "one")
        assert len(expected) == STEPS
        for name in names:
            assert_close(losses(folder / name), expected)
            assert_same_model(folder / name / "out", whole)
        record = json.loads((folder / "one, then two" / "out" / "training.json").read_text())
        assert record["resumed_from"] == f"step-{CUT:09d}.ckpt"
        assert_one_goes_on(strategy, folder / "two", expected)


def assert_one_goes_on(strategy: str, folder: Path, expected: list[dict[str, float]]) -> None:
    """From the checkpoint of two processes, which the program has kept."""
    (kept,) = checkpoints_in(folder / "kept")
    (folder / "kept").rename(folder / "work" / "checkpoints")
    resumed = one_process(strategy, folder)
    assert resumed.record["resumed_from"] == kept.name == f"step-{CUT:09d}.ckpt"
    assert_close(losses(folder), expected)


def assert_same_model(output: Path, whole: Trained) -> None:
    made, wanted = load(output).state_dict(), whole.model.state_dict()
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.allclose(made[name], atol=1e-5), name


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for step, one in zip(found, expected, strict=True):
        assert step == pytest.approx(one, rel=1e-5)
