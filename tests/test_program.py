"""What FusionBench's program says and does around methods and task pools of ours."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from test_training_method import SMALL, cli_run, pool_of
from tiny import dense_model
from tiny_training import TOKENIZER

from fusion_upcycle.checkpoint.source import locate
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.method import MoEMergingAlgorithm

TEXT = "taskpool.texts={few: {_target_: tiny_training.documents}}"
SCORED = ["taskpool=CausalLMPerplexityTaskPool/local_files", TEXT, "taskpool.context_length=16"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dense_model(vocab_size=257).save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    "pools",
    [
        SCORED,
        ["taskpool=several", "+taskpool@taskpool.pools.cost=ModelCostTaskPool/cost"],
        ["method=sparse_upcycling", "taskpool=dummy"],
    ],
    ids=["pool", "several", "method"],
)
def test_a_report_may_be_a_file_without_a_folder(
    pools: list[str], source: Path, tmp_path: Path
) -> None:
    result = cli_run(
        tmp_path / "run", "method=dummy", *pool_of(source), *pools, "report_save_path=rep.json"
    )
    assert json.loads((tmp_path / "rep.json").read_text()) == result["report"]


@pytest.mark.parametrize(
    "method",
    [
        ["method=sparse_upcycling", "method.save_checkpoint=out"],
        [
            *("method=continued_pretraining", "method.save_checkpoint=out", "method.tokens=64"),
            "method.data={a: {_target_: tiny_training.documents}}",
            *(f"method.{option}" for option in SMALL),
        ],
        [
            *("method=upcycle_and_train", "method.training.save_checkpoint=out"),
            "method.training.tokens=64",
            "method.training.data={a: {_target_: tiny_training.documents}}",
            *(f"method.training.{option}" for option in SMALL),
        ],
    ],
    ids=["conversion", "training", "chain"],
)
@pytest.mark.filterwarnings("ignore:Routers out of balance")
def test_a_model_that_was_saved_is_not_called_unsaved(
    method: list[str], source: Path, tmp_path: Path, capsys: Any
) -> None:
    cli_run(tmp_path / "run", *method, *pool_of(source), "taskpool=dummy")
    said = capsys.readouterr().out
    assert "Skipping saving" not in said
    assert re.search(r"^The model is saved in \S*out\.$", said, re.M)
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_is_not_saved_or_saved_by_fusion_bench_is_left_to_it(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    method = ["method=sparse_upcycling", *pool_of(source), "taskpool=dummy"]
    cli_run(tmp_path / "run", *method)
    assert "Skipping saving" in capsys.readouterr().out
    twice = ["method.save_checkpoint=out", f"merged_model_save_path={tmp_path / 'twice'}"]
    cli_run(tmp_path / "run", *method, *twice)
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "twice" / "config.json").is_file()


def test_a_prototype_router_in_memory_shows_that_it_is_being_made(
    source: Path, capsys: Any
) -> None:
    calibration = {
        name: {"_target_": "builtins.list", "_args_": [[f"text of {name * 9} " * 90]]}
        for name in ("a", "b")
    }
    algorithm = MoEMergingAlgorithm(1, router_init="prototype", calibration=calibration)
    from fusion_bench.modelpool import CausalLMPool
    from omegaconf import OmegaConf

    models = OmegaConf.create({"a": str(source), "b": str(source)})
    algorithm.run(CausalLMPool(models, tokenizer=str(source)))
    assert "Calibrating the router" in capsys.readouterr().err


TRAINING = [
    *("method=continued_pretraining", "method.tokens=8192"),
    "method.data={a: {_target_: tiny_training.documents}}",
]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["method=sparse_upcycling", "modelpool.models._pretrained_=./no"], "models._pretrained_"),
        ([*TRAINING, "modelpool.models._pretrained_=./no"], "models._pretrained_"),
        ([*TRAINING, "modelpool.tokenizer=./no"], "tokenizer"),
        (["method=dummy", "modelpool.tokenizer=./no", *SCORED], "tokenizer"),
    ],
    ids=["conversion", "training", "tokenizer", "taskpool"],
)
def test_transformers_is_not_asked_for_a_folder_that_is_missing(
    overrides: list[str], named: str, source: Path, tmp_path: Path
) -> None:
    """It would say that `./no` is no name of the Hub, in 100 lines."""
    with pytest.raises(UpcyclingError, match=rf"modelpool\.{named}: {tmp_path}/no is not a folder"):
        cli_run(tmp_path / "run", *pool_of(source), "taskpool=dummy", *overrides)


@pytest.mark.parametrize("read", [locate, load_by_config])
def test_a_missing_folder_is_named_whole(read: Any, tmp_path: Path) -> None:
    """As with `hydra.job.chdir`, where it is sought in the folder of the run."""
    with pytest.raises(UpcyclingError, match=f"{tmp_path}/dense"):
        read("./dense")
