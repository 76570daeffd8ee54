"""What a live model takes: how long an input, which token ids, which arguments."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.modes import evaluating

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


def require_decoder_start(model: "PreTrainedModel") -> None:
    """Refuse an encoder-decoder that does not know with which token its decoder begins.

    Raises:
        UpcyclingError: its config names none.
    """
    if getattr(model.config, "decoder_start_token_id", None) is None:
        raise UpcyclingError(
            f"config.json of this {model.config.model_type} model has no decoder_start_token_id, "
            "with which its decoder begins. Set it (0 for a T5)."
        )


def image_shape(model: "PreTrainedModel") -> tuple[int, int, int]:
    """Channels, height and width of what the model takes."""
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.num_channels, height, width


@torch.inference_mode()
def image_tokens(model: "PreTrainedModel") -> int:
    """Tokens that a model makes of one image, found by giving it one."""
    pixels = torch.zeros(1, *image_shape(model), dtype=model.dtype, device=model.device)
    with evaluating(model):
        return int(model.base_model(pixel_values=pixels).last_hidden_state.shape[1])


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
