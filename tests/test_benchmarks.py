"""The benchmarks run, on tiny models; their numbers are in `examples/benchmarks/results`."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import dense_folder

from fusion_upcycle.demo.tokenizer import byte_tokenizer

SCRIPT = Path(__file__).parent.parent / "examples" / "benchmarks" / "convert.py"


def test_the_conversion_benchmark_measures_every_row(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--tiny", "--runs=1", f"--work={tmp_path / 'work'}", f"--record={record}"]
    subprocess.run([sys.executable, SCRIPT, *flags], check=True)
    table = subprocess.run(
        [sys.executable, SCRIPT, f"--table={record}"], check=True, capture_output=True, text=True
    ).stdout
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
        assert all(run["wall"] > 0 and run["bytes"] > 0 and "failed" not in run for run in runs)
    assert [(run["layers"], run["experts"]) for run in content["convert"]["scaling"]] == [
        (1, 2),
        (1, 8),
        (4, 2),
    ]
    assert not (tmp_path / "work" / "output").exists()


def test_the_merge_job_measures_both_routers(tmp_path: Path) -> None:
    models = {}
    for seed in range(4):
        folder = dense_folder(tmp_path / str(seed), vocab_size=257, seed=seed)
        byte_tokenizer(64).save_pretrained(folder)
        models[f"model{seed}"] = str(folder)
    for router in ("normal", "prototype"):
        task = {"models": models, "output": str(tmp_path / router), "router_init": router}
        job = [sys.executable, SCRIPT.with_name("jobs.py"), "merge", json.dumps(task)]
        printed = subprocess.run(job, check=True, capture_output=True, text=True).stdout
        measured = json.loads(printed.splitlines()[-1])
        assert "proven" in measured["proven"]
        assert measured["conversion"]["peak_rss"] > 0
        assert (tmp_path / router / "upcycling.json").is_file()


def test_the_training_benchmark_measures_every_model(tmp_path: Path) -> None:
    script, record = SCRIPT.with_name("train.py"), tmp_path / "train.json"
    flags = ["--tiny", "--rounds=2", "--steps=1", f"--record={record}", "--accelerator=cpu"]
    flags += ["--implementations", "grouped_mm", "deepgemm"]
    subprocess.run([sys.executable, script, *flags], check=True)
    printed = subprocess.run(
        [sys.executable, script, f"--table={record}"], check=True, capture_output=True, text=True
    ).stdout
    assert "Does not run here: MoE, deepgemm: DeepGEMM experts path requires bfloat16" in printed
    assert "| MoE, deepgemm | 0.2M |" in printed
    models = json.loads(record.read_text())["train"]["tiny"]["models"]
    assert models.pop("MoE, deepgemm").keys() == {"parameters", "flops_per_token", "failed"}
    assert list(models) == ["dense", "dense, same active FLOPs", "MoE, grouped_mm"]
    for name, model in models.items():
        assert f"| {name} |" in printed
        assert len(model["steps"]) == 2
        assert all(step["wall"] > 0 and step["cpu"] > 0 for step in model["steps"])
        assert model["peak_bytes"] > 0
    dense, wide, moe = models.values()
    assert dense["parameters"] < wide["parameters"] < moe["parameters"]
    # The router is all that the MoE computes more than a dense model of its active size.
    assert moe["flops_per_token"] - wide["flops_per_token"] < 0.02 * wide["flops_per_token"]


def test_the_expansion_benchmark_measures_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("expand")
    name = "copy, with moments"
    monkeypatch.setattr(script, "RUNS", {name: script.RUNS[name]})
    record = script.measure(tmp_path, script.TINY | {"vocab_size": 300}, 1024)
    run = record["runs"][name]
    assert run["peak_rss"] > 0 and run["cpu"] > 0 and run["proven"].startswith("approximate")
    # Weights in bfloat16 and moments in float32, without the headers of their files.
    assert run["bytes"] > run["parameters"]["total"] * (2 + 4 + 4)
    assert f"| {name} | " in script.table(record).to_markdown()
