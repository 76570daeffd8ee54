"""The Hydra plugin: our configs win, FusionBench's still resolve, other apps see nothing."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusion_bench.scripts.cli  # the plugin looks for it
import pytest
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

import fusion_upcycle
from fusion_upcycle.errors import ProofError, UpcyclingError
from hydra_plugins.fusion_upcycle import one_sentence
from hydra_plugins.fusion_upcycle.one_sentence import end_in_one_sentence
from hydra_plugins.fusion_upcycle.search_path import FusionUpcycleSearchPath

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "config"
CONFIG_FILES = sorted(str(path.relative_to(CONFIG)) for path in CONFIG.rglob("*.yaml"))
# Experiments are of an application of their own, see test_benchmark.py.
CONFIG_FILES = [file for file in CONFIG_FILES if not file.startswith("benchmark")]
GROUPS_OF_FUSION_BENCH = ("method", "modelpool", "taskpool")


def compose(*overrides: str) -> DictConfig:
    """Compose as FusionBench does, up to where its CLI would instantiate the program."""
    overrides = ("modelpool=CausalLMPool/mistral-7b", *overrides)
    cfg = initialize_hydra_config("fabric_model_fusion", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # log_dir interpolates ${hydra:job.config_name}
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.resolve(cfg)
    return cfg


@pytest.fixture(params=["repository root", "folder with a ./config", "elsewhere"])
def cwd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FusionBench takes $CWD/config for its whole tree, so where it is started matters."""
    folder = tmp_path
    if request.param == "repository root":
        folder = REPOSITORY
    elif request.param == "folder with a ./config":
        (tmp_path / "config").mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_our_method_wins_over_the_upstream_one_of_the_same_name(cwd: Path) -> None:
    method = compose("method=mixtral_moe_upscaling").method
    assert method._target_ == "fusion_upcycle.method.MixtralForCausalLMUpscalingAlgorithm"
    assert method.expert_init == {"_target_": "fusion_upcycle.expert_init.copy", "_partial_": True}
    merging = compose("method=mixtral_moe_merging", "method/router_init=prototype").method
    assert merging._target_ == "fusion_upcycle.method.MixtralForCausalLMMergingAlgorithm"
    assert merging.router_init._target_ == "fusion_upcycle.merging.prototypes.prototype"


def test_initialisers_are_config_groups(cwd: Path) -> None:
    method = compose(
        "method=mixtral_moe_upscaling",
        "method/expert_init=noise",
        "method.expert_init.noise_std=0.05",
        "method/router_init=zeros",
    ).method
    assert method.expert_init._target_ == "fusion_upcycle.expert_init.noise"
    assert method.expert_init.noise_std == 0.05
    assert method.router_init._target_ == "fusion_upcycle.router_init.zeros"


@pytest.mark.parametrize(
    ("overrides", "group", "target"),
    [
        (["method=simple_average"], "method", "SimpleAverageAlgorithm"),
        (["method=task_arithmetic"], "method", "TaskArithmeticAlgorithm"),
        (["method=ties_merging"], "method", "TiesMergingAlgorithm"),
        ([], "modelpool", "CausalLMPool"),
        (["modelpool=CLIPVisionModelPool/_template"], "modelpool", "CLIPVisionModelPool"),
        (["taskpool=dummy"], "taskpool", "DummyTaskPool"),
        (["taskpool=LMEvalHarnessTaskPool/lm_eval"], "taskpool", "LMEvalHarnessTaskPool"),
    ],
)
def test_upstream_configs_still_resolve(
    cwd: Path, overrides: list[str], group: str, target: str
) -> None:
    module, _, name = compose(*overrides)[group]._target_.rpartition(".")
    assert (module.split(".")[0], name) == ("fusion_bench", target)


@pytest.mark.parametrize("file", CONFIG_FILES)
def test_every_config_composes_and_its_targets_exist(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    group, _, name = file.removesuffix(".yaml").partition("/")
    prefix = "" if group in GROUPS_OF_FUSION_BENCH else "+"
    assert compose(f"{prefix}{group}={name}")
    for target in _targets(OmegaConf.to_container(OmegaConf.load(CONFIG / file))):
        assert callable(get_object(target)), target


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for child in node.values():
            yield from _targets(child)
    elif isinstance(node, list):
        for child in node:
            yield from _targets(child)


def test_our_tree_comes_first_and_no_tree_twice(cwd: Path) -> None:
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    search_path.append("main", fusion_bench.utils.hydra_utils.get_default_config_path())
    FusionUpcycleSearchPath().manipulate_search_path(search_path)
    folders = [e.path.removeprefix("file://") for e in search_path.get_path()][1:]
    assert folders[0] == str(CONFIG)
    assert (Path(folders[-1]) / "fabric_model_fusion.yaml").is_file()
    assert len(set(folders)) == len(folders)


def test_an_install_without_configs_is_an_error_and_not_the_upstream_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fusion_upcycle, "__file__", str(tmp_path / "package" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="without its config tree; reinstall"):
        compose("method=mixtral_moe_upscaling")


WITHOUT_CLI = """
import os, sys
from fusion_bench.utils.hydra_utils import initialize_hydra_config
for folder in sys.argv[1:]:
    os.chdir(folder)
    cfg = initialize_hydra_config("fabric_model_fusion", ["method=mixtral_moe_upscaling"])
    assert cfg.method._target_.startswith("fusion_upcycle."), (folder, cfg.method)
assert "fusion_bench.scripts.cli" not in sys.modules
"""


def test_configs_composed_in_a_notebook_are_ours_too(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_CLI, tmp_path, REPOSITORY], check=True)


OTHER_APP = """
import sys
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

def providers():
    with initialize_config_dir(sys.argv[1], version_base=None):
        assert compose("main") == {"greeting": "hello"}
        path = GlobalHydra.instance().config_loader().get_search_path().get_path()
        return [element.provider for element in path]

alone = providers()
assert alone == ["hydra", "main", "schema"], alone
assert "hydra_plugins.fusion_upcycle.search_path" in sys.modules, "the plugin was not even found"
assert "fusion_upcycle" not in sys.modules
import fusion_bench
beside_fusion_bench = providers()
assert beside_fusion_bench == alone, beside_fusion_bench
"""


def test_other_hydra_apps_are_left_alone_even_where_they_import_fusion_bench(
    tmp_path: Path,
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "main.yaml").write_text("greeting: hello\n")
    (tmp_path / "config" / "method").mkdir()  # a name that we have too
    subprocess.run([sys.executable, "-c", OTHER_APP, tmp_path / "config"], check=True, cwd=tmp_path)


def test_the_command_line_of_fusion_bench_ends_in_one_sentence(tmp_path: Path) -> None:
    """Started as torchrun does; as users do, the logger has another name."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fusion_bench.scripts.cli", "method=sparse_upcycling"),
            *(
                "modelpool=CausalLMPool/mistral-7b",
                f"modelpool.models._pretrained_={tmp_path / 'dense'}",
            ),
            *(f"method.save_checkpoint={tmp_path / 'out'}", f"path.log_dir={tmp_path / 'log'}"),
            "taskpool=dummy",
        ],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    assert said[-2].startswith(f"error: modelpool.models._pretrained_: {tmp_path / 'dense'} is not")
    assert "HYDRA_FULL_ERROR=1" in said[-1]
    compose("method=sparse_upcycling")
    assert one_sentence._watch in logging.getLogger(fusion_bench.scripts.cli.__name__).filters


def logged(error: Exception, cause: Exception | None = None) -> None:
    """As FusionBench logs what its program raises."""
    end_in_one_sentence(logger := "tests.one_sentence")
    try:
        raise error from cause
    except Exception as found:
        logging.getLogger(logger).error(found, exc_info=True)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UpcyclingError("seed=x"), None),
        (ProofError("seed=x"), ValueError("digits")),
        (InstantiationException("Error in call to target"), UpcyclingError("seed=x")),
    ],
    ids=str,
)
def test_an_error_of_ours_is_shown_without_a_trace(
    error: Exception, cause: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(CompactHydraException, match=r"^error: seed=x$") as found:
        logged(error, cause)
    assert isinstance(found.value, UpcyclingError)  # for who catches it


def test_other_errors_and_full_ones_keep_their_trace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    logged(ValueError("not ours"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(logging.getLogger("tests.one_sentence"), "filters", [])
    logged(UpcyclingError("ours"))
    assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info] == ["not ours", "ours"]
