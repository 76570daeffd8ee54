"""What a live model takes: how long an input, which token ids, which arguments."""

import inspect
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def max_positions(model: "PreTrainedModel") -> int | None:
    """Longest input that the model's config allows; None where it sets no limit (e.g. Mamba)."""
    return positions_of(model.config)


def positions_of(config: "PreTrainedConfig") -> int | None:
    """As `max_positions`, of a config."""
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions and "roberta" in text.model_type:  # positions begin behind that of padding
        return int(positions - text.pad_token_id - 1)
    return positions


def num_embeddings(model: "PreTrainedModel") -> int:
    """Token ids that the model has an embedding for: 0 to this number, which is none."""
    number = model.get_input_embeddings().num_embeddings
    assert isinstance(number, int)
    return number


def logits_of_last(model: "PreTrainedModel", rows: int) -> dict[str, int]:
    """Arguments by which a forward pass makes logits of the last `rows` tokens only.

    None for backbones, which have no logits, and for the few families that always make all.
    """
    told = "logits_to_keep" in inspect.signature(model.forward).parameters
    # Heads that FusionBench puts in its place (SMILE) take whole hidden states only.
    linear = type(model.get_output_embeddings()) is nn.Linear
    return {"logits_to_keep": rows} if told and linear else {}
