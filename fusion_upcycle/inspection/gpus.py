"""How much of a GPU's memory training takes, in a table, and from how many GPUs on it fits."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.architectures import known_family
from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.located import locate_model
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checkpoint.writer import parse_size
from fusion_upcycle.checks import require_whole
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.memory import NODE, USABLE, Memory, Planner, Way
from fusion_upcycle.inspection.numbers import short_count
from fusion_upcycle.inspection.recipes import plan_recipe
from fusion_upcycle.report.tables import Table
from fusion_upcycle.upcycling.run import plan_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.upcycling.options import UpcyclingOptions

_GB = 10**9
#: What the table is, and what it is not.
NOTE = (
    "Calculated from the config, for precision=bf16-mixed with all parameters trained: weights, "
    "gradients and AdamW's moments in float32, on the GPU that has most. EP n is strategy=fsdp "
    "expert_parallel=n. Transient: layers that FSDP2 gathers and gradients that it sends; of ddp, "
    "bfloat16 copies of the weights, and buckets. Activations: of one micro-batch, with attention "
    "that keeps no scores and experts that are evenly loaded. It fits where the total is at most "
    f"{USABLE:.0%} of the memory. How near this is to what was measured: docs/scale.md."
)


def print_memory(
    source: str | None,
    options: "UpcyclingOptions",
    *,
    base: str | None = None,
    recipe: str | None,
    gpus: int | None,
    memory: str | None,
    context_length: int,
    micro_batch_size: int,
) -> None:
    """Print what training takes of each GPU's memory; no weights are read.

    Args:
        source: folder of an MoE, of which `config.json` is enough, or a dense model that `options`
            are to make one of; None is the published dense model of `recipe`.
        options, base, recipe: as `fusion_upcycle.inspection.inspection.print_inspection` has them.
        gpus: how many there are.
        memory: of each, as in `80GB`.
        context_length: tokens of a sequence.
        micro_batch_size: sequences of a forward pass on each.

    Raises:
        UpcyclingError: `gpus` or `memory` without the other, numbers below 1, or what
            `memory_table` refuses.
    """
    from rich.console import Console

    if gpus is None or memory is None:
        missing = "--gpus 64" if gpus is None else "--memory 80GB"
        raise UpcyclingError(
            f"Memory is planned for a number of GPUs and the memory of each: add {missing}."
        )
    numbers = {"gpus": gpus, "context_length": context_length, "micro_batch_size": micro_batch_size}
    for name, value in numbers.items():
        require_whole(name, value, at_least=1)
    table, lines = memory_table(
        _config(source, options, base, recipe),
        gpus,
        parse_size(memory, "memory"),
        context_length=context_length,
        sequences=micro_batch_size,
    )
    console = Console()
    console.print(table.to_rich())
    for line in lines:
        console.print(line, highlight=False)


def _config(
    source: str | None, options: "UpcyclingOptions", base: str | None, recipe: str | None
) -> "PreTrainedConfig":
    """Of the MoE that is in a folder, or that a dense model would become."""
    if source is None:
        assert recipe is not None
        return plan_recipe(recipe, options).config
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file() and known_family(config := read_config(folder)):
        return config
    return plan_folder(locate_model(source, base), options).config


def memory_table(
    config: "PreTrainedConfig",
    gpus: int,
    gpu_bytes: int,
    *,
    context_length: int,
    sequences: int = 1,
) -> tuple[Table, list[str]]:
    """A column for each way to train; and in words, what of it fits.

    Args:
        config: of a decoder, with its class in `architectures`.
        gpus: how many there are, in nodes of 8.
        gpu_bytes: memory of each.
        context_length: tokens of a sequence.
        sequences: of a micro-batch, on each GPU.

    Raises:
        UpcyclingError: a model that is no decoder, or that cannot be planned.
    """
    name = class_name(config)
    if not name.endswith("ForCausalLM"):
        raise UpcyclingError(
            f"Memory is planned for decoders (...ForCausalLM), and this is a {name}. Leave --gpus "
            "and --memory out."
        )
    planner = Planner(config, sequences, context_length)
    ways, refused = planner.ways(gpus), []
    columns, fitting = [], {}
    for way in ways:
        try:
            found = planner.memory(gpus, way)
        except UpcyclingError as error:
            refused.append(str(error))
            columns.append(["-"] * 9)
        else:
            columns.append(_column(found))
            for again in (False, True):
                if found.fits(gpu_bytes, checkpointing=again):
                    fitting[way, again] = gpus
        for again in (False, True):
            smallest = planner.smallest(way, gpu_bytes, checkpointing=again)
            columns[-1].append("none" if smallest is None else f"{smallest}")
    title = (
        f"{name}, {short_count(planner.parameters)} parameters, on {gpus} GPUs of "
        f"{gpu_bytes / _GB:.4g} GB, micro-batches of {sequences} x {context_length} tokens"
    )
    rows = [[label, *row] for label, *row in zip(_ROWS, *columns, strict=True)]
    lines = [*refused, _advice(planner, gpus, gpu_bytes, fitting), NOTE]
    return Table(title, ["GB on each GPU", *map(_short, ways)], rows), lines


_ROWS = (
    "parameters",
    "weights",
    "gradients",
    "AdamW's moments",
    "transient",
    "activations",
    "activations, checkpointing",
    "total",
    "total, checkpointing",
    "fits from GPUs",
    "fits from, checkpointing",
)


def _short(way: Way) -> str:
    return way.strategy if way.expert_parallel == 1 else f"EP {way.expert_parallel}"


def _column(found: Memory) -> list[str]:
    sizes = (
        found.weights,
        found.weights,
        2 * found.weights,
        found.transient,
        found.activations,
        found.checkpointed,
        *(found.total(checkpointing=again) for again in (False, True)),
    )
    return [short_count(found.parameters), *(f"{size / _GB:.1f}" for size in sizes)]


def _advice(
    planner: Planner, gpus: int, gpu_bytes: int, fitting: Mapping[tuple[Way, bool], int]
) -> str:
    """The first way that fits; one that recomputes nothing, if one does, as that is the fastest."""
    if fitting:
        return f"It fits on {gpus} GPUs: {_in_words(*min(fitting, key=lambda found: found[1]))}."
    least = [
        (smallest, again, way)
        for way in planner.ways(NODE)
        for again in (False, True)
        if (smallest := planner.smallest(way, gpu_bytes, checkpointing=again))
    ]
    if not least:
        return (
            "It fits on no number of such GPUs: what each has of one layer and of one micro-batch "
            "is too much. Take shorter sequences (--context-length), or GPUs with more memory."
        )
    smallest, again, way = min(least, key=lambda found: found[:2])
    return (
        f"No way to train it fits on {gpus} GPUs; the smallest number is {smallest}: "
        f"{_in_words(way, again)}."
    )


def _in_words(way: Way, checkpointing: bool) -> str:
    return f"{way}{' activation_checkpointing=true' if checkpointing else ''}"
