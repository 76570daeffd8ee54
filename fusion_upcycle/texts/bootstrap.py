"""How sure a mean loss is: a block bootstrap over the windows that it was scored in.

Tokens of a window depend on each other, so that windows, and groups of neighbours where there are
many, are what is drawn with replacement [Künsch 1989, with blocks that do not overlap].
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
_MOST_BLOCKS = 1000
_CHUNK = 100  # resamples whose counts are in memory together


class Spread(NamedTuple):
    """Of a mean: standard error, and the interval that holds 95 % of the resampled means."""

    stderr: float
    low: float
    high: float


def block_bootstrap(
    nats: Sequence[float], tokens: Sequence[int], *, seed: int = 0
) -> "NDArray[np.float64] | None":
    """Resampled means, in nats per token; None with fewer than two blocks.

    Args:
        nats: loss of each window, summed over its tokens, in the order of the text.
        tokens: of each window, those that count.
        seed: of the draws; the same seed gives the same numbers.
    """
    size = -(-len(nats) // _MOST_BLOCKS)
    edges = np.arange(0, len(nats), size)
    if len(edges) < 2:
        return None
    nats_B = np.add.reduceat(np.asarray(nats, dtype=np.float64), edges)
    tokens_B = np.add.reduceat(np.asarray(tokens, dtype=np.float64), edges)
    kept = tokens_B > 0
    nats_B, tokens_B = nats_B[kept], tokens_B[kept]
    if len(nats_B) < 2:
        return None
    generator = np.random.default_rng(seed)
    even = np.full(len(nats_B), 1 / len(nats_B))
    means = []
    for _ in range(RESAMPLES // _CHUNK):
        counts_RB = generator.multinomial(len(nats_B), even, size=_CHUNK)
        means.append(counts_RB @ nats_B / (counts_RB @ tokens_B))
    return np.concatenate(means)


def spread(means: "NDArray[np.float64]") -> Spread:
    """Standard error and interval of resampled values."""
    low, high = np.percentile(means, [2.5, 97.5])
    return Spread(float(means.std(ddof=1)), float(low), float(high))
