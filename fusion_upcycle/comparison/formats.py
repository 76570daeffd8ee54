"""Tables as Markdown, LaTeX (booktabs), CSV and JSON."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any
from unicodedata import normalize

from fusion_upcycle.comparison.results import Result
from fusion_upcycle.comparison.tables import Cell, Line, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    "[": "{[}",  # after the end of a row, both would be arguments of it
    "*": "{*}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "“": "``",
    "”": "''",
    "\u2018": "`",
    "\u2019": "'",
    "\u2013": "--",
    "\u2014": "---",
}
#: Letters beyond ASCII, and accents over letters, that LaTeX's default fonts have.
_LETTERS = "ßæœøłıÆŒØŁ"
_ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"
_DOCUMENT = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[landscape,margin=1.5cm]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\begin{document}
%s
\end{document}
"""


def grouped(table: Table) -> Iterator[tuple[str, list[Line]]]:
    """Heading and its lines, in order."""
    for group, lines in groupby(table.lines, key=lambda line: line.group):
        yield group, list(lines)


def to_markdown(table: Table) -> str:
    """GitHub Markdown; headings are rows of their own, as in FusionBench's documentation."""
    width = len(table.headers)
    text = [f"| Method | {' | '.join(map(_pipes, table.headers))} |"]
    text.append(f"| --- |{' ---: |' * width}")
    for group, lines in grouped(table):
        if group:
            text.append(f"| *{_pipes(group)}* |{' |' * width}")
        for line in lines:
            cells = " | ".join(_marked(cell) for cell in line.cells)
            text.append(f"| {_pipes(line.label)} | {cells} |")
    return "\n".join(text)


def _marked(cell: Cell) -> str:
    return {"best": f"**{cell.text}**", "second": f"<u>{cell.text}</u>"}.get(cell.mark, cell.text)


def _pipes(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def to_latex(table: Table) -> str:
    """A `table` environment for `booktabs`, at most as wide as the text."""
    width = len(table.headers)
    rows: list[str] = []
    for group, lines in grouped(table):
        if group:
            head = rf"\multicolumn{{{width + 1}}}{{l}}{{\textit{{{_escaped(group)}}}}} \\"
            rows += ([r"\midrule"] if rows else []) + [head]
        for line in lines:
            cells = " & ".join(_latex_cell(cell) for cell in line.cells)
            rows.append(rf"{_escaped(line.label)} & {cells} \\")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(table.title)}. {_escaped(table.note)}}}",
            rf"\label{{tab:{table.key}}}",
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * width}}}",
            r"\toprule",
            rf"Method & {' & '.join(map(_escaped, table.headers))} \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def to_latex_document(tables: Sequence[Table]) -> str:
    """All tables as a document that compiles by itself."""
    return _DOCUMENT % "\n\n".join(rf"\input{{{table.key}.tex}}" for table in tables)


def _latex_cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    forms = {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}"}
    return forms.get(cell.mark, text)


def _escaped(text: str) -> str:
    """Characters that LaTeX does not know are written as what they are called, not dropped."""
    return "".join(map(_written, text))


def _written(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    letter, *accents = list(normalize("NFD", character))
    accented = letter.isalpha() and len(accents) == 1 and accents[0] in _ACCENTS
    if character in _LETTERS or (letter.isascii() and letter.isprintable() and not accents):
        return character
    if letter.isascii() and accented and ord(character) < 0x17F:
        return character
    return f"{{[}}U+{ord(character):04X}]"


def to_csv(table: Table) -> str:
    """Unrounded values; group, row and settings first."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["group", "method", *table.headers])
    for line in table.lines:
        values = ["" if cell.value is None else repr(cell.value) for cell in line.cells]
        writer.writerow([_harmless(line.group), _harmless(line.label), *values])
    return file.getvalue()


def _harmless(text: str) -> str:
    """A spreadsheet would run a text that begins like this as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def to_json(tables: Sequence[Table], failed: Sequence[Result]) -> str:
    """Every cell with its value, every line with the runs that it comes from, and what failed."""
    content: dict[str, Any] = {
        table.key: {
            "title": table.title,
            "note": table.note,
            "lines": [
                {
                    "group": line.group,
                    "method": line.label,
                    "cells": {
                        header: {"value": cell.value, "text": cell.text, "mark": cell.mark}
                        for header, cell in zip(table.headers, line.cells, strict=True)
                    },
                    "runs": [] if line.row is None else [_run(r) for r in line.row.results],
                }
                for line in table.lines
            ],
        }
        for table in tables
    }
    content["failed"] = [
        {"method": result.label, "error": result.error, **_run(result)} for result in failed
    ]
    return json.dumps(content, indent=1, ensure_ascii=False)


def _run(result: Result) -> dict[str, Any]:
    return {
        "record": str(result.source),
        "seed": result.seed,
        "settings": dict(result.settings),
        "proof": result.proof,
        "arguments": list(result.arguments),
    }
