"""The config of an MoE that is scored or expanded: what stands in the way is refused by name."""

import copy
from typing import TYPE_CHECKING

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.config import REQUIRED, WITH_CODE
from fusion_upcycle.architectures.layout import target_class
from fusion_upcycle.errors import UpcyclingError, with_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Fields that are no obstacle in a model of our own class.
_OURS_CAN = ("is_encoder_decoder",)


def checked_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """A copy of the source's config, once nothing in it stands in the way.

    Raises:
        UpcyclingError: a field that cannot be kept, a family or a variant of it that is not known,
            code of the model's own, or another routing than by token choice.
    """
    moe_family(config).check_known(config)
    config = copy.deepcopy(config)
    fields, family = config.to_dict(), config.model_type
    ours = hasattr(config, "dense_model_type")
    for name in ("chunk_size_feed_forward", "is_encoder_decoder", "quantization_config"):
        only, remedy = REQUIRED[name]
        if (value := fields.get(name, only)) != only and not (ours and name in _OURS_CAN):
            if name == "quantization_config":
                value = fields[name].get("quant_method")
                remedy = remedy.replace("upcycle", "expand")
            raise UpcyclingError(
                f"config.json of the {family} source: {name}={value!r} cannot be expanded. "
                f"{with_settings(remedy)}"
            )
    if getattr(config, "auto_map", None):
        if family not in WITH_CODE and not ours:
            raise UpcyclingError(
                f"config.json of the {family} source: the model brings code of its own (auto_map), "
                "which is never run here. Where transformers' own class computes the same, remove "
                "auto_map from its config.json."
            )
        del config.auto_map  # the code, which is transformers' own or ours, is not copied
    require_token_choice(config)
    if not ours:  # whose class `known_family` has looked at
        config.architectures = [target_class(config, config)]
    return config


def require_token_choice(config: "PreTrainedConfig") -> None:
    """Refuse an MoE to which no expert can be added.

    Raises:
        UpcyclingError: one of ours that routes by expert choice or by a table.
    """
    routing = getattr(config, "moe_routing", "token_choice")
    if routing == "token_choice":
        return
    why = (
        "a table of token ids has no router whose rows could be copied."
        if routing == "hash"
        else "with more experts, each would take fewer tokens."
    )
    raise UpcyclingError(
        f"config.json of the {config.model_type} source: moe_routing={routing}. Only token choice "
        f"can be expanded: {why} Upcycle the dense model into more experts instead."
    )
