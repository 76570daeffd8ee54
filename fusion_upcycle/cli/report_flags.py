"""The command `report`; light, so that `--help` is quick."""

import argparse

from fusion_upcycle.cli.option_flags import Command

DESCRIPTION = """\
Tables and figures of many runs, as a page (index.html) that needs nothing beside it, and as
Markdown, LaTeX, CSV, JSON, PNG and SVG. From run records only, at any time: those of `benchmark`,
and also others' program_report.json (fusion_bench) and results_*.json (lm-eval).
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle report outputs/benchmark/three_domains -o ./report
  python -m fusion_upcycle report ./mine ./lm_eval_results ./other/program_report.json -o ./report
"""


def add_report(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command and its flags."""
    report = commands.add_parser(
        "report",
        help="run records -> comparison tables, figures, a page",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("runs", nargs="+", metavar="RUNS", help="folders of runs, or report files")
    report.add_argument(
        "-o",
        "--output",
        default="report",
        metavar="FOLDER",
        help="is made; files of the same names are replaced (default: ./report)",
    )
    report.add_argument("--title", help="of the page (default: the experiments' names)")
    report.set_defaults(run=_report)


def _report(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.comparison import write_report

    print(f"Output: {write_report(parsed.runs, parsed.output, parsed.title)}")
