"""The real model's work, on tiny models: questions, fine-tunes, commands and plan."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fusion_upcycle.benchmark.application import config_tree
from fusion_upcycle.benchmark.experiment import read_experiment, trial_count
from fusion_upcycle.benchmark.preparation import prepare
from fusion_upcycle.cli import _parser
from fusion_upcycle.demo.texts import DOMAINS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def work() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import real_work
    finally:
        sys.path.remove(str(EXAMPLES))
    return real_work


def test_questions_have_one_right_answer_of_four(work: ModuleType, tmp_path: Path) -> None:
    work.questions(tmp_path)
    for domain in DOMAINS:
        text = "\n".join(work.domain_text(domain, "test"))
        lines = (tmp_path / "tasks" / f"{domain}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == work.QUESTIONS
        for row in rows:
            assert len(set(row["choices"])) == work.CHOICES
            right = row["choices"][row["label"]]
            assert right in text
            if domain == "arithmetic":  # the others are wrong, each in one digit
                others = [choice for choice in row["choices"] if choice != right]
                assert all(sum(map(str.__ne__, right, o)) == 1 for o in others)
        assert min(Counter(row["label"] for row in rows).values()) >= work.QUESTIONS // 10
        task = (tmp_path / "tasks" / f"{domain}.yaml").read_text()
        assert f"task: real_{domain}" in task and str(tmp_path) in task


def test_held_out_text_is_not_trained_on(work: ModuleType, tmp_path: Path) -> None:
    work.texts(tmp_path)
    for domain in DOMAINS:
        found = {
            split: {
                json.loads(line)["text"]
                for line in (tmp_path / "texts" / f"{domain}.{split}.jsonl")
                .read_text()
                .splitlines()
            }
            for split in ("continued", "validation", "test")
        }
        assert not found["test"] & {*found["continued"], *work.domain_text(domain, "train")}
        assert not found["test"] & found["validation"]


def test_a_fine_tune_is_an_adapter_and_the_same_model_merged(
    work: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion_upcycle.demo.models import demo_model

    base = demo_model("base")
    (tmp_path / "smollm2").symlink_to(base)
    monkeypatch.setattr(work, "TRAINING", {**work.TRAINING, "steps": 12, "tokens": 32})
    losses = work.fine_tune(tmp_path, "arithmetic")
    assert work.fine_tune(tmp_path, "arithmetic") == losses  # made once
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(dense, str(tmp_path / "adapters" / "arithmetic"))
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path / "models" / "arithmetic", dtype=torch.float32
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, found = adapted(ids).logits, whole(ids).logits
        with adapted.disable_adapter():
            before = adapted(ids).logits
    moved = (before - expected).abs().mean()
    assert (found - expected).abs().mean() < moved / 2  # all weights were rounded to bfloat16


def test_the_commands_are_those_of_the_command_line(work: ModuleType) -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import real_model
    finally:
        sys.path.remove(str(EXAMPLES))
    for command in real_model.STEPS.values():
        words = real_model.shlex.split(command)
        if words[:3] == real_model.OURS.split():
            _parser().parse_args(words[3:])
        else:
            assert words[0] == "fusion_bench"
    record = {"steps": [{"name": "x", "cpu_s": 1.2, "rss_mib": 2345.6, "said": "exact"}]}
    assert "| x | 1 | 2,346 | exact |" in real_model.table({"real_model": record}).to_markdown()


def test_the_experiment_is_planned_without_the_models(
    work: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with initialize_config_dir(str(config_tree()), version_base="1.3"):
        cfg = compose("benchmark", ["benchmark@_global_=real_model", "experiment=real_model"])
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    for folder in content["modelpool"]["options"]["models"].values():
        Path(folder).mkdir(parents=True)
    work.texts(Path("outputs/real"))
    work.questions(Path("outputs/real"))
    experiment = read_experiment(dict(content))
    assert {trial_count(method) for method in experiment.methods.values()} == {0, 4}
    for method in content["methods"].values():  # one trial of each is planned: it takes 0.1 s
        method["trials"] = {name: values[:1] for name, values in method.get("trials", {}).items()}
    content = {str(key): value for key, value in content.items()}
    plan = prepare(read_experiment(content), tmp_path / "out")
    assert len(plan) >= 3 + len(content["methods"])
