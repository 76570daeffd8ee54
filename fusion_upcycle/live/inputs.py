"""What a live model takes: how long an input, which token ids."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def max_positions(model: "PreTrainedModel") -> int | None:
    """Longest input that the model's config allows; None where it sets no limit (e.g. Mamba)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def num_embeddings(model: "PreTrainedModel") -> int:
    """Token ids that the model has an embedding for: 0 to this number, which is none."""
    number = model.get_input_embeddings().num_embeddings
    assert isinstance(number, int)
    return number
