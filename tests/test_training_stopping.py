"""Signals, the clock and the words around a run: what stops it, what is kept, what is said."""

import json
import logging
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import fusion_bench.scripts.cli as cli
import pytest
import torch
from processes import two_ranks
from test_training_method import cli_run, pool_of
from test_training_run import losses
from tiny import assert_same_bits, dense_model, load
from tiny_training import TOKENIZER, moe_model, run

from fusion_upcycle.benchmark import perform
from fusion_upcycle.checkpoint.moments import MOMENTS_FILE
from fusion_upcycle.cli import main
from fusion_upcycle.errors import Stopped, UpcyclingError
from fusion_upcycle.training.checkpoint_folders import checkpoints_in
from fusion_upcycle.training.checkpoints import CheckpointEvery
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.objectives.texts import separator_of
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.seen import MEASURED
from hydra_plugins.fusion_upcycle.one_sentence import end_in_one_sentence

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

STEP = PretrainingModule.training_step


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def signalled(monkeypatch: Any, at: int, *signals: signal.Signals) -> Any:
    """Send them to this process while the step after `at` steps is taken."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        STEP(self, batch, batch_idx)
        if self._step_number == at + 1:
            for each in signals:
                os.kill(os.getpid(), each)

    monkeypatch.setattr(PretrainingModule, "training_step", training_step)
    return monkeypatch


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder / "work" / "checkpoints")]


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_same_call_goes_on(
    sent: signal.Signals, code: int, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"checkpoint_every": 0, "log_every": 3}
    whole = run(moe_model(), tmp_path / "whole", 9, **options)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with signalled(monkeypatch, 3, sent).context(), pytest.raises(Stopped) as stopped:
        run(moe_model(), tmp_path / "a", 9, **options)
    assert stopped.value.code == code
    assert names(tmp_path / "a") == ["step-000000004"]  # 4 is no step that would be logged
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "Stopped" in line]
    folder = tmp_path / "a" / "work" / "checkpoints"
    assert said == (
        f"Stopped by {sent.name} after step 4 of 9, saved in {folder}; the same command goes on "
        "from there."
    )
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    monkeypatch.setattr(PretrainingModule, "training_step", STEP)
    resumed = run(moe_model(), tmp_path / "a", 9, **options)
    assert resumed.record["resumed_from"] == "step-000000004"
    assert resumed.record["first"] == whole.record["first"]
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())
    logs = [read_metrics(tmp_path / name / "log") for name in ("a", "whole")]
    logs = [[{k: v for k, v in row.items() if k not in MEASURED} for row in rows] for rows in logs]
    assert logs[0] == logs[1]  # loads of steps before the signal too


def test_a_run_that_was_to_start_over_says_how_to_go_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with signalled(monkeypatch, 0, signal.SIGTERM).context(), pytest.raises(Stopped):
        run(dense_model(vocab_size=257), tmp_path, 3, resume=False)
    assert "; the same command, without resume=False goes on from" in capsys.readouterr().err


def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with signalled(monkeypatch, 1, signal.SIGINT, signal.SIGINT).context(), pytest.raises(Stopped):
        run(moe_model(), tmp_path, 9)
    assert not names(tmp_path)


def test_a_signal_outside_of_the_steps_ends_the_run_and_leaves_nothing_half(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("fusion_upcycle.training.data.move", told)
        run(dense_model(vocab_size=257), tmp_path, 2)
    assert "Stopped by SIGTERM outside of the steps; the same command" in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("fusion_upcycle.training.export._model_card", told)
        run(dense_model(vocab_size=257), tmp_path, 2, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(dense_model(vocab_size=257), tmp_path, 2, output=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of jobs in the background
    try:
        signalled(monkeypatch, 1, signal.SIGINT)
        run(dense_model(vocab_size=257), tmp_path, 3)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def stopped_by_one(folder: Path) -> None:
    """On one of two devices."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        STEP(self, batch, batch_idx)
        if self.global_rank == 1 and self._step_number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    PretrainingModule.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        run(moe_model(), folder, 6, devices=2, strategy="ddp")
    assert names(folder) == ["step-000000002"]


@pytest.mark.early
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path) -> None:
    two_ranks(stopped_by_one, tmp_path / "two", folder=tmp_path)
    again = run(moe_model(), tmp_path / "two", 6)
    assert again.record["resumed_from"] == "step-000000002"


# --- the faces ------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dense_model(vocab_size=257).save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    (tmp_path / "a.txt").write_text("some text " * 200)
    return tmp_path / "dense"


SMALL = {"context_length": 16, "batch_size": 4, "accelerator": "cpu", "log_every": 1}


def test_the_command_line_ends_in_one_line_with_the_code_of_the_signal(
    source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ["train", str(source), "out", "--data", "a=a.txt", "--tokens", "256", *flags]
    with signalled(monkeypatch, 1, signal.SIGTERM).context(), pytest.raises(SystemExit) as ended:
        main([*command, "--quiet"])
    assert ended.value.code == 143
    assert len([line for line in capsys.readouterr().err.splitlines() if "Stopped by" in line]) == 1
    monkeypatch.setattr(PretrainingModule, "training_step", STEP)
    main([*command, "--learning-rate", "2e-5"])
    said = capsys.readouterr().out
    size = re.search(r"AdamW's moments: ([\d.]+ kB), not kept in out; .*save.moments", said)
    parameters = dense_model(vocab_size=257).num_parameters()
    assert size is not None and size[1] == f"{8 * parameters / 1000:.3g} kB"
    assert not (tmp_path / "out" / MOMENTS_FILE).exists()
    number = r"\d+\.\d{4}"
    closing = rf"Trained on 256 tokens in 4 steps: lm loss {number} -> {number} nats per token; "
    assert re.fullmatch(rf"{closing}saved to out\.", said.splitlines()[-1])
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    rows = read_metrics(tmp_path / "out.training" / "logs")
    assert record["first"] == {"lm_nats_per_token": rows[0]["lm_nats_per_token"]}


def test_fusion_bench_ends_without_a_trace(
    source: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_in_one_sentence(cli.log.name)
    overrides = [
        "method=continued_pretraining",
        *pool_of(source),
        "taskpool=dummy",
        "method.data={a: a.txt}",
        "method.tokens=256",
        *(f"method.{name}={value}" for name, value in SMALL.items()),
    ]
    with (
        signalled(monkeypatch, 1, signal.SIGTERM).context(),
        pytest.raises(SystemExit) as ended,
        caplog.at_level(logging.ERROR),
    ):
        cli_run(tmp_path / "run", *overrides)
    assert ended.value.code == 143
    assert not caplog.records


def test_a_run_of_a_benchmark_that_was_stopped_has_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped(signal.SIGTERM, "")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("runpy.run_module", stopped)
    with pytest.raises(Stopped):
        perform._fusion_bench([])


# --- the clock ------------------------------------------------------------------------------------


def test_a_run_is_saved_when_minutes_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 45))  # three quarters of a minute for each look
    saved: list[int] = []
    monkeypatch.setattr("fusion_upcycle.training.checkpoints.time.monotonic", lambda: next(clock))

    def save(self: Any, trainer: Any) -> None:
        saved.append(trainer.global_step)
        self._saved_at = next(clock)

    monkeypatch.setattr(CheckpointEvery, "_save", save)
    run(dense_model(vocab_size=257), tmp_path, 7, checkpoint_every=0, checkpoint_minutes=1.5)
    assert saved == [2, 4, 6, 7]
    assert make_training_options(tokens=10**6).checkpoint_minutes == 30


def test_nothing_but_the_place_of_checkpoints_depends_on_the_clock(tmp_path: Path) -> None:
    each = run(moe_model(), tmp_path / "each", 3, checkpoint_minutes=1e-9)
    none = run(moe_model(), tmp_path / "none", 3, checkpoint_minutes=0)
    assert names(tmp_path / "each") == ["step-000000002", "step-000000003"]
    assert names(tmp_path / "none") == ["step-000000003"]
    assert losses(tmp_path / "each") == losses(tmp_path / "none")
    assert_same_bits(each.model.state_dict(), none.model.state_dict())


# --- moments, separators --------------------------------------------------------------------------


def test_moments_are_kept_where_that_is_asked_for_and_their_size_is_said(
    tmp_path: Path, capsys: Any
) -> None:
    options: dict[str, Any] = {"progress": True, "freeze": ["embeddings"], "save_moments": True}
    model = dense_model(vocab_size=257)
    run(model, tmp_path, 2, output=tmp_path / "out", **options)
    size = (tmp_path / "out" / MOMENTS_FILE).stat().st_size
    said = re.search(r"AdamW's moments: ([\d.]+) kB, kept in ", capsys.readouterr().out)
    assert said is not None and float(said[1]) == pytest.approx(size / 1000, rel=0.1)
    run(load(tmp_path / "out"), tmp_path / "on", 1, optimizer_state=tmp_path / "out")


def test_documents_begin_with_the_token_that_was_named(tmp_path: Path) -> None:
    vocabulary = TOKENIZER.get_vocab()
    assert separator_of(TOKENIZER, None, [None, 7]) == 7
    name = next(name for name, number in vocabulary.items() if number == 65)
    assert separator_of(TOKENIZER, name, [7]) == 65
    with pytest.raises(UpcyclingError, match="separator='nothing' is no token of the tokenizer"):
        separator_of(TOKENIZER, "nothing", [7])
    with pytest.raises(UpcyclingError, match=r"budget is tokens\. Leave it out"):
        make_training_options(examples=100, separator=name)
    own = run(dense_model(vocab_size=257), tmp_path / "own", 1)
    other = run(dense_model(vocab_size=257), tmp_path / "other", 1, separator=name)
    assert own.record["data"]["numbers"]["sha256"] != other.record["data"]["numbers"]["sha256"]


def test_a_tokenizer_without_an_end_names_the_token_that_works(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    config = json.loads((source / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        config.pop(name, None)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ["train", str(source), "out", "--data", "a=a.txt", "--tokens", "64", *flags]
    with pytest.raises(SystemExit):
        main([*command, "--quiet"])
    (remedy,) = re.findall(r"as in (--separator .+)\.$", capsys.readouterr().err, re.M)
    main([*command, "--quiet", *shlex.split(remedy)])
    assert (tmp_path / "out" / "config.json").is_file()


def test_float32_moments_of_half_precision_are_counted(tmp_path: Path) -> None:
    from fusion_upcycle.training.summary import in_bytes, moments_in_words

    options = make_training_options(tokens=10**6, save_moments=True)
    small = torch.nn.Linear(1000, 1000, bias=False)
    assert moments_in_words(small, options, tmp_path).startswith("AdamW's moments: 8 MB, kept in")  # type: ignore[arg-type]
    assert [in_bytes(n) for n in (12, 1_380_000_000, 2e12)] == ["12 bytes", "1.38 GB", "2 TB"]
