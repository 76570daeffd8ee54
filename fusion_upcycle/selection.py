"""Which experts of an MoE are duplicated: importance scores -> `DuplicationPlan`.

Every source expert keeps its place; what is chosen is who gets the M - E copies of each layer.
Order of a plan: the E originals, then all first copies, then all second copies, ... each by the
index of the source expert.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.experts import DuplicationPlan, generator_for

#: Scores [E] of a layer, number of copies, most copies of one expert, temperature, generator
#: -> copies of each expert [E], originals not counted.
_Chooser = Callable[[Tensor, int, int, float, Generator], list[int]]


def select(
    scores: Mapping[int, Sequence[float] | Tensor],
    num_experts: int,
    *,
    selection: str = "uniform",
    max_copies: int = 3,
    temperature: float = 1.0,
    seed: int = 0,
) -> DuplicationPlan:
    """Choose the source expert of each of `num_experts` = M experts, layer by layer.

    Args:
        scores: MoE layer -> importance of each of its E experts, >= 0, in any unit. `uniform` and
            `random` look at their number only.
        selection: `uniform`: M // E places each, the rest round robin, and no cap. `greedy`: the
            best expert gets as many places as `max_copies` lets it, then the second best, ...
            `proportional`: copies by the largest remainder on the shares of the scores.
            `sampling`: copies drawn with probability ~ score^(1/temperature). `random`: drawn with
            equal probability, the baseline.
        max_copies: most places of one expert, its original among them.
        temperature: of `sampling`, > 0; high is like `random`.
        seed: of the draws.

    Raises:
        UpcyclingError: M < E, M beyond E * max_copies, a score that is negative or not finite, an
            unknown selection or an option out of range.
    """
    check_selection(selection, max_copies, temperature)
    choose, plan = SELECTIONS[selection], {}
    for layer, layer_scores in scores.items():
        values = torch.as_tensor(layer_scores, dtype=torch.float64).cpu()
        assert values.ndim == 1 and len(values), (layer, values.shape)
        count = len(values)
        if num_experts < count:
            raise UpcyclingError(
                f"num_experts={num_experts} is less than the {count} experts that layer {layer} "
                f"has: expanding never removes one. Choose {count} or more."
            )
        room = num_experts if selection == "uniform" else max_copies
        if count * room < num_experts:
            raise UpcyclingError(
                f"num_experts={num_experts} needs more than {room} places for an expert: "
                f"{count} experts x max_copies={room} = {count * room}. Set max_copies to "
                f"{math.ceil(num_experts / count)} or more, or choose selection=uniform."
            )
        if selection in NEEDS_SCORES and not (values.isfinite().all() and (values >= 0).all()):
            raise UpcyclingError(
                f"The scores of layer {layer} are {values.tolist()}: each must be a finite number "
                ">= 0. Measure them again."
            )
        generator = generator_for(seed, layer, 0, "selection")
        copies = choose(values, num_experts - count, room - 1, temperature, generator)
        assert sum(copies) == num_experts - count, (layer, copies)
        plan[layer] = _in_order([1 + extra for extra in copies])
    return DuplicationPlan(plan)


def check_selection(selection: str, max_copies: object, temperature: object) -> None:
    """Check the options by themselves.

    Raises:
        UpcyclingError: an unknown selection or an option out of range.
    """
    if selection not in SELECTIONS:
        raise unknown("selection", str(selection), SELECTIONS)
    if type(max_copies) is not int or max_copies < 1:
        raise UpcyclingError(f"max_copies={max_copies!r} must be a whole number, 1 or more.")
    if not (is_number(temperature) and temperature > 0):  # type: ignore[operator]
        raise UpcyclingError(f"temperature={temperature!r} must be a number > 0 (default 1).")


def _in_order(places: Sequence[int]) -> tuple[int, ...]:
    """Numbers of places -> the plan of a layer, copy group by copy group."""
    return tuple(
        expert
        for copy_index in range(max(places))
        for expert, count in enumerate(places)
        if count > copy_index
    )


def _uniform(
    scores: Tensor, count: int, room: int, temperature: float, generator: Generator
) -> list[int]:
    share, rest = divmod(count, len(scores))
    return [share + (expert < rest) for expert in range(len(scores))]


def _greedy(
    scores: Tensor, count: int, room: int, temperature: float, generator: Generator
) -> list[int]:
    copies = [0] * len(scores)
    for expert in _best_first(scores):
        copies[expert] = min(room, count - sum(copies))
    return copies


def _proportional(
    scores: Tensor, count: int, room: int, temperature: float, generator: Generator
) -> list[int]:
    """Largest remainder; what an expert has no room for is shared out again among the others."""
    copies = [0] * len(scores)
    while missing := count - sum(copies):
        shares = _shares(scores, copies, room)
        due = shares / shares.sum() * missing
        # 3 * (1/3) must count as one whole: quotas are compared after rounding away the last bits.
        whole = (due + 1e-9).floor()
        for expert in _best_first((due - whole).round(decimals=9) * (shares > 0))[
            : missing - int(whole.sum())
        ]:
            whole[expert] += 1
        copies = [min(room, c + int(w)) for c, w in zip(copies, whole.tolist(), strict=True)]
    return copies


def _sampling(
    scores: Tensor, count: int, room: int, temperature: float, generator: Generator
) -> list[int]:
    copies = [0] * len(scores)
    for _ in range(count):
        # In logarithms: score^(1/T) of a small T is beyond any number.
        logits = _shares(scores, copies, room).log() / temperature
        copies[int(torch.multinomial(logits.softmax(0), 1, generator=generator))] += 1
    return copies


def _random(
    scores: Tensor, count: int, room: int, temperature: float, generator: Generator
) -> list[int]:
    return _sampling(torch.ones_like(scores), count, room, 1.0, generator)


def _shares(scores: Tensor, copies: Sequence[int], room: int) -> Tensor:
    """Scores of the experts that have room, 0 for others; equal ones if all of these are 0."""
    has_room = torch.tensor([c < room for c in copies])
    shares = scores.where(has_room, 0.0)
    return shares / shares.max() if shares.any() else has_room.double()


def _best_first(scores: Tensor) -> list[int]:
    """Indices by score; equal ones by index."""
    order: list[int] = scores.sort(descending=True, stable=True).indices.tolist()
    return order


SELECTIONS: dict[str, _Chooser] = {
    "uniform": _uniform,
    "greedy": _greedy,
    "proportional": _proportional,
    "sampling": _sampling,
    "random": _random,
}

#: Selections that look at the scores.
NEEDS_SCORES = frozenset({"greedy", "proportional", "sampling"})
