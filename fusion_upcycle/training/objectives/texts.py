"""Windows of packed texts, which the objectives of language models are made of.

Shapes: T tokens of a window.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.training.data import PackedText
from fusion_upcycle.training.options import TrainingOptions


@dataclass(frozen=True)
class Windows:
    """A text's windows of T tokens, and the token behind each."""

    text: PackedText
    context_length: int

    @property
    def name(self) -> str:
        return self.text.name

    @property
    def digest(self) -> str:
        return self.text.digest

    def __len__(self) -> int:
        return self.text.windows(self.context_length)

    def example(self, index: int, number: int) -> dict[str, Any]:
        window = self.text.window(index, self.context_length)
        return {"ids": torch.from_numpy(window.astype(np.int64))}

    def to_json(self) -> dict[str, Any]:
        return self.text.to_json()


def check_length(options: TrainingOptions, limit: int | None) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        UpcyclingError: they are.
    """
    if limit is not None and options.context_length > limit:
        raise UpcyclingError(
            f"context_length={options.context_length} is longer than the model's {limit} positions "
            f"(max_position_embeddings): use at most "
            f"{setting('context_length', limit)}."
        )
