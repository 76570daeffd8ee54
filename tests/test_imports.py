"""What an import brings along, in fresh processes; import-linter holds the order of imports."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TENSORS_ONLY = [
    f"fusion_upcycle.{name}"
    for name in ("expert_init", "router_init", "router_extension", "selection")
]
OPTIONS = [
    f"fusion_upcycle.{name}.options" for name in ("upcycling", "merging", "expansion", "training")
]
HEAVY = ["torch", "transformers", "lightning", "fusion_bench"]


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
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
