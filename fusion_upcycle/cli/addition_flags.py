"""The command `add-expert`; light, so that `--help` is quick."""

import argparse

from fusion_upcycle.cli.option_flags import Command, add_base, add_making

DESCRIPTION = """\
Add one expert to a model that `merge` made with --statistics: the FFNs of another fine-tune of the
same base. Only the new model's texts are needed; old experts and all that is shared stay bit for
bit, and the router is made anew from what the merged model keeps and the new texts.

With --shared base the result is the merge of all models at once. With --shared average all that is
shared stays the mean over the models that were merged first.
"""

EXAMPLES = """\
examples:
  python -m fusion_upcycle merge ./moe --model math=./math-1b --model code=./code-1b \\
      --base ./llama-1b --shared base --router-init prototype --statistics \\
      --calibration math=./math.jsonl --calibration code=./code.txt
  python -m fusion_upcycle add-expert ./moe ./law-1b ./moe-3 --data ./law.jsonl
"""


def add_add_expert(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add the command."""
    command = commands.add_parser(
        "add-expert",
        help="one more fine-tune for a merged MoE, from its own texts alone",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", help="folder of a model merged with --statistics")
    command.add_argument(
        "fine_tune", metavar="fine-tune", help="folder or Hub id (safetensors) of the new model"
    )
    command.add_argument("output", help="folder to make; appears only when complete and proven")
    command.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="the new model's own text: .txt, .jsonl or .parquet, or a folder of these",
    )
    command.add_argument(
        "--name", help="of the new model among the experts (default: that of its folder)"
    )
    add_base(command)
    add_making(command)
    command.set_defaults(run=_add_expert)


def _add_expert(parsed: argparse.Namespace) -> None:
    from fusion_upcycle.addition.run import add_expert
    from fusion_upcycle.files import specification

    data = [specification(text) for text in parsed.data]
    made = add_expert(
        parsed.model,
        parsed.fine_tune,
        parsed.output,
        data=data[0] if len(data) == 1 else data,
        name=parsed.name,
        base=parsed.base,
        verify=parsed.verify,
        overwrite=parsed.overwrite,
        max_shard_size=parsed.max_shard_size,
        push_to_hub=parsed.push_to_hub,
        progress=not parsed.quiet,
    )
    said = made.record["shared_weights"]
    print(made.proof, said, *made.notes, f"Output: {made.output}", sep="\n")
