"""The benchmarks run, on tiny models; their numbers are in `examples/benchmarks/results`.

Their jobs run in this process, as one of their own takes 7 to 10 s to start; one of each kind is
started as the benchmarks start it.
"""

import contextlib
import importlib
import io
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import dense_folder

from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.training.options import make_training_options

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def printed_by(job: list[str]) -> str:
    """What `python jobs.py NAME ARGUMENTS` prints."""
    python, file, *arguments = job
    assert (python, file) == (sys.executable, str(FOLDER / "jobs.py"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        script("jobs").main(*arguments)
    return printed.getvalue()


def run_here(name: str, command: list[str], output: Path, source: Path) -> dict[str, Any]:
    """`convert.run_process` in this process, whose time and memory nobody looks at."""
    assert source.is_dir()
    printed = printed_by(command)
    nbytes = sum(file.stat().st_size for file in filter(Path.is_file, output.rglob("*")))
    shutil.rmtree(output)
    measured = {"wall": 1.0, "cpu": 1.0, "peak_rss": 2**20, "bytes": nbytes, "load": 0.0}
    return measured | (json.loads(printed) if name in script("convert").OURS else {})


@pytest.fixture
def jobs_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    convert, expand = script("convert"), script("expand")
    monkeypatch.setattr(convert, "run_process", run_here)
    for module in (convert, expand):
        monkeypatch.setattr(module, "prepare", lambda *job: printed_by(convert.job(*job)))


def main_of(name: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    script(name).main()


@pytest.mark.usefixtures("jobs_run_here")
def test_the_conversion_benchmark_measures_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    flags = ["--tiny", "--runs=1", f"--work={tmp_path / 'work'}", f"--record={record}"]
    main_of("convert", flags, monkeypatch)
    capsys.readouterr()
    main_of("convert", [f"--table={record}"], monkeypatch)
    table = capsys.readouterr().out
    for row in (
        "plain write, 8 MiB pieces",
        "the same, page cache given back",
        "fusion_upcycle: plan to rename",
        "fusion_upcycle: imports",
        "fusion_upcycle: proof, verify=layers",
        "fusion_upcycle: whole process",
        "transformers, in memory",
    ):
        assert f"| {row} |" in table
    content = json.loads(record.read_text())
    assert {"machine", "versions", "convert"} <= content.keys()
    for runs in content["convert"]["runs"].values():
        assert all(run["bytes"] > 0 and "failed" not in run for run in runs)
    assert [(run["layers"], run["experts"]) for run in content["convert"]["scaling"]] == [
        (1, 2),
        (1, 8),
        (4, 2),
    ]


@pytest.mark.early
def test_a_job_is_a_process_that_is_measured_from_outside(tmp_path: Path) -> None:
    convert, source = script("convert"), dense_folder(tmp_path / "dense")
    task = {"source": str(source), "output": str(tmp_path / "out"), "num_experts": 2}
    real = convert.run_job("fusion_upcycle", task, source)
    assert not (tmp_path / "out").exists()
    command = convert.job("fusion_upcycle", task)
    assert real.keys() == run_here("fusion_upcycle", command, tmp_path / "out", source).keys()
    assert real["wall"] > 0 and real["bytes"] > 0 and real["conversion"]["wall"] > 0
    # From outside: with the start of Python, and all of its memory.
    assert real["cpu"] > sum(real[part]["cpu"] for part in ("imports", "conversion", "proof"))
    assert real["peak_rss"] >= real["conversion"]["peak_rss"] > 2**20


def test_a_job_that_fails_is_recorded_so_and_ends_the_benchmark_if_it_is_ours(
    tmp_path: Path,
) -> None:
    convert = script("convert")
    output = tmp_path / "out"
    output.write_text("in the way")
    write = {"output": str(output), "nbytes": 1}
    assert convert.run_job("plain_write", write, tmp_path)["failed"].startswith("exit code 1, see")
    with pytest.raises(SystemExit, match=r"(?s)merge: exit code 1, see .*TypeError"):
        convert.run_job("merge", {"output": str(output), "no_such": 1}, tmp_path)


@pytest.mark.usefixtures("jobs_run_here")
def test_the_merge_job_measures_both_routers(tmp_path: Path) -> None:
    models = {}
    for seed in range(4):
        folder = dense_folder(tmp_path / str(seed), vocab_size=257, seed=seed)
        byte_tokenizer(64).save_pretrained(folder)
        models[f"model{seed}"] = str(folder)
    for router in ("normal", "prototype"):
        task = {"models": models, "output": str(tmp_path / router), "router_init": router}
        measured = json.loads(printed_by(script("convert").job("merge", task)))
        assert "proven" in measured["proven"]
        assert measured["conversion"]["peak_rss"] > 0
        assert (tmp_path / router / "upcycling.json").is_file()


ROUNDS = 2


class TrainedHere:
    """A worker of `train_job`, as far as its starter sees it: it ran to its end beforehand."""

    def __init__(self, command: list[str], **_: Any):
        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("go\n" * ROUNDS))
            patch.setattr(resource, "setrlimit", lambda *_: None)
            with contextlib.suppress(Exception, SystemExit):
                script("train_job").main(command[2], told)
        self.stdin, self.stdout = io.StringIO(), io.StringIO(told.getvalue())

    def terminate(self) -> None: ...

    def communicate(self) -> None: ...


@pytest.mark.early
def test_the_training_benchmark_measures_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def start(command: list[str], **kwargs: Any) -> Any:
        started.append(Path(json.loads(command[2])["model"]).name)
        kind = subprocess.Popen if started[-1] == "dense" else TrainedHere
        return kind(command, **kwargs)

    train, record = script("train"), tmp_path / "train.json"
    processes = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE)
    monkeypatch.setattr(script("train_job"), "subprocess", processes)
    flags = ["--tiny", f"--rounds={ROUNDS}", "--steps=1", f"--record={record}", "--accelerator=cpu"]
    flags += ["--implementations", "grouped_mm", "deepgemm"]
    main_of("train", flags, monkeypatch)
    assert started == ["dense", "wide", "moe", "moe"]
    capsys.readouterr()
    main_of("train", [f"--table={record}"], monkeypatch)
    printed = capsys.readouterr().out
    assert "Does not run here: MoE, deepgemm: DeepGEMM experts path requires bfloat16" in printed
    assert "| MoE, deepgemm | 0.2M |" in printed
    models = json.loads(record.read_text())["train"]["tiny"]["models"]
    assert models.pop("MoE, deepgemm").keys() == {"parameters", "flops_per_token", "failed"}
    assert list(models) == [train.DENSE, train.WIDE, "MoE, grouped_mm"]
    for name, model in models.items():
        assert f"| {name} |" in printed
        assert len(model["steps"]) == ROUNDS
        assert all(step["wall"] > 0 and step["cpu"] > 0 for step in model["steps"])
        assert model["peak_bytes"] > 0
    dense, wide, moe = models.values()
    assert dense["parameters"] < wide["parameters"] < moe["parameters"]
    # The router is all that the MoE computes more than a dense model of its active size.
    assert moe["flops_per_token"] - wide["flops_per_token"] < 0.02 * wide["flops_per_token"]


def test_the_training_benchmark_shares_a_step_in_every_way() -> None:
    ways = script("train").shared_by(2)
    names = ("ddp", "fsdp", "expert_parallel=2")
    assert list(ways) == [f"MoE, 2 processes, {name}" for name in names]
    for way in ways.values():
        options = make_training_options(tokens=2**16, accelerator="cpu", **way)
        command = script("train_job").Worker._python(SimpleNamespace(_arguments={"options": way}))
        assert options.devices == 2 and command[-2:] == ["--nproc-per-node", "2"]
    assert script("train").shared_by(1) == {}


@pytest.mark.usefixtures("jobs_run_here")
def test_the_expansion_benchmark_measures_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand = script("expand")
    name = "copy, with moments"
    monkeypatch.setattr(expand, "RUNS", {name: expand.RUNS[name]})
    record = expand.measure(tmp_path, expand.TINY | {"vocab_size": 300}, 1024)
    run = record["runs"][name]
    assert run["proven"].startswith("approximate")
    # Weights in bfloat16 and moments in float32, without the headers of their files.
    assert run["bytes"] > run["parameters"]["total"] * (2 + 4 + 4)
    assert f"| {name} | " in expand.table(record).to_markdown()


def test_a_plan_of_many_tensors_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = script("plan")
    monkeypatch.setattr(plan, "prepare", lambda *job: printed_by(script("convert").job(*job)))
    monkeypatch.setattr(
        plan, "printed", lambda *job: json.loads(printed_by(script("convert").job(*job)))
    )
    # Beyond the 32 files that are open at once, and the usual limit of a process is 1,024.
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        record = plan.measure(tmp_path, layers=33, experts=8, shards=300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [run["shards"] for run in record.values()] == [300, 300]
    assert record["upcycling"]["planned"] == record["expansion"]["tensors"] > 900
    assert record["expansion"]["planned"] > 1700
    (tmp_path / "record.json").write_text(json.dumps({"plan": record}))
    main_of("plan", [f"--table={tmp_path / 'record.json'}"], monkeypatch)
    assert "| expansion | 300 | " in capsys.readouterr().out
    # A tensor costs 2 KB.
    for run in record.values():
        assert run["peak_bytes"] < 40 * 2**20


@pytest.mark.full
def test_a_plan_of_1000_shards_and_100000_tensors_takes_500_mb(tmp_path: Path) -> None:
    plan = script("plan")
    record = plan.measure(tmp_path, plan.LAYERS, plan.EXPERTS, plan.SHARDS)
    assert record["upcycling"]["planned"] > 100_000 and record["expansion"]["planned"] > 200_000
    for run in record.values():
        assert run["shards"] == 1000
        assert run["peak_bytes"] < 500e6
