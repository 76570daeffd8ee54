"""The notebook runs from top to bottom, and shows what it says."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "upcycle.ipynb"


def words(cell: Any) -> str:
    """All text that a cell printed."""
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def table_of(cells: list[Any]) -> dict[str, str]:
    """First column -> the rest, of the table of scores; training on first use prints beside it."""
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    (text,) = [data["text/markdown"] for data in shown if "text/markdown" in data]
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines()]
    return dict(rows)


#: Runs before the notebook, as its first cell: demo models that take a second.
TINY = """
from fusion_upcycle.demo import demo_model
from fusion_upcycle.demo.recipe import Recipe
demo_model.__defaults__ = (Recipe(16, 32, 1, 2, 1, batch_size=2, base_steps=12, finetune_steps=6),)
"""


@pytest.mark.early
@pytest.mark.parametrize(
    "first",
    [pytest.param(TINY, id="tiny"), pytest.param("", id="as shipped", marks=pytest.mark.full)],
)
def test_the_notebook_runs_and_upcycled_equals_dense(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if first:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
        monkeypatch.setenv("FUSION_UPCYCLE_CACHE", str(tmp_path / "cache"))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("exact, proven" in words(cell) for cell in ran)
    found = table_of(ran)
    assert found["upcycled"] == found["dense"]
    images = [o for c in ran for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(images) == 1


def test_the_committed_notebook_was_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert table_of(notebook.cells)["upcycled"] == table_of(notebook.cells)["dense"]
