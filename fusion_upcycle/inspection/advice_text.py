"""Advice as a table and a few lines for a terminal."""

import math

from fusion_upcycle.inspection.advice import UPCYCLE, Advice, Choice, Crossing
from fusion_upcycle.inspection.measured import Interval, Row, read_measured
from fusion_upcycle.inspection.numbers import short_count
from fusion_upcycle.inspection.scaling_law import SOURCE
from fusion_upcycle.report.tables import Table

#: Size of router rows in models and recipes that do not say it by logits.
_USUAL_STD = 0.02


def advice_table(advice: Advice) -> Table:
    """The three choices down; tokens, and what is known of their loss, across."""
    case = advice.case
    rows = []
    for choice in advice.choices:
        name = choice.name
        if name == UPCYCLE:
            name = f"{UPCYCLE}, {case.num_experts} top-{case.experts_per_token}"
        rows.append((name, short_count(choice.tokens), *_cells(choice)))
    budget = short_count(case.budget_tokens)
    title = f"{budget} tokens more: loss minus the upcycled model's (+ is worse)"
    headers = ["at the same compute", "tokens", "studies, bits/byte", "law, nats/token"]
    return Table(title, headers, rows)


def advice_lines(advice: Advice) -> list[str]:
    """What the table rests on, what to set, and how far outside of it the case is."""
    case, settings = advice.case, advice.settings
    dense, _, scratch = advice.choices
    usual = settings.router_ratio * _USUAL_STD
    outside = advice.outside_studies or advice.outside_law
    each = advice.tokens_per_parameter
    lines = [
        f"Advice{', extrapolated' if outside else ''}: {advice.verdict}",
        f"Source: {short_count(case.source_tokens)} tokens for {short_count(case.parameters)} "
        f"parameters without embeddings, {each:{',.0f' if each >= 100 else '.3g'}} for each; the "
        f"budget is {_percent(advice.budget_share)} of its training compute.",
        f"Our studies ({_rows_in_words(advice.rows)}): upcycled "
        f"{_against(dense.measured)} the dense model, {_against(scratch.measured)} the MoE from "
        "scratch.",
        f"The law ({SOURCE}; intervals: its printed digits alone): upcycled "
        f"{_against(dense.law)} the dense model, {_against(scratch.law)} the MoE from scratch. It "
        f"passes the dense model {_at(advice.pays_from)}, and is passed by the MoE from scratch "
        f"{_at(advice.caught_at)}.",
        f"Learning rate: {settings.learning_rate_share:g} x the source's peak; try half of that "
        "too, and tune a dense baseline as much.",
        f"Router: --router-init normal,logit_std={settings.logit_std:g}, and leave out "
        f"router_learning_rate, which is then {settings.router_ratio:g} x the std of the rows: "
        f"{advice.router_learning_rate:.1e} for inputs of size 1. Rows of std {_USUAL_STD:g} take "
        f"{usual:.0e} at most.",
        f"Balance: balance_weight {settings.balance_weight:g}, as in the studies (not varied). "
        f"Schedule: wsd, warmup_share {settings.warmup_share:g}, decay_share "
        f"{settings.decay_share:g}, final_share {settings.final_share:g}.",
    ]
    if case.renormalised and case.experts_per_token == 1:
        lines.append(
            "Top-1 with renormalised weights gives the router no gradient of the language loss. In "
            "our studies it was ahead of top-2 up to +25 % all the same, and behind from +50 % on."
        )
    lines.append(_outside("our studies (bytes, tiny models)", advice.outside_studies))
    lines.append(_outside("the law", advice.outside_law))
    return lines


def _cells(choice: Choice) -> tuple[str, str]:
    if choice.name == UPCYCLE:
        return "0", "0"
    return _interval(choice.measured), _interval(choice.law)


def _interval(found: Interval) -> str:
    low, high = (f"{round(end, 3) + 0.0:+.3f}" for end in (found.low, found.high))
    return f"{low} or more" if math.isinf(found.high) else f"{low} to {high}"


def _against(other: Interval) -> str:
    """How the upcycled model stands, given another one's loss minus its own."""
    if other.low > 0:
        return "ahead of"
    return "behind" if other.high < 0 else "not told apart from"


def _at(found: Crossing) -> str:
    if found.low is None:
        return "at no budget"
    high = "never" if found.high is None else _percent(found.high)
    best = "beyond 1000 %" if found.share is None else f"at {_percent(found.share)}"
    return f"{best} of the source's compute ({_percent(found.low)} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _rows_in_words(rows: tuple[Row, ...]) -> str:
    named = ", ".join(
        f"{row.tokens_per_parameter:g} tokens/parameter at +{_percent(row.share)}" for row in rows
    )
    return f"nearest row{'s' if len(rows) > 1 else ''}: {named}"


def _outside(what: str, found: tuple[str, ...]) -> str:
    if not found:
        return f"Inside the range of {what}."
    return f"OUTSIDE the range of {what}: {'; '.join(found)}."


def measured_in_words() -> str:
    """Where the numbers of our studies are from."""
    measured = read_measured()
    return f"Our studies: {measured.setting}. Source: {measured.source}."
