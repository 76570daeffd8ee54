"""Experts of every form: with a gate or without, with biases or without."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fusion_upcycle.checks import told
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expert_init import EXPERT_INITS, copy, drop, noise, permute, subset, svd
from fusion_upcycle.experts import (
    ALL_PARTS,
    EXPERT_PARTS,
    Expert,
    neuron_axis,
    part_shape,
    take_neurons,
)
from fusion_upcycle.upcycling.options import check_expert_init, make_options
from fusion_upcycle.upcycling.shards import Sharding, part_scales, repeat_neurons

NEURONS, HIDDEN = 24, 7
TWO = ("up_proj_FD", "down_proj_DF")
FORMS = {
    "gated": EXPERT_PARTS,
    "gated, biases": ALL_PARTS,
    "two matrices": TWO,
    "two matrices, biases": (*TWO, "up_bias_F", "down_bias_D"),
    "bias of down alone": (*TWO, "down_bias_D"),
}
every_form = pytest.mark.parametrize("parts", FORMS.values(), ids=FORMS)
every_init = pytest.mark.parametrize(
    "init", [told(init, index=1, num_experts=4) for init in EXPERT_INITS.values()], ids=EXPERT_INITS
)


def make_expert(parts: tuple[str, ...], dtype: torch.dtype = torch.float64) -> Expert:
    """The same values of a part in every form; no two parts are alike."""
    drawn = {
        part: torch.randn(part_shape(part, NEURONS, HIDDEN), generator=generator(50 + number))
        for number, part in enumerate(ALL_PARTS)
    }
    return Expert.from_parts({part: drawn[part].to(dtype) for part in parts})


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def ffn(expert: Expert) -> Tensor:
    """What the expert makes of some tokens, written down by hand."""
    x = torch.randn(5, HIDDEN, generator=generator(4), dtype=torch.float64)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = torch.einsum("ni,oi->no", x, weight)
        return product if bias is None else product + bias

    up = linear(x, expert.up_proj_FD, expert.up_bias_F)
    if expert.gate_proj_FD is None:
        hidden = F.gelu(up)
    else:
        hidden = F.silu(linear(x, expert.gate_proj_FD, expert.gate_bias_F)) * up
    return linear(hidden, expert.down_proj_DF, expert.down_bias_D)


def same_bits(a: Expert, b: Expert) -> bool:
    return a.parts.keys() == b.parts.keys() and all(
        torch.equal(weight, b.parts[part]) for part, weight in a.parts.items()
    )


def scaled(expert: Expert, scales: dict[str, float]) -> Expert:
    assert scales.keys() == expert.parts.keys()
    return Expert.from_parts({part: w * scales[part] for part, w in expert.parts.items()})


@every_form
def test_an_expert_has_the_parts_that_it_was_given_in_a_fixed_order(parts: tuple[str, ...]) -> None:
    expert = make_expert(tuple(reversed(parts)))
    assert tuple(expert.parts) == parts
    assert all(getattr(expert, part) is None for part in set(ALL_PARTS) - set(parts))
    assert tuple(expert.map(torch.zeros_like).parts) == parts


def test_map_changes_the_parts_that_it_is_told_and_keeps_the_rest() -> None:
    expert = make_expert(ALL_PARTS)
    made = expert.map(torch.zeros_like, ["up_bias_F"])
    assert not made.parts["up_bias_F"].any()
    assert all(made.parts[part] is expert.parts[part] for part in ALL_PARTS if part != "up_bias_F")


def test_the_three_matrices_come_first_in_an_expert() -> None:
    gate, up, down = make_expert(EXPERT_PARTS).parts.values()
    assert same_bits(Expert(gate, up, down), make_expert(EXPERT_PARTS))


def test_a_bias_of_a_gate_that_is_not_there_is_refused() -> None:
    with pytest.raises(UpcyclingError, match=r"gate_bias_F, but no gate_proj_FD.*up_bias_F"):
        make_expert((*TWO, "gate_bias_F"))


def test_the_name_of_a_part_says_its_shape_and_where_its_neurons_are() -> None:
    shapes = [(24, 7), (24, 7), (7, 24), (24,), (24,), (7,)]
    assert [part_shape(part, 24, 7) for part in ALL_PARTS] == shapes
    assert [neuron_axis(part) for part in ALL_PARTS] == [0, 0, 1, 0, 0, None]


@every_form
@every_init
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_form_dtype_and_source_are_kept(
    init: Callable[..., Expert], parts: tuple[str, ...], dtype: torch.dtype
) -> None:
    source = make_expert(parts, dtype)
    made = init(source, generator())
    described = {part: (weight.dtype, weight.shape) for part, weight in made.parts.items()}
    assert described == {part: (dtype, weight.shape) for part, weight in source.parts.items()}
    assert same_bits(source, make_expert(parts, dtype))


@every_init
@pytest.mark.parametrize("matrices", [EXPERT_PARTS, TWO], ids=str)
def test_biases_do_not_change_what_the_matrices_become(
    init: Callable[..., Expert], matrices: tuple[str, ...]
) -> None:
    biases = tuple(part for part in ALL_PARTS[3:] if matrices == EXPERT_PARTS or part[0] != "g")
    without = init(make_expert(matrices), generator())
    made = init(make_expert(matrices + biases), generator())
    assert same_bits(Expert.from_parts({part: made.parts[part] for part in matrices}), without)


@every_form
@pytest.mark.parametrize("init", [copy, permute])
def test_copy_and_permute_keep_the_function(
    init: Callable[..., Expert], parts: tuple[str, ...]
) -> None:
    source = make_expert(parts)
    made = init(source, generator())
    assert same_bits(made, source) == (init is copy)
    torch.testing.assert_close(ffn(made), ffn(source))


@pytest.mark.parametrize("init", [noise, partial(svd, kept_energy=0.5)])
def test_noise_and_svd_change_every_matrix_and_no_bias(init: Callable[..., Expert]) -> None:
    source = make_expert(ALL_PARTS)
    made = init(source, generator())
    changed = [part for part, w in source.parts.items() if not torch.equal(made.parts[part], w)]
    assert tuple(changed) == EXPERT_PARTS


@pytest.mark.parametrize("paired", [True, False])
def test_drop_redraws_the_biases_of_the_neurons_whose_rows_it_redraws(paired: bool) -> None:
    source = make_expert(ALL_PARTS)
    made = drop(source, generator(), drop_ratio=0.3, paired=paired)
    changed = {part: made.parts[part] != weight for part, weight in source.parts.items()}
    for matrix in ("gate", "up"):
        assert changed[f"{matrix}_bias_F"].sum() == 7
        assert torch.equal(changed[f"{matrix}_bias_F"], changed[f"{matrix}_proj_FD"].any(1))
    assert torch.equal(changed["gate_bias_F"], changed["up_bias_F"]) == paired
    assert not changed["down_bias_D"].any()


def test_drop_draws_biases_after_the_matrices_from_the_slice_of_the_bias() -> None:
    source = make_expert(FORMS["two matrices, biases"])
    replay = generator(5)
    dropped = torch.randperm(NEURONS, generator=replay)[:12]
    for _ in TWO:
        torch.randn(12, HIDDEN, generator=replay, dtype=torch.float64)
    old = source.parts["up_bias_F"][dropped]
    drawn = torch.randn(12, generator=replay, dtype=torch.float64)
    made = drop(source, generator(5)).parts["up_bias_F"][dropped]
    torch.testing.assert_close(made, old.mean() + drawn * old.std(correction=0))


@every_form
def test_the_subsets_of_all_experts_have_the_ffn_as_their_mean(parts: tuple[str, ...]) -> None:
    dense = make_expert(parts)
    made = [subset(dense, generator(), index=e, num_experts=5) for e in range(5)]
    # k = N and a zero router: a weight of 1/N for each.
    torch.testing.assert_close(sum(ffn(expert) / 5 for expert in made), ffn(dense))
    assert all((expert.up_proj_FD.abs().sum(1) > 0).sum() in (4, 5) for expert in made)


#: (experts, chosen, weight of each of these, sum of their weights)
ROUTERS = {
    "one group": (6, range(3), 1 / 3, 1.0),
    "two groups": (6, range(6), 1 / 6, 1.0),
    "softmax, not normalised": (6, range(3, 6), 1 / 6, 3 * (1 / 6)),
    "sigmoid, not normalised": (6, range(3), 1 / 2, 3 * (1 / 2)),
}


@every_form
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_chosen_shards_of_whole_groups_give_the_ffn(
    router: tuple[int, range, float, float], share: float, parts: tuple[str, ...]
) -> None:
    number, chosen, weight, weights_sum = router
    dense, sharding = make_expert(parts), Sharding(NEURONS, 8, number)
    scales = part_scales(parts, sharding, weights_sum=weights_sum, share=share)
    shards = [take_neurons(dense, sharding.neurons(0, 0, expert)) for expert in chosen]
    assert all(shard.up_proj_FD.shape == (8, HIDDEN) for shard in shards)
    outputs = [weight * ffn(scaled(shard, scales)) for shard in shards]
    torch.testing.assert_close(sum(outputs), share * ffn(dense))


def test_every_group_has_the_same_shards() -> None:
    sharding = Sharding(NEURONS, 8, 6)
    shards = [take_neurons(make_expert(ALL_PARTS), sharding.neurons(0, 0, e)) for e in range(6)]
    assert same_bits(shards[1], shards[4]) and not same_bits(shards[1], shards[3])


def test_the_bias_of_down_is_not_scaled_by_the_number_of_shards() -> None:
    scales = part_scales(ALL_PARTS, Sharding(24, 6, 4), share=0.5)
    assert scales == dict.fromkeys(ALL_PARTS, 1.0) | {"down_proj_DF": 2.0, "down_bias_D": 0.5}
    assert tuple(part_scales(TWO, Sharding(24, 6, 4))) == TWO


@every_form
def test_shards_of_a_shuffled_copy_give_the_ffn(parts: tuple[str, ...]) -> None:
    dense, sharding = make_expert(parts), Sharding(NEURONS, 8, 3, shuffled=True)
    scales = part_scales(parts, sharding)
    shards = [take_neurons(dense, sharding.neurons(0, 0, expert)) for expert in range(3)]
    torch.testing.assert_close(sum(ffn(scaled(shard, scales)) / 3 for shard in shards), ffn(dense))


@every_form
@pytest.mark.parametrize("size", [24, 30, 48, 60])
def test_a_wider_ffn_computes_the_same(size: int, parts: tuple[str, ...]) -> None:
    dense = make_expert(parts)
    wide = Expert.from_parts({p: repeat_neurons(p, w, size) for p, w in dense.parts.items()})
    assert wide.down_proj_DF.shape == (HIDDEN, size)
    torch.testing.assert_close(ffn(wide), ffn(dense))


def halve(expert: Expert, generator: Generator) -> Expert:
    """A user's own initialiser, who thinks of three matrices."""
    gate, up, down = (getattr(expert, part) for part in EXPERT_PARTS)
    return Expert(gate.clone(), up, down / 2)


@every_form
@every_init
def test_our_initialisers_pass_the_rehearsal_of_every_form(
    init: Callable[..., Expert], parts: tuple[str, ...]
) -> None:
    check_expert_init(init, parts)


@pytest.mark.parametrize(
    ("form", "match"),
    [
        ("gated, biases", r"with the same parts \(gate_proj_FD, .*, down_bias_D\).*Expert.map"),
        ("two matrices", "fails on an expert of up_proj_FD, down_proj_DF: .*clone.*expert.parts"),
        ("two matrices, biases", "fails on an expert of up_proj_FD, down_proj_DF, up_bias_F, dow"),
    ],
)
def test_what_knows_three_matrices_alone_is_refused_where_there_are_others(
    form: str, match: str
) -> None:
    assert make_options(expert_init=halve).expert_initialiser(0) is halve
    with pytest.raises(UpcyclingError, match=match):
        check_expert_init(halve, FORMS[form])


def test_what_writes_into_a_bias_is_refused() -> None:
    def scribble(expert: Expert, generator: Generator) -> Expert:
        return expert.map(lambda bias: bias.add_(1), ["down_bias_D"])

    make_options(expert_init=scribble)
    with pytest.raises(UpcyclingError, match="writes into the expert"):
        check_expert_init(scribble, ALL_PARTS)


def test_what_an_initialiser_itself_refuses_is_said_in_its_words() -> None:
    with pytest.raises(UpcyclingError, match=r"^noise_std=-1 must"):
        check_expert_init(partial(noise, noise_std=-1), FORMS["two matrices"])
