"""What our studies measured, from `measured.json` beside this file, which names its source.

To replace the numbers, replace that file: nothing else holds them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

#: Numbers within 5 % are the same number: what users give is rounded.
SAME = 1.05


@dataclass(frozen=True)
class Row:
    """One comparison of two models at equal training FLOPs.

    Attributes:
        num_experts, experts_per_token: of the MoE.
        tokens_per_parameter: tokens that the dense source has seen, per parameter.
        parameters: of the dense source, without embeddings.
        share: budget, of the source's training FLOPs.
        difference: of the loss, in bits per byte.
        spread: standard deviation of the difference over seeds; None for a single seed.
        seeds: how many.
    """

    num_experts: int
    experts_per_token: int
    tokens_per_parameter: float
    parameters: float
    share: float
    difference: float
    spread: float | None
    seeds: int


@dataclass(frozen=True)
class Settings:
    """Settings of continued training that were best in the studies.

    Attributes:
        learning_rate_share: of the source's peak learning rate.
        router_ratio: largest learning rate of the router, over the std of its rows.
        logit_std: standard deviation of the router's logits at step 0.
        balance_weight: of the balance loss.
        warmup_share, decay_share: of the budget.
        final_share: of the learning rate, at the end.
    """

    learning_rate_share: float
    router_ratio: float
    logit_std: float
    balance_weight: float
    warmup_share: float
    decay_share: float
    final_share: float


@dataclass(frozen=True)
class Measured:
    """The studies.

    Attributes:
        source, setting: of the numbers, in words.
        rows: upcycled minus dense-continued.
        from_scratch: MoE from scratch minus upcycled.
        settings: the best ones.
    """

    source: str
    setting: str
    rows: tuple[Row, ...]
    from_scratch: tuple[Row, ...]
    settings: Settings


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`."""

    low: float
    high: float

    def negated(self) -> "Interval":
        """The interval of the difference the other way round."""
        return Interval(-self.high, -self.low)


@cache
def read_measured() -> Measured:
    """The content of `measured.json`."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return Measured(
        source=found["source"],
        setting=found["setting"],
        rows=tuple(Row(**row) for row in found["rows"]),
        from_scratch=tuple(Row(**row) for row in found["from_scratch"]),
        settings=Settings(**found["settings"]),
    )


def rows_of_setting(rows: Sequence[Row], num_experts: int, experts_per_token: int) -> list[Row]:
    """The rows of this many experts and top-k; where there is none, of the setting with most."""
    settings = [(row.num_experts, row.experts_per_token) for row in rows]
    wanted = (num_experts, experts_per_token)
    chosen = wanted if wanted in settings else max(settings, key=settings.count)
    return [row for row, setting in zip(rows, settings, strict=True) if setting == chosen]


def nearest_rows(rows: Sequence[Row], tokens_per_parameter: float, share: float) -> list[Row]:
    """The rows next to a case, at most on either side of it; at an edge, those of the edge.

    First by tokens per parameter, then among the rows of each such source by budget.
    """
    near = []
    for tokens in sorted(_beside((r.tokens_per_parameter for r in rows), tokens_per_parameter)):
        same = [row for row in rows if row.tokens_per_parameter == tokens]
        shares = _beside((row.share for row in same), share)
        near += [row for row in same if row.share in shares]
    return near


def interval_of(near: Sequence[Row], share: float, spread: float, below: float) -> Interval:
    """From the smallest to the largest difference of `near`, and their spread on both sides.

    Args:
        near: rows next to the case; nothing is fitted between them.
        share: budget of the case.
        spread: taken for rows of a single seed.
        below: what the difference tends to at budgets smaller than a source's smallest row, and
            counts there: 0 for two models that compute the same function before any training.
    """
    ends = []
    for row in near:
        around = spread if row.spread is None else row.spread
        ends += [row.difference - around, row.difference + around]
    smallest: dict[float, float] = {}
    for row in near:
        tokens = row.tokens_per_parameter
        smallest[tokens] = min(row.share, smallest.get(tokens, row.share))
    if any(share * SAME < measured for measured in smallest.values()):
        ends.append(below)
    return Interval(min(ends), max(ends))


def _beside(values: Iterable[float], wanted: float) -> set[float]:
    """The nearest value on either side of `wanted`, or the one that is `wanted`."""
    known = sorted(set(values))
    nearest = min(known, key=lambda value: abs(value - wanted))
    if max(nearest / wanted, wanted / nearest) < SAME:
        return {nearest}
    below = [value for value in known if value <= wanted]
    above = [value for value in known if value >= wanted]
    return {*below[-1:], *above[:1]}
