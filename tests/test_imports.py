"""Imports go one way. Checked in fresh processes, as sys.modules of this one is full."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "fusion_upcycle"
# The FusionBench face: the only part that may import fusion_bench. Nothing else imports it.
FACE = {"method", "modelpool", "taskpool"}
LIBRARY = sorted(
    f"fusion_upcycle.{path.stem}"
    for path in PACKAGE.iterdir()
    if (path.suffix == ".py" or (path / "__init__.py").is_file())
    and path.stem not in FACE | {"__init__", "__main__"}
)
TENSORS_ONLY = [
    f"fusion_upcycle.{name}"
    for name in ("expert_init", "router_init", "router_extension", "selection")
]
HEAVY = ["torch", "transformers", "lightning", "fusion_bench"]


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        pytest.param(["fusion_upcycle"], HEAVY, id="import fusion_upcycle is quick"),
        pytest.param(
            LIBRARY,
            ["fusion_bench", *(f"fusion_upcycle.{name}" for name in sorted(FACE))],
            id="only the face imports fusion_bench",
        ),
        pytest.param(
            TENSORS_ONLY,
            ["transformers", "lightning", "safetensors", "fusion_upcycle.architectures"],
            id="initialisers know torch and experts only",
        ),
    ],
)
def test_imports_go_one_way(modules: list[str], forbidden: list[str]) -> None:
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    loaded = [name for name in {forbidden} if name in sys.modules]
    assert not loaded, f"import {{module}} also imports {{loaded}}"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
