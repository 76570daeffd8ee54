"""How a router gets new rows: the originals bit for bit, the rest by the plan."""

import pytest
import torch

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.router_extension import ROUTER_EXTENSIONS, bias, copy, noise

PLAN = (0, 1, 2, 2, 0, 2)


def weight(dtype: torch.dtype = torch.float32, columns: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(3, columns, generator=generator) * 0.3 + 1.0).to(dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ROUTER_EXTENSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axes", [1, 2])
def test_originals_stay_bit_for_bit_and_nothing_is_written_to(
    name: str, dtype: torch.dtype, axes: int
) -> None:
    source = weight(dtype)[:, 0] if axes == 1 else weight(dtype)
    before = source.clone()
    made = ROUTER_EXTENSIONS[name](source, PLAN, generator())
    assert made.shape == (6, *source.shape[1:]) and made.dtype == dtype
    assert torch.equal(made[:3], source)
    assert torch.equal(source, before)
    assert torch.equal(made, ROUTER_EXTENSIONS[name](source, PLAN, generator()))


def test_a_copy_has_the_row_of_its_source_expert() -> None:
    assert torch.equal(copy(weight(), PLAN, generator()), weight()[list(PLAN)])


def test_noise_is_relative_to_the_spread_of_the_router() -> None:
    source = weight()
    made = noise(source, PLAN, generator(), noise_std=0.05)
    added = made[3:] - source[[2, 0, 2]]
    assert added.std().item() == pytest.approx(0.05 * source.std().item(), rel=0.05)
    assert abs(added.mean().item()) < 3 * 0.05 * 0.3 / 12000**0.5
    # Two copies of one expert differ from each other too.
    assert not torch.equal(made[3], made[5])
    assert not torch.equal(made, noise(source, PLAN, generator(1), noise_std=0.05))


@pytest.mark.parametrize("extension", [noise, bias])
def test_no_noise_is_another_extension(extension: object) -> None:
    with pytest.raises(UpcyclingError, match=r"router_extension=.copy"):
        extension(weight(), PLAN, generator(), noise_std=0)  # type: ignore[operator]


def test_noise_on_a_bias_without_spread_is_refused() -> None:
    with pytest.raises(UpcyclingError, match=r"same for all experts.*router_extension=.noise"):
        bias(torch.zeros(3), PLAN, generator())
