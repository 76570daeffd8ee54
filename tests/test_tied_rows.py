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
from fusion_upcycle.training.run import Origin

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

GRANULAR = {"granularity": 2}


def halves(**options: Any) -> PreTrainedModel:
    """4 groups of 2 half experts, top-2: one FFN's worth for each token."""
    options = {"expert_init": "noise", "verify": "none"} | GRANULAR | options
    made = SparseUpcyclingAlgorithm(8, 2, **options).run(dense_model(vocab_size=257))
    assert made is not None
    return made


def rows(model: PreTrainedModel) -> list[Tensor]:
    """Router rows of each layer, [groups, 2, D]."""
    found = find_routers(model)
    found.close()
    return [module.weight.detach().unflatten(0, (-1, 2)) for module in found.modules.values()]


def trained(folder: Path, granular: bool = True, **options: Any) -> PreTrainedModel:
    origin = Origin("tiny", GRANULAR if granular else {})
    return run(halves(), folder, 5, origin=origin, **options).model


def test_the_rows_of_a_group_stay_equal_and_groups_learn(tmp_path: Path) -> None:
    before, after = rows(halves()), rows(trained(tmp_path))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, 0], new[:, 1])
        assert not torch.equal(old, new)
        assert len(new[:, 0].unique(dim=0)) == 4


def test_without_it_they_drift_apart(tmp_path: Path) -> None:
    for layer in rows(trained(tmp_path, granular=False)):
        assert not torch.equal(layer[:, 0], layer[:, 1])


def test_the_gradient_is_the_mean_of_the_group(tmp_path: Path) -> None:
    """AdamW's first step has the sign of it: where both shards' own agree, it is theirs."""
    step = {"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": "constant"}
    apart = rows(run(halves(), tmp_path / "a", 1, origin=Origin("tiny"), **step).model)
    tied = rows(run(halves(), tmp_path / "b", 1, origin=Origin("tiny", GRANULAR), **step).model)
    for alone, together, old in zip(apart, tied, rows(halves()), strict=True):
        signs = (alone - old).sign()
        agree = signs[:, 0] == signs[:, 1]
        assert agree.any() and not agree.all()
        torch.testing.assert_close(together[:, 0][agree], alone[:, 0][agree])


@pytest.mark.parametrize("router_init", ["zeros", "normal"])
def test_routers_that_are_not_in_groups_are_left_alone(router_init: str, tmp_path: Path) -> None:
    """Rows that are all equal, or that differ, are no groups, whatever the record says."""

    options = {"router_init": router_init, "granularity": 1}
    plain = run(halves(**options), tmp_path / "a", 3, origin=Origin("tiny", {})).model
    said = run(halves(**options), tmp_path / "b", 3, origin=Origin("tiny", GRANULAR)).model
    assert_same_bits(said.state_dict(), plain.state_dict())


def test_sharded_weights_are_tied_too(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    sharded = trained(tmp_path / "sharded", strategy="fsdp")
    for layer, same in zip(rows(sharded), rows(whole), strict=True):
        assert torch.equal(layer[:, 0], layer[:, 1])
        torch.testing.assert_close(layer, same)
