"""The command `train`; light, so that `--help` is quick."""

import argparse
from pathlib import Path
from typing import Any

from fusion_upcycle.cli.merge_flags import data_pairs
from fusion_upcycle.cli.option_flags import Command, given_options

DESCRIPTION = """\
Train a model on, dense or Mixture-of-Experts, on what its class is made for: decoders on the next
token, BERT and the like on masked tokens, T5 and the like on targets of inputs, image classifiers
on labelled images, CLIP's vision towers against the frozen texts of their CLIP model.

A run that was killed goes on with the same command.
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle train ./llama-8x1b ./trained --data web=./web.jsonl --tokens 1000000000
  python -m fusion_upcycle train ./bert-moe ./trained --data web=./texts --tokens 100000000 \\
      --context-length 512
  python -m fusion_upcycle train ./t5-moe ./trained --data sums=./sums.jsonl --examples 200000
  python -m fusion_upcycle train ./vit-moe ./trained --data pets=./pets --examples 100000 \\
      --validation pets=./held-out --validate-every 200
  python -m fusion_upcycle train ./tower-moe ./trained --clip-model ./clip --data pets=./pets \\
      --examples 100000
"""


def add_train(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command, its inputs, and one flag for each field of `TrainingOptions`."""
    train = commands.add_parser(
        "train",
        help="train a model on, dense or MoE: texts, pairs or images",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("model", help="local folder or Hugging Face Hub id")
    train.add_argument("output", help="folder to make; appears only when complete")
    data = train.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="texts: a .txt (one document), .jsonl or .parquet (column `text`) file, or a folder "
        "of such files; pairs: a .jsonl or .parquet file with `input` and `target`; images: a "
        "folder with one for each class, or a .parquet file; once for each source",
    )
    data.add_argument("--demo", action="store_true", help="shipped text, unseen by the demo base")
    train.add_argument(
        "--validation",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="likewise, held out",
    )
    train.add_argument(
        "--processor",
        metavar="MODEL",
        help="whose tokenizer or image processor is taken (default: the model's own)",
    )
    train.add_argument(
        "--clip-model",
        metavar="MODEL",
        help="of a vision tower: the whole CLIP model whose texts judge",
    )
    train.add_options("fusion_upcycle.training.options:TrainingOptions")
    train.add_argument(
        "--optimizer-state",
        metavar="FOLDER",
        help="of an earlier run of this model or of its dense source, whose AdamW moments to begin "
        "with",
    )
    train.add_argument(
        "--work-folder",
        metavar="FOLDER",
        help="checkpoints, logs and packed data (default: OUTPUT.training)",
    )
    train.add_argument("--start-over", action="store_true", help="where there are checkpoints")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(run=_train)


def _train(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.live.loading import load_by_config, load_processor
    from fusion_upcycle.report.record import Measured
    from fusion_upcycle.training.objectives.clip import ClipTexts
    from fusion_upcycle.training.options import make_training_options
    from fusion_upcycle.training.processes import is_first
    from fusion_upcycle.training.run import Origin, Places, train, upcycling_of
    from fusion_upcycle.training.sharding import load_part
    from fusion_upcycle.training.summary import in_one_line

    options = make_training_options(**given_options(parsed))
    output = Path(parsed.output).expanduser()
    work = parsed.work_folder or output.with_name(f"{output.name}.training")
    work = Path(work).expanduser()
    places = Places(work, work / "logs", output, parsed.overwrite, not parsed.start_over)
    with Measured() as loading:
        if options.strategy == "fsdp":
            part = load_part(parsed.model, options)
            model = part.model
        else:
            part, model = None, load_by_config(parsed.model)
    trained = train(
        part or model,
        load_processor(parsed.processor or parsed.model, model),
        options,
        data=_data(parsed),
        places=places,
        origin=Origin(parsed.model, upcycling_of(parsed.model), loading.wall_seconds),
        validation=data_pairs("--validation", parsed.validation) or None,
        optimizer_state=parsed.optimizer_state and Path(parsed.optimizer_state).expanduser(),
        clip=parsed.clip_model and ClipTexts(parsed.clip_model),
        progress=not parsed.quiet,
    )
    if is_first():
        _say(trained.record, options.unit)
        print(in_one_line(trained.record, output))


def add_export(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command."""
    export = commands.add_parser(
        "export",
        help="make a model folder of a checkpoint of a training",
        description="Write a checkpoint of `train` as a Hugging Face folder, whatever number of "
        "processes has saved it; in one process, one tensor in memory at a time.",
        epilog="example:\n  python -m fusion_upcycle export "
        "./trained.training/checkpoints/step-000001000 ./at-1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("checkpoint", help="a folder step-* in checkpoints of a work folder")
    export.add_argument("output", help="folder to make; appears only when complete")
    export.add_argument("--save-moments", action="store_true", help="AdamW's moments, too")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    export.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.training.export import export

    checkpoint, output = (Path(p).expanduser() for p in (parsed.checkpoint, parsed.output))
    record = export(checkpoint, output, moments=parsed.save_moments, overwrite=parsed.overwrite)
    print(f"{output}: {record['class']} after step {record['steps']:,}")


def _data(parsed: argparse.Namespace) -> dict[str, Any]:
    from fusion_upcycle.demo.texts import demo_documents

    if parsed.demo:
        return demo_documents("continued")
    return data_pairs("--data", parsed.data)


def _say(record: dict[str, Any], unit: str) -> None:
    """Held-out metrics and speed."""
    steps = list(record["validation"])
    for name, metrics in record["validation"][steps[-1]].items() if steps else ():
        shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        print(f"  {name}: {shown}")
    cost, load = record["cost"], record["source"]["load_seconds"]
    print(f"{cost[f'{unit}_per_cpu_second']:.4g} {unit} per CPU second")
    mfu = f", MFU {cost['mfu']:.1%}" if "mfu" in cost else ""
    rate, each = (cost[f"{unit}_per_second{of}"] for of in ("", "_per_device"))
    print(
        f"{rate:.4g} {unit}/s, {each:.4g} of each device{mfu}; largest memory of a process "
        f"{cost['peak_memory_bytes'] / 1e9:.3g} GB; "
        f"load {load:.3g} s, save {cost['save_seconds']:.3g} s, export "
        f"{cost.get('export_seconds', 0.0):.3g} s"
    )
