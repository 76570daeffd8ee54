"""Directions in router-input space that part tokens into equal groups with few between them.

Hidden states say linearly what class a token is of (letter, space, digit, name, ...), so that there
are directions whose value is nearly two-valued over tokens. They are found by least squares on
labels of its own making: label tokens by the largest value, regress the labels, repeat, from many
starts. Each round lowers the squared error, as in k-means. With two groups this looks for the
largest mean of |s| at a given mean of s^2, a measure of two-valuedness as in independent component
analysis.

Shapes: N tokens, D hidden size, G groups, S starts, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

#: Of the mean variance. Large, so that directions are short and lie where router inputs vary most:
#: with 0.01 they are twice as long and no more two-valued on held-out text.
RIDGE = 0.1
STARTS = 24
ROUNDS = 25
#: Tokens among which starts compete; the best start is then fitted to all tokens.
SEARCH_TOKENS = 8192
#: Starts that are fitted to all tokens.
_FINALISTS = 8
_FINAL_ROUNDS = 5
#: A group should win this part of its fair share in each class, and classes of fewer tokens say
#: nothing.
_CLASS_SHARE = 0.7
_CLASS_TOKENS = 100
_BALANCE_STEPS = 300


@dataclass(frozen=True)
class Groups:
    """What parts the tokens.

    Attributes:
        directions_GD: `directions @ h` is about 1 - 1/G for the group of token h, -1/G for others.
        constant_D: `constant @ h` is about 1: the bias that routers lack.
        residual: mean squared error of the first; 0 if all tokens were at one of G points.
    """

    directions_GD: Tensor
    constant_D: Tensor
    residual: float


def find_groups(
    inputs_ND: Tensor, groups: int, generator: Generator, classes_N: Tensor | None = None
) -> Groups:
    """The best of `STARTS` searches.

    Args:
        inputs_ND: router inputs, float32.
        groups: G; each gets 1/G of the tokens.
        generator: of the starts.
        classes_N: of each token, 0 or more: groups are to part the tokens of each class equally.
    """
    solve = _Regression(inputs_ND)
    classes_N = (
        inputs_ND.new_zeros(len(inputs_ND), dtype=torch.long) if classes_N is None else classes_N
    )
    stride = -(-len(inputs_ND) // SEARCH_TOKENS)
    few_ND, few_N = inputs_ND[::stride], classes_N[::stride]
    few = _Regression(few_ND)
    # A start is G tokens; its first labels say to which of them a token is nearest.
    places = torch.randint(len(few_ND), (STARTS * groups,), generator=generator)
    values_NSG = (few_ND @ few.whitened(few_ND[places])).view(-1, STARTS, groups)
    values_NSG = values_NSG / values_NSG.std(0, keepdim=True).clamp_min(1e-12)
    offsets_CSG = torch.zeros(int(classes_N.max()) + 1, STARTS, groups)
    for _ in range(ROUNDS):
        labels_NSG = _labels(values_NSG, offsets_CSG, few_N)
        values_NSG = (few_ND @ few(labels_NSG.flatten(1))).view_as(values_NSG)
    residual_S = (values_NSG - labels_NSG).square().mean((0, 2))
    constant_D = solve(torch.ones(len(inputs_ND), 1))[:, 0]
    finalists = []
    for start in residual_S.argsort()[:_FINALISTS].tolist():
        directions_DG = few(labels_NSG[:, start])
        own_CSG = offsets_CSG[:, start : start + 1].clone()
        for _ in range(_FINAL_ROUNDS):
            labels_NG = _labels((inputs_ND @ directions_DG)[:, None], own_CSG, classes_N)[:, 0]
            directions_DG = solve(labels_NG)
        residual = float((inputs_ND @ directions_DG - labels_NG).square().mean())
        directions_GD = _balanced(inputs_ND, directions_DG, constant_D)
        missing = max(0.0, _CLASS_SHARE - _smallest_share(inputs_ND, directions_GD, classes_N))
        finalists.append((missing, residual, Groups(directions_GD, constant_D, residual)))
    return min(finalists, key=lambda finalist: finalist[:2])[2]


def constant_direction(inputs_ND: Tensor) -> Tensor:
    """[D]: `Groups.constant_D`."""
    return _Regression(inputs_ND)(torch.ones(len(inputs_ND), 1))[:, 0]


class _Regression:
    """Ridge regression on fixed inputs: targets [N, *] -> coefficients [D, *]."""

    def __init__(self, inputs_ND: Tensor):
        self.inputs_ND = inputs_ND
        covariance_DD = inputs_ND.T @ inputs_ND / len(inputs_ND)
        ridge = RIDGE * covariance_DD.diagonal().mean()
        covariance_DD.diagonal().add_(ridge)
        self.factor_DD = torch.linalg.cholesky(covariance_DD)

    def __call__(self, targets_NX: Tensor) -> Tensor:
        moments_DX = self.inputs_ND.T @ targets_NX / len(self.inputs_ND)
        return torch.cholesky_solve(moments_DX, self.factor_DD)

    def whitened(self, points_XD: Tensor) -> Tensor:
        """[D, X]: h @ this is the similarity of h to each point where inputs are white."""
        return torch.cholesky_solve(points_XD.T.contiguous(), self.factor_DD)


def _labels(values_NSG: Tensor, offsets_CSG: Tensor, classes_N: Tensor) -> Tensor:
    """1 - 1/G for the group with the largest value, -1/G for others; offsets move to equal groups.

    The offsets are changed in place, a few steps in each round.
    """
    groups = values_NSG.shape[-1]
    counts_C11 = torch.bincount(classes_N, minlength=len(offsets_CSG)).clamp_min(1)[:, None, None]
    for _ in range(4):
        winners_NS = (values_NSG + offsets_CSG[classes_N]).argmax(-1)
        labels_NSG = one_hot(winners_NS, groups).to(values_NSG.dtype) - 1 / groups
        sums_CSG = torch.zeros_like(offsets_CSG).index_add_(0, classes_N, labels_NSG)
        offsets_CSG -= 0.5 * sums_CSG / counts_C11
    return labels_NSG


def _balanced(inputs_ND: Tensor, directions_DG: Tensor, constant_D: Tensor) -> Tensor:
    """[G, D]: with as much of the constant as gives each group 1/G of the tokens."""
    groups = directions_DG.shape[1]
    values_NG, ones_N1 = inputs_ND @ directions_DG, (inputs_ND @ constant_D)[:, None]
    offsets_G, best, smallest = torch.zeros(groups), torch.zeros(groups), -1.0
    for step in range(_BALANCE_STEPS):
        shares_G = torch.bincount(
            (values_NG + offsets_G * ones_N1).argmax(-1), minlength=groups
        ) / len(inputs_ND)
        if float(shares_G.min()) > smallest:
            best, smallest = offsets_G, float(shares_G.min())
        offsets_G = offsets_G + (0.5 / (1 + step / 30)) * (1 / groups - shares_G)
    best = best - best.mean()
    return directions_DG.T + best[:, None] * constant_D


def _smallest_share(inputs_ND: Tensor, directions_GD: Tensor, classes_N: Tensor) -> float:
    """Smallest share of any group in the tokens of any class, relative to the fair share 1/G."""
    groups = len(directions_GD)
    winners_N = (inputs_ND @ directions_GD.T).argmax(-1)
    counts_CG = torch.bincount(classes_N * groups + winners_N).float()
    counts_CG = torch.nn.functional.pad(counts_CG, (0, -len(counts_CG) % groups)).view(-1, groups)
    counted_CG = counts_CG[counts_CG.sum(1) >= _CLASS_TOKENS]
    if len(counted_CG) == 0:
        return 1.0
    return float((counted_CG.amin(1) / counted_CG.mean(1)).min())
