"""Comparison tables, made from run records only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.errors import plain
from fusion_upcycle.report.record import RECORD_NAME
from fusion_upcycle.untrusted import read_object

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A table as text: the first column is left-aligned, the others are numbers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """GitHub Markdown, without the title."""
        lines = [self.headers, ["---", *["---:"] * (len(self.headers) - 1)], *self.rows]
        return "\n".join(plain(f"| {' | '.join(line)} |") for line in lines)

    def to_rich(self) -> "RichTable":
        """The table as `rich` prints it on a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title)
        for index, header in enumerate(self.headers):
            table.add_column(header, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*(Text(plain(cell)) for cell in row))  # `[red]` in a name is no markup
        return table


def read_run_record(folder: Path) -> dict[str, Any]:
    """The `run_record.json` of a run's folder."""
    return read_object(folder / RECORD_NAME)


def bits_per_byte_table(title: str, records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Models down, texts across: bits per byte (lower is better), and parameters.

    Args:
        records: name of the model -> run record with a `taskpool` section of one evaluation.
    """
    rows, texts = [], []
    for name, record in records.items():
        (evaluation,) = record["taskpool"]["evaluations"]
        report = evaluation["report"]
        texts = list(record["taskpool"]["config"]["texts"])
        total = report["model_info"]["all_params"]
        active = record.get("method", {}).get("parameters", {}).get("active", total)
        scores = [f"{report[text]['bits_per_byte']:.4f}" for text in [*texts, "average"]]
        rows.append([name, *scores, f"{total:,}", f"{active:,}"])
    headers = ["bits per byte", *texts, "average", "parameters", "active per token"]
    return Table(title, headers, rows)
