"""The wheel: it holds every package and config, and its plugin works where only the wheel is."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from os import environ
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tiny import dense_folder

from fusion_upcycle.demo import MODELS
from fusion_upcycle.errors import REQUIRED

REPOSITORY = Path(__file__).resolve().parents[1]
# What a wheel is built from. Building in the checkout would leave build/ there, and take stale
# files from it into the next wheel.
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "fusion_upcycle", "hydra_plugins", "config"]
# A checkout on PYTHONPATH would hide that the wheel lacks something.
ENVIRONMENT = {key: value for key, value in environ.items() if key != "PYTHONPATH"}


def test_package_list_equals_the_folders_on_disk() -> None:
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join(init.parent.relative_to(REPOSITORY).parts)
        for top in ("fusion_upcycle", "hydra_plugins")
        for init in (REPOSITORY / top).rglob("__init__.py")
    }
    listed = setuptools["packages"]
    assert len(set(listed)) == len(listed)
    assert set(listed) == on_disk | {"hydra_plugins", "fusion_upcycle.config"}
    assert setuptools["package-dir"] == {"fusion_upcycle.config": "config"}
    # An __init__.py there would shadow the Hydra plugins of every other package.
    assert not (REPOSITORY / "hydra_plugins" / "__init__.py").exists()


def test_versions_are_checked_as_they_are_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, versions in REQUIRED.items():
        assert SpecifierSet(versions) == declared[name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (wheel,) = out.glob("fusion_upcycle-*.whl")
    return wheel


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees our wheel and this environment's libraries, but no checkout.

    The .pth file puts this environment's site-packages behind the clean one's. Python does not
    read the .pth files *there*, so an editable install of ours stays out of sight.
    """
    venv = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    imported = run(python, "-c", "import fusion_upcycle; print(fusion_upcycle.__file__)", cwd=venv)
    assert imported.stdout.strip() == str(site_packages / "fusion_upcycle" / "__init__.py")
    return python


def test_make_is_never_silent_while_pip_is(tmp_path: Path) -> None:
    """What is being installed is said before, and every 10 seconds, which are made short here."""
    packages = tmp_path / "venv" / "lib" / "python3" / "site-packages"
    (packages / "one-1.0.dist-info").mkdir(parents=True)
    for name, seconds in (("venv/bin/python", 1.5), ("tools/sleep", 0.1)):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\nexec /bin/sleep {seconds}\n")
        file.chmod(0o755)
    makefile = tmp_path / "Makefile"
    makefile.write_text(f"include {REPOSITORY}/Makefile\nprobe:\n\t@$(call install,things,-e .)\n")
    done = subprocess.run(
        ["make", "-s", "-f", makefile, "probe", f"VENV={tmp_path / 'venv'}"],
        env={**environ, "PATH": f"{tmp_path / 'tools'}:{environ['PATH']}"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.splitlines()
    assert said[0] == "venv: installing things"
    assert said[1] == "venv: ... 10 s, 1 packages"
    assert len(said) > 3


def test_wheel_holds_every_file(wheel: Path) -> None:
    expected = {
        str(path.relative_to(REPOSITORY))
        for top in ("fusion_upcycle", "hydra_plugins")
        for path in (REPOSITORY / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {
        f"fusion_upcycle/{path.relative_to(REPOSITORY)}"
        for path in (REPOSITORY / "config").rglob("*")
        if path.is_file()
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= names
    # Nothing else at the top of site-packages: a `config/` there would replace FusionBench's own.
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"fusion_upcycle", "hydra_plugins"}


def test_wheel_brings_text_models_and_their_licence_and_stays_small(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = "fusion_upcycle/demo/data"
    assert {f"{data}/{domain}.jsonl.xz" for domain in ("prose", "source")} <= names
    for file in ("config.json", "model.safetensors", "tokenizer.json", "demo.json", "README.md"):
        assert {f"{data}/models/{name}/{file}" for name in MODELS} <= names
    assert f"{data}/NOTICE" in names
    (licence,) = (n for n in names if ".dist-info/" in n and n.endswith("/demo/data/NOTICE"))
    notice = zipfile.ZipFile(wheel).read(licence).decode()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice
    assert "2023 Python Software Foundation" in notice
    assert wheel.stat().st_size < 12e6


COMPOSED = """
from fusion_bench.utils.hydra_utils import initialize_hydra_config
cfg = initialize_hydra_config("fabric_model_fusion", ["method=mixtral_moe_upscaling"])
print(cfg.method._target_)
import fusion_upcycle
print(fusion_upcycle.__file__)
"""


def test_the_wheels_configs_are_found_where_no_checkout_is(
    clean_python: Path, tmp_path: Path
) -> None:
    target, package = run(clean_python, "-c", COMPOSED, cwd=tmp_path).stdout.split()
    assert target == "fusion_upcycle.method.MixtralForCausalLMUpscalingAlgorithm"
    assert Path(package).is_relative_to(clean_python.parents[1])


@pytest.mark.early
@pytest.mark.parametrize(
    ("place", "cli"),
    [
        # As torchrun starts it; -P, or the checkout in the working directory would be imported.
        ("repository root", ["-P", "-m", "fusion_bench.scripts.cli"]),
        pytest.param(
            "elsewhere",
            [Path(sysconfig.get_path("scripts")) / "fusion_bench"],
            marks=pytest.mark.full,
        ),
    ],
)
def test_fusion_bench_cli_upcycles_with_the_wheel(
    place: str, cli: list[str | Path], clean_python: Path, tmp_path: Path
) -> None:
    output = tmp_path / "moe"
    run(
        *(clean_python, *cli, "method=mixtral_moe_upscaling", "method/router_init=zeros"),
        "modelpool=CausalLMPool/mistral-7b",
        f"modelpool.models._pretrained_={dense_folder(tmp_path / 'dense')}",
        *("method.num_experts=8", "method.experts_per_token=2"),
        *(f"method.save_checkpoint={output}", "taskpool=dummy"),
        *(f"path.log_dir={tmp_path / 'log'}", f"path.cache_dir={tmp_path / 'cache'}"),
        cwd=tmp_path if place == "elsewhere" else REPOSITORY,
    )
    made = json.loads((output / "upcycling.json").read_text())
    assert made["proof"]["holds"] is True
    assert made["options"]["num_experts"] == 8
    assert made["options"]["router_init"] == {"name": "zeros"}
    assert made["dtype"] == "bfloat16"  # the pool's
    assert (tmp_path / "log" / "run_record.json").is_file()


def pip(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done
