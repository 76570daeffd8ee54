"""Each process loads its own part of a folder: two gloo processes on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import two_ranks
from tiny import logits_of
from tiny_families import dense as dense_family
from tiny_moe import moe_folder, moe_model
from torch import Tensor
from transformers import PreTrainedModel

from fusion_upcycle import upcycle
from fusion_upcycle.architectures.layout import own_class_name
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.live.identity import state_sha256
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.live.tensors import whole
from fusion_upcycle.training import launching
from fusion_upcycle.training.part_check import check_part
from fusion_upcycle.training.part_layout import Layout, plan_layout
from fusion_upcycle.training.sharding import config_of, load_sharded

#: What transformers shards, what it would not, and both experts and routers on the last axis.
LAYOUTS = (Layout(2), Layout(2, axis=2), Layout(2, expert_parallel=2, axis=2))


def loaded(folders: dict[str, Path]) -> None:
    """One of two processes."""
    launching.start(2, 1, "auto")
    for name, folder in folders.items():
        wanted = load_by_config(folder, dtype=torch.float32)
        layouts = LAYOUTS[:1] if name == "own" else LAYOUTS
        assert plan_layout(config_of(folder), 2) == layouts[0]
        for layout in layouts:
            found = load_sharded(folder, layout, dtype=torch.float32).model
            assert_same(found, wanted)
            held = sum(p.to_local().numel() for p in found.parameters() if hasattr(p, "to_local"))
            assert held < 0.65 * wanted.num_parameters()
            assert own_class_name(found) == type(wanted).__name__
            assert state_sha256(found, "") == state_sha256(wanted, "")
            assert found.config.to_dict() == wanted.config.to_dict()
    assert_tied(folders["mixtral"])
    with pytest.raises(ProofError, match=r"gate_up_proj was not loaded as .*strategy"):
        load_sharded(folders["mixtral"], Layout(2, axis=1), dtype=torch.float32)
    with pytest.raises(UpcyclingError, match=r"2 processes .*Pass devices=2, or start 4 on"):
        launching.start(4, 1, "auto")
    with pytest.raises(UpcyclingError, match=r"devices=1 .*Pass devices=2 num_nodes=1, or start"):
        launching.require_as_started(1, 2)  # as many, but not where they are


def assert_same(found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    tensors = {name: whole(tensor) for name, tensor in found.state_dict().items()}
    expected: dict[str, Tensor] = wanted.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert (logits_of(found) - logits_of(wanted)).abs().max() <= 1e-6


def assert_tied(folder: Path) -> None:
    """Tied weights get the gradients of both their uses, which transformers' own groups lose."""
    model = load_sharded(folder, Layout(2), dtype=torch.float32).model
    expected = load_by_config(folder, dtype=torch.float32)
    ids = torch.arange(12).view(1, 12)
    for each in (model, expected):
        each(input_ids=ids, labels=ids).loss.backward()
    gradient = whole(model.get_input_embeddings().weight.grad)
    assert gradient.allclose(expected.get_input_embeddings().weight.grad, atol=1e-6)


def test_every_process_holds_its_part(tmp_path: Path) -> None:
    """Of a family with tied weights, of one whose selection bias is a parameter, of our own."""
    dense_family("gemma2").float().save_pretrained(tmp_path / "dense")
    own = tmp_path / "own"
    upcycle(tmp_path / "dense", own, num_experts=4, target="sparse", verify="none", progress=False)
    folders = {
        "mixtral": moe_folder(tmp_path / "mixtral", "mixtral", tie_word_embeddings=True),
        "ernie4_5_moe": moe_folder(tmp_path / "ernie", "ernie4_5_moe"),
        "own": own,
    }
    two_ranks(loaded, folders, folder=tmp_path)
    with pytest.raises(UpcyclingError, match=r"expert_parallel=2: SparseGemma2ForCausalLM"):
        plan_layout(config_of(own), 2, 2)
    with pytest.raises(UpcyclingError, match=r"expert_parallel=2: Gemma2ForCausalLM has no exp"):
        plan_layout(config_of(tmp_path / "dense"), 2, 2)


@pytest.mark.parametrize("family", ["glm4_moe", "lfm2_moe", "ernie4_5_moe"])
def test_selection_biases_are_given_back_as_they_were_loaded(family: str, tmp_path: Path) -> None:
    moe_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    dtypes = check_part(load_by_config(tmp_path, dtype=torch.float32), tmp_path)
    exact = [name for name, dtype in dtypes.items() if dtype == torch.float32]
    assert exact and all("bias" in name for name in exact)
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("processes", "expert_parallel", "expected"),
    [
        (1, 1, Layout(1)),
        (4, 1, Layout(4)),  # one expert each
        (8, 1, Layout(8, 1, 2)),  # more processes than experts
        (8, 2, Layout(8, 2, 2)),
        (4, 4, Layout(4, 4, 2)),
        (6, 1, "4 experts.*24 and 32 wide.*6 processes. Start 1, 2, 4 or 8 processes"),
        (12, 4, "12 processes in groups of expert_parallel=4. Start 4, 8 or 16 processes"),
        (8, 8, "divide both the 8 processes and the 4 experts of a layer: 1, 2 or 4"),
    ],
)
def test_parts_are_planned(processes: int, expert_parallel: int, expected: Layout | str) -> None:
    config = moe_model("mixtral").config
    config.architectures = ["MixtralForCausalLM"]
    if isinstance(expected, Layout):
        assert plan_layout(config, processes, expert_parallel) == expected
        return
    with pytest.raises(UpcyclingError, match=expected):
        plan_layout(config, processes, expert_parallel)


def test_experts_with_biases_are_dealt_out_evenly(tmp_path: Path) -> None:
    dense_family("gpt_neox").float().save_pretrained(tmp_path / "dense")
    how: dict[str, Any] = {"target": "sparse", "verify": "none", "progress": False}
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, **how)
    assert plan_layout(config_of(tmp_path / "moe"), 2) == Layout(2)
    with pytest.raises(UpcyclingError, match=r"with biases.* 8 processes. Start 1, 2 or 4"):
        plan_layout(config_of(tmp_path / "moe"), 8)


def test_a_process_is_started_for_each_device() -> None:
    with pytest.raises(UpcyclingError, match="torchrun --nnodes 2 --nproc-per-node 4"):
        launching.start(4, 2, "auto")
