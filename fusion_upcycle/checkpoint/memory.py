"""Memory for pieces of tensors, used again when no tensor is in it: new pages cost time.

A tensor holds a reference to the object that it was made from, and so does each view of it.
"""

import sys
import threading

_WORTH_KEEPING = 2**20
_KEPT = 4

_lock = threading.Lock()
_kept: list[bytearray] = []


def memory_for(size: int) -> bytearray:
    """So many bytes or more, with anything in them, for `torch.frombuffer`."""
    with _lock:
        for memory in _kept:
            # References of the list, of this loop, and of the question itself.
            if len(memory) >= size and sys.getrefcount(memory) == 3:
                return memory
        memory = bytearray(size)
        if size >= _WORTH_KEEPING:
            _kept.append(memory)
            del _kept[:-_KEPT]
        return memory
