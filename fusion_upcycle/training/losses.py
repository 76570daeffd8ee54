"""The losses of routing, and the update that needs none.

Shapes: L MoE layers, E experts, N tokens, K experts per token.
"""

import torch
from torch import Tensor


def balance_loss(load_LE: Tensor, probability_LE: Tensor) -> Tensor:
    """Switch balance loss, `E * sum_i f_i P_i`, per layer, then averaged over layers.

    Uniform routing gives 1, a layer that sends all tokens to the same K experts up to E/K.
    The transformers function pools the layers first, so that layers collapsed onto different
    experts look balanced to it. [arXiv 2101.03961, equation 4]

    Args:
        load_LE: f, each expert's share of the assignments; rows sum to 1; no gradient.
        probability_LE: P, mean router probability; rows sum to 1.
    """
    num_experts = load_LE.shape[1]
    return num_experts * (load_LE.detach() * probability_LE).sum(1).mean()


def z_loss(logits_LNE: Tensor) -> Tensor:
    """Mean of `logsumexp(logits)^2`, which keeps router logits small. [arXiv 2202.08906, eq. 5]"""
    return logits_LNE.float().logsumexp(-1).square().mean()


def balanced_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The selection bias moved towards even load, `b_i + rate * sign(mean load - load_i)`.

    Loss-free balancing: no gradient flows from it. [arXiv 2408.15664, algorithm 1]
    """
    return bias_E + rate * torch.sign(load_E.mean() - load_E)
