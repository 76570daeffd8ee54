"""What a checkpoint or a published recipe is and would become, and what that costs."""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.located import locate_model
from fusion_upcycle.checkpoint.writer import plan_shards
from fusion_upcycle.checks import dtype_name
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.adapter import adapter_in_words
from fusion_upcycle.inspection.advice import Advice, Case, advise
from fusion_upcycle.inspection.advice_text import advice_lines, advice_table, measured_in_words
from fusion_upcycle.inspection.economics import economics, embedding_parameters
from fusion_upcycle.inspection.numbers import short_count
from fusion_upcycle.inspection.recipes import find_recipe, plan_recipe
from fusion_upcycle.report.tables import Table
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.upcycling.run import check_base, plan_folder

if TYPE_CHECKING:
    from fusion_upcycle.upcycling.upcycling import Upcycling


def print_inspection(
    source: str | None,
    options: UpcyclingOptions,
    *,
    base: str | None = None,
    recipe: str | None,
    tokens: float,
    context_length: int,
    source_tokens: float | None = None,
    budget_tokens: float | None = None,
) -> None:
    """Print source and result side by side, and what they cost; nothing is written.

    Args:
        source: folder or Hub id; None is the published dense model of `recipe`, without weights.
        options: what to make of it.
        base: of an adapter, if its own file is not to say it.
        recipe: name of the recipe that the options are from.
        tokens: of continued training.
        context_length: tokens of a sequence.
        source_tokens: that the source was trained on; with `budget_tokens`, advice is printed.
        budget_tokens: what can be spent, in tokens of training the dense source on.

    Raises:
        UpcyclingError: one of `source_tokens` and `budget_tokens` without the other.
    """
    from rich.console import Console

    if (source_tokens is None) != (budget_tokens is None):
        missing = "--source-tokens" if source_tokens is None else "--budget-tokens"
        raise UpcyclingError(
            f"Advice needs both --source-tokens and --budget-tokens: {missing} is missing. Give it "
            "(what the source was trained on, what you can spend), or leave both out."
        )
    if source is None:
        assert recipe is not None
        upcycling, name = plan_recipe(recipe, options), find_recipe(recipe).dense
    else:
        at = locate_model(source, base)
        check_base(at, base)
        upcycling, name = plan_folder(at, options), source
    console = Console()
    if source is not None and at.adapter is not None:
        console.print(adapter_in_words(at), highlight=False)
    console.print(inspection_table(upcycling, f"{name} and what it would become").to_rich())
    if recipe is not None:
        console.print(published_in_words(recipe), highlight=False)
    console.print(_plan_in_words(upcycling), highlight=False)
    console.print(economics_table(upcycling, tokens, context_length).to_rich())
    for note in notes(upcycling):
        console.print(note, highlight=False)
    if source_tokens is not None and budget_tokens is not None:
        advice = upcycling_advice(upcycling, source_tokens, budget_tokens, context_length)
        console.print(advice_table(advice).to_rich())
        for line in (*advice_lines(advice), measured_in_words()):
            console.print(line, highlight=False)


def upcycling_advice(
    upcycling: "Upcycling", source_tokens: float, budget_tokens: float, context_length: int
) -> Advice:
    """Advice on a planned upcycling; nothing is read.

    Args:
        upcycling: the plan.
        source_tokens: that the source was trained on.
        budget_tokens: what can be spent, in tokens of training the dense source on.
        context_length: tokens of a sequence, for the cost of attention.
    """
    costs = economics(upcycling, context_length)
    config = upcycling.config
    routing = moe_family(config).routing
    return advise(
        Case(
            parameters=upcycling.parameters["dense"] - embedding_parameters(upcycling)[1],
            source_tokens=source_tokens,
            budget_tokens=budget_tokens,
            cost_ratio=costs.upcycled.flops / costs.dense.flops,
            num_experts=upcycling.options.num_experts,
            experts_per_token=upcycling.options.experts_per_token,
            hidden_size=config.hidden_size,
            renormalised=routing.normalised == "always" or bool(config.norm_topk_prob),
        )
    )


def notes(upcycling: "Upcycling") -> list[str]:
    """What the numbers are and are not, and what is to be known of this model."""
    asked = upcycling.options
    untaught = asked.experts_per_token == 1 and asked.normalize_topk_prob
    return [*_NOTES, *([_UNTAUGHT] if untaught else [])]


def inspection_table(upcycling: "Upcycling", title: str) -> Table:
    """What the source is and what it would become: a row for each quantity."""
    before, after, counts = upcycling.source_config, upcycling.config, upcycling.parameters
    resolved, options = upcycling.resolved, upcycling.options
    source_bytes = sum(spec.nbytes for spec in upcycling.source.specs.values())
    source_dtypes = sorted({dtype_name(spec.dtype) for spec in upcycling.source.specs.values()})
    _, embeddings = embedding_parameters(upcycling)
    kept_dense = resolved.num_layers - len(resolved.moe_layers)
    rows = [
        ("class", class_name(before), class_name(after)),
        (
            "layers",
            f"{before.num_hidden_layers}",
            f"{len(resolved.moe_layers)}" + (f" + {kept_dense} dense" if kept_dense else ""),
        ),
        ("hidden size", f"{before.hidden_size}", f"{after.hidden_size}"),
        ("FFN size", f"{before.intermediate_size}", f"{resolved.expert_size} per expert"),
        ("shared expert's size", "", f"{resolved.shared_size or 'none'}"),
        ("experts per layer", "1", f"{options.num_experts}"),
        ("experts per token", "1", f"{options.experts_per_token}"),
        ("parameters, total", f"{counts['dense']:,}", f"{counts['total']:,}"),
        ("parameters, active", f"{counts['dense']:,}", f"{counts['active']:,}"),
        (
            "total, no embeddings",
            f"{counts['dense'] - embeddings:,}",
            f"{counts['total'] - embeddings:,}",
        ),
        (
            "active, no embeddings",
            f"{counts['dense'] - embeddings:,}",
            f"{counts['active'] - embeddings:,}",
        ),
        ("dtype", ", ".join(source_dtypes), dtype_name(upcycling.dtype)),
        ("tensors", f"{len(upcycling.source.specs):,}", f"{len(upcycling.specs):,}"),
        ("bytes", f"{source_bytes:,}", f"{upcycling.total_bytes:,}"),
        ("files of 5 GB", "", f"{len(plan_shards(upcycling.specs, '5GB'))}"),
    ]
    return Table(title, ["", "source", "upcycled"], rows)


def economics_table(upcycling: "Upcycling", tokens: float, context_length: int) -> Table:
    """Models down; parameters, bytes and FLOPs across."""
    costs = economics(upcycling, context_length)
    dense_training = costs.dense.training_flops(tokens)
    rows = []
    for label, cost in (
        ("dense", costs.dense),
        ("upcycled", costs.upcycled),
        ("fresh MoE", costs.upcycled),
        ("wider dense", costs.equal_active),
    ):
        training = cost.training_flops(tokens)
        counts = (
            short_count(cost.total),
            short_count(cost.active),
            f"{short_count(cost.bytes, 'G')}B",
        )
        flops = (f"{cost.flops:.2e}", f"{training:.2e}", f"{training / dense_training:.2f}")
        rows.append((label, *counts, *flops))
    title = f"training on {short_count(tokens)} tokens in sequences of {context_length}"
    headers = ["", "total", "active", "size", "FLOPs/token", "training", "x dense"]
    return Table(title, headers, rows)


def published_in_words(recipe: str) -> str:
    """What the recipe's source says of the model's size."""
    found = find_recipe(recipe)
    numbers = {"total": found.total, "active": found.active}
    said = ", ".join(f"{value} {name}" for name, value in numbers.items() if value is not None)
    counted = "" if found.with_embeddings else ", without embeddings"
    return f"Published: {said or 'no counts'}{counted if said else ''} ({found.source})."


#: What the table of costs is, and what it is not.
_NOTES = (
    "By arithmetic, nothing here is measured. FLOPs/token: forward, 2 x (active parameters without "
    "the embedding lookup) + attention scores. Training: 3 x that, for each token. Wider dense: as "
    "many parameters as the upcycled model has active ones.",
    "A fresh MoE costs the same per token but starts from nothing: trained from scratch it needs "
    "about 120 % of the dense model's whole pre-training compute to catch up with the upcycled one "
    "(Komatsuzaki et al., arXiv 2212.05055).",
)

_UNTAUGHT = (
    "With one expert per token and top-k weights divided by their sum, that weight is always 1: "
    "the language model's loss teaches the router nothing, only the balance loss moves it."
)


def _plan_in_words(upcycling: "Upcycling") -> str:
    described = upcycling.options.to_json()
    if upcycling.claims_exact:
        claim = "the dense function at step 0 (exact, up to rounding)"
    elif upcycling.options.preserves_function:
        claim = "near the dense function (these shards and this routing do not keep it)"
    else:
        claim = "near the dense function (the initialiser changes weights)"
    return (
        f"Plan: in each of {len(upcycling.plan.source_experts)} layers the FFN becomes "
        f"{upcycling.options.num_experts} experts, expert_init {described['expert_init']}, "
        f"router_init {described['router_init']}, seed {described['seed']}. It computes {claim}."
    )
