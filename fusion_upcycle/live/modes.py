"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluating(model: "PreTrainedModel", *, experts: str | None = None) -> Iterator[None]:
    """Evaluation mode; each module's own mode is restored after.

    Args:
        experts: transformers' implementation of the experts for the while; `eager` runs in every
            dtype on every device. None leaves the model's own.
    """
    modes = [(module, module.training) for module in model.modules()]
    before = experts and model.config._experts_implementation
    model.eval()
    if experts is not None:
        model.config._experts_implementation = experts
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if experts is not None:
            model.config._experts_implementation = before
