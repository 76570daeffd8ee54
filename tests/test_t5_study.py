"""The T5 of three tasks and sentences of a real BERT: data, plan and tables, on made models."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_families
import tiny_objectives
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from fusion_upcycle import upcycle
from fusion_upcycle.benchmark.application import config_tree
from fusion_upcycle.benchmark.experiment import read_experiment, trial_count
from fusion_upcycle.benchmark.preparation import prepare
from fusion_upcycle.live.loading import load_by_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    return script("studies/t5_tasks.py")


def shipped() -> dict[str, Any]:
    with initialize_config_dir(str(config_tree()), version_base="1.3"):
        name = "t5_three_tasks"
        cfg = compose("benchmark", [f"benchmark@_global_={name}", f"experiment={name}"])
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_examples_are_made_from_the_text_and_none_is_in_two_splits(
    tasks: ModuleType, tmp_path: Path
) -> None:
    tasks.write_data(tmp_path)
    for name in tasks.TASKS:
        found = {s: rows(tmp_path / "data" / name / f"{s}.jsonl") for s in tasks.EXAMPLES}
        pairs = [(row["input"], row["target"]) for split in found.values() for row in split]
        assert len(set(pairs)) == len(pairs)
        assert all(given.startswith(f"{name}: ") for given, _ in pairs)
        assert all(200 < len(split) <= tasks.EXAMPLES[s] for s, split in found.items())
        for given, target in pairs[:50]:
            given = given.removeprefix(f"{name}: ")
            if name == "sums":
                assert sum(map(int, given.split(" + "))) == int(target)
            elif name == "vowels":
                assert given == "".join(c for c in target if c not in "aeiou")
            else:
                assert target in ("prose", "source", "arithmetic") and len(given) <= tasks.LINE


def test_base_and_fine_tunes_are_made_by_our_own_command(
    tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"input": f"say {n}", "target": str(n)} for n in range(8)]
    for split in ("train", "validation"):
        for name in tasks.TASKS:
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            tasks.write(tmp_path / "data" / name / f"{split}.jsonl", pairs)
    monkeypatch.setitem(tasks.RECIPE, "batch-size", 4)
    few = {"examples": 12, "learning-rate": 1e-2}
    tasks.draw(tmp_path / "drawn")
    tasks.train(tmp_path, tmp_path / "drawn", tmp_path / "base", tuple(tasks.TASKS), few)
    tasks.train(tmp_path, tmp_path / "base", tmp_path / "models" / "sums", ("sums",), few)
    models = [load_by_config(tmp_path / name) for name in ("drawn", "base", "models/sums")]
    assert [model.num_parameters() for model in models] == [238_656] * 3
    first, second, third = (model.shared.weight for model in models)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_the_experiment_is_planned_without_the_data(
    tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    content = shipped()
    models = content["modelpool"]["options"]["models"]
    assert list(models) == ["_pretrained_", *tasks.TASKS]
    assert Path(models["vowels"]) == tasks.HOME / "models" / "vowels"
    for folder in models.values():
        Path(folder).mkdir(parents=True)  # there, and not looked into
    experiment = read_experiment(content)
    assert {trial_count(method) for method in experiment.methods.values()} == {0, 12}
    for method in content["methods"].values():  # one trial of each is planned: it takes 0.1 s
        method["trials"] = {name: values[:1] for name, values in method.get("trials", {}).items()}
    plan = prepare(read_experiment(content), tmp_path / "out")
    found = {planned.run.row: requests for planned, requests in plan}
    assert len(found) == 4 + len(content["methods"])
    assert found["Upcycled, hash, top-1, step 0"][0].facts["group"] == "Model Mixing"


def test_dense_and_upcycled_t5s_are_trained_with_the_same_flops(
    tasks: ModuleType, tmp_path: Path
) -> None:
    methods = shipped()["methods"]
    given = methods["dense_trained"]["options"]
    tasks.draw(tmp_path / "dense")
    budget = given["examples"] * flops(load_by_config(tmp_path / "dense"))
    for name in ("token_choice_trained", "expert_choice_trained", "hash_trained"):
        options = methods[name]["options"]
        how = {
            option.partition(".")[2]: value
            for option, value in options.items()
            if option.startswith("upcycling.")
        }
        upcycle(tmp_path / "dense", tmp_path / name, verify="none", progress=False, **how)
        cost = flops(load_by_config(tmp_path / name))
        steps = int(budget / cost) // given["batch_size"]  # whole ones
        assert options["training.examples"] == steps * given["batch_size"], name
        for option, value in given.items():
            if option != "examples":
                assert options[f"training.{option}"] == value, option


def flops(model: Any) -> int:
    model.set_attn_implementation("eager")  # the kernels of others are not counted
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    ids = torch.arange(32)[None]  # a multiple of the experts, as a batch's is nearly
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :10])
    return counter.get_total_flops()


def test_sentences_of_a_bert_are_the_same_where_every_expert_takes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = script("sentences.py")
    tokenizer = tiny_objectives.mask_tokenizer()
    dense = tiny_families.dense("bert", name="BertModel", vocab_size=270).float()
    dense.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(study, "SENTENCES", 5)
    monkeypatch.setattr(study, "BATCH", 4)
    texts = ["to be", "or", "not to be", "that is it", "a"]
    monkeypatch.setattr(study, "sentences", lambda: texts)
    wanted = ("token choice, top-2", "expert choice, C = 1", "expert choice, C = 8")
    monkeypatch.setattr(study, "ROWS", {name: study.ROWS[name] for name in wanted})
    record = study.measure(tmp_path / "bert")
    token, few, every = record["rows"]
    for row in (token, every):
        assert row["largest_difference"] < 1e-5 and row["same_nearest"] == 1
    assert record["tokens"] == sum(map(len, texts)) < record["positions"]
    assert token["unchosen"] == [] and every["unchosen"] == [0.0, 0.0]
    assert min(few["unchosen"]) > 0.05 and few["smallest_cosine"] < 1 - 1e-4
    made = study.table({"sentences": record}).to_markdown()
    assert "| expert choice, C = 8 | 0.0 | 1.000000 |" in made
    assert "| token choice, top-2 | - |" in made


def test_embeddings_do_not_see_padding(tmp_path: Path) -> None:
    study = script("sentences.py")
    tokenizer = tiny_objectives.mask_tokenizer()
    dense = tiny_families.dense("bert", name="BertModel", vocab_size=270).float().eval()
    texts = ["be", "not to be", "a"]
    together = study.embeddings(dense, study.batches_of(tokenizer, texts))
    for text, found in zip(["a", "be", "not to be"], together, strict=True):  # the shortest first
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone = dense(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(alone, found, atol=1e-5)


def test_the_sentences_are_whole() -> None:
    found = script("sentences.py").sentences()
    assert len(set(found)) == 200
    assert all(text[0].isupper() and text.endswith(".") and len(text.split()) > 5 for text in found)
