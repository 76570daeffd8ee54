"""An expert initialiser and a router initialiser: pure functions, options by keyword."""

import torch
from torch import Generator, Tensor

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import Expert


def flip(expert: Expert, generator: Generator, *, share: float = 0.1) -> Expert:
    """Turn the sign of a share of the neurons' outputs: what they add, they now take away.

    Args:
        share: of the neurons, 0 to 1.
    """
    if not 0 <= share <= 1:
        raise UpcyclingError(f"share={share!r} of expert_init=flip must be from 0 to 1.")
    neurons = expert.down_proj_DF.shape[1]
    flipped = torch.rand(neurons, generator=generator) < share
    return expert.map(lambda down_DF: torch.where(flipped, -down_DF, down_DF), ["down_proj_DF"])


def orthogonal(hidden_size: int, generator: Generator, *, norm: float = 0.5) -> Tensor:
    """A random direction of a given length [D]; in many dimensions nearly orthogonal to others.

    Args:
        norm: length of the row.
    """
    row = torch.randn(hidden_size, generator=generator)
    return row * (norm / row.norm())
