"""The command `analyze`; light, so that `--help` is quick."""

import argparse
from pathlib import Path

from fusion_upcycle.cli.option_flags import Command

DESCRIPTION = """\
What the experts of a Mixture-of-Experts model do with your texts, or images, as a folder with a
page (index.md), figures (PNG and SVG) and all numbers (run_record.json):

  load       of every expert; dead ones, health limits, router entropy, margin
  domains    does the choice of experts depend on the domain? In bits, tested by permuted labels
  classes    where numbers, operators, brackets, capitalised and other tokens go (of texts)
  similarity of experts: cosine of weights, and CKA of outputs on the same tokens of your texts

A domain is a name of yours for one kind of text. With 5 or more documents in each, the test speaks
of texts like yours; with fewer, of these texts only. Even a router that was never trained depends
on the domain: give the model before training as --before to test whether experts specialised, and
to see whether copies diverged.
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle analyze ./llama-8x1b --demo
  python -m fusion_upcycle analyze ./trained --before ./llama-8x1b --output ./report \\
      --data prose=./books --data code=./code.jsonl --tokens 50000
"""


def add_analyze(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command and its flags."""
    analyze = commands.add_parser(
        "analyze",
        help="what the experts of an MoE do with your texts: a page",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    analyze.add_argument("model", help="local folder or Hugging Face Hub id of an MoE model")
    texts = analyze.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--data",
        action="append",
        metavar="NAME=PATH",
        help="a domain and its text: a .txt (one document), .jsonl or .parquet (column `text`) "
        "file, or a folder of such files; for a model of images, a folder of images; once for each "
        "domain",
    )
    texts.add_argument("--demo", action="store_true", help="prose, source code and arithmetic")
    analyze.add_argument(
        "--before", metavar="MODEL", help="the same model before training, to compare with"
    )
    analyze.add_argument(
        "--tokens",
        type=int,
        default=20_000,
        metavar="N",
        help="of each domain at most, spread over its documents or images (default: 20000)",
    )
    analyze.add_argument(
        "--output",
        default="analysis",
        metavar="FOLDER",
        help="is made; files of the same names are replaced (default: ./analysis)",
    )
    analyze.add_argument("--quiet", action="store_true", help="no progress bars")
    analyze.set_defaults(run=_analyze)


def _analyze(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from fusion_upcycle.analysis.report import information_table, load_table, write_analysis
    from fusion_upcycle.analysis.run import analyze_folder, demo_texts, read_data
    from fusion_upcycle.checks import require_folder
    from fusion_upcycle.report.drawing import require_matplotlib

    require_matplotlib()
    require_folder("output", Path(parsed.output))
    data = demo_texts() if parsed.demo else read_data(parsed.model, parsed.data)
    analyses = [
        analyze_folder(folder, data, tokens=parsed.tokens, progress=not parsed.quiet)
        for folder in (parsed.model, parsed.before)
        if folder is not None
    ]
    page = write_analysis(analyses[0], Path(parsed.output), before=(*analyses, None)[1])
    record, console = analyses[0].record, Console()
    for table in (load_table, *([information_table] if record["information"] else [])):
        console.print(table(record).to_rich())
    print(f"Output: {page}")
