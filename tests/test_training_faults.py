"""Runs that are killed, on disks that are full or forget bits: they end as if nothing had been."""

import csv
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from processes import ended, start, two_ranks
from tiny import assert_same_bits, load
from tiny_training import moe_model, run

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.training.checkpoint_folders import checkpoints_in
from fusion_upcycle.training.checkpoints import STATE_FILE, CheckpointEvery, HashedCheckpointIO
from fusion_upcycle.training.run import Trained
from fusion_upcycle.training.seen import MEASURED
from fusion_upcycle.training.work_folder import held, lost_processes
from fusion_upcycle.verify import verify_files

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

STEPS = 9
OPTIONS: dict[str, Any] = {"checkpoint_every": 2, "validate_every": 4}
OPTIONS |= {"validation": {"few": {"_target_": "tiny_training.documents", "count": 3}}}


def train(folder: Path, **options: Any) -> Trained:
    # Dropout too: its draws must be those of the step, not of the process.
    model = moe_model(attention_dropout=0.2)
    return run(model, folder, STEPS, output=folder / "out", **OPTIONS | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def table(folder: Path) -> list[list[str]]:
    """The log as it is written, but for the columns that depend on clock and machine."""
    with open(folder / "log" / "metrics.csv", encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    places = [place for place, name in enumerate(rows[0]) if name not in MEASURED]
    return [[row[place] for place in places] for row in rows]


def assert_as(whole: tuple[Path, Trained], folder: Path) -> None:
    """The same bits, the same log, and nothing left."""
    assert table(folder) == table(whole[0])
    assert_same_bits(load(folder / "out").state_dict(), whole[1].model.state_dict())
    assert verify_files(folder / "out") > 5
    assert not list((folder / "work" / "checkpoints").iterdir())
    assert not [path for path in folder.rglob(".*") if "tensorboard" not in str(path)]


# --- kills ----------------------------------------------------------------------------------------

MOVE = "fusion_upcycle.training.checkpoint_folders.move"
#: Where a run is killed, one after the other: what is called, which time, after or before it.
KILLS = [
    ("fusion_upcycle.training.data.move", 1, "before"),
    ("fusion_upcycle.training.data.move", 1, "after"),
    ("fusion_upcycle.training.logs.Metrics.log_metrics", 1, "before"),
    ("fusion_upcycle.training.checkpoints._log", 2, "after"),  # of the first checkpoint
    ("torch.save", 1, "before"),
    ("fusion_upcycle.training.checkpoint_folders.seal", 1, "before"),
    (MOVE, 1, "before"),
    (MOVE, 1, "after"),
    ("fusion_upcycle.training.module.PretrainingModule.training_step", 2, "before"),
    ("fusion_upcycle.training.logs.Metrics.log_metrics", 1, "half"),
    ("fusion_upcycle.training.logs._replacing", 2, "before"),  # columns of a validation
    ("fusion_upcycle.training.checkpoint_folders._clear", 3, "before"),  # the old one renamed
    ("fusion_upcycle.training.checkpoints.CheckpointEvery._save", 2, "after"),
    ("fusion_upcycle.training.run.export", 1, "before"),
    ("fusion_upcycle.training.export.seal", 1, "before"),
    ("fusion_upcycle.training.run.export", 1, "after"),  # only the checkpoints are to be removed
]


def killed_at_each(folder: Path) -> None:
    """By a process that computes nothing itself, and forks one for each kill."""
    for kill in KILLS:
        child = os.fork()
        if not child:
            killed(folder, *kill)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, kill


def killed(folder: Path, name: str, number: int, moment: str) -> None:
    """Train until then."""
    original, calls = resolve_name(name), 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and moment == "half":
            with open(folder / "log" / "metrics.csv", "a") as file:
                file.write("0.125,0.2")
        if calls == number and moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    module, _, attribute = name.rpartition(".")
    setattr(resolve_name(module), attribute, call)
    train(folder)


@pytest.mark.early
def test_a_run_killed_at_each_of_its_moments_ends_as_one_that_was_not(
    whole: tuple[Path, Trained], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    assert ended(start(killed_at_each, folder, log=tmp_path / "log"), tmp_path / "log") == 0
    again = train(folder)
    assert again.record["resumed_from"] == "step-000000009"
    assert again.record["validation"] == whole[1].record["validation"]
    assert_same_bits(again.model.state_dict(), whole[1].model.state_dict())
    assert_as(whole, folder)


# --- bits -----------------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(place)
        (byte,) = handle.read(1)
        handle.seek(place)
        handle.write(bytes([byte ^ 4]))


class Killed(BaseException):
    """Stands for a kill in tests that need not lose the process."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, saved: int) -> Iterator[None]:
    """Let the run die when it has saved so many checkpoints."""
    original, calls = CheckpointEvery._save, 0

    def save(self: Any, trainer: Any) -> None:
        nonlocal calls
        original(self, trainer)
        calls += 1
        if calls == saved:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CheckpointEvery, "_save", save)
        yield


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_alone(
    whole: tuple[Path, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dying(monkeypatch, 3):
        train(tmp_path)
    first, last = checkpoints_in(tmp_path / "work" / "checkpoints")
    flip(last / STATE_FILE, (last / STATE_FILE).stat().st_size // 2)
    flip(first / "metrics.csv", 100)
    with pytest.raises(UpcyclingError, match=r"06 is .*04 is damaged \(metrics\.csv differs\)"):
        train(tmp_path)
    flip(first / "metrics.csv", 100)
    with held(tmp_path / "work"), pytest.raises(UpcyclingError, match="in use by another run"):
        train(tmp_path)
    with (
        pytest.warns(UserWarning, match=r"step-000000006 is damaged \(state\.pt differs\)"),
        dying(monkeypatch, 1),
    ):
        train(tmp_path)
    kept = checkpoints_in(tmp_path / "work" / "checkpoints")
    assert [path.name for path in kept] == ["step-000000004", "step-000000006"]
    trained = train(tmp_path)
    assert trained.record["resumed_from"] == "step-000000006"  # written anew
    assert_as(whole, tmp_path)


# --- disks ----------------------------------------------------------------------------------------

#: What is called, which time, while no file may grow beyond so many bytes; what is said of it.
LIMITS = [
    ("fusion_upcycle.training.data._write", 1, 50, r"Packing data\.numbers in .*/data failed"),
    ("fusion_upcycle.training.logs.Metrics.log_metrics", 1, 100, "Writing the log failed"),
    ("fusion_upcycle.training.logs.TensorBoard.save", 1, 0, "Reading or writing failed"),
    ("fusion_upcycle.training.checkpoints.CheckpointEvery._save", 1, 10**5, "Saving .*02 failed"),
    ("fusion_upcycle.training.checkpoint_folders.seal", 1, 100, "Saving .*02 failed"),
    ("fusion_upcycle.training.export.seal", 1, 2000, "Writing .*out failed"),
]


def limited(original: Any, number: int, limit: int) -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return original(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return call


def test_a_full_disk_ends_the_run_in_one_line_and_the_same_call_goes_on(
    whole: tuple[Path, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number, limit, words in LIMITS:
        with (
            monkeypatch.context() as patch,
            pytest.raises(UpcyclingError, match=f"{words}: .*File too large"),
        ):
            patch.setattr(name, limited(resolve_name(name), number, limit))
            train(tmp_path)
        assert not list((tmp_path / "work" / "checkpoints").glob(".*")), name
        assert not (tmp_path / ".out.incomplete").exists(), name
    assert train(tmp_path).record["resumed_from"] == "step-000000009"
    assert_as(whole, tmp_path)


def test_the_thread_of_tensorboard_is_heard_and_says_nothing_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write", write)
    with pytest.raises(UpcyclingError, match=r"failed: .*No space left"):
        train(tmp_path)
    assert "Traceback" not in capsys.readouterr().err


# --- processes ------------------------------------------------------------------------------------


def on_two_devices(folder: Path) -> None:
    """As one of two processes."""
    rank = os.environ["RANK"]
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "checkpoint_every": 2}
    original = HashedCheckpointIO.save_checkpoint

    def full(self: Any, checkpoint: Any, path: Path, storage_options: Any = None) -> None:
        if checkpoint["global_step"] == 6:
            path = Path("/dev/full")
        original(self, checkpoint, path, storage_options)

    HashedCheckpointIO.save_checkpoint = full  # type: ignore[method-assign]
    words = "Saving .*06 failed: .*No space left"
    with pytest.raises(UpcyclingError, match=words):  # in both: none waits for the other
        run(moe_model(), folder, 8, **options)
    HashedCheckpointIO.save_checkpoint = original  # type: ignore[method-assign]
    first, last = checkpoints_in(folder / "work" / "checkpoints")
    if rank == "0":
        flip(last / STATE_FILE, 1000)
        (folder / "flipped").touch()
    while not (folder / "flipped").exists():
        time.sleep(0.01)
    if rank == "0":
        with pytest.warns(UserWarning, match="step-000000004 is damaged"):
            trained = run(moe_model(), folder, 8, **options)
    else:
        trained = run(moe_model(), folder, 8, **options)
    assert trained.record["resumed_from"] == first.name == "step-000000002"


def test_processes_end_together_on_a_full_disk_and_go_on_from_the_same_checkpoint(
    tmp_path: Path,
) -> None:
    two_ranks(on_two_devices, tmp_path / "two", folder=tmp_path)
    log = tmp_path / "two" / "log" / "metrics.csv"
    with open(log, encoding="utf-8", newline="") as lines:
        assert [row["step"] for row in csv.DictReader(lines)] == [str(n + 1) for n in range(8)]


def test_processes_that_were_not_asked_for_do_not_each_train_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them, and FusionBench's fabric."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(
        UpcyclingError, match=r"2 processes were started.*Pass devices=2, or start 1"
    ):
        train(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_lost_ends_the_others_in_a_line(tmp_path: Path) -> None:
    for said in ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", "of another kind"):
        error = UpcyclingError if "gloo" in said else RuntimeError
        with pytest.raises(error, match=said[-15:]) as caught, lost_processes(tmp_path):
            raise RuntimeError(said)
        assert (caught.type is UpcyclingError) == ("gloo" in said)
