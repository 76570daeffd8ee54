"""Expert initialisers against the formulas of their papers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_upcycle import expert_init
from fusion_upcycle.checks import told
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expert_init import EXPERT_INITS, copy, drop, noise, permute, svd
from fusion_upcycle.experts import EXPERT_PARTS, Expert

NEURONS, HIDDEN = 201, 150  # odd, so that floor(r * F) is not r * F
#: Mean and standard deviation of gate, up and down: all different.
STATISTICS = ((0.3, 0.5), (-0.7, 2.0), (1.1, 0.1))


def make_expert(dtype: torch.dtype = torch.float32) -> Expert:
    generator = torch.Generator().manual_seed(11)
    gate, up, down = (
        (torch.randn(NEURONS, HIDDEN, generator=generator) * std + mean).to(dtype)
        for mean, std in STATISTICS
    )
    return Expert(gate, up, down.T.contiguous())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neurons_first(expert: Expert) -> dict[str, Tensor]:
    """Each matrix with neurons as rows."""
    return {
        "gate": expert.gate_proj_FD,
        "up": expert.up_proj_FD,
        "down": expert.down_proj_DF.T,
    }


def changed_neurons(before: Expert, after: Expert) -> dict[str, Tensor]:
    """Per matrix, the indices of neurons that are not bit-equal."""
    old, new = neurons_first(before), neurons_first(after)
    return {part: (old[part] != new[part]).any(1).nonzero().flatten() for part in old}


def ffn(expert: Expert, x: Tensor) -> Tensor:
    hidden = F.silu(x @ expert.gate_proj_FD.T) * (x @ expert.up_proj_FD.T)
    return hidden @ expert.down_proj_DF.T


def equal(a: Expert, b: Expert) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in EXPERT_PARTS)


#: Expert 1 of 4, for those that want to know.
every_init = pytest.mark.parametrize(
    "init", [told(init, index=1, num_experts=4) for init in EXPERT_INITS.values()], ids=EXPERT_INITS
)


@every_init
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_kept(init: Callable[..., Expert], dtype: torch.dtype) -> None:
    source = make_expert(dtype)
    made = init(source, generator())
    for part in EXPERT_PARTS:
        before, after = getattr(source, part), getattr(made, part)
        assert (after.dtype, after.shape) == (before.dtype, before.shape)


@every_init
def test_the_same_generator_gives_the_same_bits(init: Callable[..., Expert]) -> None:
    assert equal(init(make_expert(), generator(3)), init(make_expert(), generator(3)))


@pytest.mark.parametrize("init", [noise, drop, permute, svd])
def test_another_generator_gives_another_expert(init: Callable[..., Expert]) -> None:
    assert not equal(init(make_expert(), generator(3)), init(make_expert(), generator(4)))


@every_init
def test_the_source_expert_is_not_written_to(init: Callable[..., Expert]) -> None:
    source = make_expert()
    init(source, generator())
    assert equal(source, make_expert())


def test_copy_is_the_source_expert() -> None:
    assert equal(copy(make_expert(), generator()), make_expert())


@pytest.mark.parametrize("noise_std", [0.01, 0.3])
def test_noise_is_relative_to_each_matrix_own_spread(noise_std: float) -> None:
    source = make_expert(torch.float64)
    made = noise(source, generator(), noise_std=noise_std)
    for part in EXPERT_PARTS:
        weight = getattr(source, part)
        added = getattr(made, part) - weight
        assert (added.std() / weight.std()).item() == pytest.approx(noise_std, rel=0.03)
        assert abs(added.mean()) < 5 * added.std() / added.numel() ** 0.5


def test_noise_has_the_documented_default() -> None:
    made, explicit = (
        noise(make_expert(), generator()),
        noise(make_expert(), generator(), noise_std=0.01),
    )
    assert equal(made, explicit)


def test_noise_is_normally_distributed() -> None:
    source = make_expert(torch.float64)
    added = noise(source, generator(), noise_std=1.0).gate_proj_FD - source.gate_proj_FD
    standardised = added / added.std()
    assert (standardised**4).mean() == pytest.approx(3.0, rel=0.1)


def test_noise_in_half_precision_is_added_before_rounding() -> None:
    source = make_expert(torch.bfloat16)
    made = noise(source, generator(), noise_std=0.2)
    exact = noise(source.map(Tensor.float), generator(), noise_std=0.2)
    assert equal(made, exact.map(Tensor.bfloat16))


def test_noise_of_zero_changes_nothing() -> None:
    assert equal(noise(make_expert(), generator(), noise_std=0.0), make_expert())


@pytest.mark.parametrize("noise_std", [-0.1, float("nan"), float("inf")])
def test_noise_refuses_a_std_that_is_not_a_size(noise_std: float) -> None:
    with pytest.raises(UpcyclingError, match="noise_std"):
        noise(make_expert(), generator(), noise_std=noise_std)


@pytest.mark.parametrize("ratio", [0.0, 0.004, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("paired", [True, False])
def test_drop_redraws_exactly_the_floor_of_the_share(ratio: float, paired: bool) -> None:
    source = make_expert()
    made = drop(source, generator(), drop_ratio=ratio, paired=paired)
    for indices in changed_neurons(source, made).values():
        assert len(indices) == int(ratio * NEURONS)


def test_drop_redraws_every_weight_of_a_dropped_neuron() -> None:
    source = make_expert()
    made = drop(source, generator())
    for part, indices in changed_neurons(source, made).items():
        old, new = neurons_first(source)[part][indices], neurons_first(made)[part][indices]
        assert (old != new).float().mean() > 0.999


def test_paired_drop_takes_the_same_neurons_in_all_matrices() -> None:
    changed = changed_neurons(make_expert(), drop(make_expert(), generator()))
    assert torch.equal(changed["gate"], changed["up"])
    assert torch.equal(changed["gate"], changed["down"])


def test_unpaired_drop_draws_neurons_for_each_matrix() -> None:
    changed = changed_neurons(make_expert(), drop(make_expert(), generator(), paired=False))
    gate, up, down = (set(indices.tolist()) for indices in changed.values())
    # Independent halves of 201 share 50 of 100 neurons on average, with a spread of 3.6.
    for a, b in ((gate, up), (gate, down), (up, down)):
        assert 30 < len(a & b) < 70


def test_drop_does_not_always_take_the_first_neurons() -> None:
    changed = changed_neurons(make_expert(), drop(make_expert(), generator()))
    assert changed["gate"].float().mean() == pytest.approx(NEURONS / 2, abs=20)


def test_drop_draws_from_the_statistics_of_the_dropped_slice() -> None:
    """A slice that is unlike the rest of its matrix shows which of the two was measured."""
    source = make_expert(torch.float64)
    dropped = changed_neurons(source, drop(source, generator()))["gate"]
    for weight in neurons_first(source).values():  # views: this edits the expert
        weight[dropped] = weight[dropped] * 3 + 40
    made = drop(source, generator())
    for part, weight in neurons_first(source).items():
        old, new = weight[dropped], neurons_first(made)[part][dropped]
        assert abs(new.mean() - old.mean()) < 5 * old.std() / old.numel() ** 0.5
        assert (new.std() / old.std()).item() == pytest.approx(1, rel=0.03)


def test_drop_matches_the_formula_on_the_very_same_draws() -> None:
    source = make_expert()
    replay = generator(5)
    dropped = torch.randperm(NEURONS, generator=replay)[: NEURONS // 2]
    old = source.gate_proj_FD[dropped]
    fresh = old.mean() + torch.randn(old.shape, generator=replay) * old.std(correction=0)
    made = drop(source, generator(5))
    torch.testing.assert_close(made.gate_proj_FD[dropped], fresh)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_drop_refuses_a_share_outside_0_to_1(ratio: float) -> None:
    with pytest.raises(UpcyclingError, match="drop_ratio"):
        drop(make_expert(), generator(), drop_ratio=ratio)


def test_permute_keeps_the_function() -> None:
    source = make_expert(torch.float64)
    x = torch.randn(7, HIDDEN, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(ffn(permute(source, generator()), x), ffn(source, x))


def test_permute_applies_one_order_to_all_three_matrices() -> None:
    source = make_expert()
    order = torch.randperm(NEURONS, generator=generator(9))
    made = neurons_first(permute(source, generator(9)))
    for part, weight in neurons_first(source).items():
        assert torch.equal(made[part], weight[order])


def test_permute_moves_neurons() -> None:
    changed = changed_neurons(make_expert(), permute(make_expert(), generator()))
    assert len(changed["gate"]) > 0.9 * NEURONS


@pytest.mark.parametrize("kept_energy", [0.5, 0.9])
def test_svd_keeps_the_spectrum_and_the_strong_directions(kept_energy: float) -> None:
    source = make_expert(torch.float64)
    made = svd(source, generator(), kept_energy=kept_energy)
    for part in EXPERT_PARTS:
        before, after = getattr(source, part), getattr(made, part)
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        torch.testing.assert_close(torch.linalg.svdvals(after), values)
        energy = values.square().cumsum(0) / values.square().sum()
        strong = int((energy < kept_energy).sum()) + 1  # until the share is reached
        kept = (left[:, :strong] * values[:strong]) @ right[:strong]
        weak, turned = before - kept, after - kept
        # What is strong stays, and the rest lies in the space that it lay in.
        assert (left[:, :strong].T @ turned).abs().max() < 1e-9
        assert (turned @ right[:strong].T).abs().max() < 1e-9
        change = (turned - weak).norm() / weak.norm()
        assert 1.2 < change < 1.6  # a rotation at random: sqrt(2)


def test_svd_that_keeps_everything_is_the_source() -> None:
    made = svd(make_expert(), generator(), kept_energy=1.0)
    for part, weight in make_expert().parts.items():
        torch.testing.assert_close(getattr(made, part), weight)


def test_svd_decomposes_a_matrix_once_for_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the bits that it gives an expert alone, wherever the matrix lies."""
    source = make_expert()
    alone = []
    for seed in range(4):
        expert_init._DIRECTIONS.clear()
        alone.append(svd(source, generator(seed)))
    expert_init._DIRECTIONS.clear()
    found, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: found.append(x.shape) or eigh(x))
    for seed in range(4):
        copied = source.map(Tensor.clone)
        assert equal(svd(copied, generator(seed)), alone[seed])
    assert len(found) == 3
    other = source.map(lambda weight: weight + 1)
    assert not equal(svd(other, generator()), alone[0])
    assert len(found) == 6
    assert len(expert_init._DIRECTIONS) == 3  # the memory of one FFN


def test_svd_of_zeros_is_zero() -> None:
    zeros = Expert(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(3, 4))
    assert equal(svd(zeros, generator()), zeros)


@pytest.mark.parametrize("kept_energy", [-0.1, 1.1, float("nan"), "0.9"])
def test_svd_refuses_a_share_that_is_none(kept_energy: object) -> None:
    with pytest.raises(UpcyclingError, match="kept_energy"):
        svd(make_expert(), generator(), kept_energy=kept_energy)  # type: ignore[arg-type]
