"""Expert upcycling under FusionBench: models, pools, streaming, a whole run, and its config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench import BaseModelPool
from fusion_bench.modelpool import CausalLMPool
from helpers import grow
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from test_calibrated_expansion import FIT, TEXT, byte_moe
from test_expansion_moments import flat, trained
from test_method import method_record, pool, run
from test_plugin import compose
from tiny import assert_same_bits, dense_model, load, tensors_of
from tiny_moe import moe_model
from transformers import MixtralForCausalLM, MixtralModel

from fusion_upcycle import ExpertUpcyclingAlgorithm
from fusion_upcycle.checkpoint.moments import read_moments
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.options import make_expansion_options
from fusion_upcycle.modelpool import DemoCausalLMPool


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return byte_moe(tmp_path / "moe")


@pytest.fixture
def calibration(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "sums.txt").write_text(TEXT)
    return {"data": {"sums": str(tmp_path / "sums.txt")}, "tokens": 1000, "context_length": 50}


@pytest.fixture(autouse=True)
def no_hydra_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test files leave HydraConfig set; its job would get our run records."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


def test_a_model_grows_in_memory_and_stays_as_it_is() -> None:
    moe = moe_model("mixtral")
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    made = ExpertUpcyclingAlgorithm(6).run(moe)
    assert type(made) is MixtralForCausalLM
    assert made.config.num_local_experts == 6 and made.config.num_experts_per_tok == 2
    assert_same_bits(moe.state_dict(), before)
    assert type(ExpertUpcyclingAlgorithm().run(moe_model("mixtral", backbone=True))) is MixtralModel


def test_a_pool_is_streamed_to_the_folder_without_loading_it(
    source: Path,
    calibration: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CausalLMPool, "load_model", lambda *_: pytest.fail("loaded the source"))
    options: dict[str, Any] = {"router_extension": "split", "calibration": calibration}
    made = ExpertUpcyclingAlgorithm(8, str(tmp_path / "out"), **options).run(pool(source))
    assert made is not None
    assert_same_bits(made.state_dict(), load(tmp_path / "out").state_dict())
    options |= {"return_model": False, "overwrite": True}
    algorithm = ExpertUpcyclingAlgorithm(8, str(tmp_path / "out"), **options)
    assert algorithm.run(pool(source)) is None


def test_a_live_model_is_saved_as_the_streamed_folder_would_be(
    source: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "num_experts": 6,
        "router_extension": FIT,
        "selection": "greedy",
        "calibration": calibration,
    }
    streamed = ExpertUpcyclingAlgorithm(save_checkpoint=str(tmp_path / "streamed"), **options)
    streamed.run(pool(source))
    live = ExpertUpcyclingAlgorithm(
        save_checkpoint=str(tmp_path / "live"), tokenizer=str(source), **options
    )
    live.run(load(source))
    assert_same_bits(tensors_of(tmp_path / "live"), tensors_of(tmp_path / "streamed"))
    records = [
        json.loads((tmp_path / name / "upcycling.json").read_text())
        for name in ("live", "streamed")
    ]
    for key in ("plan", "options", "router", "importance", "num_experts", "parameters"):
        assert records[0][key] == records[1][key], key
    assert (tmp_path / "live" / "importance" / "importance.svg").is_file()


@pytest.mark.parametrize("streaming", [True, False])
def test_moments_grow_with_the_model(streaming: bool, tmp_path: Path) -> None:
    source = trained(tmp_path, "mixtral")
    algorithm = ExpertUpcyclingAlgorithm(
        6, str(tmp_path / "out"), optimizer_state=str(source), new_moments="reset"
    )
    algorithm.run(pool(source) if streaming else load(source))
    grow(
        source,
        tmp_path / "function",
        num_experts=6,
        optimizer_state=source,
        new_moments="reset",
    )
    assert_same_bits(
        flat(read_moments(tmp_path / "out")), flat(read_moments(tmp_path / "function"))
    )
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record["optimizer_state"] == {"source": str(source), "new_moments": "reset"}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_run_of_fusion_bench_grows_its_pool(
    streaming: bool,
    source: Path,
    calibration: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(
        tmp_path / "run",
        "method=expert_upcycling",
        "method/router_extension=fit",
        "method.router_extension.steps=3",
        "method/expert_init=noise",
        "method.num_experts=6",
        "method.selection=greedy",
        "method.importance.metric=saliency",
        f"method.calibration.data={{sums: {calibration['data']['sums']}}}",
        "method.calibration.tokens=1000",
        "method.calibration.context_length=50",
        f"modelpool.models._pretrained_={source}",
        f"modelpool.tokenizer={source}",
        *([f"method.save_checkpoint={tmp_path / 'out'}"] if streaming else []),
    )
    record = method_record(tmp_path / "run")
    assert record["algorithm"] == "ExpertUpcyclingAlgorithm"
    assert record["options"]["router_extension"] == FIT | {"min_copy_share": 0.6}
    assert record["options"]["expert_init"]["name"] == "noise"
    assert record["num_experts"] == {"before": 4, "after": 6}
    assert record["importance"]["metric"] == "saliency"
    assert record["router"]["layers"].keys() == record["plan"].keys() == {"0", "1"}
    folder = tmp_path / "out" / "importance" if streaming else tmp_path / "run"
    assert (folder / "importance.json").is_file()
    grow(
        source,
        tmp_path / "function",
        scores=folder,
        calibration=calibration["data"],
        calibration_tokens=1000,
        context_length=50,
        **make_options(record),
    )
    assert_same_bits(result["merged_model"].state_dict(), load(tmp_path / "function").state_dict())


def make_options(record: dict[str, Any]) -> dict[str, Any]:
    """The options of a run record, as a user would repeat it."""
    return vars(make_expansion_options(**record["options"]))


@pytest.mark.parametrize(
    ("extension", "init"),
    [
        ("copy", "copy"),
        ("noise", "noise"),
        ("bias", "drop"),
        ("split", "permute"),
        ("fit", "svd"),
    ],
)
def test_every_choice_of_the_config_makes_an_algorithm(
    extension: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    groups = [f"method/router_extension={extension}", f"method/expert_init={init}"]
    method = compose("method=expert_upcycling", *groups).method
    made = instantiate(method, _recursive_=False)
    assert made._options.to_json()["router_extension"]["name"] == extension
    assert made._options.to_json()["expert_init"]["name"] == init
    defaults = ExpertUpcyclingAlgorithm(expert_init=init, router_extension=extension)
    assert made._options.to_json() == defaults._options.to_json()
    assert made._inputs == defaults._inputs


def test_the_demo_text_is_new_to_the_demo_models() -> None:
    made = ExpertUpcyclingAlgorithm(calibration={"data": "demo"})
    assert {spec["split"] for spec in made._inputs["calibration"].values()} == {"continued"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_expert": 6}, "Did you mean 'num_experts'"),
        ({"num_experts": 6, "multiplier": 2}, "Give one of them"),
        ({"importance": {"metrics": "load"}}, r"option in method\.importance: 'metrics'.*'metric'"),
        ({"importance": {"metric": "gradient"}}, "Unknown metric 'gradient'"),
        ({"importance": "load"}, r"method\.importance='load' must be a mapping"),
        ({"calibration": {"text": "demo"}}, r"option in method\.calibration: 'text'"),
        ({"calibration": {"data": 5}}, r"method\.calibration\.data=5 must be"),
        ({"router_extension": {"name": "split", "margin": 6}}, "Unknown option of router_ext"),
        ({"optimizer_state": "x"}, 'Pass save_checkpoint="FOLDER", or optimizer_state=None'),
        ({"new_moments": "zero"}, "Unknown new_moments 'zero'"),
        ({"verify": "all"}, "Unknown verify mode"),
        ({"return_model": False}, 'save_checkpoint="FOLDER"'),
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UpcyclingError, match=match):
        ExpertUpcyclingAlgorithm(**options)


def test_models_that_cannot_be_grown(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="dense 'llama' model"):
        ExpertUpcyclingAlgorithm().run(dense_model("llama"))
    with pytest.raises(UpcyclingError, match="is less than the 4 experts"):
        ExpertUpcyclingAlgorithm(3).run(moe_model("mixtral"))
    with pytest.raises(UpcyclingError, match="no '_pretrained_' model"):
        ExpertUpcyclingAlgorithm().run(BaseModelPool({"moe": load(source)}))
    streaming = ExpertUpcyclingAlgorithm(6, str(tmp_path / "out"))
    with pytest.raises(UpcyclingError, match=r"dtype=bfloat16 cannot be honoured.*is float32"):
        streaming.run(pool(source, torch_dtype="bfloat16"))
    with pytest.raises(UpcyclingError, match=r"method\.tokenizer=.* would not be used"):
        ExpertUpcyclingAlgorithm(6, str(tmp_path / "out"), tokenizer="x").run(pool(source))
    assert not (tmp_path / "out").exists()


def test_a_pool_in_half_precision_grows_in_memory(source: Path) -> None:
    made = ExpertUpcyclingAlgorithm(6).run(pool(source, torch_dtype="bfloat16"))
    assert made is not None and made.dtype == torch.bfloat16


def test_the_demo_pool_has_the_demo_moe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = instantiate(compose("modelpool=CausalLMPool/demo_moe").modelpool, _recursive_=False)
    assert isinstance(made, DemoCausalLMPool)
    assert made.load_model("_pretrained_").config.num_local_experts == 16
    assert made.load_tokenizer()("a")["input_ids"]
