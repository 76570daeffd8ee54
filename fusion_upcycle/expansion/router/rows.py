"""What new router rows do on given router inputs: errors, and whether the copies are in use.

Shapes: N tokens, D hidden size, E experts, M experts after, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle.architectures.routing import RoutingRule

#: Choices of a source expert below which the shares of its copies say nothing.
_FEW = 20


@dataclass(frozen=True)
class RowsReport:
    """New router rows of one layer, on some router inputs.

    Attributes:
        weight_error: squared difference between the weights of the source's experts and those of
            their copies together, relative to the squared weights: 0 is the source's function.
        one_group_share: share of the tokens whose top-k has copies of one group only (all
            originals, all first copies, ...), where each expert has as many copies; else None.
        copy_shares: for each new expert, its tokens relative to its fair share, which is that of
            its source expert divided by its copies; None where the source expert is hardly chosen.
        smallest_copy_share: of the experts with copies.
    """

    weight_error: float
    one_group_share: float | None
    copy_shares: list[float | None]
    smallest_copy_share: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rows_report(
    weight_ED: Tensor,
    rows_MD: Tensor,
    inputs_ND: Tensor,
    source_experts: Sequence[int],
    rule: RoutingRule,
    new_rule: RoutingRule | None = None,
) -> RowsReport:
    """Compare the routing of `rows_MD` with that of `weight_ED`, the source's, by `rule`.

    Args:
        new_rule: of `rows_MD`; by default `rule`, where copies have the selection bias of their
            source expert.
    """
    experts, plan = len(weight_ED), tuple(source_experts)
    inputs_ND = inputs_ND.float()
    source = rule.route(inputs_ND @ weight_ED.float().T)
    new = (new_rule or rule.for_experts(plan)).route(inputs_ND @ rows_MD.float().T)
    one_group = None
    if plan == tuple(range(experts)) * (len(plan) // experts):
        group_NK = new[1] // experts
        one_group = float((group_NK == group_NK[:, :1]).all(-1).float().mean())
    share_M = copy_shares(new[1], plan)
    counted = share_M[share_M.isfinite()]
    return RowsReport(
        weight_error(source, new, plan, experts),
        one_group,
        [None if share != share else share for share in share_M.tolist()],
        float(counted.min()) if len(counted) else None,
    )


def weight_error(
    source: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    source_experts: Sequence[int],
    experts: int,
) -> float:
    """`RowsReport.weight_error` of two routings, each weights [N, K] and chosen experts [N, K]."""
    weights_NK, chosen_NK = source
    wanted_NE = weights_NK.new_zeros(len(weights_NK), experts).scatter_(1, chosen_NK, weights_NK)
    parents_NK = torch.tensor(source_experts)[new[1]]
    found_NE = torch.zeros_like(wanted_NE).scatter_add_(1, parents_NK, new[0])
    return float((found_NE - wanted_NE).square().sum() / wanted_NE.square().sum())


def copy_shares(chosen_NK: Tensor, source_experts: Sequence[int]) -> Tensor:
    """[M]: tokens of each expert over those of a fair copy; NaN without copies or tokens."""
    plan_M = torch.tensor(source_experts)
    count_M = torch.bincount(chosen_NK.flatten(), minlength=len(plan_M)).float()
    total_M = torch.zeros(int(plan_M.max()) + 1).index_add_(0, plan_M, count_M)[plan_M]
    copies_M = torch.bincount(plan_M)[plan_M]
    share_M = count_M * copies_M / total_M.clamp_min(1)
    return share_M.masked_fill((copies_M == 1) | (total_M < _FEW), torch.nan)
