"""What a checkpoint is and what it would become, from its config and headers alone."""

from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.source import locate
from fusion_upcycle.checkpoint.writer import plan_shards
from fusion_upcycle.convert import plan_folder
from fusion_upcycle.options import UpcyclingOptions, dtype_name
from fusion_upcycle.upcycling import Upcycling


def print_inspection(source: str, options: UpcyclingOptions) -> None:
    """Print source and result side by side; nothing is written."""
    from rich.console import Console
    from rich.table import Table

    upcycling = plan_folder(locate(source), options)
    table = Table(title=f"{source} and what it would become")
    table.add_column("")
    table.add_column("source", justify="right")
    table.add_column("upcycled", justify="right")
    for row in inspection_rows(upcycling):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(_plan_in_words(upcycling))


def inspection_rows(upcycling: Upcycling) -> list[tuple[str, str, str]]:
    """Label, source, result."""
    before, after, counts = upcycling.source_config, upcycling.config, upcycling.parameters
    source_bytes = sum(spec.nbytes for spec in upcycling.source.specs.values())
    source_dtypes = sorted({dtype_name(spec.dtype) for spec in upcycling.source.specs.values()})
    return [
        ("class", class_name(before), class_name(after)),
        ("layers", f"{before.num_hidden_layers}", f"{after.num_hidden_layers}"),
        ("hidden size", f"{before.hidden_size}", f"{after.hidden_size}"),
        ("FFN size", f"{before.intermediate_size}", f"{after.intermediate_size} per expert"),
        ("experts per layer", "1", f"{upcycling.options.num_experts}"),
        ("experts per token", "1", f"{upcycling.options.experts_per_token}"),
        ("parameters, total", f"{counts['dense']:,}", f"{counts['total']:,}"),
        ("parameters, active", f"{counts['dense']:,}", f"{counts['active']:,}"),
        (
            "dtype",
            ", ".join(source_dtypes),
            dtype_name(upcycling.dtype),
        ),
        ("tensors", f"{len(upcycling.source.specs):,}", f"{len(upcycling.specs):,}"),
        ("bytes", f"{source_bytes:,}", f"{upcycling.total_bytes:,}"),
        ("files of 5 GB", "", f"{len(plan_shards(upcycling.specs, '5GB'))}"),
    ]


def _plan_in_words(upcycling: Upcycling) -> str:
    described = upcycling.options.to_json()
    claim = (
        "the dense function at step 0 (exact, up to rounding)"
        if upcycling.claims_exact
        else "near the dense function (the initialiser changes weights)"
    )
    return (
        f"Plan: in each of {len(upcycling.plan.source_experts)} layers the FFN becomes "
        f"{upcycling.options.num_experts} experts, expert_init {described['expert_init']}, "
        f"router_init {described['router_init']}, seed {described['seed']}. It computes {claim}."
    )
