"""Tiny training runs: a byte-level model of 25,000 parameters on a few kilobytes of text."""

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tiny import dense_model
from transformers import PreTrainedModel

from fusion_upcycle import SparseUpcyclingAlgorithm
from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.training import strategy
from fusion_upcycle.training.checkpoint_folders import checkpoint_path
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, Trained, train

CONTEXT, BATCH = 16, 4
TOKENIZER = byte_tokenizer(64)
#: One step of these takes `CONTEXT * BATCH` = 64 tokens.
OPTIONS: dict[str, Any] = {
    "context_length": CONTEXT,
    "batch_size": BATCH,
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "accelerator": "cpu",
    "log_every": 1,
    "checkpoint_every": 5,
}


def dying_in_a_save(step: int) -> Any:
    """Within the block a process that trains in parts ends while it writes this checkpoint."""
    hashed = strategy._hashed

    def die(written: Any, at: Path, process: int) -> dict[str, str]:
        found = hashed(written, at, process)
        if checkpoint_path(Path(), step).name in str(at):
            time.sleep(1)  # training goes on
            os._exit(9)
        return found

    return patch.object(strategy, "_hashed", die)


def documents(count: int = 8) -> list[str]:
    """Documents of different lengths; some shorter than a window, some longer."""
    return [f"{i} and {i * i} " * (1 + 3 * i % 7) for i in range(count)]


DATA = {"numbers": {"_target_": "tiny_training.documents"}}


def moe_model(target: str = "mixtral", dense: str | None = None, **fields: Any) -> PreTrainedModel:
    """An upcycled model of 4 experts, top-2, whose experts and routers differ."""
    source = dense or next(iter(ARCHITECTURES[target].dense))
    algorithm = SparseUpcyclingAlgorithm(4, 2, target=target, expert_init="noise", verify="none")
    made = algorithm.run(dense_model(source, vocab_size=257, **fields))
    assert made is not None
    return made


def options_for(steps: int, **options: Any) -> dict[str, Any]:
    merged = OPTIONS | options
    return merged | {"tokens": steps * merged["context_length"] * merged["batch_size"]}


def run(
    model: PreTrainedModel,
    folder: Path,
    steps: int = 4,
    *,
    data: Any = None,
    figure: bool = False,
    **options: Any,
) -> Trained:
    """Train for some steps; options of `Places` and of `train` itself are taken too.

    Without the figure of the routing, which takes longer than the steps, unless it is asked for.
    """
    names = ("output", "overwrite", "resume")  # of `Places`
    places = {name: options.pop(name) for name in names if name in options}
    more = {
        n: options.pop(n) for n in ("validation", "optimizer_state", "progress") if n in options
    }
    if "optimizer_state" in more:
        more["optimizer_state"] = Path(more["optimizer_state"])
    origin = options.pop("origin", Origin("tiny"))
    undrawn = patch("fusion_upcycle.training.run.save_routing", lambda log: None)
    with nullcontext() if figure else undrawn:
        return train(
            model,
            TOKENIZER,
            make_training_options(**options_for(steps, **options)),
            data=data or DATA,
            places=Places(folder / "work", folder / "log", **places),
            origin=origin,
            **{"progress": False} | more,
        )
