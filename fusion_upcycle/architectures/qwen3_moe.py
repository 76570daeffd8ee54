"""Qwen3-MoE: softmax over all experts, top-k, renormalised if `norm_topk_prob`; no shared expert.

`norm_topk_prob` is written as true (the class default is false): then the top-k weights sum to 1
and N copies of an expert compute that expert's function for any router, with no scale.
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import (
    LLAMA_LAYOUT,
    Architecture,
    Routing,
    dense_layers_field,
)
from fusion_upcycle.architectures.config import carry_fields, one_window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The Qwen3-MoE config whose MoE computes the dense Qwen3 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that Qwen3-MoE cannot express.
    """
    from transformers import Qwen3MoeConfig

    fields = carry_fields(
        source,
        target="Qwen3-MoE",
        config_class=Qwen3MoeConfig,
        carried={"attention_bias"},
        # What these say together is one window for all layers, or none: see `one_window`.
        no_effect={"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"},
        ignored=shape.ignored,
    )
    window = one_window(source, "Qwen3-MoE")
    return Qwen3MoeConfig(
        **fields,
        use_sliding_window=window is not None,
        sliding_window=window,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_size,
        norm_topk_prob=shape.normalize_topk_prob,
        decoder_sparse_step=1,
        **dense_layers_field(shape.moe_layers, shape.num_layers),
    )


QWEN3_MOE = Architecture(
    name="qwen3_moe",
    dense={"qwen3": LLAMA_LAYOUT},
    convert_config=convert_config,
    routing=Routing(normalised="optional"),
    moe_layer_fields=dense_layers_field,
    remapped_fields=frozenset({"sliding_window", "use_sliding_window"}),
)
