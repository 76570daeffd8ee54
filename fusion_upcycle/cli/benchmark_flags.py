"""The command `benchmark`, whose arguments are Hydra's; light, so that `--help` is quick."""

import argparse
from collections.abc import Sequence

from fusion_upcycle.cli.option_flags import Command

DESCRIPTION = """\
Run many methods on one model pool and task pools, and write the comparison: upcycling, MoE merging,
growing and training of ours beside any method of FusionBench, the base model and each fine-tune.

Each run is one fusion_bench run in a folder of its own. What is complete is not repeated: after a
failure, an interruption or a change, the same command makes what is missing. An experiment is a
YAML file; docs/benchmark.md explains its keys. All arguments are Hydra's overrides, as in
fusion_bench; jobs=N runs N at once, hydra/launcher=NAME hands runs to a cluster.
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle benchmark experiment=three_domains jobs=2
  python -m fusion_upcycle benchmark experiment=./mine.yaml output=./results 'seeds=[0,1,2]'
  python -m fusion_upcycle benchmark experiment=three_domains '~methods.dare' \\
      methods.ties_merging.trials.threshold=[20,80] equal_trials=false
  python -m fusion_upcycle benchmark experiment=./mine.yaml hydra/launcher=submitit_slurm \\
      hydra.launcher.gpus_per_node=1

exit status: 0 all runs complete, 1 some failed (the others are done, and in the report), 2 refused
before the first run.
"""


def add_benchmark(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command."""
    benchmark = commands.add_parser(
        "benchmark",
        help="many methods on one model pool and task pools: runs and report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="experiment=NAME or FILE.yaml, and more"
    )


def takes_overrides(arguments: Sequence[str]) -> argparse.Namespace | None:
    """The command's own parsing: everything is Hydra's, flags too; None for other commands."""
    if arguments[:1] != ["benchmark"] or {"-h", "--help"} & {*arguments}:
        return None
    return argparse.Namespace(run=_benchmark, overrides=arguments[1:])


def _benchmark(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.benchmark.application import main

    main(parsed.overrides)
