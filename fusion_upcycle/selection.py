"""Which experts of an MoE are duplicated: importance scores -> `DuplicationPlan`.

Every source expert keeps its place; what is chosen is who gets the M - E copies of each layer.
Order of a plan: the E originals, then all first copies, then all second copies, ... each by the
index of the source expert.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from fusion_upcycle.errors import UpcyclingError, setting, unknown
from fusion_upcycle.experts import DuplicationPlan, generator_for

#: Scores [E] of a layer, number of copies, most copies of one expert, generator
#: -> copies of each expert [E], originals not counted.
_Chooser = Callable[[Tensor, int, int, Generator], list[int]]


def select(
    scores: Mapping[int, Sequence[float] | Tensor],
    num_experts: int,
    *,
    selection: str = "uniform",
    max_copies: int = 3,
    seed: int = 0,
) -> DuplicationPlan:
    """Choose the source expert of each of `num_experts` = M experts, layer by layer.

    Args:
        scores: MoE layer -> importance of each of its E experts, >= 0, in any unit. Only `greedy`
            looks at more than their number.
        selection: `uniform`: M // E places each, the rest round robin, and no cap. `greedy`: the
            best expert gets as many places as `max_copies` lets it, then the second best, ...
            `control`: as many places as `greedy` gives, to experts in a random order. `random`:
            each copy is drawn with equal probability.
        max_copies: most places of one expert, its original among them.
        seed: of the draws.

    Raises:
        UpcyclingError: M < E, M beyond E * max_copies, a score that is negative or not finite, an
            unknown selection or an option out of range.
    """
    check_selection(selection, max_copies)
    choose, plan = SELECTIONS[selection], {}
    for layer, layer_scores in scores.items():
        values = torch.as_tensor(layer_scores, dtype=torch.float64).cpu()
        assert values.ndim == 1 and len(values), (layer, values.shape)
        count = len(values)
        if num_experts < count:
            raise UpcyclingError(
                f"num_experts={num_experts} is less than the {count} experts that layer {layer} "
                f"has: expanding never removes one. Choose {setting('num_experts', count)} or more."
            )
        room = num_experts if selection == "uniform" else max_copies
        if count * room < num_experts:
            raise UpcyclingError(
                f"num_experts={num_experts} needs more than {room} places for an expert: "
                f"{count} experts x max_copies={room} = {count * room}. Pass "
                f"{setting('max_copies', math.ceil(num_experts / count))} or more, or choose "
                f"{setting('selection', 'uniform')}."
            )
        if selection in NEEDS_SCORES and not (values.isfinite().all() and (values >= 0).all()):
            raise UpcyclingError(
                f"The scores of layer {layer} are {values.tolist()}: each must be a finite number "
                ">= 0. Measure them again."
            )
        generator = generator_for(seed, layer, 0, "selection")
        copies = choose(values, num_experts - count, room - 1, generator)
        assert sum(copies) == num_experts - count, (layer, copies)
        plan[layer] = _in_order([1 + extra for extra in copies])
    return DuplicationPlan(plan)


def check_selection(selection: str, max_copies: object) -> None:
    """Check the options by themselves.

    Raises:
        UpcyclingError: an unknown selection or an option out of range.
    """
    if selection not in [*SELECTIONS]:  # also what cannot be a key
        raise unknown("selection", str(selection), SELECTIONS)
    if type(max_copies) is not int or max_copies < 1:
        raise UpcyclingError(f"max_copies={max_copies!r} must be a whole number, 1 or more.")


def _in_order(places: Sequence[int]) -> tuple[int, ...]:
    """Numbers of places -> the plan of a layer, copy group by copy group."""
    return tuple(
        expert
        for copy_index in range(max(places))
        for expert, count in enumerate(places)
        if count > copy_index
    )


def _uniform(scores: Tensor, count: int, room: int, generator: Generator) -> list[int]:
    share, rest = divmod(count, len(scores))
    return [share + (expert < rest) for expert in range(len(scores))]


def _greedy(scores: Tensor, count: int, room: int, generator: Generator) -> list[int]:
    return _filled(_best_first(scores), count, room)


def _control(scores: Tensor, count: int, room: int, generator: Generator) -> list[int]:
    return _filled(torch.randperm(len(scores), generator=generator).tolist(), count, room)


def _random(scores: Tensor, count: int, room: int, generator: Generator) -> list[int]:
    copies = [0] * len(scores)
    for _ in range(count):
        has_room = torch.tensor([c < room for c in copies]).double()
        copies[int(torch.multinomial(has_room, 1, generator=generator))] += 1
    return copies


def _filled(order: Sequence[int], count: int, room: int) -> list[int]:
    """Copies [E]: as many as there is room for, expert after expert."""
    copies = [0] * len(order)
    for expert in order:
        copies[expert] = min(room, count - sum(copies))
    return copies


def _best_first(scores: Tensor) -> list[int]:
    """Indices by score; equal ones by index."""
    order: list[int] = scores.sort(descending=True, stable=True).indices.tolist()
    return order


SELECTIONS: dict[str, _Chooser] = {
    "uniform": _uniform,
    "greedy": _greedy,
    "control": _control,
    "random": _random,
}

#: Selections that look at the scores.
NEEDS_SCORES = frozenset({"greedy"})

#: What is said where one of these was used.
CONTROL_ADVICE = (
    "selection=control copies as many experts as often, but random ones: the gain of "
    "selection=greedy over it is what importance brings; the rest is mere concentration."
)
