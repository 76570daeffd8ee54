"""The published scaling law for upcycling: Liew, Kato and Takase, ICML 2025, arXiv 2502.03009.

    dense, MoE    L = A D^-a                      + B N^-b + E
    upcycled      L = A D1^-a1 D2^(-a2 + a3 ln D1) + B N^-b + E

L in nats per token, N the dense model's parameters, D tokens, of which D1 before upcycling and D2
after it. The term a3 is the interaction: the more the source has seen, the less more tokens help.

Where it is from: the coefficients are table 2 ("Fitted parameters for joint scaling laws") as
github.com/1jmdev/research quotes it at commit 12ddff7 (papers/model-conversion/
dense-to-moe-upcycling/2502.03009-*.md); the authors' own repository could not be had. The form is
read off that table's columns and the authors' abstract of arXiv 2510.06548 ("the exponent with
respect to second-stage tokens decreases logarithmically with" first-stage tokens), not off the
paper's equation 12. That the logarithm is natural is seen from the numbers: with log10, an upcycled
model on 1 % of its source's tokens would beat a dense and a fresh MoE on twice as many.

How certain it is: errors of the fit are not in that source. What is given here is what the printed
digits leave open, twice the standard deviation of rounding: less than the whole uncertainty.
"""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal

from fusion_upcycle.inspection.measured import Interval

SOURCE = "arXiv 2502.03009, table 2"
#: With the digits that are printed.
_PRINTED = {
    **{"dense A": "8.83", "dense B": "12.3", "dense a": "0.088", "dense b": "0.116"},
    **{"moe A": "32.0", "moe B": "7.05", "moe a": "0.161", "moe b": "0.080"},
    **{"up A": "16.3", "up B": "8.53", "up a1": "0.043", "up a2": "0.085"},
    **{"up a3": "7.98e-4", "up b": "0.112"},
    "E": "0.165",
}
COEFFICIENTS: Mapping[str, float] = {name: float(text) for name, text in _PRINTED.items()}
_ROUNDING = {
    name: 10.0 ** int(Decimal(text).as_tuple().exponent) / 2 for name, text in _PRINTED.items()
}

#: The MoE of the law is Mixtral-like.
NUM_EXPERTS, EXPERTS_PER_TOKEN = 8, 2
#: Largest dense model that the source names (its 8 experts are the 7B of the reviews).
LARGEST_MODEL = 1e9
#: Tokens of the data set, SlimPajama's Common Crawl.
MOST_TOKENS = 368e9

Coefficients = Mapping[str, float]
Loss = Callable[[Coefficients], float]


def dense_loss(parameters: float, tokens: float, c: Coefficients = COEFFICIENTS) -> float:
    """Nats per token of a dense model trained on `tokens` in one run."""
    return (
        c["dense A"] * tokens ** -c["dense a"] + c["dense B"] * parameters ** -c["dense b"] + c["E"]
    )


def scratch_loss(parameters: float, tokens: float, c: Coefficients = COEFFICIENTS) -> float:
    """Nats per token of the MoE trained from nothing; `parameters` are the dense model's."""
    return c["moe A"] * tokens ** -c["moe a"] + c["moe B"] * parameters ** -c["moe b"] + c["E"]


def upcycled_loss(
    parameters: float, before: float, after: float, c: Coefficients = COEFFICIENTS
) -> float:
    """Nats per token of the MoE made of a dense model.

    Args:
        parameters: of the dense model.
        before: tokens that the dense model has seen.
        after: tokens that the MoE is trained on.
        c: the law's.
    """
    exponent = -c["up a2"] + c["up a3"] * math.log(before)
    data = c["up A"] * before ** -c["up a1"] * after**exponent
    return data + c["up B"] * parameters ** -c["up b"] + c["E"]


def against_upcycled(
    parameters: float, before: float, share: float, cost_ratio: float
) -> tuple[Loss, Loss]:
    """Loss of dense-continued, and of the MoE from scratch, minus the upcycled one's.

    All three spend the same compute after what the source has cost. Dense-continued is taken as one
    run over all tokens, which is the best that it can be.

    Args:
        parameters: of the dense model.
        before: tokens that it has seen.
        share: budget, of the compute that the source has cost.
        cost_ratio: FLOPs per token of the MoE over the dense model's.
    """
    after = share * before / cost_ratio

    def dense(c: Coefficients) -> float:
        upcycled = upcycled_loss(parameters, before, after, c)
        return dense_loss(parameters, before * (1 + share), c) - upcycled

    def scratch(c: Coefficients) -> float:
        return scratch_loss(parameters, after, c) - upcycled_loss(parameters, before, after, c)

    return dense, scratch


def with_rounding(loss: Loss) -> Interval:
    """What the printed digits leave open: twice the standard deviation of their rounding."""
    best, variance = loss(COEFFICIENTS), 0.0
    for name, half in _ROUNDING.items():
        moved = loss({**COEFFICIENTS, name: COEFFICIENTS[name] + half}) - best
        variance += moved**2 / 3
    reach = 2 * math.sqrt(variance)
    return Interval(best - reach, best + reach)


def first_share(holds: Callable[[float], bool]) -> float | None:
    """The smallest budget, of 0.1 % to 1000 % in steps of 5 %, from which on `holds` is true."""
    shares = [10 ** (-3 + step / 50) for step in range(201)]
    return next((share for share in shares if holds(share)), None)
