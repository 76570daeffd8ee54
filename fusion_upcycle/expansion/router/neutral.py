"""Router rows for which a shift of all logits is neutral, of a router for which it is not.

A selection bias sees how large scores are, and the weights of sigmoid scores change with a shift.
But far below zero a sigmoid is an exponential: normalised weights of logits `l - t` are then those
of a softmax of the chosen `l`, for any large t. So rows are sought with which softmax top-k without
a selection bias routes as the source does. They start from

    slope * w_e + (b_e - mean bias) / score * u

where `slope` is that of log sigmoid at the scores of chosen experts, `score` their mean, and
`u.h` is about 1 for all tokens; then they are fitted (`fit`). On a trained GLM-4.5 MoE of 16
experts, that costs 0.001 nats per byte (`examples/expert_upcycling/sigmoid.py`).

Shapes: N tokens, D hidden size, E experts, M rows, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fusion_upcycle.architectures.routing import RoutingRule
from fusion_upcycle.expansion.router.fit import FittedRows, fit_rows
from fusion_upcycle.expansion.router.groups import constant_direction
from fusion_upcycle.expansion.router.rows import weight_error

#: Of Adam.
_STEPS = 600
#: Parts of the bias and of the slope that the start is chosen of.
_BIAS_PARTS = (0.0, 0.5, 1.0, 1.5)
_SLOPES = (1.0, 1.5, 2.0)
#: Depths that are tried, in logits; the first counts whose error is at most this much larger.
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_TOLERANCE = 1.05


def neutral_rule(rule: RoutingRule) -> RoutingRule:
    """Softmax of the chosen logits, no selection bias."""
    return RoutingRule(rule.experts_per_token, "softmax", True, rule.scale)


def neutral_rows(
    weight_ED: Tensor, inputs_ND: Tensor, rule: RoutingRule, generator: Generator
) -> FittedRows:
    """Rows [E, D] that route by `neutral_rule` nearly as `weight_ED` by `rule`, and the error."""
    experts, constant_D = tuple(range(len(weight_ED))), constant_direction(inputs_ND)
    logits_NE = inputs_ND @ weight_ED.T
    routed = rule.route(logits_NE)
    score_NK = rule.scores_of(logits_NE).gather(-1, routed[1])
    slope = float((1 - score_NK).mean()) if rule.scores == "sigmoid" else 1.0
    offset_E = torch.zeros(len(weight_ED))
    if (bias_E := rule.selection_bias_E) is not None:
        offset_E = (bias_E.float() - bias_E.float().mean()) / score_NK.mean()
    new_rule = neutral_rule(rule)

    def error(rows_ED: Tensor) -> float:
        return weight_error(routed, new_rule.route(inputs_ND @ rows_ED.T), experts, len(experts))

    starts = [
        part * slope * weight_ED + share * offset_E[:, None] * constant_D
        for part in _SLOPES
        for share in _BIAS_PARTS
    ]
    start_ED = min(starts, key=error)
    return fit_rows(
        weight_ED,
        inputs_ND,
        experts,
        rule,
        generator,
        start_MD=start_ED,
        new_rule=new_rule,
        steps=_STEPS,
    )


@dataclass(frozen=True)
class Lowered:
    """Rows for sigmoid scores.

    Attributes:
        rows_MD: with logits far below zero.
        score_scale: mean score of the chosen experts over what it was in the source.
    """

    rows_MD: Tensor
    score_scale: float


def lowered(
    rows_MD: Tensor, inputs_ND: Tensor, weight_ED: Tensor, rule: RoutingRule, plan: Sequence[int]
) -> Lowered:
    """Rows whose sigmoid scores, without a selection bias, route as softmax does with `rows_MD`.

    Logits are lowered no farther than needed. Scores then differ by orders of magnitude from token
    to token, so that no bias suits all of them: loss-free balancing is over for such a router.

    Args:
        weight_ED: of the source, which routes by `rule`.
        plan: source expert of each row.
    """
    constant_D = constant_direction(inputs_ND)
    logits_NE = inputs_ND @ weight_ED.T
    routed, new_rule = rule.route(logits_NE), replace(rule, selection_bias_E=None)

    def lower(depth: float) -> tuple[float, Tensor]:
        lower_MD = rows_MD - depth * constant_D
        new = new_rule.route(inputs_ND @ lower_MD.T)
        return weight_error(routed, new, plan, len(weight_ED)), lower_MD

    found = [lower(depth) for depth in _DEPTHS]
    best = min(error for error, _ in found)
    lower_MD = next(rows for error, rows in found if error <= best * _TOLERANCE)
    logits_NM = inputs_ND @ lower_MD.T
    after = new_rule.scores_of(logits_NM).gather(-1, new_rule.route(logits_NM)[1]).mean()
    return Lowered(lower_MD, float(after / rule.scores_of(logits_NE).gather(-1, routed[1]).mean()))
