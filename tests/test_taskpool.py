"""The perplexity task pool and the demo model pool, run by FusionBench's own program."""

import json
import math
from pathlib import Path
from typing import Any

import fusion_bench.scripts.cli as cli
import pytest
import torch
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fusion_upcycle.taskpool.causal_lm_perplexity as pool_module
import fusion_upcycle.taskpool.pool as common
from fusion_upcycle.demo import DOMAINS, demo_model, domain_text
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.modelpool import DemoCausalLMPool
from fusion_upcycle.taskpool import CausalLMPerplexityTaskPool
from fusion_upcycle.texts.perplexity import perplexity

TEXT = "Some text to predict, größer. " * 20
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three different tiny models with the byte tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("_pretrained_", "a", "b")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(root / name)
        byte_tokenizer(64).save_pretrained(root / name)
    return {name: root / name for name in ("_pretrained_", "a", "b")}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


def run(output: Path, *overrides: str) -> dict[str, Any]:
    """One in-process run of FusionBench's CLI program; what its ``run`` returns."""
    cfg = initialize_hydra_config(
        "fabric_model_fusion",
        [f"path.log_dir={output}", "print_config=false", "fabric.accelerator=cpu", *overrides],
        return_hydra_config=True,
    )
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(output)
        HydraConfig.instance().set_config(cfg)
        cfg = DictConfig({key: value for key, value in cfg.items() if key != "hydra"})
    return cli.main(cfg)


def pool_overrides(folders: dict[str, Path]) -> list[str]:
    return [
        "modelpool=CausalLMPool/mistral-7b",
        *(f"++modelpool.models.{name}={path}" for name, path in folders.items()),
        f"modelpool.tokenizer={folders['a']}",
        "modelpool.model_kwargs.torch_dtype=float32",
    ]


def scored(model: nn.Module, documents: list[str], stride: int = 32) -> dict[str, float | int]:
    return perplexity(model, byte_tokenizer(64), documents, context_length=64, stride=stride)


def test_a_merging_baseline_is_scored_by_our_pool(folders: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two 🙂")))
    output = tmp_path / "run"
    result = run(
        output,
        "method=simple_average",
        *pool_overrides(folders),
        "taskpool=CausalLMPerplexityTaskPool/local_files",
        f"taskpool.texts={{file: {text}, both: [{lines}, {text}]}}",
    )
    a, b = (AutoModelForCausalLM.from_pretrained(folders[name]) for name in ("a", "b"))
    with torch.no_grad():
        for ours, other in zip(a.parameters(), b.parameters(), strict=True):
            ours.add_(other).div_(2)
    expected = {"file": scored(a, [TEXT]), "both": scored(a, ["one", "two 🙂", TEXT])}
    report = result["report"]
    for name, metrics in expected.items():
        assert report[name] == pytest.approx(metrics, rel=1e-5)
    loss = sum(m["loss_nats_per_token"] for m in expected.values()) / 2
    assert report["average"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert report["model_info"]["all_params"] == a.num_parameters()

    assert json.loads((output / "program_report.json").read_text()) == report
    record = json.loads((output / "run_record.json").read_text())["taskpool"]
    assert [e["report"] for e in record["evaluations"]] == [report]
    assert record["evaluations"][0]["wall_seconds"] > 0
    assert record["config"]["context_length"] == 64
    assert record["config"]["texts"]["file"] == str(text)


def test_each_of_several_pools_has_its_part_of_the_record(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    local = "=CausalLMPerplexityTaskPool/local_files"
    pools = "taskpool.pools"
    report = run(
        tmp_path / "run",
        "method=simple_average",
        *pool_overrides(folders),
        "taskpool=several",
        *(f"+taskpool@{pools}.{name}{local}" for name in ("short", "long")),
        *(f"{pools}.{name}.texts={{t: {text}}}" for name in ("short", "long")),
        f"{pools}.short.context_length=8",
        f"+taskpool@{pools}.cost=ModelCostTaskPool/cost",
        f"+taskpool@{pools}.theirs=dummy",
    )["report"]
    assert list(report) == ["short", "long", "cost", "theirs"]
    assert report["short"]["t"] != report["long"]["t"]
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())["taskpool"]
    assert list(record) == ["short", "long", "cost"]
    assert [record[name]["config"]["context_length"] for name in ("short", "long")] == [8, 64]
    for name, section in record.items():
        assert [entry["report"] for entry in section["evaluations"]] == [report[name]]


def test_demo_pools_run_together(tmp_path: Path) -> None:
    result = run(
        tmp_path / "run",
        "method=task_arithmetic",
        "modelpool=CausalLMPool/demo",
        "taskpool=CausalLMPerplexityTaskPool/demo",
    )
    assert list(result["report"]) == [*DOMAINS, "average", "model_info"]
    for domain in DOMAINS:
        size = sum(len(document.encode()) for document in domain_text(domain, "test"))
        assert result["report"][domain]["bytes"] == size


def test_the_demo_pool_gives_folders() -> None:
    prose = demo_model("prose")
    pool = DemoCausalLMPool({"_pretrained_": "base", "mine": "prose"}, model_kwargs=None)
    assert isinstance(pool, CausalLMPool)
    assert pool.get_model_path("mine") == str(prose)
    assert pool.model_names == ["mine"]
    weight = AutoModelForCausalLM.from_pretrained(prose).lm_head.weight
    assert torch.equal(pool.load_model("mine").lm_head.weight, weight)
    assert pool.load_tokenizer()("ab")["input_ids"] == byte_tokenizer(64)("ab")["input_ids"]
    assert pool.config.models["mine"] == str(prose)


def test_the_demo_pool_refuses_unknown_models() -> None:
    with pytest.raises(UpcyclingError, match="Unknown demo model 'poetry'"):
        DemoCausalLMPool({"_pretrained_": "poetry"})
    with pytest.raises(UpcyclingError, match="models is empty"):
        DemoCausalLMPool({})


def test_every_model_that_a_method_yields_is_in_the_record(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(common, "write_run_record", lambda _, record: seen.append(record))
    (tmp_path / "t.txt").write_text(TEXT)
    pool = CausalLMPerplexityTaskPool({"t": "t.txt"}, tokenizer=str(folders["a"]))
    reports = [
        pool.evaluate(AutoModelForCausalLM.from_pretrained(folders[name])) for name in ("a", "b")
    ]
    assert reports[0]["t"] != reports[1]["t"]
    assert [e["report"] for e in seen[-1]["evaluations"]] == reports


def test_context_and_stride_reach_the_windows(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    model = AutoModelForCausalLM.from_pretrained(folders["a"])
    pool = CausalLMPerplexityTaskPool(
        {"t": "t.txt"}, tokenizer=str(folders["a"]), context_length=16, stride=3, batch_size=5
    )
    expected = perplexity(model, byte_tokenizer(64), [TEXT], context_length=16, stride=3)
    assert pool.evaluate(model)["t"] == pytest.approx(expected, rel=1e-6)
    assert expected["loss_nats_per_token"] != scored(model, [TEXT])["loss_nats_per_token"]
    assert pool.config.stride == 3


def test_a_model_on_the_cpu_moves_to_the_device_of_fabric(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def record_device(model: nn.Module, *_: Any, **__: Any) -> dict[str, float]:
        devices.append(next(model.parameters()).device.type)
        return {"loss_nats_per_token": 1.0, "perplexity": 1.0, "bits_per_byte": 1.0}

    class Program:
        class fabric:
            device = torch.device("meta")

        modelpool = CausalLMPool({}, tokenizer=str(folders["a"]))

    monkeypatch.setattr(pool_module, "perplexity", record_device)
    (tmp_path / "t.txt").write_text(TEXT)
    pool = CausalLMPerplexityTaskPool({"t": "t.txt"})
    pool._program = Program
    pool.evaluate(AutoModelForCausalLM.from_pretrained(folders["a"]))
    assert devices == ["meta"]


def test_the_average_adds_the_squares_of_independent_errors() -> None:
    scores = {"loss_nats_per_token": 1.0, "bits_per_byte": 2.0}
    sure = {**scores, "loss_nats_per_token_stderr": 0.3, "bits_per_byte_stderr": 0.6}
    other = {**scores, "loss_nats_per_token_stderr": 0.4, "bits_per_byte_stderr": 0.8}
    average = pool_module._average([sure, other])
    assert average["loss_nats_per_token_stderr"] == pytest.approx(0.25)
    assert average["perplexity_stderr"] == pytest.approx(0.25 * math.e)
    assert average["bits_per_byte_stderr"] == pytest.approx(0.5)
    assert average["bits_per_byte_low"] == pytest.approx(2 - 1.96 * 0.5)
    assert average["bits_per_byte_high"] == pytest.approx(2 + 1.96 * 0.5)
    assert set(pool_module._average([sure, scores])) == {*scores, "perplexity"}


def test_without_a_tokenizer_the_error_says_where_to_set_it(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["a"])
    with pytest.raises(UpcyclingError, match=r"set taskpool\.tokenizer"):
        CausalLMPerplexityTaskPool({"t": "t.txt"}).evaluate(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": {"t": "t.txt"}, "batchsize": 4}, "Did you mean 'batch_size'"),
        ({"texts": {}}, "at least one text"),
        ({"texts": {"average": "t.txt"}}, "average is a name of the report"),
        ({"texts": {"cost": "t.txt"}}, "cost is a name of the report"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        CausalLMPerplexityTaskPool(**arguments)
