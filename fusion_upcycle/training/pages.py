"""Memory that a step frees stays with the process for the next one, on a CPU.

glibc gives large blocks back to the operating system as they are freed, so that each step is given
fresh pages, which the kernel clears as they are touched: activations and, as gradients are freed
after each step, as much memory as the model. That is up to a quarter of the time of an MoE's FFN,
and more than of a dense one, whose tensors are smaller (`examples/benchmarks/train.py`).
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MIB = 2**20


@contextmanager
def kept_pages() -> Iterator[None]:
    """Keep freed memory until the block ends, and give it back there; without glibc, do nothing.

    Peak memory stays nearly the same. Afterwards malloc's thresholds are the largest that glibc
    chooses by itself, which a process that has freed a large tensor has anyway.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_MMAP_MAX, 0)  # no block gets a mapping of its own, which goes when it is freed
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
        libc.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        libc.mallopt(_MMAP_MAX, 65536)
        libc.malloc_trim(0)
