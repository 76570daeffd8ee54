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
    """First column -> the rest, of the table of scores."""
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    (text,) = [data["text/markdown"] for data in shown if "text/markdown" in data]
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines()]
    return dict(rows)


@pytest.mark.early
def test_the_notebook_runs_and_upcycled_equals_dense(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
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
