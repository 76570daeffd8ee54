"""Router extensions: how the M rows of an expanded router are made of the E rows it had.

Pure functions `(weight, source_experts, generator, **options) -> weight of M experts`. The first
rows of a plan are those of the originals, and stay bit for bit; row e of the rest starts from that
of its source expert. The same functions extend a selection bias [E].

Copies with (nearly) the same row are picked together: with top-k fixed the function is not kept.
`split` and `fit` (`fusion_upcycle.expansion`), which look at router inputs, mend that.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.registry import Registry

RouterExtension = Callable[[Tensor, Sequence[int], Generator], Tensor]

ROUTER_EXTENSIONS: Registry[Callable[..., Tensor]] = Registry("router_extension")


@ROUTER_EXTENSIONS.add
def copy(weight_ED: Tensor, source_experts: Sequence[int], generator: Generator) -> Tensor:
    """Every copy has the row of its source expert."""
    return weight_ED[list(source_experts)]


@ROUTER_EXTENSIONS.add
def noise(
    weight_ED: Tensor,
    source_experts: Sequence[int],
    generator: Generator,
    *,
    noise_std: float = 0.01,
) -> Tensor:
    """`copy`, and `+ randn * noise_std * std(W)` on the new rows.

    Args:
        noise_std: relative to the standard deviation of all that is extended.

    Raises:
        UpcyclingError: a `noise_std` of 0 or below, or none.
    """
    if not (is_number(noise_std) and noise_std > 0):
        raise UpcyclingError(
            f"router noise_std={noise_std!r} must be a number > 0 (default 0.01); for none choose "
            f"{setting('router_extension', 'copy')}."
        )
    first = len(weight_ED)
    result = weight_ED[list(source_experts)]
    precise = weight_ED.to(torch.promote_types(weight_ED.dtype, torch.float32))
    drawn = torch.randn(result[first:].shape, generator=generator, dtype=precise.dtype)
    new = precise[list(source_experts[first:])] + drawn * (noise_std * precise.std(correction=0))
    result[first:] = new.to(result.dtype)
    return result


@ROUTER_EXTENSIONS.add
def bias(
    weight_E: Tensor,
    source_experts: Sequence[int],
    generator: Generator,
    *,
    noise_std: float = 0.01,
) -> Tensor:
    """`noise` on the selection bias, for families that have one; the rows are copied.

    Args:
        noise_std: relative to the standard deviation of the bias, which must not be 0.

    Raises:
        UpcyclingError: a selection bias that is the same for all experts; as `noise`.
    """
    if weight_E.numel() and weight_E.std(correction=0) == 0:
        raise UpcyclingError(
            "router_extension=bias draws noise relative to the spread of the selection bias, and "
            "this bias is the same for all experts. Choose "
            f"{setting('router_extension', 'noise')}."
        )
    return noise(weight_E, source_experts, generator, noise_std=noise_std)
