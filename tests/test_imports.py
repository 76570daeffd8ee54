"""What an import brings along, in fresh processes; import-linter holds the order of imports."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fusion_upcycle.errors import require_versions

REPOSITORY = Path(__file__).resolve().parents[1]
# The FusionBench face: the only part that imports fusion_bench.
FACE = {"method", "modelpool", "taskpool"}
TENSORS_ONLY = [
    f"fusion_upcycle.{name}"
    for name in ("expert_init", "router_init", "router_extension", "selection")
]
OPTIONS = [
    f"fusion_upcycle.{name}.options" for name in ("upcycling", "merging", "expansion", "training")
]
HEAVY = ["torch", "transformers", "lightning", "fusion_bench"]


FAKE = """
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: {fake}.get(name) or real(name)
"""


@pytest.mark.parametrize("module", sorted(FACE))
@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [("transformers", "5.5.0", ">=5.21"), ("hydra-core", "1.4.0rc3", ">=1.3,<1.4")],
)
def test_the_face_says_which_version_is_wrong_before_it_imports_fusion_bench(
    module: str, name: str, found: str, wanted: str
) -> None:
    code = (
        FAKE.format(fake={name: found})
        + f"""
try:
    import fusion_upcycle.{module}
except ImportError as error:
    print(error)
assert "fusion_bench" not in sys.modules
"""
    )
    assert python("-c", code).stdout.strip() == (
        f"{name} {found} is installed, but fusion_upcycle needs {name}{wanted}: run "
        f"pip install '{name}{wanted}'."
    )


def test_the_command_line_refuses_routers_that_say_probabilities(tmp_path: Path) -> None:
    code = FAKE.format(fake={"transformers": "5.20.2"}) + "import fusion_upcycle.cli as cli\n"
    refused = python("-c", code + f"cli.main(['upcycle', 'dense', '{tmp_path / 'out'}'])", status=2)
    assert refused.stderr.startswith("error: transformers 5.20.2 is installed, but")
    assert "usage:" in python("-c", code + "cli.main(['--help'])").stdout


@pytest.mark.parametrize("found", ["5.21.0", "5.24.0", "5.25.0.dev0", "6.0", None])
def test_versions_that_work_are_let_through(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    require_versions("transformers")


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        pytest.param(["fusion_upcycle"], HEAVY, id="import fusion_upcycle is quick"),
        pytest.param(OPTIONS, HEAVY, id="options are light, for the command line's help"),
        pytest.param(
            TENSORS_ONLY,
            ["transformers", "lightning", "safetensors", "fusion_upcycle.architectures"],
            id="initialisers know torch and experts only",
        ),
    ],
)
def test_an_import_brings_no_more_than_it_needs(modules: list[str], forbidden: list[str]) -> None:
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    loaded = [name for name in {forbidden} if name in sys.modules]
    assert not loaded, f"import {{module}} also imports {{loaded}}"
"""
    python("-c", code)


def python(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done
