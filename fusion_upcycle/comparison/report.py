"""A report, from run records only: tables in four forms, figures, one page."""

from collections.abc import Iterable
from pathlib import Path

from fusion_upcycle.checks import require_folder
from fusion_upcycle.comparison.figures import make_pictures
from fusion_upcycle.comparison.formats import (
    to_csv,
    to_json,
    to_latex,
    to_latex_document,
    to_markdown,
)
from fusion_upcycle.comparison.page import to_html
from fusion_upcycle.comparison.results import read_results
from fusion_upcycle.comparison.rows import find_tasks, make_rows
from fusion_upcycle.comparison.tables import make_tables
from fusion_upcycle.report.drawing import require_matplotlib, save


def write_report(runs: Iterable[str | Path], output: str | Path, title: str | None = None) -> Path:
    """Read all results, and write `index.html` and the files beside it.

    Args:
        runs: folders, searched for run records of benchmarks, FusionBench's `program_report.json`
            and lm-eval's `results_*.json`; or such files.
        output: folder, made if need be; files of the same names are replaced.
        title: of the page; by default the experiments' names.

    Returns:
        The path of the page. Beside it: `report.md`, `report.tex` (which compiles), `report.json`
        (every cell with its runs), each table as .md, .tex and .csv, each figure as .png and .svg.

    Raises:
        UpcyclingError: nothing to report on, or matplotlib is missing.
    """
    require_matplotlib()
    folder = Path(output).expanduser()
    require_folder("output", folder)
    results = read_results(runs)
    tasks = find_tasks([result for result in results if result.error is None])
    rows = make_rows(results, tasks)
    failed = [result for result in results if result.error is not None]
    tables = make_tables(rows, tasks)
    names = dict.fromkeys(result.experiment for result in results if result.experiment)
    title = title or (f"Comparison: {', '.join(names)}" if names else "Comparison")
    summary = f"{len(rows)} rows from {len(results) - len(failed)} runs, {len(tasks)} tasks" + (
        f"; {len(failed)} failed." if failed else "."
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for picture in make_pictures(rows, tasks):
        save(picture.draw(), folder, picture.key)
        pictures[picture] = folder / f"{picture.key}.svg"
    parts = [f"# {title}\n\n{summary}\n"]
    for table in tables:
        markdown = to_markdown(table)
        parts.append(f"## {table.title}\n\n{markdown}\n\n{table.note}\n")
        _write(folder / f"{table.key}.md", markdown + "\n")
        _write(folder / f"{table.key}.tex", to_latex(table) + "\n")
        _write(folder / f"{table.key}.csv", to_csv(table))
    parts += [f"![{p.title}. {p.words}]({p.key}.png)\n" for p in pictures]
    if failed:
        lines = (f"- {result.label}: {result.error} ({result.source})" for result in failed)
        parts.append("## Failed runs\n\n" + "\n".join(lines) + "\n")
    _write(folder / "report.md", "\n".join(parts))
    _write(folder / "report.tex", to_latex_document(tables))
    _write(folder / "report.json", to_json(tables, failed) + "\n")
    page = folder / "index.html"
    _write(page, to_html(title, summary, tables, rows, failed, pictures))
    return page


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
