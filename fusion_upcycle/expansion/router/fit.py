"""Router rows for any duplication plan, found on router inputs: no labels, no backward pass.

No row rule is exact where some experts have copies and others have none, as "the larger of two
values" is not linear. But nearly: each duplicated expert p gets directions of its own, found on the
tokens that choose p, with `d_j.h = 0` for the copy that is to have token h and -1 for the others
(`groups`). The rows `w_p + c * d_j` leave the winner's logit where it was
and push its twins out of the top-k. That is the start; all rows are then fitted, with Adam, to

    k * sum_p (weight of p's winner - weight of p in the source)^2
    + k * smallest weight * softplus(best preference of all others - last preference of the winners)

where the winners are the largest copies of the experts that the source chooses. The first term is
what weights would be if the winners were chosen, the second lets them be chosen; a token where the
last winner hardly counts does not weigh. Both are convex in the rows for given winners. A copy that
wins too few tokens gets an advantage in the next choice of winners, so that copies stay in use: a
function that is kept by dead copies is worth nothing.

Ours; measured in `examples/expert_upcycling/router.py`.

Shapes: N tokens (B in a batch), D hidden size, E experts, M experts after, K experts per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus

from fusion_upcycle.architectures.routing import RoutingRule
from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.router.groups import find_groups
from fusion_upcycle.expansion.router.rows import copy_shares, weight_error

STEPS = 600
BATCH_TOKENS = 4096
#: Of Adam, per standard deviation of the logits, as inputs are white.
LEARNING_RATE = 0.05
#: How far winners should lead, in standard deviations of a token's preferences.
LEAD = 0.2
#: Copies with less than this share of the fair one get an advantage, `_ADVANTAGE` a step.
COPY_SHARE = 0.8
_ADVANTAGE = 0.1
#: Default of `min_copy_share`.
MIN_COPY_SHARE = 0.6
_CHECK_EVERY = 50
#: Of the mean variance, when inputs are made white.
_RIDGE = 1e-3
#: Scales of the directions that the start is chosen of, in standard deviations of logits.
_SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
#: Tokens, for each copy, on which the directions of a rarely chosen expert are found at least.
_MIN_TOKENS = 256


@dataclass(frozen=True)
class FittedRows:
    """New router rows of one layer.

    Attributes:
        rows_MD: as the plan has them.
        step: at which they were best; 0 is the start.
        error: on the calibration text, as `weight_error` has it.
        smallest_copy_share: likewise, as `copy_shares` has it; None where nothing is duplicated.
    """

    rows_MD: Tensor
    step: int
    error: float
    smallest_copy_share: float | None


def fit_rows(
    weight_ED: Tensor,
    inputs_ND: Tensor,
    source_experts: Sequence[int],
    rule: RoutingRule,
    generator: Generator,
    *,
    start_MD: Tensor | None = None,
    new_rule: RoutingRule | None = None,
    steps: int = STEPS,
    min_copy_share: float = MIN_COPY_SHARE,
) -> FittedRows:
    """Rows that come near the source's routing, with all copies in use.

    Args:
        weight_ED: router rows.
        inputs_ND: what the router sees on calibration text.
        source_experts: source expert of each of the M experts.
        rule: of the source.
        generator: of the directions and the batches.
        start_MD: rows to start from, such as those of `split_rows`; None finds directions for
            each duplicated expert.
        new_rule: of the result, beside `start_MD`; by default the source's, as copies have it.
        steps: of Adam.
        min_copy_share: rows whose least used copy gets less than this part of its fair share do
            not count, unless there are no others.

    Raises:
        UpcyclingError: a share that is none.
    """
    if not (is_number(min_copy_share) and 0 <= min_copy_share < 1):
        raise UpcyclingError(
            f"min_copy_share={min_copy_share!r} must be at least 0 and below 1 "
            f"(default {MIN_COPY_SHARE})."
        )
    fit = _Fit(weight_ED.float(), inputs_ND.float(), tuple(source_experts), rule)
    if new_rule is not None:
        assert start_MD is not None
        fit.route_by(new_rule, start_MD.float())
    if start_MD is None:
        start_MD = fit.start(generator)
    return fit.run(start_MD.float(), generator, steps, min_copy_share)


class _Fit:
    def __init__(
        self, weight_ED: Tensor, inputs_ND: Tensor, plan: tuple[int, ...], rule: RoutingRule
    ):
        self.weight_ED, self.inputs_ND = weight_ED, inputs_ND
        self.plan, self.plan_M = plan, torch.tensor(plan)
        self.rule, self.new_rule = rule, rule.for_experts(plan)
        self.logits_NE = inputs_ND @ weight_ED.T
        self.weights_NK, self.chosen_NK = rule.route(self.logits_NE)
        self.copies_E = torch.bincount(self.plan_M, minlength=len(weight_ED))
        self._measure(self.logits_NE, rule)

    def route_by(self, new_rule: RoutingRule, start_MD: Tensor) -> None:
        """Of the result, whose logits are of the size that `start_MD` gives."""
        self.new_rule = new_rule
        self._measure(self.inputs_ND @ start_MD.T, new_rule)

    def _measure(self, logits_NX: Tensor, rule: RoutingRule) -> None:
        self.spread = float(logits_NX.std(-1).mean())
        self.lead = LEAD * float(rule.preference(logits_NX).std(-1).mean())

    def judge(self, rows_MD: Tensor) -> tuple[float, float | None]:
        """Error, and smallest copy share."""
        logits_NM = self.inputs_ND @ rows_MD.T
        routed = self.new_rule.route(logits_NM)
        share_M = copy_shares(routed[1], self.plan)
        counted = share_M[share_M.isfinite()]
        error = weight_error(
            (self.weights_NK, self.chosen_NK), routed, self.plan, len(self.weight_ED)
        )
        return error, float(counted.min()) if len(counted) else None

    def start(self, generator: Generator) -> Tensor:
        """[M, D]: directions for each duplicated expert, at the best common scale."""
        directions_MD = torch.zeros(len(self.plan), self.weight_ED.shape[1])
        preference_NE = self.rule.preference(self.logits_NE)
        last_N = preference_NE.gather(1, self.chosen_NK).amin(1)
        for expert, copies in enumerate(self.copies_E.tolist()):
            if copies < 2:
                continue
            lead_N = preference_NE[:, expert] - last_N
            wanted = max(int((lead_N >= 0).sum()), copies * _MIN_TOKENS)
            tokens = lead_N.topk(min(wanted, len(lead_N))).indices.sort().values
            groups = find_groups(self.inputs_ND[tokens], copies, generator)
            # From 1 - 1/G and -1/G to 0 and -1.
            down_D = (1 - 1 / copies) * groups.constant_D
            directions_MD[self.plan_M == expert] = groups.directions_GD - down_D
        found = [
            self.weight_ED[self.plan_M] + scale * self.spread * directions_MD for scale in _SCALES
        ]
        return min(found, key=lambda rows_MD: self.judge(rows_MD)[0])

    def run(
        self, start_MD: Tensor, generator: Generator, steps: int, min_copy_share: float
    ) -> FittedRows:
        # White inputs: the same learning rate then suits all directions.
        covariance_DD = self.inputs_ND.T @ self.inputs_ND / len(self.inputs_ND)
        covariance_DD.diagonal().add_(_RIDGE * covariance_DD.diagonal().mean())
        factor_DD = torch.linalg.cholesky(covariance_DD)
        white_ND = torch.linalg.solve_triangular(factor_DD, self.inputs_ND.T, upper=False).T

        def rows(white_MD: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(factor_DD, white_MD, upper=False, left=False)

        white_MD = (start_MD @ factor_DD).requires_grad_()
        optimiser = torch.optim.Adam([white_MD], lr=LEARNING_RATE * self.spread, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
        advantage_M = torch.zeros(len(self.plan))
        best = FittedRows(start_MD, 0, *self.judge(start_MD))
        for step in range(1, steps + 1):
            batch = torch.randint(len(white_ND), (BATCH_TOKENS,), generator=generator)
            loss = self.loss(white_ND[batch] @ white_MD.T, batch, advantage_M)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % _CHECK_EVERY == 0 or step == steps:
                rows_MD = rows(white_MD.detach())
                found = FittedRows(rows_MD, step, *self.judge(rows_MD))
                best = min(best, found, key=lambda fitted: _rank(fitted, min_copy_share))
        return best

    def loss(self, logits_BM: Tensor, batch: Tensor, advantage_M: Tensor) -> Tensor:
        """The fit's objective; `advantage_M`, in standard deviations, is changed in place."""
        chosen_BK, weights_BK = self.chosen_NK[batch], self.weights_NK[batch]
        preference_BM = self.new_rule.preference(logits_BM)
        with torch.no_grad():
            biased_BM = preference_BM + advantage_M * (self.lead / LEAD)
            other_BKM = chosen_BK[:, :, None] != self.plan_M
            winners_BK = biased_BM[:, None].masked_fill(other_BKM, -math.inf).argmax(-1)
            share_M = copy_shares(winners_BK, self.plan).nan_to_num(nan=1.0)
            # Back to none where it is not needed, or it would only grow.
            advantage_M += _ADVANTAGE * (COPY_SHARE - share_M).clamp_min(0)
            advantage_M *= torch.where(share_M > 1, 1 - _ADVANTAGE, 1.0)
        total = weights_BK.sum(-1, keepdim=True).mean()
        k = self.rule.experts_per_token
        off_BK = (self.new_rule.weights(logits_BM, winners_BK) - weights_BK) / total
        others_B = preference_BM.scatter(1, winners_BK, -math.inf).amax(-1)
        last_B = preference_BM.gather(1, winners_BK).amin(-1)
        short_B = softplus(4 * (others_B - last_B) / self.lead + 2) * self.lead / 4
        # In standard deviations of preferences, so that the scale of logits does not matter.
        short_B = short_B * LEAD / self.lead
        return k * (off_BK.square().sum(-1) + weights_BK.amin(-1) / total * short_B).mean()


def _rank(fitted: FittedRows, min_copy_share: float) -> tuple[float, float]:
    """Smaller is better: enough share first, then the error."""
    share = fitted.smallest_copy_share
    missing = 0.0 if share is None else max(0.0, min_copy_share - share)
    return missing, fitted.error
