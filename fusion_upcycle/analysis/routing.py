"""Where tokens go: counts of one or more passes, and the statistics made from them.

An assignment is one (token, expert) pair: K for each token, and in expert choice as many as experts
took it. Load is an expert's share of the assignments of a layer, so that the loads of a layer sum
to 1 and an even load is 1/E.

Shapes: L MoE layers, D domains, C token classes, U units (see `collect`), E experts, N tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle.analysis.token_classes import TOKEN_CLASSES
from fusion_upcycle.live.layer_health import LayerHealth


def entropy_bits(probability_E: Tensor) -> Tensor:
    """Entropy over the last axis in bits: 0 for one certain expert, log2(E) for even ones."""
    return torch.special.entr(probability_E).sum(-1) / math.log(2)


def top1_margin(probability_E: Tensor) -> Tensor:
    """Largest minus second largest probability over the last axis: 0 is a tie, 1 certainty."""
    first, second = probability_E.topk(2, dim=-1).values.unbind(-1)
    return first - second


def shares(counts_E: Tensor) -> Tensor:
    """Counts as shares of their sum over the last axis."""
    return counts_E.double() / counts_E.sum(-1, keepdim=True)


@dataclass(frozen=True)
class RoutingCounts:
    """Sums over tokens; their size does not depend on how many tokens there were.

    Attributes:
        layers: index of each MoE layer.
        domains: names.
        chosen_LDCE: assignments, by domain and token class; of images all of one class.
        unit_LDUE: assignments, by domain and unit.
        probability_LDE: sum of router probabilities.
        entropy_LD: sum of the tokens' router entropies, in bits.
        margin_LD: sum of the tokens' top-1 margins.
        tokens_LD: tokens counted.
        left_out_LD: those of them that no expert took.
        class_DC: tokens that have a class, of all stacks of layers together.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    chosen_LDCE: Tensor
    unit_LDUE: Tensor
    probability_LDE: Tensor
    entropy_LD: Tensor
    margin_LD: Tensor
    tokens_LD: Tensor
    left_out_LD: Tensor
    class_DC: Tensor

    @classmethod
    def empty(
        cls,
        layers: Sequence[int],
        domains: Sequence[str],
        *,
        num_experts: int,
        units: int,
    ) -> "RoutingCounts":
        """Counts to begin with: all zero."""
        places = (len(layers), len(domains))
        return cls(
            tuple(layers),
            tuple(domains),
            torch.zeros(*places, len(TOKEN_CLASSES), num_experts, dtype=torch.int64),
            torch.zeros(*places, units, num_experts, dtype=torch.int64),
            torch.zeros(*places, num_experts, dtype=torch.float64),
            torch.zeros(*places, dtype=torch.float64),
            torch.zeros(*places, dtype=torch.float64),
            torch.zeros(*places, dtype=torch.int64),
            torch.zeros(*places, dtype=torch.int64),
            torch.zeros(len(domains), len(TOKEN_CLASSES), dtype=torch.int64),
        )

    def add(
        self,
        domain: int,
        layer: int,
        probability_NE: Tensor,
        sent_NE: Tensor,
        classes_N: Tensor | None,
        units_N: Tensor,
    ) -> None:
        """Count the tokens of one domain that a layer saw.

        Args:
            domain, layer: their places among all.
            probability_NE: of the router.
            sent_NE: how often each token was sent to each expert.
            classes_N: index into `TOKEN_CLASSES`; None where tokens have no class.
            units_N: unit of each token.
        """
        sent_NE = sent_NE.long()
        kinds_N = torch.zeros_like(units_N) if classes_N is None else classes_N
        self.chosen_LDCE[layer, domain].index_add_(0, kinds_N, sent_NE)
        self.unit_LDUE[layer, domain].index_add_(0, units_N, sent_NE)
        self.probability_LDE[layer, domain] += probability_NE.double().sum(0)
        self.entropy_LD[layer, domain] += entropy_bits(probability_NE).double().sum()
        self.margin_LD[layer, domain] += top1_margin(probability_NE).double().sum()
        self.tokens_LD[layer, domain] += len(units_N)
        self.left_out_LD[layer, domain] += (sent_NE.sum(1) == 0).sum()

    def add_classes(self, domain: int, classes_N: Tensor) -> None:
        """Count the classes of tokens, once whatever the number of layers that see them."""
        self.class_DC[domain] += torch.bincount(classes_N, minlength=len(TOKEN_CLASSES))

    def class_tokens(self) -> dict[str, int]:
        """Tokens of each class that occurs."""
        totals = self.class_DC.sum(0).tolist()
        return {name: total for name, total in zip(TOKEN_CLASSES, totals, strict=True) if total}

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Layer index (as text) -> its statistics, see `_layer`."""
        return {str(index): self._layer(place) for place, index in enumerate(self.layers)}

    def _layer(self, layer: int) -> dict[str, Any]:
        """Statistics of all tokens, and the same `by_domain`; loads `by_class` of token.

        `load` [E] sums to 1; `load_cv` is standard deviation over mean; `dead_experts` have less
        than 0.01 * 8/E; `limit_broken` says which health limit is broken (CV below 0.3, smallest
        share above 0.02 * 8/E), if one is. `router_entropy_bits` is the entropy of the mean router
        distribution (how even the router is over a text), `token_entropy_bits` the mean entropy
        per token (how undecided it is about one), `top1_margin` the mean difference of a token's
        two largest router probabilities. `left_out` is the share of the tokens that no expert
        took, which is 0 but in expert choice.
        """
        chosen_DCE = self.chosen_LDCE[layer]
        load_E = shares(chosen_DCE.sum((0, 1)))
        health = LayerHealth.of(load_E)
        every = torch.arange(len(self.domains))
        return {
            **self._spread(layer, every),
            "load_cv": health.cv,
            "dead_experts": health.dead,
            "smallest_share": health.smallest_share,
            "limit_broken": health.broken(len(load_E)),
            "by_domain": {
                name: self._spread(layer, every[[domain]])
                for domain, name in enumerate(self.domains)
            },
            "by_class": {
                name: {"load": shares(counts_E).tolist()}
                for name, counts_E in zip(TOKEN_CLASSES, chosen_DCE.sum(0), strict=True)
                if counts_E.sum() and self.class_DC.any()
            },
        }

    def _spread(self, layer: int, domains: Tensor) -> dict[str, Any]:
        tokens = self.tokens_LD[layer, domains].sum()
        mean_E = self.probability_LDE[layer, domains].sum(0) / tokens
        return {
            "load": shares(self.chosen_LDCE[layer, domains].sum((0, 1))).tolist(),
            "router_entropy_bits": float(entropy_bits(mean_E)),
            "token_entropy_bits": float(self.entropy_LD[layer, domains].sum() / tokens),
            "top1_margin": float(self.margin_LD[layer, domains].sum() / tokens),
            "left_out": float(self.left_out_LD[layer, domains].sum() / tokens),
        }
