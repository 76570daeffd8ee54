"""`python -m fusion_upcycle`: upcycle, merge, expand, train, verify without FusionBench."""

import argparse
import os
import sys
from collections.abc import Sequence

from fusion_upcycle.cli.addition_flags import add_add_expert
from fusion_upcycle.cli.analysis_flags import add_analyze
from fusion_upcycle.cli.benchmark_flags import add_benchmark, takes_overrides
from fusion_upcycle.cli.expansion_flags import add_expand, add_importance
from fusion_upcycle.cli.merge_flags import add_merge
from fusion_upcycle.cli.option_flags import Command, add_base, add_making
from fusion_upcycle.cli.planning_flags import add_planning, planning_options
from fusion_upcycle.cli.report_flags import add_report
from fusion_upcycle.cli.spelling import flags_of
from fusion_upcycle.cli.train_flags import add_export, add_train
from fusion_upcycle.errors import ProofError, UpcyclingError, spelled, stopped_by_signals
from fusion_upcycle.inspection.numbers import read_count

DESCRIPTION = """\
Turn trained language models into sparse Mixture-of-Experts (MoE) models, from folder to folder, and
prove what came out. COMMAND --help explains a command, with examples.
"""

EXAMPLES = """\
examples: python -m fusion_upcycle COMMAND --help

Task pools are FusionBench's: fusion_bench method=dummy taskpool=...
(docs/fusionbench.md).
"""

UPCYCLE = """\
Copy the FFN of each layer of a dense model into N experts behind a router: until it is trained
further, the result computes the function of its source (with other initialisers than copy and
permute nearly, and the proof says how nearly).

For training on, use --expert-init noise or drop: experts that are alike learn alike.
"""

UPCYCLE_EXAMPLES = """\
examples:
  python -m fusion_upcycle upcycle ./llama-1b ./llama-8x1b --num-experts 8 --experts-per-token 2
  python -m fusion_upcycle upcycle ./llama-1b ./out --expert-init noise,noise_std=0.02
  python -m fusion_upcycle upcycle ./mistral-7b ./mixtral --recipe mixtral_8x7b
  python -m fusion_upcycle upcycle ./lora-of-llama-1b ./llama-8x1b --base ./llama-1b
"""

VERIFY = """\
Prove a folder again, as when it was made: all files by their digests, tensors bit by bit against
the source, names and config against transformers, then the function on sample tokens. Exit status 1
if it does not hold.

A merged folder is proven when it is made; later, --quick checks that it has not changed since.
"""

VERIFY_EXAMPLES = """\
examples:
  python -m fusion_upcycle verify ./llama-8x1b
  python -m fusion_upcycle verify ./downloaded --quick
  python -m fusion_upcycle verify ./llama-8x1b --source /new/place/llama-1b --mode layers
"""

INSPECT = """\
What a dense model is and would become: class, sizes, total and active parameters, bytes, files,
whether the result computes the same function; and what it costs per token and to train, next to the
dense model, an MoE from scratch and a dense model of equal active size. Only headers are read.

With --source-tokens and --budget-tokens: whether to upcycle, to train the dense model on, or to
start from nothing, and with which settings; by our studies and a published scaling law, with how
far your case is outside of both (docs/guide.md).

With --gpus and --memory: what training takes of each GPU's memory, with ddp, fsdp and
expert_parallel, and from how many GPUs on it fits. SOURCE may be an MoE then, and config.json is
enough of it.

With --recipe and no source, the published dense model is taken from its config: no weights needed.
With both, the recipe's options are planned for your source; further options replace the recipe's.
"""

_OF_MEMORY = ("gpus", "memory", "context_length", "micro_batch_size")

INSPECT_EXAMPLES = """\
examples:
  python -m fusion_upcycle inspect --recipe qwen2_57b_a14b
  python -m fusion_upcycle inspect --recipe mixtral_8x7b --num-experts 16 --tokens 1T
  python -m fusion_upcycle inspect ./mistral-7b --recipe mixtral_8x7b
  python -m fusion_upcycle inspect ./llama-1b --num-experts 64 --experts-per-token 8 --granularity 8
  python -m fusion_upcycle inspect ./llama-1b --source-tokens 2T --budget-tokens 100B
  python -m fusion_upcycle inspect --recipe mixtral_8x7b --gpus 64 --memory 80GB
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exit status 0 done, 1 not proven, 2 wrong input, 130 and 143 ended by SIGINT and SIGTERM.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = takes_overrides(given) or _parser().parse_args(given)
    if getattr(parsed, "command", None) not in (None, "train"):
        let_threads_sleep()
    try:
        with spelled(flags_of(getattr(parsed, "command", None))), stopped_by_signals():
            parsed.run(parsed)
    except ProofError as error:
        sys.exit(_failed(error, 1))
    except UpcyclingError as error:
        sys.exit(_failed(error, 2))


def let_threads_sleep() -> None:
    """Ask OpenMP, before torch is loaded, that threads without work sleep.

    They spin otherwise, which is good for training and takes CPU seconds from all others while a
    conversion reads, hashes and writes: 8.5 instead of 11.0 of a conversion of 1.4 GB.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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

    inspect = commands.add_parser(
        "inspect",
        help="what a dense model or recipe is and would become, and its cost",
        description=INSPECT,
        epilog=INSPECT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument(
        "source", nargs="?", help="local folder or Hugging Face Hub id (safetensors)"
    )
    add_base(inspect)
    add_planning(inspect)
    inspect.add_argument(
        "--tokens",
        metavar="N",
        help="of continued training, as in 20B or 1.5T (default: --budget-tokens, else 100B)",
    )
    inspect.add_argument(
        "--context-length",
        type=int,
        default=4096,
        metavar="T",
        help="tokens of a sequence, for the cost of attention (default: 4096)",
    )
    inspect.add_argument(
        "--source-tokens",
        metavar="N",
        help="that the source was trained on; with --budget-tokens, whether upcycling pays is said",
    )
    inspect.add_argument(
        "--budget-tokens",
        metavar="N",
        help="what you can spend, in tokens of training the dense source on; an MoE that costs "
        "more per token gets fewer",
    )
    inspect.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --memory, what training takes of each of so many GPUs is said instead",
    )
    inspect.add_argument("--memory", metavar="SIZE", help="of each GPU, as in 80GB")
    inspect.add_argument(
        "--micro-batch-size",
        type=int,
        default=1,
        metavar="B",
        help="sequences of a forward pass on each GPU, with --gpus (default: 1)",
    )
    inspect.set_defaults(run=_inspect, usage=inspect)

    upcycle = commands.add_parser(
        "upcycle",
        help="dense model -> MoE folder that computes the same function",
        description=UPCYCLE,
        epilog=UPCYCLE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    upcycle.add_argument("source", help="local folder or Hugging Face Hub id (safetensors)")
    upcycle.add_argument("output", help="folder to make; appears only when complete and proven")
    add_base(upcycle)
    add_planning(upcycle)
    add_making(upcycle)
    upcycle.set_defaults(run=_upcycle)

    add_merge(commands)
    add_add_expert(commands)
    add_importance(commands)
    add_expand(commands)
    add_train(commands)
    add_export(commands)

    verify = commands.add_parser(
        "verify",
        help="prove an output folder again, against its source",
        description=VERIFY,
        epilog=VERIFY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("output", help="a folder of ours")
    verify.add_argument(
        "--quick",
        action="store_true",
        help="only look whether all files are as they were written: needs no source, and takes any "
        "folder of ours, merged and trained ones too",
    )
    verify.add_argument("--source", help="where the source is now (default: where it was)")
    add_base(verify)
    verify.add_argument(
        "--mode",
        default="auto",
        metavar="HOW",
        help="layers streams both models, logits loads them; auto is layers (default: auto)",
    )
    verify.add_argument("--quiet", action="store_true", help="no progress bars")
    verify.set_defaults(run=_verify)

    add_analyze(commands)
    add_benchmark(commands)
    add_report(commands)
    return parser


def _upcycle(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.upcycling.run import upcycle

    converted = upcycle(
        parsed.source,
        parsed.output,
        base=parsed.base,
        verify=parsed.verify,
        overwrite=parsed.overwrite,
        max_shard_size=parsed.max_shard_size,
        push_to_hub=parsed.push_to_hub,
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
    print(*converted.notes, f"Output: {converted.output}", sep="\n")


def _inspect(parsed: argparse.Namespace) -> None:
    if parsed.source is None and parsed.recipe is None:
        parsed.usage.error("name a SOURCE, a --recipe, or both")
    from fusion_upcycle.inspection.gpus import print_memory
    from fusion_upcycle.inspection.inspection import print_inspection
    from fusion_upcycle.upcycling.options import make_options

    if parsed.gpus is not None or parsed.memory is not None:
        print_memory(
            parsed.source,
            make_options(**planning_options(parsed)),
            **{name: getattr(parsed, name) for name in ("base", "recipe", *_OF_MEMORY)},
        )
        return
    given = {}
    for name in ("tokens", "source_tokens", "budget_tokens"):
        text = getattr(parsed, name)
        given[name] = text and read_count(text, f"--{name.replace('_', '-')}")
    print_inspection(
        parsed.source,
        make_options(**planning_options(parsed)),
        base=parsed.base,
        recipe=parsed.recipe,
        context_length=parsed.context_length,
        **given | {"tokens": given["tokens"] or given["budget_tokens"] or 100e9},
    )


def _verify(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.verify import verify, verify_files

    if parsed.quick:
        count = verify_files(parsed.output, progress=not parsed.quiet)
        if count == 0:
            raise UpcyclingError(
                f"{parsed.output} was made by an earlier version, which took no digests of its "
                "files: verify it against its source, without --quick."
            )
        print(f"{count} files are as they were written (SHA-256).")
        return
    print(
        verify(
            parsed.output,
            parsed.source,
            base=parsed.base,
            mode=parsed.mode,
            progress=not parsed.quiet,
        )
    )
