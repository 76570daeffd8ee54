"""Does the choice of experts depend on the domain, and more than before? Tested, in bits.

The mutual information of domain and chosen expert, I = sum p(d, e) log2(p(d, e) / p(d) p(e)), is
what one assignment tells about its domain: 0 bits if routing is the same everywhere, and the
entropy of the domains at most. Computed from counts (the plug-in estimate) it is above 0 even where
nothing depends on anything, by about (D-1)(E-1) / (2 n ln 2) bits for n independent assignments and
by far more for tokens of real text, which depend on each other. So the baseline is made by the data
themselves: domain labels are permuted over whole units (documents), which breaks any relation of
label and routing and keeps all dependence inside a unit.

A router that was never trained passes this test too, since hidden states differ by domain. That
experts *specialise* is a claim about training: `information_gain` tests it against the same model
before. It says that routing follows the domain more than it did, not that it helps the loss.

Shapes: L MoE layers, D domains, U units of a domain, P units of all domains, E experts, R
permutations.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

#: A claim holds if its p-value, adjusted for the number of layers, is at most this.
ALPHA = 0.05
#: Numbers in one chunk of permutations.
_CHUNK = 2**24
_ROUNDING_BITS = 1e-12


def mutual_information_bits(counts_DE: Tensor) -> Tensor:
    """Plug-in mutual information in bits of the last two axes of a table of counts."""
    joint = counts_DE.double() / counts_DE.sum((-2, -1), keepdim=True)
    entropy = torch.special.entr(joint.sum(-1)).sum(-1) + torch.special.entr(joint.sum(-2)).sum(-1)
    return (entropy - torch.special.entr(joint).sum((-2, -1))).clamp_min(0) / math.log(2)


def domain_information(
    units_LDUE: Tensor, layers: Sequence[int], *, permutations: int, seed: int
) -> dict[str, Any] | None:
    """Test whether each layer's routing depends on the domain; None with fewer than two domains.

    Args:
        units_LDUE: assignments of each unit; units without any are left out.
        layers: index of each layer.
        permutations: R; the smallest p-value is 1 / (R + 1).
        seed: of the permutations.

    Returns:
        `units` of each domain; `domain_entropy_bits`, which no layer can exceed; `permutations`;
        `seed`; `alpha`; and `layers`: index -> `bits`, measured; `baseline_mean_bits` and
        `baseline_95_bits`, mean and 95th percentile under permuted labels; `excess_bits`, measured
        minus that mean; `p_value`; `adjusted_p_value`; `depends_on_domain`, whether that is at most
        alpha.
    """
    if units_LDUE.shape[1] < 2:
        return None
    used_DU = units_LDUE[0].sum(-1) > 0
    labels_P = used_DU.nonzero()[:, 0]
    counts_PLE = _flat(units_LDUE, used_DU)
    domains = units_LDUE.shape[1]

    def by_domain(labels_RP: Tensor) -> Tensor:
        member_RPD = one_hot(labels_RP, domains).double()
        return mutual_information_bits(torch.einsum("rpd,ple->rlde", member_RPD, counts_PLE))

    measured_L = by_domain(labels_P[None])[0]
    permuted_RL = _draws(
        lambda random_RP: by_domain(labels_P[random_RP.argsort(1)]),
        len(labels_P),
        _chunk(counts_PLE, domains),
        permutations,
        seed,
    )
    mean_L, high_L = permuted_RL.mean(0), permuted_RL.quantile(0.95, dim=0)
    tokens_D = units_LDUE[0].sum((-2, -1)).double()
    entropy = torch.special.entr(tokens_D / tokens_D.sum()).sum() / math.log(2)
    return {
        "units": used_DU.sum(1).tolist(),
        "domain_entropy_bits": float(entropy),
        "permutations": permutations,
        "seed": seed,
        "alpha": ALPHA,
        "layers": {
            str(layer): {
                "bits": float(measured_L[place]),
                "baseline_mean_bits": float(mean_L[place]),
                "baseline_95_bits": float(high_L[place]),
                "excess_bits": float(measured_L[place] - mean_L[place]),
                "p_value": p,
                "adjusted_p_value": adjusted,
                "depends_on_domain": adjusted <= ALPHA,
            }
            for place, (layer, p, adjusted) in enumerate(
                zip(layers, *_p_values(measured_L, permuted_RL), strict=True)
            )
        },
    }


def information_gain(
    before_LDUE: Tensor, after_LDUE: Tensor, layers: Sequence[int], *, permutations: int, seed: int
) -> dict[str, dict[str, Any]] | None:
    """Test whether routing depends more on the domain than before; None with fewer than 2 domains.

    If training had changed nothing, before and after could be swapped in any unit: the baseline of
    the gain is its value when each unit's two counts are swapped with probability 1/2.

    Args:
        before_LDUE: assignments of each unit.
        after_LDUE: of the same units.
        layers: index of each layer.
        permutations: R.
        seed: of the swaps.

    Returns:
        Layer index -> `before_bits`, `after_bits`, `gain_bits`, `p_value`, `adjusted_p_value`, and
        `specialised`, whether that is at most alpha.
    """
    if before_LDUE.shape[1] < 2:
        return None
    used_DU = before_LDUE[0].sum(-1) > 0
    before_PLE, after_PLE = _flat(before_LDUE, used_DU), _flat(after_LDUE, used_DU)
    member_PD = one_hot(used_DU.nonzero()[:, 0], before_LDUE.shape[1]).double()
    total_LDE = torch.einsum("pd,ple->lde", member_PD, before_PLE + after_PLE)

    def bits(swapped_RP: Tensor) -> tuple[Tensor, Tensor]:
        """Before and after, [R, L], when these units are swapped."""
        kept_RPD = torch.where(swapped_RP[..., None], 0.0, 1.0) * member_PD
        after_RLDE = torch.einsum("rpd,ple->rlde", kept_RPD, after_PLE)
        after_RLDE += torch.einsum("rpd,ple->rlde", member_PD - kept_RPD, before_PLE)
        return mutual_information_bits(total_LDE - after_RLDE), mutual_information_bits(after_RLDE)

    (before_L,), (after_L,) = bits(torch.zeros(1, len(member_PD), dtype=torch.bool))
    gains_RL = _draws(
        lambda random_RP: torch.sub(*reversed(bits(random_RP < 0.5))),
        len(member_PD),
        _chunk(before_PLE, before_LDUE.shape[1]),
        permutations,
        seed,
    )
    gain_L = after_L - before_L
    return {
        str(layer): {
            "before_bits": float(before_L[place]),
            "after_bits": float(after_L[place]),
            "gain_bits": float(gain_L[place]),
            "p_value": p,
            "adjusted_p_value": adjusted,
            "specialised": adjusted <= ALPHA,
        }
        for place, (layer, p, adjusted) in enumerate(
            zip(layers, *_p_values(gain_L, gains_RL), strict=True)
        )
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing them all [Holm 1979]: the chance of any false claim is kept."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def _p_values(measured_L: Tensor, permuted_RL: Tensor) -> tuple[list[float], list[float]]:
    """(1 + permutations at or above) / (1 + R), never 0 [Phipson and Smyth 2010]; and adjusted."""
    above_L = (permuted_RL >= measured_L - _ROUNDING_BITS).sum(0)
    p_L = ((1 + above_L).double() / (1 + len(permuted_RL))).tolist()
    return p_L, holm(p_L)


def _flat(units_LDUE: Tensor, used_DU: Tensor) -> Tensor:
    return units_LDUE[:, used_DU].transpose(0, 1).double()


def _chunk(counts_PLE: Tensor, domains: int) -> int:
    """Permutations whose tables are in memory together."""
    return max(1, _CHUNK // (domains * (len(counts_PLE) + counts_PLE[0].numel())))


def _draws(
    statistic: Callable[[Tensor], Tensor], units: int, chunk: int, permutations: int, seed: int
) -> Tensor:
    """`statistic` [R, L] of uniform random numbers [R, P], some rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            statistic(
                torch.rand(
                    min(chunk, permutations - start),
                    units,
                    generator=generator,
                    dtype=torch.float64,
                )
            )
            for start in range(0, permutations, chunk)
        ]
    )
