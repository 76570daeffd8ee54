"""How far a case is outside of what was measured, in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion_upcycle.inspection import scaling_law
from fusion_upcycle.inspection.measured import SAME, Row
from fusion_upcycle.inspection.numbers import short_count

if TYPE_CHECKING:
    from fusion_upcycle.inspection.advice import Case


def outside_studies(case: "Case", rows: Sequence[Row]) -> tuple[str, ...]:
    """In what the case is outside of the rows of one setting."""
    row = rows[0]
    found = []
    if (case.num_experts, case.experts_per_token) != (row.num_experts, row.experts_per_token):
        found.append(
            f"{case.num_experts} experts top-{case.experts_per_token} not measured, "
            f"{row.num_experts} top-{row.experts_per_token} shown"
        )
    for name, value, known, unit in (
        ("parameters", case.parameters, [row.parameters for row in rows], short_count),
        (
            "tokens per parameter",
            case.source_tokens / case.parameters,
            [row.tokens_per_parameter for row in rows],
            "{:g}".format,
        ),
        (
            "budget",
            case.budget_tokens / case.source_tokens,
            [row.share for row in rows],
            "{:.0%}".format,
        ),
    ):
        low, high = min(known), max(known)
        if value > high * SAME:
            found.append(f"{name} {_times(value / high)} x the largest measured ({unit(high)})")
        elif value * SAME < low:
            found.append(f"{name} 1/{_times(low / value)} of the smallest measured ({unit(low)})")
    return tuple(found)


def outside_law(case: "Case") -> tuple[str, ...]:
    """In what the case is outside of the models and data that the scaling law was fitted to."""
    law = scaling_law
    found = []
    if (case.num_experts, case.experts_per_token) != (law.NUM_EXPERTS, law.EXPERTS_PER_TOKEN):
        found.append(f"it is of {law.NUM_EXPERTS} experts top-{law.EXPERTS_PER_TOKEN} only")
    if case.parameters > law.LARGEST_MODEL * SAME:
        times = _times(case.parameters / law.LARGEST_MODEL)
        found.append(f"parameters {times} x its largest dense model (1B)")
    if case.parameters < law.LARGEST_MODEL / 10:
        found.append("its smallest models are not known to us")
    tokens = case.source_tokens + case.budget_tokens / case.cost_ratio
    if tokens > law.MOST_TOKENS:
        found.append(f"tokens {_times(tokens / law.MOST_TOKENS)} x its data set (368B)")
    return tuple(found)


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f}"
