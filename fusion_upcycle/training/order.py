"""Which example comes when: a pure function of the seed and the example's number in the run.

Nothing is remembered, so that a run resumed at step s, on any number of devices, sees exactly the
examples that it would have seen. Those of texts are windows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset, Sampler

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.training.objectives.base import Source
from fusion_upcycle.training.permutation import permuted

_PERIOD = 1000  # examples in which every source has its share
_BLOCK = 1024  # places of an order that are computed together


class ExampleOrder(Dataset[dict[str, Any]]):
    """Number of an example in the run -> the example.

    Without weights all examples of all sources are one set, shuffled anew for each pass. With
    weights the sources take turns in a fixed pattern of 1000 examples that is as even as can be
    (smooth weighted round robin), and each source is shuffled anew for each of its own passes.

    Args:
        sources: of the examples.
        mixture: source -> weight, for all sources or None.
        seed: of the shuffles.

    Raises:
        UpcyclingError: weights for other sources than there are, or less than 1/1000 of the sum.
    """

    def __init__(self, sources: Sequence[Source], mixture: Mapping[str, float] | None, seed: int):
        self._sources = sources
        self._seed = seed
        self._sizes = [len(source) for source in sources]
        self._starts = np.cumsum([0, *self._sizes])
        self._pattern = None if mixture is None else _pattern(_shares(sources, mixture))
        self._blocks = lru_cache(maxsize=2 * len(sources))(self._block)

    def __getitem__(self, number: int) -> dict[str, Any]:
        source, index = self.place(number)
        return self._sources[source].example(index, number)

    def place(self, number: int) -> tuple[int, int]:
        """Source of the run's example `number`, 0 on, and which of its own that is."""
        if self._pattern is None:
            passes, place = divmod(number, int(self._starts[-1]))
            among_all = self._shuffled(-1, passes, place)
            source = int(np.searchsorted(self._starts, among_all, side="right")) - 1
            return source, among_all - int(self._starts[source])
        periods, place = divmod(number, _PERIOD)
        source = int(self._pattern[place])
        same = self._pattern == source
        before = periods * int(same.sum()) + int(same[:place].sum())
        passes, place = divmod(before, self._sizes[source])
        return source, self._shuffled(source, passes, place)

    def _shuffled(self, source: int, passes: int, place: int) -> int:
        block, offset = divmod(place, _BLOCK)
        return int(self._blocks(source, passes, block)[offset])

    def _block(self, source: int, passes: int, number: int) -> npt.NDArray[np.int64]:
        """Block `number` of the order of one source's examples, or of all (-1), in one pass."""
        size = int(self._starts[-1]) if source < 0 else self._sizes[source]
        key = (self._seed * 1_000_003 + source + 1) * 1_000_003 + passes
        start = number * _BLOCK
        return permuted(np.arange(start, min(start + _BLOCK, size)), size, key)


class StepSampler(Sampler[list[int]]):
    """For each step left, the numbers of the examples that one device takes.

    Step s of the run takes examples `[s * batch_size, (s + 1) * batch_size)`, the first device the
    first of them, and so on.

    Args:
        first: gives the step to begin at, asked when the iteration begins.
        steps: of the whole run.
        batch_size: examples per step, on all devices.
        rank, world: this device, of how many.
    """

    def __init__(
        self, first: Callable[[], int], steps: int, batch_size: int, rank: int, world: int
    ):
        self._first, self._steps, self._batch_size = first, steps, batch_size
        self._share = batch_size // world
        self._offset = rank * self._share

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._first(), self._steps):
            start = step * self._batch_size + self._offset
            yield list(range(start, start + self._share))

    def __len__(self) -> int:
        """Steps of the whole run, which is how Lightning counts progress after a resume too."""
        return self._steps


class StatelessLoader(DataLoader[dict[str, Any]]):
    """A loader that needs no state to be resumed, and says so to Lightning."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def _shares(sources: Sequence[Source], mixture: Mapping[str, float]) -> list[int]:
    """Examples of each source in one period: largest remainders, so that they sum up."""
    names = [source.name for source in sources]
    for name in mixture:
        if name not in names:
            raise unknown("source in mixture:", str(name), names)
    if missing := [name for name in names if name not in mixture]:
        raise UpcyclingError(f"mixture has no weight for {', '.join(missing)}: give one for each.")
    total = sum(mixture.values())
    exact = np.array([mixture[name] / total * _PERIOD for name in names])
    shares = np.floor(exact).astype(int)
    for source in np.argsort(shares - exact, kind="stable")[: _PERIOD - shares.sum()]:
        shares[source] += 1
    for name, share in zip(names, shares, strict=True):
        if not share:
            raise UpcyclingError(
                f"mixture.{name}={mixture[name]} is less than 1/{_PERIOD} of the sum of weights: "
                "raise it, or leave the source out of data and mixture."
            )
    return [int(share) for share in shares]


def _pattern(shares: Sequence[int]) -> npt.NDArray[np.int64]:
    """Sources of one period's examples, each spread out evenly."""
    credit, step = np.zeros(len(shares), dtype=np.int64), np.array(shares)
    pattern = np.empty(_PERIOD, dtype=np.int64)
    for place in range(_PERIOD):
        credit += step
        pattern[place] = chosen = int(credit.argmax())
        credit[chosen] -= _PERIOD
    return pattern
