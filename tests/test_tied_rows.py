"""Router rows of granular experts: equal within a group at step 0, and after training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_bits, dense_model
from tiny_training import run
from torch import Tensor
from transformers import PreTrainedModel

from fusion_upcycle import SparseUpcyclingAlgorithm
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.training.tied import TiedRows, group_size

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are


def halves(**options: Any) -> PreTrainedModel:
    """4 groups of 2 half experts, top-2: one FFN's worth for each token."""
    options = {"expert_init": "noise", "verify": "none", "granularity": 2} | options
    made = SparseUpcyclingAlgorithm(8, 2, **options).run(dense_model(vocab_size=257))
    assert made is not None
    return made


def rows(model: PreTrainedModel) -> list[Tensor]:
    """Router rows of each layer, [groups, 2, D]."""
    found = find_routers(model)
    found.close()
    return [module.weight.detach().unflatten(0, (-1, 2)) for module in found.modules.values()]


@pytest.fixture
def untied(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(TiedRows, "average_gradients", lambda self: None)
    return monkeypatch


def test_the_rows_of_a_group_stay_equal_and_groups_learn(tmp_path: Path) -> None:
    before, after = rows(halves()), rows(run(halves(), tmp_path, 5).model)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, 0], new[:, 1])
        assert not torch.equal(old, new)
        assert len(new[:, 0].unique(dim=0)) == 4


def test_without_it_they_drift_apart(tmp_path: Path, untied: pytest.MonkeyPatch) -> None:
    for layer in rows(run(halves(), tmp_path, 5).model):
        assert not torch.equal(layer[:, 0], layer[:, 1])


def test_the_gradient_is_the_mean_of_the_group(tmp_path: Path, untied: pytest.MonkeyPatch) -> None:
    """AdamW's first step has the sign of it: where both shards' own agree, it is theirs."""
    step = {"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": "constant"}
    apart = rows(run(halves(), tmp_path / "a", 1, **step).model)
    untied.undo()
    tied = rows(run(halves(), tmp_path / "b", 1, **step).model)
    for alone, together, old in zip(apart, tied, rows(halves()), strict=True):
        signs = (alone - old).sign()
        agree = signs[:, 0] == signs[:, 1]
        assert agree.any() and not agree.all()
        torch.testing.assert_close(together[:, 0][agree], alone[:, 0][agree])


@pytest.mark.parametrize("options", [{"router_init": "zeros"}, {"granularity": 1}], ids=str)
def test_routers_without_groups_are_left_alone(
    options: dict[str, Any], tmp_path: Path, untied: pytest.MonkeyPatch
) -> None:
    plain = run(halves(**options), tmp_path / "a", 3).model
    untied.undo()
    assert_same_bits(
        run(halves(**options), tmp_path / "b", 3).model.state_dict(), plain.state_dict()
    )


def test_sharded_weights_are_tied_too(tmp_path: Path) -> None:
    whole = run(halves(), tmp_path / "whole", 5).model
    sharded = run(halves(), tmp_path / "sharded", 5, strategy="fsdp").model
    for layer, same in zip(rows(sharded), rows(whole), strict=True):
        assert torch.equal(layer[:, 0], layer[:, 1])
        torch.testing.assert_close(layer, same)


def test_frozen_routers_have_no_gradient_to_tie(tmp_path: Path) -> None:
    model = run(halves(), tmp_path, 2, freeze=["routers"]).model
    for old, new in zip(rows(halves()), rows(model), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("aabb", 2), ("aabbcc", 2), ("aaabbb", 3), ("abcd", 1), ("aaaa", 1), ("aabc", 1), ("abab", 1)],
)
def test_groups_are_equal_neighbours(pattern: str, size: int) -> None:
    weight = torch.tensor([[float(ord(letter)), 1.0] for letter in pattern])
    assert group_size(weight) == size
