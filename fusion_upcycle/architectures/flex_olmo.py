"""FlexOlmo: OLMo 2's decoder (norms after attention and FFN) with Qwen-style experts.

Softmax over all experts, top-k, renormalised if `norm_topk_prob`, which is written as true (the
class default is false): N copies of an expert compute that expert's function for any router.

OLMo 3 is OLMo 2 with windows in some layers and a rope for each kind of attention: without windows
it fits.
"""

import copy
from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import Architecture, DenseLayout, Routing
from fusion_upcycle.architectures.config import carry_fields
from fusion_upcycle.errors import UpcyclingError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The FlexOlmo config whose MoE computes the dense OLMo 2 or 3 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that FlexOlmo cannot express.
    """
    from transformers import FlexOlmoConfig

    is_olmo3 = source.model_type == "olmo3"
    fields = carry_fields(
        _without_windows(source) if is_olmo3 else source,
        target="FlexOlmo",
        config_class=FlexOlmoConfig,
        carried={"attention_bias"},
        no_effect={"layer_types", "sliding_window"} if is_olmo3 else (),
        ignored=shape.ignored,
    )
    return FlexOlmoConfig(
        **fields | {"intermediate_size": shape.expert_size},
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        norm_topk_prob=shape.normalize_topk_prob,
    )


def _without_windows(source: "PreTrainedConfig") -> "PreTrainedConfig":
    """The config of an OLMo 3 with the one rope that full attention has."""
    if windows := [i for i, kind in enumerate(source.layer_types) if kind != "full_attention"]:
        raise UpcyclingError(
            f"config.json of the olmo3 source: layer_types gives layers {windows} a sliding window "
            f"of {source.sliding_window}, and FlexOlmo has none. Choose "
            f"{setting('target', 'sparse')}."
        )
    kinds = ("full_attention", "sliding_attention")
    if stray := {name: v for name, v in source.rope_parameters.items() if name not in kinds}:
        raise UpcyclingError(
            f"config.json of the olmo3 source: rope_parameters says {stray} for all layers, which "
            "transformers ignores: it reads OLMo 3's by kind of attention. Move it to "
            "rope_parameters.full_attention, or remove it."
        )
    source = copy.deepcopy(source)
    source.rope_parameters = source.rope_parameters["full_attention"]
    return source


FLEX_OLMO = Architecture(
    name="flex_olmo",
    dense={
        "olmo2": DenseLayout(router_norm=None),
        "olmo3": DenseLayout(router_norm=None, remapped_fields=frozenset({"rope_parameters"})),
    },
    convert_config=convert_config,
    routing=Routing(normalised="optional"),
    remapped_fields=frozenset({"intermediate_size"}),
)
