"""Work that processes share: pieces that each takes some of, and what all of them found."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process, of how many.

    Attributes:
        rank: of this process, from 0.
        world: how many there are; all do the same work, in torch.distributed's default group.
    """

    rank: int = 0
    world: int = 1

    def of(self, number: int) -> list[int]:
        """Which of the pieces 0 to `number - 1` are this process's; as many for each of them.

        A forward pass of a sharded model is one of all processes. Where the pieces do not come out
        even, those that would have none in the last round do the last piece once more.
        """
        rounds = -(-number // self.world)
        return [min(turn * self.world + self.rank, number - 1) for turn in range(rounds)]

    def gathered(self, found: Mapping[int, T]) -> list[T]:
        """What all processes found, in the order of the pieces: to sum it is as in one process.

        Args:
            found: piece -> result, of those of this process. Of a piece that several did, the
                result of the first counts.
        """
        parts: list[Any] = [found]
        if self.world > 1:
            import torch.distributed

            parts = [None] * self.world
            torch.distributed.all_gather_object(parts, dict(found))
        merged = {piece: result for part in reversed(parts) for piece, result in part.items()}
        return [merged[piece] for piece in sorted(merged)]


ALONE = Share()
