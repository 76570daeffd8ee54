"""Router initialisers: one row for each expert."""

import pytest
import torch

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.router_init import normal, zeros


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_normal_rows_have_the_given_std_and_mean_zero(std: float) -> None:
    row = normal(40_000, generator(), std=std)
    assert row.std() == pytest.approx(std, rel=0.02)
    assert abs(row.mean()) < 5 * std / 200


def test_normal_has_the_documented_default() -> None:
    assert torch.equal(normal(64, generator()), normal(64, generator(), std=0.02))


def test_normal_gives_unit_rms_states_logits_of_std_times_root_d() -> None:
    hidden = torch.randn(2000, 256, generator=generator(1))
    rows = torch.stack([normal(256, generator(seed)) for seed in range(8)])
    assert (hidden @ rows.T).std() == pytest.approx(0.02 * 16, rel=0.1)


def test_normal_rows_are_repeatable_and_differ_between_generators() -> None:
    assert torch.equal(normal(64, generator(1)), normal(64, generator(1)))
    assert not torch.equal(normal(64, generator(1)), normal(64, generator(2)))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_normal_refuses_a_std_that_is_not_a_size(std: float) -> None:
    with pytest.raises(UpcyclingError, match="std"):
        normal(8, generator(), std=std)


def test_zeros_are_zeros() -> None:
    row = zeros(33, generator())
    assert row.shape == (33,)
    assert not row.any()


@pytest.mark.parametrize("init", [normal, zeros])
def test_rows_are_float32_of_the_hidden_size(init: object) -> None:
    row = init(33, generator())  # type: ignore[operator]
    assert (row.dtype, row.shape) == (torch.float32, (33,))
