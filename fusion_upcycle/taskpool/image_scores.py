"""Accuracy and loss of a classifier on labelled images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fusion_upcycle.tables.images import Images, check_labels
from fusion_upcycle.taskpool.images import batches
from fusion_upcycle.taskpool.scores import with_error

METRICS = ("accuracy", "loss", "examples")


@torch.inference_mode()
def score_images(
    images: Images,
    logits_of: Callable[[Tensor], Tensor],
    *,
    classes: int,
    processor: Any,
    loader: Mapping[str, Any],
    mode: str = "RGB",
    order: Sequence[int] | None = None,
) -> dict[str, float]:
    """``accuracy``, ``loss`` in nats, their standard errors over images, and ``examples``.

    Args:
        logits_of: pixel values [B, ...] -> logits [B, classes of the model].
        classes: of the data.
        processor, loader, mode: see `batches`.
        order: label of the data -> class of the model; None where they are the same.

    Raises:
        UpcyclingError: a label without a class.
    """
    correct: list[float] = []
    losses: list[float] = []
    places = None if order is None else torch.tensor(order)
    every = batches(images, processor, loader, mode)
    for pixels, labels in tqdm(every, desc=images.where.rpartition(".")[2], leave=False):
        check_labels(images, labels.tolist(), classes, len(losses))
        targets = labels if places is None else places[labels]
        logits = logits_of(pixels).float().cpu()
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        correct += (logits.argmax(-1) == targets).float().tolist()
    return {
        **with_error("accuracy", correct),
        **with_error("loss", losses),
        "examples": len(losses),
    }
