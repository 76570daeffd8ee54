"""The commands `importance` and `expand`; light, so that `--help` is quick."""

import argparse
from typing import Any

from fusion_upcycle.cli.merge_flags import data_pairs
from fusion_upcycle.cli.option_flags import Command, add_making, given_options

IMPORTANCE = """\
How much each expert of a trained Mixture-of-Experts model matters, by gradients on your texts. One
pass finds all metrics; they are saved as importance.json, with a figure, for `expand --scores`.

The model is loaded, on a GPU if there is one: memory for its weights and one layer's gradients.
"""

IMPORTANCE_EXAMPLES = """\
examples:
  python -m fusion_upcycle importance ./olmoe --data web=./web.jsonl --data code=./code
  python -m fusion_upcycle importance ./moe --demo --tokens 20000 --output ./scores
"""

EXPAND = """\
Grow a Mixture-of-Experts model from E to M experts: experts are duplicated and the router gets rows
for them. Each token still goes to as many experts, at the same cost. Then train on.

Copies with the router row of their source are chosen together with it, which moves the loss. The
router extensions split and fit avoid nearly all of that; they need text: --data or --demo. The
model streams from folder to folder, but is loaded where a selection needs scores and there are no
--scores: experts are then scored on the same text.
"""

EXPAND_EXAMPLES = """\
examples:
  python -m fusion_upcycle expand ./olmoe ./larger --num-experts 128
  python -m fusion_upcycle expand ./olmoe ./larger --router-extension split --data web=./web.jsonl
  python -m fusion_upcycle expand ./olmoe ./larger --num-experts 80 --selection greedy \\
      --scores ./scores --router-extension fit --data web=./web.jsonl
"""


def add_importance(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command and its flags."""
    importance = commands.add_parser(
        "importance",
        help="how much each expert of an MoE matters on your texts: scores",
        description=IMPORTANCE,
        epilog=IMPORTANCE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importance.add_argument("model", help="local folder or Hugging Face Hub id of an MoE model")
    _add_text(importance, required=True)
    importance.add_argument(
        "--output",
        default="importance",
        metavar="FOLDER",
        help="is made; files of the same names are replaced (default: ./importance)",
    )
    importance.add_argument("--quiet", action="store_true", help="no progress bars")
    importance.set_defaults(run=_importance)


def add_expand(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command, its inputs, and one flag for each field of `ExpansionOptions`."""
    expand = commands.add_parser(
        "expand",
        help="MoE folder -> one with more experts, at the same cost of a token",
        description=EXPAND,
        epilog=EXPAND_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    expand.add_argument("source", help="local folder or Hugging Face Hub id of an MoE model")
    expand.add_argument("output", help="folder to make; appears only when complete and proven")
    expand.add_options("fusion_upcycle.expansion.options:ExpansionOptions")
    expand.add_argument(
        "--scores", metavar="FOLDER", help="what `importance` wrote, for selections by a metric"
    )
    _add_text(expand, required=False)
    expand.add_argument(
        "--optimizer-state",
        metavar="FOLDER",
        help="of the same model, saved by continued_pretraining: its moments are expanded too",
    )
    expand.add_argument(
        "--new-moments",
        default="copy",
        metavar="NAME",
        help="of new experts: copy | reset | scale (default: copy)",
    )
    add_making(expand)
    expand.set_defaults(run=_expand)


def _add_text(parser: argparse.ArgumentParser, *, required: bool) -> None:
    texts = parser.add_mutually_exclusive_group(required=required)
    texts.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="calibration text: a .txt (one document), .jsonl or .parquet (column `text`) file, or "
        "a folder of such files; once for each text",
    )
    texts.add_argument("--demo", action="store_true", help="shipped text, unseen by the demo base")
    parser.add_argument(
        "--tokens",
        type=int,
        default=65_536,
        metavar="N",
        help="of all texts together (default: 65536)",
    )
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="T",
        help="tokens of a sequence (default: 1024, or the model's positions)",
    )


def _calibration(parsed: argparse.Namespace) -> dict[str, Any]:
    """The texts as `fusion_upcycle.texts.documents` takes them."""
    from fusion_upcycle.demo.texts import demo_documents

    if parsed.demo:
        return demo_documents("continued")
    return data_pairs("--data", parsed.data)


def _importance(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from fusion_upcycle.importance.figure import importance_table
    from fusion_upcycle.importance.run import folder_importance

    importance = folder_importance(
        parsed.model,
        _calibration(parsed),
        parsed.output,
        tokens=parsed.tokens,
        context_length=parsed.context_length,
        progress=not parsed.quiet,
    )
    Console().print(importance_table(importance).to_rich())
    print(f"Output: {parsed.output}")


def _expand(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.expansion.options import make_expansion_options
    from fusion_upcycle.expansion.preparation import IMPORTANCE_FOLDER
    from fusion_upcycle.expansion.run import expand

    options = make_expansion_options(**given_options(parsed))
    made = expand(
        parsed.source,
        parsed.output,
        scores=parsed.scores,
        calibration=_calibration(parsed),
        calibration_tokens=parsed.tokens,
        context_length=parsed.context_length,
        optimizer_state=parsed.optimizer_state,
        new_moments=parsed.new_moments,
        verify=parsed.verify,
        overwrite=parsed.overwrite,
        max_shard_size=parsed.max_shard_size,
        push_to_hub=parsed.push_to_hub,
        progress=not parsed.quiet,
        **vars(options),
    )
    counts = made.record["parameters"]
    print(made.proof)
    print(
        f"{counts['source'] / 1e9:.3g}B, {counts['source_active'] / 1e9:.3g}B active per token -> "
        f"{counts['total'] / 1e9:.3g}B, {counts['active'] / 1e9:.3g}B active; "
        f"{made.record['bytes'] / 1e9:.3g} GB"
    )
    if "router" in made.record:
        layers = made.record["router"]["layers"].values()
        shares = [share for r in layers if (share := r["smallest_copy_share"]) is not None]
        if shares:
            print(f"Least used copy, on the calibration text: {min(shares):.2f} of its fair share")
    if (scores := made.output / IMPORTANCE_FOLDER).is_dir():
        print(f"Importance: {scores}")
    if (advice := options.advice) is not None:
        print(advice)
    print(*made.notes, f"Output: {made.output}", sep="\n")
