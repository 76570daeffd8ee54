"""The split router: M = m * E router rows that leave the function of an MoE (nearly) as it was.

Copies of an expert with equal rows would be chosen together, and the top-k would be the best expert
twice. Here all j-th copies share a direction: their rows are `w_e + c * d_j`. For a token `h` all
experts of copy group j shift by `c * d_j.h`. Where the largest shift leads the second by more than
the source's best logit leads its k-th, the top-k comes from one copy group, and is the source's
top-k, in the source's order. Weights that are renormalised, or made of the chosen logits, are then
the source's too. Each copy group sees its own part of the tokens and gets gradients of its own.

Ours; measured in `examples/expert_upcycling/router.py`.

Shapes: N tokens, D hidden size, E experts, M experts after, G = m copy groups.
"""

from dataclasses import dataclass

from torch import Generator, Tensor

from fusion_upcycle.architectures.routing import RoutingRule
from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.router.groups import find_groups

#: Default of `mixed_share`.
MIXED_SHARE = 0.03


@dataclass(frozen=True)
class SplitRows:
    """New router rows of one layer.

    Attributes:
        rows_MD: all first copies in the order of the source, then all second copies, ...
        margin: median, over tokens, of how far the best copy group leads the second, in logits.
        residual: of the directions, as in `Groups`.
    """

    rows_MD: Tensor
    margin: float
    residual: float


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
        generator: of the search for directions.
        mixed_share: share of the tokens whose top-k may come from more than one copy group: sets
            the scale `c` of the directions. Less keeps the function better; more lets training
            move tokens between copies sooner.

    Raises:
        UpcyclingError: a rule under which a shift of all logits is not neutral, or a share that is
            none.
    """
    check_split(rule)
    if not (is_number(mixed_share) and 0 < mixed_share < 1):
        raise UpcyclingError(
            f"mixed_share={mixed_share!r} must be between 0 and 1 (default {MIXED_SHARE})."
        )
    weight_ED, inputs_ND = weight_ED.float(), inputs_ND.float()
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
        UpcyclingError: a rule under which a shift of all logits is not neutral.
    """
    if not rule.keeps_shifts:
        raise UpcyclingError(
            "router_extension=split shifts the logits of all experts of a copy group alike, which "
            f"is neutral for softmax scores without a selection bias; this router has "
            f"{rule.scores} scores"
            + ("" if rule.selection_bias_E is None else " and a selection bias")
            + ". Choose router_extension=fit, which keeps the logits where they are."
        )
