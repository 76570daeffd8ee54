"""The page of a report: one HTML file, which needs no network and nothing beside it."""

import base64
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusion_upcycle.comparison.figures import Picture
from fusion_upcycle.comparison.formats import grouped
from fusion_upcycle.comparison.results import Result
from fusion_upcycle.comparison.rows import Row
from fusion_upcycle.comparison.tables import Table
from fusion_upcycle.report.record import versions

_DATA = Path(__file__).parent / "data"


def to_html(
    title: str,
    summary: str,
    tables: Sequence[Table],
    rows: Sequence[Row],
    failed: Sequence[Result],
    pictures: Mapping[Picture, Path],
) -> str:
    """The page.

    Args:
        title: above it.
        summary: what the report is of.
        tables: as they follow each other.
        rows: of which each gets its details.
        failed: runs that ended with an error.
        pictures: figure -> its SVG file, which is put into the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_DATA),
        undefined=StrictUndefined,
        autoescape=select_autoescape(default=True),  # names come from strangers
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        summary=summary,
        tables=tables,
        rows=rows,
        failed=failed,
        anchor=lambda row: f"run-{next(n for n, one in enumerate(rows, 1) if one is row)}",
        pictures=[
            {"key": p.key, "title": p.title, "words": p.words, "source": _inside(file)}
            for p, file in pictures.items()
        ],
        grouped=grouped,
        command=shlex.join,
        version=versions()["fusion_upcycle"] or "",
        sortable=Markup((_DATA / "sortable.min.js").read_text(encoding="utf-8")),
        accessible=Markup((_DATA / "sortable.a11y.min.js").read_text(encoding="utf-8")),
    )


def _inside(file: Path) -> str:
    """A file as an address that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"
