"""An order of N things that is computed, place by place, and never held in memory.

A keyed bijection of the numbers below a power of two, cut down to those below N by walking along
its cycles: a Feistel network [Luby and Rackoff 1988], as in format-preserving encryption [Black and
Rogaway 2002]. Sorting the windows of 1T tokens took 2 GB in each process.
"""

import numpy as np
import numpy.typing as npt

#: Raised when the same seed gives another order: part of a checkpoint, since a run that goes on in
#: another order takes some examples twice and others never. 1 sorted by a hash.
ORDER_VERSION = 2
_ROUNDS = 8
_LEAST_BITS = 3  # of a half: among fewer numbers the orders are not equally likely

Numbers = npt.NDArray[np.uint64]


def permuted(places: npt.ArrayLike, size: int, key: int) -> npt.NDArray[np.int64]:
    """What stands at these places of an order of the numbers 0 to `size - 1`.

    Args:
        places: each from 0 to `size - 1`.
        size: 1 or more.
        key: the order; any whole number, of which the last 64 bits count.
    """
    at = np.array(places, dtype=np.uint64)
    bits = max(_LEAST_BITS, -(-(size - 1).bit_length() // 2))  # of a half: 4 * size at most walk
    rounds: Numbers = np.arange(_ROUNDS, dtype=np.uint64)
    keys = _mixed(rounds + _mixed(np.array([key % 2**64], dtype=np.uint64)))
    outside = np.ones(at.shape, dtype=bool)
    while outside.any():  # a cycle that starts below `size` comes back below it
        at[outside] = _feistel(at[outside], bits, keys)
        outside = at >= size
    return at.astype(np.int64)


def _feistel(numbers: Numbers, bits: int, keys: Numbers) -> Numbers:
    """A bijection of the numbers of two halves of `bits` bits."""
    mask, width = np.uint64(2**bits - 1), np.uint64(bits)
    left, right = numbers >> width, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << width) | right


def _mixed(x: Numbers) -> Numbers:
    """splitmix64's step and finaliser: the same on every machine, unlike a library's shuffle."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
