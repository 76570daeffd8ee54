"""What the routers of one forward pass said, stack by stack of layers, padding left out.

Shapes: B rows, T tokens of a row, N tokens that are no padding, L routers of a stack, E experts, K
experts per token, C tokens per expert.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_upcycle.live.routers import Routed, Routers, expert_counts
from fusion_upcycle.training.losses import balance_loss, z_loss

if TYPE_CHECKING:
    from fusion_upcycle.training.health import RoutingTotals


@dataclass(frozen=True)
class StackRouting:
    """The routers of one stack: encoder, decoder, or the only one.

    Attributes:
        places: of its routers among all.
        logits_LNE: with gradient.
        counts_LE: how often each expert was chosen, or chose.
        left_out_L: tokens that no expert chose, in expert choice; None where tokens choose.
    """

    places: Sequence[int]
    logits_LNE: Tensor
    counts_LE: Tensor
    left_out_L: Tensor | None


def by_stack(
    routers: Routers, routed: Routed, kept: Mapping[str, Tensor]
) -> Iterator[StackRouting]:
    """Each stack that has routers.

    Args:
        kept: stack -> what of its tokens is no padding, [B, T]; stacks without padding have none.
    """
    expert_choice = routers.expert_choice
    for stack, places in routers.stacks.items():
        if not places:
            continue
        logits_LNE = torch.stack([routed.logits[place] for place in places])
        chosen = [routed.chosen[place] for place in places]
        kept_N = kept[stack].flatten() if stack in kept else None
        if kept_N is not None:
            logits_LNE = logits_LNE[:, kept_N]
        if expert_choice[places[0]]:
            tokens = len(routed.logits[places[0]])
            everything = torch.ones(tokens, dtype=torch.bool, device=logits_LNE.device)
            of_use_N = everything if kept_N is None else kept_N
            counts = [of_use_N[chosen_EC].sum(1).float() for chosen_EC in chosen]
            left_out = [(of_use_N & ~takers(c, tokens).any(1)).sum() for c in chosen]
            yield StackRouting(places, logits_LNE, torch.stack(counts), torch.stack(left_out))
        else:
            rows = [c if kept_N is None else c[kept_N] for c in chosen]
            counts = [expert_counts(chosen_NK, routers.num_experts) for chosen_NK in rows]
            yield StackRouting(places, logits_LNE, torch.stack(counts), None)


def routing_losses(
    routers: Routers,
    stacks: Iterable[StackRouting],
    counts_LE: Tensor,
    totals: "RoutingTotals",
    reduce: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Balance loss, of the layers whose tokens choose, and z loss: means over layers.

    Args:
        counts_LE: choices of the step so far, of all layers and devices; these are added.
        totals: are told of them, too.
        reduce: over devices, as Lightning's strategies have it.
    """
    balances, zs = [], []
    for stack in stacks:
        places = list(stack.places)
        probabilities_LNE = routers.probabilities(stack.logits_LNE)
        with torch.no_grad():
            counts_LE[places] += reduce(stack.counts_LE, reduce_op="sum")
            totals.add(stack, probabilities_LNE)
        zs.append((len(places), z_loss(stack.logits_LNE)))
        if stack.left_out_L is None:
            load_LE = counts_LE[places] / counts_LE[places].sum(1, keepdim=True)
            balances.append((len(places), balance_loss(load_LE, probabilities_LNE.mean(1))))
    z = _mean(zs)
    return (_mean(balances) if balances else torch.zeros_like(z)), z


def _mean(of_stacks: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Mean over layers of what are means over the layers of a stack."""
    layers = sum(number for number, _ in of_stacks)
    return torch.stack([number / layers * mean for number, mean in of_stacks]).sum()


def takers(chosen_EC: Tensor, tokens: int) -> Tensor:
    """In expert choice, which experts chose a token, [tokens, E]."""
    taken_ET = torch.zeros(len(chosen_EC), tokens, dtype=torch.bool, device=chosen_EC.device)
    return taken_ET.scatter(1, chosen_EC, True).t()
