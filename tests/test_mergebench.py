"""FusionBench's own MergeBench pools: composed, planned, merged; tiny models for the Hub's."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fusion_bench.utils import instantiate
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tiny import dense_folder, edit_config, tensors_of

from fusion_upcycle.benchmark.application import config_tree
from fusion_upcycle.benchmark.composition import composed, composing
from fusion_upcycle.benchmark.experiment import read_experiment, trial_count
from fusion_upcycle.benchmark.preparation import prepare
from fusion_upcycle.demo.tokenizer import byte_tokenizer

POOL = "CausalLMPool/mergebench"
TASKS = ("instruction", "math", "coding", "multilingual", "safety")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The Hub has tiny models under the names that it is asked for, which differ as the real do."""
    made: dict[str, Path] = {}

    def snapshot(source: str, **_: Any) -> str:
        if source not in made:
            family = "gemma2" if "gemma" in source else "llama"
            is_math = source.endswith("math")
            fields = {"head_dim": 8} if family == "gemma2" else {"rope": "llama3"}
            folder = tmp_path / "hub" / source.replace("/", "--")
            rows = 264 if is_math else 257
            dense_folder(folder, family, seed=len(made), vocab_size=rows, **fields)
            byte_tokenizer(64).save_pretrained(folder)
            if "_" in source:  # a fine-tune
                edit_config(folder, use_cache=False, eos_token_id=[5, 6], unsloth_version="2025")
            made[source] = folder
        return str(made[source])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return made


@pytest.mark.parametrize("name", ["Llama-3.2-3B", "Llama-3.1-8B-Instruct", "gemma-2-2b"])
def test_a_pool_of_mergebench_is_merged(
    name: str, hub: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with composing():
        config = composed(
            [
                f"modelpool={POOL}/{name}",
                "method=moe_merging",
                "method.shared=base",
                "method.verify=none",
                "method.return_model=false",
                f"method.save_checkpoint={tmp_path / 'out'}",
            ]
        )
    instantiate(config["method"]).run(instantiate(config["modelpool"]))
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record["experts"] == {task: [number] for number, task in enumerate(TASKS)}
    assert record["differences"]["config"]["vocab_size"]["math"] == 264
    assert record["dtype"] == "bfloat16" and len(hub) == 6
    base = next(folder for source, folder in hub.items() if "MergeBench" not in source)
    embeddings = "model.embed_tokens.weight"
    assert len(tensors_of(tmp_path / "out")[embeddings]) == len(tensors_of(base)[embeddings]) == 257


def test_the_experiment_is_planned_without_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr("fusion_upcycle.benchmark.preparation._require_model", lambda *_: None)
    with initialize_config_dir(str(config_tree()), version_base="1.3"):
        name = "mergebench_llama3"
        cfg = compose("benchmark", [f"benchmark@_global_={name}", f"experiment={name}"])
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    experiment = read_experiment(content)
    assert {trial_count(method) for method in experiment.methods.values()} == {0, 4}
    for method in content["methods"].values():  # one trial of each is planned: it takes 0.1 s
        method["trials"] = {name: values[:1] for name, values in method.get("trials", {}).items()}
    plan = prepare(read_experiment(content), tmp_path / "out")
    assert len(plan) == 1 + len(TASKS) + len(experiment.methods)
    assert {"Fine-tuned (math)", "Pre-trained"} <= {planned.run.row for planned, _ in plan}
