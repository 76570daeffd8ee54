"""Train the dense model on, upcycle it, or train an MoE from scratch? What is known of the three.

Two sources, kept apart: our studies (`measured`) and the published scaling law (`scaling_law`). All
three choices get the same compute, the budget; the MoEs get fewer tokens for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection import scaling_law
from fusion_upcycle.inspection.measured import (
    Interval,
    Row,
    Settings,
    interval_of,
    nearest_rows,
    read_measured,
    rows_of_setting,
)
from fusion_upcycle.inspection.ranges import outside_law, outside_studies

DENSE, UPCYCLE, SCRATCH = "train the dense model on", "upcycle", "MoE from scratch"


@dataclass(frozen=True)
class Case:
    """What is to be decided.

    Attributes:
        parameters: of the dense source, without embeddings and output head.
        source_tokens: that the source was trained on.
        budget_tokens: what can be spent, in tokens of training the dense source on.
        cost_ratio: FLOPs per token of the MoE over the source's.
        num_experts, experts_per_token: of the MoE.
        hidden_size: D, of the router's input.
        renormalised: whether the weights of the chosen experts are divided by their sum.

    Raises:
        UpcyclingError: a number that is not above 0.
    """

    parameters: float
    source_tokens: float
    budget_tokens: float
    cost_ratio: float
    num_experts: int
    experts_per_token: int
    hidden_size: int
    renormalised: bool

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise UpcyclingError(f"{field.name}={value} must be a number above 0.")


@dataclass(frozen=True)
class Choice:
    """One of the three.

    Attributes:
        name: in words.
        tokens: that the budget buys.
        measured: its loss minus the upcycled model's, in bits per byte, by our studies.
        law: likewise in nats per token, by the scaling law.
    """

    name: str
    tokens: float
    measured: Interval
    law: Interval


@dataclass(frozen=True)
class Crossing:
    """A budget, as a share of the source's compute, from which on one model is ahead of another.

    Attributes:
        share: by the law; None where it is none up to 1000 %.
        low, high: what its digits leave open; None likewise.
    """

    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Advice:
    """What is known of a case.

    Attributes:
        case: what was asked.
        tokens_per_parameter: of the source.
        budget_share: of the source's training compute.
        choices: dense, upcycled, from scratch.
        rows: of our studies that were looked at; none is fitted.
        verdict: what both sources together come to, in words.
        pays_from: by the law, where the upcycled model passes the dense one.
        caught_at: by the law, where the MoE from scratch passes the upcycled one.
        settings: for continued training, by our studies.
        row_std: of the router's rows, for logits of `settings.logit_std` from inputs of size 1.
        router_learning_rate: the largest, for rows of that std.
        outside_studies, outside_law: in what the case is outside of what was measured, in words.
    """

    case: Case
    tokens_per_parameter: float
    budget_share: float
    choices: tuple[Choice, Choice, Choice]
    rows: tuple[Row, ...]
    verdict: str
    pays_from: Crossing
    caught_at: Crossing
    settings: Settings
    row_std: float
    router_learning_rate: float
    outside_studies: tuple[str, ...]
    outside_law: tuple[str, ...]


def advise(case: Case) -> Advice:
    """What our studies and the scaling law say of a case; nothing is read but `measured.json`."""
    measured = read_measured()
    per_parameter = case.source_tokens / case.parameters
    share = case.budget_tokens / case.source_tokens
    spread = max(row.spread or 0.0 for row in measured.rows)
    rows = rows_of_setting(measured.rows, case.num_experts, case.experts_per_token)
    near = nearest_rows(rows, per_parameter, share)
    fresh = nearest_rows(measured.from_scratch, per_parameter, share)
    dense, scratch = scaling_law.against_upcycled(
        case.parameters, case.source_tokens, share, case.cost_ratio
    )
    moe_tokens = case.budget_tokens / case.cost_ratio
    zero = Interval(0.0, 0.0)
    row_std = measured.settings.logit_std / math.sqrt(case.hidden_size)
    choices = (
        Choice(
            DENSE,
            case.budget_tokens,
            interval_of(near, share, spread, below=0.0).negated(),
            scaling_law.with_rounding(dense),
        ),
        Choice(UPCYCLE, moe_tokens, zero, zero),
        Choice(
            SCRATCH,
            moe_tokens,
            interval_of(fresh, share, spread, below=math.inf),
            scaling_law.with_rounding(scratch),
        ),
    )
    return Advice(
        case=case,
        tokens_per_parameter=per_parameter,
        budget_share=share,
        choices=choices,
        rows=tuple(near),
        verdict=_verdict(choices),
        pays_from=_crossing(case, 0, +1),
        caught_at=_crossing(case, 1, -1),
        settings=measured.settings,
        row_std=row_std,
        router_learning_rate=measured.settings.router_ratio * row_std,
        outside_studies=outside_studies(case, rows),
        outside_law=outside_law(case),
    )


def _verdict(choices: Sequence[Choice]) -> str:
    """The choice that no source has clearly behind, and one clearly ahead; else what is known."""
    dense, _, scratch = choices
    for choice in (scratch, dense):
        if _ahead(choice) and not _behind(choice):
            return f"{choice.name}: {_who(_ahead(choice))} it ahead of upcycling."
    if any(_ahead(choice) and _behind(choice) for choice in (dense, scratch)):
        return "open: our studies and the law disagree. Try both at a small size of yours."
    if _behind(dense):
        level = "" if _behind(scratch) else " An MoE from scratch may be as good."
        return f"{UPCYCLE}: {_who(_behind(dense))} it ahead of the dense model.{level}"
    return "open: neither source tells upcycling from training the dense model on."


def _ahead(choice: Choice) -> tuple[bool, bool] | None:
    """Whether our studies, and whether the law, have it ahead of upcycling; None if neither."""
    found = choice.measured.high < 0, choice.law.high < 0
    return found if any(found) else None


def _behind(choice: Choice) -> tuple[bool, bool] | None:
    found = choice.measured.low > 0, choice.law.low > 0
    return found if any(found) else None


def _who(says: tuple[bool, bool] | None) -> str:
    assert says is not None
    if all(says):
        return "our studies and the law have"
    return "our studies have" if says[0] else "the law has"


def _crossing(case: Case, choice: int, sign: int) -> Crossing:
    """Where the law's difference to upcycled, of dense (0) or scratch (1), takes the sign."""

    def reach(share: float) -> Interval:
        losses = scaling_law.against_upcycled(
            case.parameters, case.source_tokens, share, case.cost_ratio
        )
        found = scaling_law.with_rounding(losses[choice])
        return found if sign > 0 else found.negated()

    first = scaling_law.first_share
    return Crossing(
        first(lambda share: reach(share).low + reach(share).high > 0),
        first(lambda share: reach(share).high > 0),
        first(lambda share: reach(share).low > 0),
    )
