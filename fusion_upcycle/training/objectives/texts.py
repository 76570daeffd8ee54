"""Windows of packed texts, which the objectives of language models are made of.

Shapes: T tokens of a window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.training.data import PackedText
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What ends a text in the vocabularies of most models.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")


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


def separator_of(
    tokenizer: "PreTrainedTokenizerBase", asked: str | None, own: Sequence[int | None]
) -> int:
    """The token id that begins each document.

    Args:
        asked: the option `separator`.
        own: what the tokenizer has for it, the first that is not None counts.

    Raises:
        UpcyclingError: it has nothing, or what was asked for is no token.
    """
    vocabulary = tokenizer.get_vocab()
    if asked is not None:
        if asked not in vocabulary:
            raise UpcyclingError(
                f"separator={asked!r} is no token of the tokenizer. {_suggested(vocabulary)}"
            )
        return int(vocabulary[asked])
    found = next((token for token in own if token is not None), None)
    if found is None:
        raise UpcyclingError(
            "The tokenizer has no token that ends a text, which separates documents. "
            + _suggested(vocabulary)
        )
    return found


def _suggested(vocabulary: Mapping[str, int]) -> str:
    named = next((name for name in _SEPARATORS if name in vocabulary), None)
    if named is None:
        return f"Name one of its vocabulary that stands for it: {setting('separator', 'TOKEN')}."
    return f"Name one, as in {setting('separator', named)}."


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
