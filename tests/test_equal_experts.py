"""Experts that are the same bits are read and run once in a proof, and no others."""

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dense_folder, dense_model, token_ids
from tiny_moe import moe_folder
from torch import Tensor

from fusion_upcycle import UpcyclingOptions
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.conversion.conversion import Conversion
from fusion_upcycle.expansion.options import make_expansion_options
from fusion_upcycle.expansion.plan import plan_expansion
from fusion_upcycle.experts import part_shape
from fusion_upcycle.upcycling.proof import compare_streamed, streamed_moe
from fusion_upcycle.upcycling.run import plan_folder, plan_model
from fusion_upcycle.upcycling.upcycling import Upcycling
from fusion_upcycle.verification.streamed_model import streamed_model

FP32 = torch.float32


def matrices(
    planned: Conversion, sizes: tuple[int, int], experts: int
) -> Iterator[tuple[Any, ...]]:
    """Name and start of each matrix of the experts in the last layer, and its elements."""
    family = planned.architecture
    prefix = family.layer_prefix(planned.config, 1)
    for expert in range(experts):
        for part in family.parts:
            elements = torch.Size(part_shape(part, *sizes)).numel()
            place = family.place(expert, part, elements)
            name = prefix + place.name
            yield name, place.start, planned.tensor(name).flatten()[place.start : place.stop]


def check_origins(planned: Conversion, sizes: tuple[int, int], experts: int) -> int:
    """Equal origins are equal bits; returns how many different ones there are."""
    seen: dict[Hashable, Tensor] = {}
    for name, start, found in matrices(planned, sizes, experts):
        assert torch.equal(seen.setdefault(planned.origin(name, start), found), found), name
    return len(seen)


@pytest.mark.parametrize("target", ["mixtral", "granitemoe", "sparse"])
@pytest.mark.parametrize(("init", "different"), [("copy", 1), ("noise", 4)])
def test_upcycled_matrices_of_one_origin_are_the_same_bits(
    target: str, init: str, different: int
) -> None:
    options = UpcyclingOptions(num_experts=4, expert_init=init, target=target)
    planned = plan_model(dense_model("llama"), options)
    sizes = planned.resolved.expert_size, planned.resolved.hidden_size
    parts = len(planned.architecture.parts)
    assert check_origins(planned, sizes, 4) == parts * different
    assert check_origins(planned.with_copied_experts(), sizes, 4) == parts


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
@pytest.mark.parametrize(("init", "different"), [("copy", 4), ("noise", 7)])
def test_expanded_matrices_of_one_origin_are_the_same_bits(
    family: str, init: str, different: int, tmp_path: Path
) -> None:
    source = moe_folder(tmp_path / "moe", family)
    options = make_expansion_options(num_experts=7, expert_init=init)
    planned = plan_expansion(CheckpointReader(source), read_config(source), options)
    parts = len(planned.architecture.parts)
    assert check_origins(planned, planned.expert_shape, 7) == parts * different
    with torch.inference_mode():  # some of the experts are equal
        found, expected = (
            streamed_model(planned.config, planned, planned.architecture, None, FP32, origin=known)(
                token_ids(), use_cache=False
            ).logits
            for known in (planned.origin, None)
        )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


class Counting:
    """A result that says what of its experts is read."""

    def __init__(self, planned: Upcycling):
        self._planned = planned
        self.specs = planned.specs
        self.tensor, self.release = planned.tensor, planned.release
        self.read: list[str] = []

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        if ".experts." in name:
            self.read.append(name.removeprefix("model.layers."))
        return self._planned.chunks(name, start, stop)


def test_a_proof_reads_equal_experts_once_and_computes_the_same(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "llama")
    router = {"name": "normal", "std": 1.0}
    inputs = {"input_ids": token_ids(), "use_cache": False}
    for init, experts in (("copy", [0]), ("noise", [0, 1, 2, 3])):
        options = UpcyclingOptions(num_experts=4, expert_init=init, router_init=router)
        planned = plan_folder(source, options)
        result = Counting(planned)
        with torch.inference_mode():
            found = streamed_moe(planned, result)(**inputs).logits
            config, family = planned.config, planned.architecture
            one_by_one = streamed_model(config, planned, family, None, FP32)
            expected = one_by_one(**inputs).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert result.read == [
            f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
            for layer in range(2)
            for expert in experts
            for name in ("w1", "w3", "w2")
        ]
    # Where a function is lost, that shows: these experts are neither equal nor the dense FFN.
    whole, layers = compare_streamed(planned, result, {"input_ids": token_ids()})
    assert whole.max_abs > 1e-3 and not layers["within_tolerance"]
