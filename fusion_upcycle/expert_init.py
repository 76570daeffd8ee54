"""Expert initialisers: pure functions `(expert, generator, **options) -> Expert`.

An initialiser turns the source expert into one new expert. It sees the expert in the dtype of the
result, must not write into it (it may be a view of the source's file), and returns that dtype.
An expert may lack the gate and may have biases (`expert.parts`): each function here takes all
forms, and draws for the matrices first, so that these are the same with biases and without.
To add one: a function here with `@EXPERT_INITS.add`, a YAML under `config/method/expert_init/`, a
test; a package of its own adds one as an entry point (`fusion_upcycle.expert_init`).
"""

import math
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import EXPERT_PARTS, Expert, neuron_axis, take_neurons
from fusion_upcycle.registry import Registry

ExpertInit = Callable[[Expert, Generator], Expert]

EXPERT_INITS: Registry[Callable[..., Expert]] = Registry("expert_init")

#: Initialisers whose experts compute the same function as their source expert.
FUNCTION_PRESERVING: set[Callable[..., Expert]] = set()

#: Initialisers whose experts are cut from shuffled copies of the FFN.
SHUFFLED_SHARDS: set[Callable[..., Expert]] = set()

#: Initialiser -> how its options keep more of the function.
_GENTLER: dict[Callable[..., Expert], str] = {}

Init = TypeVar("Init", bound=Callable[..., Expert])


def function_preserving(init: Init) -> Init:
    """Decorator: experts of this initialiser compute the function of their source expert."""
    FUNCTION_PRESERVING.add(init)
    return init


def shuffling(init: Init) -> Init:
    """Decorator: experts of this initialiser are cut from shuffled copies of the FFN."""
    SHUFFLED_SHARDS.add(init)
    return init


def gentler(how: str) -> Callable[[Init], Init]:
    """Decorator: says how the options of this initialiser keep more of the source's function."""

    def add(init: Init) -> Init:
        _GENTLER[init] = how
        return init

    return add


def gentler_choices(init: Callable[..., Expert]) -> tuple[str, ...]:
    """What to choose in place of this initialiser to keep more of the function.

    In words; options are written as `{option=value}`, see `errors.with_settings`.
    """
    if init in FUNCTION_PRESERVING:
        return ()
    how = (_GENTLER[init],) if init in _GENTLER else ()
    return (*how, "{expert_init=copy}")


@EXPERT_INITS.add
@function_preserving
def copy(expert: Expert, generator: Generator) -> Expert:
    """The source expert itself: N identical experts compute the dense FFN at step 0."""
    return expert


@EXPERT_INITS.add
@gentler("a smaller noise_std")
def noise(expert: Expert, generator: Generator, *, noise_std: float = 0.01) -> Expert:
    """`W + randn * noise_std * std(W)` for each matrix W: breaks the symmetry between copies.

    Biases stay as they are.

    Args:
        noise_std: noise relative to the matrix' own standard deviation. 0.001 leaves experts
            identical for many steps, 0.1 destroys the weights.

    Raises:
        UpcyclingError: a negative `noise_std`, or none.
    """
    if not (is_number(noise_std) and noise_std >= 0):
        raise UpcyclingError(f"noise_std={noise_std!r} must be a number >= 0 (default 0.01).")

    def add_noise(weight: Tensor) -> Tensor:
        exact = weight.to(_compute_dtype(weight))
        return (exact + _randn(weight, generator) * (noise_std * exact.std())).to(weight.dtype)

    return expert.map(add_noise, EXPERT_PARTS)


@EXPERT_INITS.add
@gentler("a smaller drop_ratio")
def drop(
    expert: Expert, generator: Generator, *, drop_ratio: float = 0.5, paired: bool = True
) -> Expert:
    """Drop-Upcycling (arXiv 2502.19261): re-initialise a share of the neurons.

    `floor(drop_ratio * F)` neurons are drawn; their rows of gate and up and columns of down are
    redrawn from N(mean, std) of the dropped slice of that same matrix.

    The paper's models have no biases. Here the biases of gate and up are redrawn for the neurons
    whose rows are, in the same way, from the slice of that bias; the bias of down stays.

    Args:
        drop_ratio: share of neurons, 0 <= r <= 1.
        paired: the same neurons in all three matrices, as the paper says; False draws them for
            each matrix, as the authors' code does (at 0.5, 12.5 % of neurons keep all parts).

    Raises:
        UpcyclingError: a `drop_ratio` out of range, or a `paired` that is not true or false.
    """
    if not (is_number(drop_ratio) and 0 <= drop_ratio <= 1):
        raise UpcyclingError(f"drop_ratio={drop_ratio!r} must be a number 0 to 1 (default 0.5).")
    if not isinstance(paired, bool):  # the text "false" would count as true
        raise UpcyclingError(f"paired={paired!r} must be true or false (default true).")
    neurons = expert.up_proj_FD.shape[0]
    dropped = math.floor(drop_ratio * neurons)

    def draw_indices() -> Tensor:
        return torch.randperm(neurons, generator=generator)[:dropped]

    shared = draw_indices()
    drawn: dict[str, Tensor] = {}  # matrix -> its neurons that are redrawn

    def redraw(part: str, weight: Tensor) -> Tensor:
        if (axis := neuron_axis(part)) is None:
            return weight
        matrix = part.split("_")[0]
        if matrix not in drawn:
            drawn[matrix] = shared if paired else draw_indices()
        if dropped == 0:
            return weight
        old = weight.index_select(axis, drawn[matrix]).to(_compute_dtype(weight))
        # correction=0: the spread of the slice itself, defined for a single value too
        new = old.mean() + _randn(old, generator) * old.std(correction=0)
        return weight.clone().index_copy_(axis, drawn[matrix], new.to(weight.dtype))

    return Expert.from_parts({part: redraw(part, weight) for part, weight in expert.parts.items()})


@EXPERT_INITS.add
@function_preserving
def permute(expert: Expert, generator: Generator) -> Expert:
    """One permutation of the neurons, applied to all parts of the expert together.

    The function is kept exactly (up to the order of a sum); the experts differ as points in
    parameter space. Permuting each matrix by itself would destroy the function and is not offered.
    """
    order = torch.randperm(expert.up_proj_FD.shape[0], generator=generator)
    return take_neurons(expert, order)


@EXPERT_INITS.add
@gentler("a larger kept_energy")
def svd(expert: Expert, generator: Generator, *, kept_energy: float = 0.9) -> Expert:
    """Turn the weak singular directions of each matrix, and keep the strong ones.

    With W = U S V^T, the strongest directions that hold `kept_energy` of ||W||^2 stay as they are;
    the left singular vectors of the rest (the right ones of a tall matrix) are turned by a random
    rotation of the space that they span. The singular values stay; a share of the function that no
    large direction carries is drawn anew. Relative change of W: about sqrt(2 * (1 - kept_energy)).
    Biases stay as they are.

    Costs an eigendecomposition of the smaller side of each matrix, in float64 (minutes for an
    FFN with D = 4096 on two cores), once for all experts that are made of it, and a rotation for
    each. What was found of an FFN is kept until the next one's: 24 D^2 bytes.

    Args:
        kept_energy: 0 <= share <= 1.

    Raises:
        UpcyclingError: a `kept_energy` out of range.
    """
    if not (is_number(kept_energy) and 0 <= kept_energy <= 1):
        raise UpcyclingError(f"kept_energy={kept_energy!r} must be a number 0 to 1 (default 0.9).")

    def turn(weight: Tensor) -> Tensor:
        tall = weight.shape[0] > weight.shape[1]
        exact = (weight.T if tall else weight).double()
        energy, directions = _directions(weight, exact)
        share = energy.clamp(min=0).cumsum(0) / energy.clamp(min=0).sum().clamp(min=1e-300)
        weak = int((share <= 1 - kept_energy).sum())
        drawn = torch.randn(weak, weak, generator=generator, dtype=torch.float64)
        rotation, triangle = torch.linalg.qr(drawn)
        rotation = rotation * triangle.diagonal().sign()  # else not uniform over all rotations
        space = directions[:, :weak]
        inside = space.T @ exact
        turned = exact + space @ (rotation @ inside - inside)
        return (turned.T if tall else turned).to(weight.dtype).contiguous()

    return expert.map(turn, EXPERT_PARTS)


@EXPERT_INITS.add
def subset(expert: Expert, generator: Generator, *, index: int, num_experts: int) -> Expert:
    """Expert e keeps neurons `[e*F/N, (e+1)*F/N)`, and zeros elsewhere: a partition of the FFN.

    `down_proj` is scaled by N, so that the mean of all experts is the dense FFN: exact where every
    expert is used with equal weight (k = N, zero router), else approximate. Each expert has the
    whole bias of down, which that mean gives once.

    Args:
        index, num_experts: e and N, given by the conversion.
    """
    neurons = expert.up_proj_FD.shape[0]
    first, last = index * neurons // num_experts, (index + 1) * neurons // num_experts

    def keep(part: str, weight: Tensor) -> Tensor:
        if (axis := neuron_axis(part)) is None:
            return weight
        kept = weight.narrow(axis, first, last - first)
        made = torch.zeros_like(weight)
        scale = num_experts if part == "down_proj_DF" else 1
        made.narrow(axis, first, last - first).copy_(kept * scale)
        return made

    return Expert.from_parts({part: keep(part, weight) for part, weight in expert.parts.items()})


@EXPERT_INITS.add
@gentler("a smaller drop_ratio")
@shuffling
def qwen2(expert: Expert, generator: Generator, *, drop_ratio: float = 0.5) -> Expert:
    """Qwen2's fine-grained experts (arXiv 2407.10671, section 2.2.2): half of each is drawn anew.

    What it is given is a shard: the FFN is copied as often as the experts need, every copy is
    shuffled along its neurons, and experts are cut from them one after the other.

    Args:
        drop_ratio: share of neurons that is re-initialised, as in `drop`.
    """
    return drop(expert, generator, drop_ratio=drop_ratio)


#: Digest of a matrix -> energy and directions, of the last FFN: all experts of it share them.
_DIRECTIONS: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def _directions(weight: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of `exact @ exact.T`, the weakest first.

    By content, not by place: what lies at an address now may be another model's matrix.

    Args:
        weight: the matrix that `exact` is of, as it was given.
    """
    contents = weight.contiguous().view(torch.uint8).numpy()
    key = (blake2b(contents.data).digest(), weight.dtype, tuple(weight.shape))
    if key not in _DIRECTIONS:
        if len(_DIRECTIONS) >= len(EXPERT_PARTS):
            del _DIRECTIONS[next(iter(_DIRECTIONS))]  # the oldest
        _DIRECTIONS[key] = torch.linalg.eigh(exact @ exact.T)
    return _DIRECTIONS[key]


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _randn(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=_compute_dtype(like))
