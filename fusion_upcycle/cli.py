"""`python -m fusion_upcycle`: upcycle, inspect and verify folders without FusionBench."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from fusion_upcycle.errors import ProofError, UpcyclingError

DESCRIPTION = """\
Turn a dense language model into a sparse Mixture-of-Experts model.

  inspect   what a checkpoint is and what it would become; writes nothing
  upcycle   dense folder or Hub id -> Mixture-of-Experts folder, proven to be the same function
  verify    prove an output folder again, against its source
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle inspect  ./llama-1b --num-experts 8
  python -m fusion_upcycle upcycle  ./llama-1b ./llama-8x1b --num-experts 8 --experts-per-token 2
  python -m fusion_upcycle upcycle  ./llama-1b ./out --expert-init noise,noise_std=0.02
  python -m fusion_upcycle verify   ./llama-8x1b

Inside FusionBench: fusion_bench method=mixtral_moe_upscaling modelpool=... (see the README).
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    upcycle = commands.add_parser("upcycle", help="dense folder -> Mixture-of-Experts folder")
    upcycle.add_argument("source", help="local folder or Hugging Face Hub id (safetensors)")
    upcycle.add_argument("output", help="folder to make; appears only when complete and proven")
    _add_planning(upcycle)
    upcycle.add_argument(
        "--verify",
        default="auto",
        help="layers | logits | none | auto (default: logits below 2 GiB, else layers)",
    )
    upcycle.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    upcycle.add_argument("--max-shard-size", default="5GB", help="of the files (default: 5GB)")
    upcycle.add_argument("--quiet", action="store_true", help="no progress bars")
    upcycle.set_defaults(run=_upcycle)

    inspect = commands.add_parser("inspect", help="what a checkpoint is and would become")
    inspect.add_argument("source", help="local folder or Hugging Face Hub id (safetensors)")
    _add_planning(inspect)
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="prove an output folder against its source")
    verify.add_argument("output", help="a folder made by upcycle")
    verify.add_argument("--source", help="where the source is now (default: where it was)")
    verify.add_argument("--mode", default="auto", help="layers | logits | auto")
    verify.add_argument("--quiet", action="store_true", help="no progress bars")
    verify.set_defaults(run=_verify)
    return parser


def _add_planning(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--target",
        default="auto",
        help="MoE family: mixtral | qwen2_moe | qwen3_moe | flex_olmo | auto (default: by source)",
    )
    add("--num-experts", type=int, default=4, metavar="N", help="per layer (default: 4)")
    add("--experts-per-token", type=int, default=2, metavar="K", help="top-k (default: 2)")
    add(
        "--expert-init",
        default="copy",
        metavar="NAME[,OPTION=VALUE...]",
        help="copy | noise,noise_std=0.01 | drop,drop_ratio=0.5,paired=true | permute",
    )
    add(
        "--router-init",
        default="normal",
        metavar="NAME[,OPTION=VALUE]",
        help="normal,std=0.02 | zeros",
    )
    add(
        "--shared-expert",
        default="auto",
        help="copy | zero | none, where the family has one (default: copy there)",
    )
    add("--dtype", help="float32 | bfloat16 | float16 | float64 (default: the source's)")
    add("--seed", type=int, default=0, help="of every random draw (default: 0)")
    add(
        "--ignore-config-fields",
        type=lambda text: text.split(","),
        default=[],
        metavar="FIELD[,FIELD...]",
        help="unknown fields of the source's config.json that you know to be without effect",
    )


def _options(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "target": parsed.target,
        "num_experts": parsed.num_experts,
        "experts_per_token": parsed.experts_per_token,
        "shared_expert": parsed.shared_expert,
        "expert_init": _initialiser(parsed.expert_init),
        "router_init": _initialiser(parsed.router_init),
        "dtype": parsed.dtype,
        "seed": parsed.seed,
        "ignore_config_fields": parsed.ignore_config_fields,
    }


def _initialiser(text: str) -> dict[str, Any]:
    """`noise,noise_std=0.02` as `{"name": "noise", "noise_std": 0.02}`."""
    name, *words = text.split(",")
    spec: dict[str, Any] = {"name": name}
    for word in words:
        option, equals, value = word.partition("=")
        try:
            spec[option] = json.loads(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UpcyclingError(f"{word!r} is not OPTION=VALUE with a number, true or false.")
    return spec


def _upcycle(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.convert import upcycle

    converted = upcycle(
        parsed.source,
        parsed.output,
        verify=parsed.verify,
        overwrite=parsed.overwrite,
        max_shard_size=parsed.max_shard_size,
        progress=not parsed.quiet,
        **_options(parsed),
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
    from fusion_upcycle.inspection import print_inspection
    from fusion_upcycle.options import make_options

    print_inspection(parsed.source, make_options(**_options(parsed)))


def _verify(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.convert import verify

    print(verify(parsed.output, parsed.source, mode=parsed.mode, progress=not parsed.quiet))
