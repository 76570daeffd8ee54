"""The largest memory of a while: of a GPU, or of this process."""

from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.report.record import peak_rss_bytes

if TYPE_CHECKING:
    import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak(device: "torch.device") -> None:
    """Begin: forget what was before, where the system can (a GPU; Linux)."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # man 5 proc: the peak of the resident set


def peak_bytes(device: "torch.device") -> int:
    """Since `reset_peak`: allocated on a GPU, else resident of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()
