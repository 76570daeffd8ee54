"""Experiments run by the command, in processes of their own: done, failed, killed, repeated."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_upcycle.cli import main
from fusion_upcycle.demo.tokenizer import byte_tokenizer

pytestmark = pytest.mark.early
NAMES = ("_pretrained_", "a", "b")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(root / name)
        byte_tokenizer(64).save_pretrained(root / name)
    return {name: str(root / name) for name in NAMES}


def experiment(folder: Path, models: dict[str, str], **methods: Any) -> Path:
    text = folder / "text.txt"
    text.write_text("Some text to predict, größer. " * 20)
    ppl = {
        "config": "CausalLMPerplexityTaskPool/local_files",
        "options": {"texts": {"a": str(text)}},
    }
    content = {
        "modelpool": {
            "config": "CausalLMPool/folders",
            "options": {"models": models, "tokenizer": models["a"]},
        },
        "taskpools": {"ppl": ppl},
        "validation": {
            "taskpools": {"ppl": ppl},
            "metric": "ppl.average.bits_per_byte",
            "better": "lower",
        },
        "overrides": ["fabric.accelerator=cpu"],
        "methods": methods,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def start(folder: Path, *arguments: str, **kwargs: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fusion_upcycle", "benchmark", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """As `start`, but in this process: the warm server that it forks runs from is started once."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handler, argv = signal.getsignal(signal.SIGTERM), sys.argv
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            main(["benchmark", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
            sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def sections(output: Path) -> dict[str, dict[str, Any]]:
    """The section `benchmark` of each run that has ended: it is the last to be written."""
    records = {path: json.loads(path.read_text()) for path in output.rglob("run_record.json")}
    return {
        str(path.parent.relative_to(output)): record["benchmark"]
        for path, record in records.items()
        if "benchmark" in record
    }


def times(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.rglob("console.log")}


def test_done_failed_relabelled_and_repeated(models: dict[str, str], tmp_path: Path) -> None:
    methods: dict[str, Any] = {
        "task_arithmetic": {"label": "TA", "trials": {"scaling_factor": [3.0, 0.2]}},
        "broken": {"method": "linear/linear_interpolation"},
        "made": {"folder": models["b"]},
        "moe_merging": {"seeds": [0, 1], "options": {"experts_per_token": 1}},
    }
    mine = experiment(tmp_path, models, **methods)
    status, out, err = run(tmp_path, f"experiment={mine}", "jobs=2")
    output = tmp_path / "outputs" / "benchmark" / "mine"
    assert status == 1, err
    assert "failed: broken: AssertionError" in err
    found = sections(output)
    assert {name for name, run in found.items() if run["status"] == "failed"} == {"broken"}
    assert found["task_arithmetic/chosen"]["settings"] == {"scaling_factor": 0.2}
    assert found["task_arithmetic/chosen"]["trials"] == 2
    made, tuned = found["made"]["report"]["ppl"], found["references/b"]["report"]["ppl"]
    assert made["a"] == tuned["a"]
    report = (output / "report" / "report.md").read_text()
    assert "| TA (scaling_factor=0.2) |" in report and "broken" in report
    assert "±" in report and str(output / "report" / "index.html") in out

    before = times(output)
    methods["task_arithmetic"]["label"] = "Renamed"
    del methods["broken"]
    experiment(tmp_path, models, **methods)
    status, _, err = run(tmp_path, f"experiment={mine}", "jobs=2")
    assert status == 0, err
    assert times(output) == before  # nothing was made again
    report = (output / "report" / "report.md").read_text()
    assert "| Renamed (scaling_factor=0.2) |" in report and "| TA " not in report
    assert "broken" not in report and (output / "broken" / "run.json").is_file()


def test_killed_in_the_middle_it_ends_with_the_same_table(
    models: dict[str, str], tmp_path: Path
) -> None:
    mine = experiment(
        tmp_path,
        models,
        simple_average=None,
        task_arithmetic={"trials": {"scaling_factor": [0.1, 0.2, 0.3]}},
    )
    arguments = (f"experiment={mine}", "jobs=2")
    process = start(tmp_path, *arguments, "output=killed", start_new_session=True)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    deadline = time.monotonic() + 120
    while len(sections(killed)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()  # SIGKILL: it cannot tell its children
    process.communicate()
    deadline = time.monotonic() + 20
    while children(process.pid):
        assert time.monotonic() < deadline, "runs go on without the command that started them"
        time.sleep(0.1)
    first = times(killed)

    assert run(tmp_path, *arguments, "output=killed")[0] == 0
    assert run(tmp_path, *arguments, "output=whole")[0] == 0
    kept = [path for path, when in first.items() if times(killed)[path] == when]
    assert kept  # what was complete is not made again
    for name in ("scores.csv", "normalised.csv", "scores.tex"):
        ours, theirs = ((out / "report" / name).read_text() for out in (killed, whole))
        assert ours == theirs


def children(session: int) -> list[str]:
    """Processes of a session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_an_interruption_a_launcher_and_fresh_processes(
    models: dict[str, str], tmp_path: Path
) -> None:
    mine = experiment(tmp_path, models, simple_average=None)
    arguments = (f"experiment={mine}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert run(tmp_path, *arguments, "jobs=2")[0] == 2  # two ways to say how many at once
    process = start(tmp_path, f"experiment={mine}", "output=stopped", "report=false")
    while not list((tmp_path / "stopped").rglob("run.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on with what is not complete" in err
    assert "Traceback" not in err

    alone = ("references=false", "output=stopped", "report=false")
    status, _, err = run(tmp_path, *arguments, *alone)
    assert status == 0, err
    assert sections(tmp_path / "stopped")["simple_average"]["status"] == "done"

    fresh = (f"experiment={mine}", "output=fresh", "references=false", "isolate=true")
    status, _, err = run(tmp_path, *fresh)
    assert status == 0, err
    ours = sections(tmp_path / "fresh")["simple_average"]["report"]["ppl"]
    assert ours == sections(tmp_path / "stopped")["simple_average"]["report"]["ppl"]


@pytest.mark.full
def test_the_methods_of_fusion_bench_that_merge_language_models(
    models: dict[str, str], tmp_path: Path
) -> None:
    """Those that work under transformers 5 at all; smaller ones run in every test above."""
    saved = {"model_save_path": None}
    methods: dict[str, Any] = {
        "simple_average": None,
        "task_arithmetic": None,
        "ties_merging": None,
        "dare/simple_average": None,
        "dare/task_arithmetic": None,
        "dare/ties_merging": None,
        "linear/weighted_average": {"options": {"weights": [0.3, 0.7]}},
        "linear/simple_average_for_causallm": None,
        "linear/task_arithmetic_for_causallm": {"options": saved},
        "linear/ties_merging_for_causallm": {"options": saved},
        "model_stock/model_stock": {"options": saved},
        "magmax/magmax": None,
        "slerp/slerp_lm": {"pretrained": False, "options": saved},
        "smile_upscaling/smile_upscaling": {
            "options": {"upscaling_accelerator": "cpu", "k": 4, "gate_k": 4}
        },
    }
    mine = experiment(tmp_path, models, **methods)
    status, _, err = run(tmp_path, f"experiment={mine}", "jobs=2", "output=all")
    assert status == 0, err
    done = [run for run in sections(tmp_path / "all").values() if run["status"] == "done"]
    assert len(done) == len(methods) + 3
