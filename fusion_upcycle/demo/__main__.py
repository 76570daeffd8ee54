"""``python -m fusion_upcycle.demo``: how good the demo models are; `train` makes them again."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_upcycle.demo.models import demo_model, demo_reference
from fusion_upcycle.demo.recipe import MODELS, RECIPES
from fusion_upcycle.demo.texts import DOMAINS
from fusion_upcycle.errors import UpcyclingError, unknown

OUTPUT = Path("outputs/demo_models")
TITLE = "bits per byte on held-out text (lower is better)"

DESCRIPTION = """\
Without a command: held-out bits per byte of the shipped demo models, beside what compressors reach.
"""

TRAIN = """\
Train demo models again, from the shipped recipes and text, on the CPU. A model that starts from
another one starts from the one trained in the same call, else from the shipped one. The last digits
depend on CPU and library versions.
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle.demo
  python -m fusion_upcycle.demo train                        # all of them, minutes each
  python -m fusion_upcycle.demo train prose --output ./mine  # from the shipped base
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 0 done, 2 wrong input."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "train":
            train(parsed.names or MODELS, parsed.output)
        else:
            show()
    except UpcyclingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show() -> None:
    """Print what the shipped models reach, and the compressors."""
    rows = []
    for name in MODELS:
        facts = _facts(demo_model(name))
        seconds = f"{facts['training']['wall_seconds']:.0f}"
        rows.append([name, f"{facts['parameters']:,}", *_bits(facts["bits_per_byte"]), seconds])
    reference = demo_reference()
    for name in ("unigram", "gzip", "lzma"):
        rows.append([name, "", *_bits({d: found[name] for d, found in reference.items()}), ""])
    _print(["model", "parameters", *DOMAINS, "training s"], rows)


def train(names: Sequence[str], output: Path) -> None:
    """Train the named models into folders of `output`, and print them beside the shipped ones.

    Raises:
        UpcyclingError: an unknown name, or a folder that is there already.
    """
    for name in names:
        if name not in MODELS:
            raise unknown("demo model", name, MODELS)
        if (output / name).exists():
            raise UpcyclingError(f"{output / name} exists. Remove it, or give another --output.")
    from fusion_upcycle.demo.train import train_model

    made: dict[str, Path] = {}
    rows = []
    for name in MODELS:  # what others start from comes first
        if name not in names:
            continue
        start = RECIPES[name].start
        print(f"demo: training {name!r} into {output / name}", flush=True)
        made[name] = train_model(
            name, output, start=None if start is None else made.get(start) or demo_model(start)
        )
        for which, folder in (("trained", made[name]), ("shipped", demo_model(name))):
            rows.append([name, which, *_bits(_facts(folder)["bits_per_byte"])])
    _print(["model", "", *DOMAINS], rows)
    print("The last digits depend on CPU and library versions (`versions` in demo.json).")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusion_upcycle.demo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser(
        "train",
        help="train them again, and compare with the shipped ones",
        description=TRAIN,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)} (default: all)"
    )
    command.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="FOLDER",
        help=f"where the models' folders go (default: {OUTPUT})",
    )
    return parser


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "demo.json").read_text(encoding="utf-8"))


def _bits(found: dict[str, float]) -> list[str]:
    return [f"{found[domain]:.3f}" for domain in DOMAINS]


def _print(headers: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console

    from fusion_upcycle.report.tables import Table

    Console().print(Table(TITLE, headers, rows).to_rich())


if __name__ == "__main__":
    main()
