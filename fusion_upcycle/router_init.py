"""Router initialisers: pure functions `(hidden_size, generator, **options) -> row_D`.

Each new expert's router row is drawn by itself, so that expert e has the same row whatever the
number of experts. Rows are float32 and cast to the output dtype afterwards.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.registry import Registry

RouterInit = Callable[[int, Generator], Tensor]

ROUTER_INITS: Registry[Callable[..., Tensor]] = Registry("router_init")


@ROUTER_INITS.add
def normal(hidden_size: int, generator: Generator, *, std: float = 0.02) -> Tensor:
    """N(0, std): small, so that no expert starts saturated, and tokens spread over experts.

    For hidden states of unit RMS the logits have standard deviation `std * sqrt(D)`.

    Raises:
        UpcyclingError: a `std` of 0 or below, or none.
    """
    if not (is_number(std) and std > 0):
        raise UpcyclingError(
            f"router std={std!r} must be a number > 0 (default 0.02); for an all-zero router "
            "choose router_init=zeros."
        )
    return torch.randn(hidden_size, generator=generator) * std


@ROUTER_INITS.add
def zeros(hidden_size: int, generator: Generator) -> Tensor:
    """All-zero rows: every token gets the same k experts with equal weights, until trained.

    Bit-exact in every dtype for k a power of two, so a good conversion check; a poor start for
    training, since ties send all tokens to the same experts.
    """
    return torch.zeros(hidden_size)
