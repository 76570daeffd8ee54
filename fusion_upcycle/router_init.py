"""Router initialisers: pure functions `(hidden_size, generator, **options) -> row_D`.

Each new expert's router row is drawn by itself, so that expert e has the same row whatever the
number of experts. Rows are float32 and cast to the output dtype afterwards. An initialiser with a
keyword `input_rms` is told how large the router's inputs are (root mean square over tokens and
dimensions), as the norm before the router makes them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from fusion_upcycle.checks import bare_function, is_number
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.registry import Registry

RouterInit = Callable[[int, Generator], Tensor]

ROUTER_INITS: Registry[Callable[..., Tensor]] = Registry("router_init")

#: Standard deviation of the logits of `normal` where neither of its options is given.
LOGIT_STD = 1.0


@ROUTER_INITS.add
def normal(
    hidden_size: int,
    generator: Generator,
    *,
    logit_std: float | None = None,
    std: float | None = None,
    input_rms: float = 1.0,
) -> Tensor:
    """Independent normal values, so large that the logits at step 0 have a given size.

    By the size of the logits and no more by that of the rows, as that is what routing sees: with
    small logits a token changes its experts at every step of training.

    Args:
        hidden_size: D.
        logit_std: standard deviation of the router's logits over tokens and experts; by default
            `LOGIT_STD`. The rows have `logit_std / (input_rms * sqrt(D))`.
        std: of the rows themselves, instead.
        input_rms: root mean square of the router's inputs.

    Raises:
        UpcyclingError: both sizes, one that is no number above 0, or inputs without a size.
    """
    if logit_std is not None and std is not None:
        raise UpcyclingError(
            f"router logit_std={logit_std!r} and std={std!r} both say how large the rows are. "
            "Give one of the two."
        )
    if logit_std is None and std is None:
        logit_std = LOGIT_STD
    for name, size in (("logit_std", logit_std), ("std", std)):
        if size is not None and not (is_number(size) and size > 0):
            raise UpcyclingError(
                f"router {name}={size!r} must be a number > 0; for an all-zero router choose "
                f"{setting('router_init', 'zeros')}."
            )
    if std is None:
        assert logit_std is not None
        if not (math.isfinite(input_rms) and input_rms > 0):
            raise UpcyclingError(
                f"the router's inputs have size {input_rms:g} by the norm's weight, so that no "
                f"rows give logits of logit_std={logit_std:g}. Look at that weight, or give the "
                "rows' own std."
            )
        std = logit_std / (input_rms * math.sqrt(hidden_size))
    return torch.randn(hidden_size, generator=generator) * std


def with_default(initialiser: Callable[..., Any]) -> Callable[..., Any]:
    """`normal` with its default written out, which a record must not depend on; others as given."""
    given = initialiser.keywords if isinstance(initialiser, partial) else {}
    if bare_function(initialiser) is not normal or {*given.values()} - {None}:
        return initialiser
    return partial(normal, logit_std=LOGIT_STD)


@ROUTER_INITS.add
def zeros(hidden_size: int, generator: Generator) -> Tensor:
    """All-zero rows: every token gets the same k experts with equal weights, until trained.

    Bit-exact in every dtype for k a power of two, so a good conversion check; a poor start for
    training, since ties send all tokens to the same experts.
    """
    return torch.zeros(hidden_size)


def hash_table(vocabulary: int, chosen: int, num_experts: int, generator: Generator) -> Tensor:
    """The experts [V, K] of each token id, drawn once: hash layers (arXiv 2106.04426, section 3).

    The first column is balanced over ids; all K of a row differ.
    """
    first = torch.randperm(vocabulary, generator=generator) % num_experts
    others = torch.rand(vocabulary, num_experts - 1, generator=generator).argsort(-1) + 1
    rest = (first[:, None] + others[:, : chosen - 1]) % num_experts
    return torch.cat([first[:, None], rest], dim=1)
