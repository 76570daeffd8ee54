"""The command `merge`; light, so that `--help` is quick."""

import argparse
from functools import partial
from typing import Any

from fusion_upcycle.cli.option_flags import Command, add_making, given_options
from fusion_upcycle.errors import UpcyclingError

DESCRIPTION = """\
Merge dense models of one shape into a Mixture-of-Experts model: the FFNs of each become experts,
all else is the mean over the models, or the base model's.

A random router is there to be trained. One that works at once is made from each model's own texts:
--router-init prototype and a --calibration for each --model.
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle merge ./moe --model math=./math-1b --model code=./code-1b
  python -m fusion_upcycle merge ./moe --model math=./math-1b --model code=./code-1b \\
      --base ./llama-1b --shared base --router-init prototype,logit_std=2.0 \\
      --calibration math=./math.jsonl --calibration code=./code.txt
"""


def add_merge(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command, its inputs, and one flag for each field of `MergingOptions`."""
    merge = commands.add_parser(
        "merge",
        help="several fine-tunes of one model -> one MoE folder",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("output", help="folder to make; appears only when complete and proven")
    pair = partial(merge.add_argument, action="append", default=[])
    pair(
        "--model",
        metavar="NAME=PATH",
        help="folder or Hub id of a model or LoRA adapter; once for each",
    )
    merge.add_argument(
        "--base",
        metavar="PATH",
        help="the model that they were trained from, which adapters are put on (default: each on "
        "the one that it names)",
    )
    pair(
        "--calibration",
        metavar="NAME=PATH",
        help="a model's own text for --router-init prototype: a .txt, .jsonl or .parquet file, or "
        "a folder of such files",
    )
    merge.add_options("fusion_upcycle.merging.options:MergingOptions")
    add_making(merge)
    merge.set_defaults(run=_merge)


def _merge(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.merging.merging import BASE
    from fusion_upcycle.merging.run import merge_into_moe

    base = {} if parsed.base is None else {BASE: parsed.base}
    made = merge_into_moe(
        base | pairs("--model", parsed.model),
        parsed.output,
        calibration=data_pairs("--calibration", parsed.calibration),
        verify=parsed.verify,
        overwrite=parsed.overwrite,
        max_shard_size=parsed.max_shard_size,
        push_to_hub=parsed.push_to_hub,
        progress=not parsed.quiet,
        **given_options(parsed),
    )
    print(made.proof, *made.notes, f"Output: {made.output}", sep="\n")


def pairs(flag: str, texts: list[str]) -> dict[str, str]:
    """The values of a flag NAME=PATH by name.

    Raises:
        UpcyclingError: a value that is not NAME=PATH, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in found:
            raise UpcyclingError(f"{flag} {text!r} is not NAME=PATH with a name of its own.")
        found[name] = path
    return found


def data_pairs(flag: str, texts: list[str]) -> dict[str, Any]:
    """As `pairs`, of data: a path, or `{path: ..., column: ...}` and the like.

    Raises:
        UpcyclingError: as `pairs`; braces that hold no `key: value, ...`.
    """
    from fusion_upcycle.files import specification

    return {name: specification(text) for name, text in pairs(flag, texts).items()}
