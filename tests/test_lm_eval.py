"""The lm-eval task pool against lm-eval's own command, on local tasks and data."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks._index import TaskIndex
from test_training_method import cli_run, pool_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.taskpool import LMEvalTaskPool
from fusion_upcycle.upcycling.run import upcycle

pytestmark = pytest.mark.early  # all, as lm-eval takes seconds to import
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
GROUP = """\
group: tiny_group
task: [tiny_choice]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a * b}"], "answer": a % 2}
        for a in range(2, 6)
        for b in range(2, 7)
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MoE made by us, its experts told apart."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(root / "dense")
    byte_tokenizer(64).save_pretrained(root / "dense")
    made = upcycle(root / "dense", root / "moe", expert_init={"name": "noise", "noise_std": 0.3})
    return made.output


@pytest.fixture(scope="module", autouse=True)
def catalogue_is_read_once() -> Iterator[None]:
    """It is of 13,000 files, which takes 6 seconds."""
    build, found = TaskIndex.build, {}

    def once(paths: list[Path]) -> dict[str, Any]:
        if tuple(paths) not in found:
            found[tuple(paths)] = build(paths)
        return dict(found[tuple(paths)])

    with patch.object(TaskIndex, "build", staticmethod(once)):
        yield


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


def pool(moe: Path, tasks: Path, names: list[str], **options: Any) -> LMEvalTaskPool:
    return LMEvalTaskPool(names, include_path=str(tasks), tokenizer=str(moe), **options)


def test_ours_agrees_with_lm_evals_own_command_to_the_digit(
    moe: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["tiny_choice", "tiny_rolling"]
    model = AutoModelForCausalLM.from_pretrained(moe).train()
    report = pool(moe, tasks, names).evaluate(model)
    assert model.training

    command = ["lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={moe},dtype=float32", "--tasks", *names]
    command += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "8"]
    theirs = tmp_path / "out"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "theirs")
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(theirs)])
    cli_evaluate()  # in this process, as its imports take ten seconds
    (file,) = theirs.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        expected = results["tiny_choice"][f"{metric},none"]
        assert report["tiny_choice"][metric] == expected
    assert report["tiny_rolling"]["bits_per_byte"] == results["tiny_rolling"]["bits_per_byte,none"]
    assert 0 < report["tiny_choice"]["acc"] < 1
    json.dumps(report, allow_nan=False)


def test_fusion_bench_asks_local_tasks_and_writes_the_report(
    moe: Path, tasks: Path, tmp_path: Path
) -> None:
    """Where its own `LMEvalHarnessTaskPool` ends in an ImportError."""
    result = cli_run(
        tmp_path / "run",
        "method=dummy",
        *pool_of(moe),
        "taskpool=LMEvalTaskPool/lm_eval",
        "taskpool.tasks=[tiny_choice]",
        f"taskpool.include_path={tasks}",
        "report_save_path=report.json",
    )
    expected = pool(moe, tasks, ["tiny_choice"]).evaluate(AutoModelForCausalLM.from_pretrained(moe))
    assert result["report"]["tiny_choice"] == expected["tiny_choice"]
    assert json.loads((tmp_path / "report.json").read_text()) == result["report"]


def test_groups_and_averages_are_in_the_report(moe: Path, tasks: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe)
    model.config.name_or_path = model.name_or_path = ""  # as of a model that a config made
    report = pool(moe, tasks, ["tiny_group"], limit=8).evaluate(model)
    assert report["tiny_group"]["acc"] == report["tiny_choice"]["acc"]
    assert report["average"]["acc"] == report["tiny_group"]["acc"]
    assert report["groups"] == {"tiny_group": ["tiny_choice"]}
    assert report["model_info"]["all_params"] == model.num_parameters()


def test_unknown_and_missing_tasks_are_refused(moe: Path, tasks: Path) -> None:
    wrong = pool(moe, tasks, ["tiny_choise"])
    with pytest.raises(UpcyclingError, match=r"tiny_choise.*Did you mean 'tiny_choice'"):
        wrong.evaluate(AutoModelForCausalLM.from_pretrained(moe))
    with pytest.raises(UpcyclingError, match=r"taskpool\.tasks is empty"):
        LMEvalTaskPool([])
    with pytest.raises(UpcyclingError, match=r"include_path=/nowhere is not a folder"):
        LMEvalTaskPool(["a"], include_path="/nowhere")
    with pytest.raises(UpcyclingError, match="Did you mean 'tasks'"):
        LMEvalTaskPool(["a"], taks=["b"])


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_upcycle.taskpool.lm_eval.find_spec", lambda name: None)
    with pytest.raises(UpcyclingError, match=r"pip install 'fusion-upcycle\[eval\]'"):
        LMEvalTaskPool(["a"])
