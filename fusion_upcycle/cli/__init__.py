"""`python -m fusion_upcycle`: upcycle, merge, expand, verify, analyze without FusionBench."""

import argparse
import re
import sys
from collections.abc import Sequence

from fusion_upcycle.cli.analysis_flags import add_analyze
from fusion_upcycle.cli.expansion_flags import add_expand, add_importance
from fusion_upcycle.cli.merge_flags import add_merge
from fusion_upcycle.cli.option_flags import Command
from fusion_upcycle.cli.planning_flags import add_planning, planning_options
from fusion_upcycle.errors import ProofError, UpcyclingError

DESCRIPTION = """\
Turn a dense language model into a sparse Mixture-of-Experts model, and grow one.

  inspect     what a checkpoint or recipe is and would become, and its cost; writes nothing
  upcycle     dense folder or Hub id -> Mixture-of-Experts folder, proven to be the same function
  merge       several fine-tunes of one model -> one Mixture-of-Experts folder
  importance  how much each expert of a model matters on your texts: scores and a figure
  expand      Mixture-of-Experts folder -> one with more experts, at the same cost of a token
  verify      prove an output folder again, against its source
  analyze     what the experts of a model do with your texts: load, domains, similarity; a page
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle inspect  --recipe mixtral_8x7b
  python -m fusion_upcycle inspect  ./llama-1b --num-experts 8
  python -m fusion_upcycle upcycle  ./llama-1b ./llama-8x1b --num-experts 8 --experts-per-token 2
  python -m fusion_upcycle upcycle  ./llama-1b ./out --expert-init noise,noise_std=0.02
  python -m fusion_upcycle merge    ./moe --model math=./math-1b --model code=./code-1b
  python -m fusion_upcycle expand   ./llama-8x1b ./llama-16x1b --router-extension split --demo
  python -m fusion_upcycle verify   ./llama-8x1b
  python -m fusion_upcycle analyze  ./llama-8x1b --demo

Inside FusionBench: fusion_bench method=mixtral_moe_upscaling modelpool=... (see the README).
"""

INSPECT = """\
What a dense model is and would become: class, sizes, total and active parameters, bytes, files,
whether the result computes the same function; and what it costs per token and to train, next to the
dense model, a MoE from scratch and a dense model of equal active size. Only headers are read.

With --recipe and no source, the published dense model is taken from its config: no weights needed.
With both, the recipe's options are planned for your source; further options replace the recipe's.
"""

INSPECT_EXAMPLES = """\
examples:
  python -m fusion_upcycle inspect --recipe qwen2_57b_a14b
  python -m fusion_upcycle inspect --recipe mixtral_8x7b --num-experts 16 --tokens 1T
  python -m fusion_upcycle inspect ./mistral-7b --recipe mixtral_8x7b
  python -m fusion_upcycle inspect ./llama-1b --num-experts 64 --experts-per-token 8 --granularity 8
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 0 done, 1 not proven, 2 wrong input."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except ProofError as error:
        sys.exit(_failed(error, 1))
    except UpcyclingError as error:
        sys.exit(_failed(error, 2))


def _failed(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusion_upcycle",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Command
    )

    upcycle = commands.add_parser("upcycle", help="dense folder -> Mixture-of-Experts folder")
    upcycle.add_argument("source", help="local folder or Hugging Face Hub id (safetensors)")
    upcycle.add_argument("output", help="folder to make; appears only when complete and proven")
    add_planning(upcycle)
    upcycle.add_argument(
        "--verify",
        default="auto",
        help="layers | logits | none | auto (default: logits below 2 GiB, else layers)",
    )
    upcycle.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    upcycle.add_argument("--max-shard-size", default="5GB", help="of the files (default: 5GB)")
    upcycle.add_argument("--quiet", action="store_true", help="no progress bars")
    upcycle.set_defaults(run=_upcycle)

    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint or recipe is and would become, and its cost",
        description=INSPECT,
        epilog=INSPECT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument(
        "source", nargs="?", help="local folder or Hugging Face Hub id (safetensors)"
    )
    add_planning(inspect)
    inspect.add_argument(
        "--tokens",
        default="100B",
        metavar="N",
        help="of continued training, as in 20B or 1.5T (default: 100B)",
    )
    inspect.add_argument(
        "--context-length",
        type=int,
        default=4096,
        metavar="T",
        help="tokens of a sequence, for the cost of attention (default: 4096)",
    )
    inspect.set_defaults(run=_inspect, usage=inspect)

    verify = commands.add_parser("verify", help="prove an output folder against its source")
    verify.add_argument("output", help="a folder made by upcycle or expand")
    verify.add_argument("--source", help="where the source is now (default: where it was)")
    verify.add_argument("--mode", default="auto", help="layers | logits | auto")
    verify.add_argument("--quiet", action="store_true", help="no progress bars")
    verify.set_defaults(run=_verify)

    add_merge(commands)
    add_importance(commands)
    add_expand(commands)
    add_analyze(commands)
    return parser


def _count(text: str) -> float:
    """`1.5T` as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text)
    if match is None or not float(match[1]):
        raise UpcyclingError(f"--tokens {text} must be a number above 0, as in 5000, 20B or 1.5T.")
    return float(match[1]) * 1000.0 ** " KMBT".index(match[2] or " ")


def _upcycle(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.upcycling.run import upcycle

    converted = upcycle(
        parsed.source,
        parsed.output,
        verify=parsed.verify,
        overwrite=parsed.overwrite,
        max_shard_size=parsed.max_shard_size,
        progress=not parsed.quiet,
        **planning_options(parsed),
    )
    counts, write = converted.record["parameters"], converted.costs["write"]
    print(f"{converted.proof}")
    print(
        f"{counts['dense'] / 1e9:.3g}B dense -> {counts['total'] / 1e9:.3g}B total, "
        f"{counts['active'] / 1e9:.3g}B active per token; {converted.record['bytes'] / 1e9:.3g} GB "
        f"written in {write['wall_seconds']:.1f} s"
    )
    print(f"Output: {converted.output}")


def _inspect(parsed: argparse.Namespace) -> None:
    if parsed.source is None and parsed.recipe is None:
        parsed.usage.error("name a SOURCE, a --recipe, or both")
    from fusion_upcycle.inspection.inspection import print_inspection
    from fusion_upcycle.upcycling.options import make_options

    print_inspection(
        parsed.source,
        make_options(**planning_options(parsed)),
        recipe=parsed.recipe,
        tokens=_count(parsed.tokens),
        context_length=parsed.context_length,
    )


def _verify(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.verify import verify

    print(verify(parsed.output, parsed.source, mode=parsed.mode, progress=not parsed.quiet))
