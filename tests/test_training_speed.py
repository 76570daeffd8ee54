"""What training leaves out to be fast, seen without a clock."""

import inspect
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dense_model
from tiny_training import run

from fusion_upcycle.training.module import PretrainingModule

SIZE = 2**26  # bytes, a block that malloc would always give back when freed
PAGES = SIZE // resource.getpagesize()

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc"
)


def faults() -> int:
    """Pages of fresh memory that a large block takes, which is then freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(SIZE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@needs_glibc
def test_freed_pages_are_kept_in_the_block_and_given_back_after_it() -> None:
    # In a process of its own: a heap with a large hole would serve the block from there.
    code = f"""
import resource
from fusion_upcycle.training.pages import kept_pages
SIZE = {SIZE}
{inspect.getsource(faults)}
with kept_pages():
    faults()
    assert faults() < {PAGES} / 100
assert faults() > {PAGES} / 2
assert faults() > {PAGES} / 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_glibc
def test_a_training_step_uses_the_pages_of_the_last_one(tmp_path: Path) -> None:
    seen: list[int] = []
    model = dense_model(vocab_size=257)
    model.register_forward_pre_hook(lambda *_: seen.append(faults()))
    run(model, tmp_path, 4)
    # Not in every one: a small block that stays may be cut out of the freed ones.
    assert sorted(seen)[1] < PAGES / 100, seen


@pytest.mark.parametrize(("limit", "writes"), [(0.0, 0), (1e9, 0), (1e-3, 1)])
def test_gradients_are_written_again_only_where_they_are_clipped(
    limit: float, writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = PretrainingModule._clip

    def clip(self: Any, optimizer: Any) -> float:
        gradients = [p.grad for p in self.model.parameters()]
        before = [g._version for g in gradients]
        norm = original(self, optimizer)
        seen.extend(g._version - b for g, b in zip(gradients, before, strict=True))
        if limit == 1e-3:
            total = torch.nn.utils.get_total_norm(gradients)
            assert norm > limit
            assert float(total) == pytest.approx(limit, rel=1e-2)
        return norm

    monkeypatch.setattr(PretrainingModule, "_clip", clip)
    run(dense_model(vocab_size=257), tmp_path, 1, gradient_clip=limit)
    assert set(seen) == {writes}
