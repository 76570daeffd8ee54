"""Held-out text and images scored by several processes: the numbers of one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import dense_model
from tiny_training import TOKENIZER, documents

from fusion_upcycle.live.sharing import Share
from fusion_upcycle.texts.perplexity import perplexity


@pytest.mark.parametrize(("number", "world"), [(1, 1), (7, 1), (8, 4), (7, 3), (1, 3), (5, 2)])
def test_every_piece_is_done_and_all_processes_do_as_many(number: int, world: int) -> None:
    shares = [Share(rank, world).of(number) for rank in range(world)]
    assert {piece for share in shares for piece in share} == set(range(number))
    assert len({len(share) for share in shares}) == 1
    twice = sum(map(len, shares)) - number
    assert twice < world


def as_several(
    score: Callable[[Share], Any], world: int, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """What each of several processes is told, one after the other: what all found is kept."""
    found: dict[int, Any] = {}

    def gather(parts: list[Any], mine: Any) -> None:
        found[len(found)] = mine
        parts[:] = [found.get(rank, {}) for rank in range(world)]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for rank in range(world):
        score(Share(rank, world))
    everything = dict(found)
    monkeypatch.setattr(
        "torch.distributed.all_gather_object",
        lambda parts, mine: parts.__setitem__(slice(None), list(everything.values())),
    )
    return [score(Share(rank, world)) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_perplexity_of_several_processes_is_that_of_one(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = dense_model(vocab_size=257)
    options: dict[str, Any] = {"context_length": 16, "stride": 8, "batch_size": 3}
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))

    def score(share: Share) -> dict[str, Any]:
        return perplexity(model, TOKENIZER, documents(), share=share, **options)

    whole = perplexity(model, TOKENIZER, documents(), **options)
    alone = len(passes)
    assert as_several(score, world, monkeypatch) == [whole] * world
    assert len(passes) - alone == 2 * world * -(-alone // world)  # not all of them, by everyone
