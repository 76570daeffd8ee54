"""The config of an MoE that is scored or expanded: what stands in the way is refused by name."""

import copy
from typing import TYPE_CHECKING

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.config import REQUIRED, WITH_CODE
from fusion_upcycle.architectures.layout import target_class
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def checked_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """A copy of the source's config, once nothing in it stands in the way.

    Raises:
        UpcyclingError: a field that cannot be kept, a family or a variant of it that is not known,
            or code of the model's own.
    """
    moe_family(config).check_known(config)
    config = copy.deepcopy(config)
    fields, family = config.to_dict(), config.model_type
    for name in ("chunk_size_feed_forward", "is_encoder_decoder", "quantization_config"):
        only, remedy = REQUIRED[name]
        if (value := fields.get(name, only)) != only:
            if name == "quantization_config":
                value = fields[name].get("quant_method")
                remedy = remedy.replace("upcycle", "expand")
            raise UpcyclingError(
                f"config.json of the {family} source: {name}={value!r} cannot be expanded. {remedy}"
            )
    if getattr(config, "auto_map", None):
        if family not in WITH_CODE:
            raise UpcyclingError(
                f"config.json of the {family} source: the model brings code of its own (auto_map), "
                "which is never run here. Where transformers' own class computes the same, remove "
                "auto_map from its config.json."
            )
        del config.auto_map  # the code, which became transformers' own, is not copied
    config.architectures = [target_class(config, config)]
    return config
