"""The split router: M = m * E router rows that leave the function of an MoE (nearly) as it was.

Copies of an expert with equal rows would be chosen together, and the top-k would be the best expert
twice. Here all j-th copies share a direction: their rows are `w_e + c * d_j`. For a token `h` all
experts of copy group j shift by `c * d_j.h`. Where the largest shift leads the second by more than
the source's best logit leads its k-th, the top-k comes from one copy group, and is the source's
top-k, in the source's order. Weights that are renormalised, or made of the chosen logits, are then
the source's too. Each copy group sees its own part of the tokens and gets gradients of its own.

A router that feels a shift of all logits, by sigmoid scores or a selection bias, first gets rows
for which that is neutral (`neutral`); its selection bias starts again at zero.

Ours; measured in `examples/expert_upcycling/router.py` and `sigmoid.py`.

Shapes: N tokens, D hidden size, E experts, M experts after, G = m copy groups.
"""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fusion_upcycle.architectures.routing import RoutingRule
from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.expansion.router.groups import find_groups
from fusion_upcycle.expansion.router.neutral import lowered, neutral_rows, neutral_rule

#: Default of `mixed_share`.
MIXED_SHARE = 0.03


@dataclass(frozen=True)
class SplitRows:
    """New router rows of one layer.

    Attributes:
        rows_MD: all first copies in the order of the source, then all second copies, ...
        margin: median, over tokens, of how far the best copy group leads the second, in logits.
        residual: of the directions, as in `Groups`.
        selection_bias_M: where it is another one than that of the source expert.
        score_scale: as in `Lowered`, where scores were made smaller.
    """

    rows_MD: Tensor
    margin: float
    residual: float
    selection_bias_M: Tensor | None = None
    score_scale: float | None = None


def split_rows(
    weight_ED: Tensor,
    inputs_ND: Tensor,
    multiplier: int,
    rule: RoutingRule,
    generator: Generator,
    *,
    mixed_share: float = MIXED_SHARE,
) -> SplitRows:
    """Rows of a layer whose experts are all duplicated `multiplier` times.

    Args:
        weight_ED: router rows.
        inputs_ND: what the router sees on calibration text.
        multiplier: m, the number of copy groups; each wins about 1/m of the tokens.
        rule: of the source.
        generator: of the search for directions, and of the fit of neutral rows.
        mixed_share: share of the tokens whose top-k may come from more than one copy group: sets
            the scale `c` of the directions. Less keeps the function better; more lets training
            move tokens between copies sooner.

    Raises:
        UpcyclingError: a rule that has no neutral rows, or a share that is none.
    """
    check_split(rule)
    if not (is_number(mixed_share) and 0 < mixed_share < 1):
        raise UpcyclingError(
            f"mixed_share={mixed_share!r} must be between 0 and 1 (default {MIXED_SHARE})."
        )
    weight_ED, inputs_ND = weight_ED.float(), inputs_ND.float()
    if rule.keeps_shifts:
        return _split(weight_ED, inputs_ND, multiplier, rule, generator, mixed_share)
    neutral = neutral_rows(weight_ED, inputs_ND, rule, generator).rows_MD
    made = _split(neutral, inputs_ND, multiplier, neutral_rule(rule), generator, mixed_share)
    bias_M = None if rule.selection_bias_E is None else torch.zeros(len(made.rows_MD))
    made = replace(made, selection_bias_M=bias_M)
    if rule.scores == "softmax":
        return made
    plan = tuple(range(len(weight_ED))) * multiplier
    low = lowered(made.rows_MD, inputs_ND, weight_ED, rule, plan)
    return replace(made, rows_MD=low.rows_MD, score_scale=low.score_scale)


def _split(
    weight_ED: Tensor,
    inputs_ND: Tensor,
    multiplier: int,
    rule: RoutingRule,
    generator: Generator,
    mixed_share: float,
) -> SplitRows:
    # Any shift is exact at top-1; the lead over the second expert then gives it a scale.
    top_NK = (inputs_ND @ weight_ED.T).topk(max(2, rule.experts_per_token), -1)
    groups = find_groups(inputs_ND, multiplier, generator, top_NK.indices[:, 0])
    first_N2 = (inputs_ND @ groups.directions_GD.T).topk(2, -1).values
    margin_N = (first_N2[:, 0] - first_N2[:, 1]).clamp_min(1e-9)
    needed_N = (top_NK.values[:, 0] - top_NK.values[:, -1]) / margin_N
    scale = float(needed_N.quantile(1 - mixed_share))
    rows_GED = weight_ED + scale * groups.directions_GD[:, None]
    return SplitRows(rows_GED.flatten(0, 1), scale * float(margin_N.median()), groups.residual)


def check_split(rule: RoutingRule) -> None:
    """Refuse a router that split rows would change.

    Raises:
        UpcyclingError: a rule that has no neutral rows.
    """
    if not (rule.keeps_shifts or rule.normalised):
        raise UpcyclingError(
            "router_extension=split shifts the logits of all experts of a copy group alike, and "
            f"the weights of this router, {rule.scores} scores that are not divided by their sum "
            "(norm_topk_prob=false), would change with them. Choose "
            f"{setting('router_extension', 'fit')}, which keeps the logits where they are."
        )
