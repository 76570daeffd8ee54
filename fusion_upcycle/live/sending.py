"""Tokens sent to given experts, whatever the routers say: bounds of what routing could give.

Shapes: N tokens, E experts, K experts per token.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.routers import find_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Said = tuple[Tensor, Tensor, Tensor]


@contextmanager
def sending(model: "PreTrainedModel", expert: int | None) -> Iterator[None]:
    """Within the block every MoE layer sends its tokens to `expert`, or to any.

    The weights of a token's experts sum up to what the router's own do.

    Args:
        model: an MoE whose tokens choose experts.
        expert: its index; None draws K experts for each token of each layer, all equally likely,
            with even weights, the same in each block.

    Raises:
        UpcyclingError: a model without such routers, or without this expert.
    """
    routers = find_routers(model)
    routers.close()
    if not routers or any(routers.expert_choice):
        raise UpcyclingError(
            f"{type(model).__name__} has no routers by which tokens choose experts, so that none "
            "can be sent to an expert. Leave experts out."
        )
    if expert is not None and not 0 <= expert < routers.num_experts:
        raise UpcyclingError(
            f"expert {expert} is not one of the {routers.num_experts} experts, 0 to "
            f"{routers.num_experts - 1}, that each MoE layer has."
        )
    generator = torch.Generator().manual_seed(0)

    def send(_: nn.Module, __: tuple[Tensor, ...], output: Said) -> Said:
        logits, weights, chosen = output
        if expert is not None:  # K times the same
            return logits, weights, torch.full_like(chosen, expert)
        drawn = torch.rand((chosen[..., 0].numel(), routers.num_experts), generator=generator)
        experts = drawn.argsort(-1)[:, : chosen.shape[-1]].to(chosen).view_as(chosen)
        return logits, weights.mean(-1, keepdim=True).expand_as(weights), experts

    with ExitStack() as hooks:
        for module in routers.modules.values():
            hooks.callback(module.register_forward_hook(send).remove)
        yield
