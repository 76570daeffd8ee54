"""Qwen3.5-MoE (text): linear and full attention in turn, softmax, top-k, always renormalised.

The gated shared expert is Qwen2-MoE's: with a zero gate a copy takes half of the function, and the
routed experts' `down_proj` is scaled by 1/2.
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import Architecture, DenseLayout
from fusion_upcycle.architectures.config import carry_fields
from fusion_upcycle.architectures.qwen2_moe import GATED_SHARED_EXPERT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

_ATTENTION = {
    "attention_bias",
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
}


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The Qwen3.5-MoE config whose MoE computes the dense Qwen3.5 text `source` at step 0.

    Raises:
        UpcyclingError: a field means something that Qwen3.5-MoE cannot express.
    """
    from transformers import Qwen3_5MoeTextConfig

    fields = carry_fields(
        source,
        target="Qwen3.5-MoE",
        config_class=Qwen3_5MoeTextConfig,
        carried=_ATTENTION,
        # Said again in `layer_types` and `rope_parameters`, whose values count.
        no_effect={"full_attention_interval", "partial_rotary_factor"},
        ignored=shape.ignored,
    )
    del fields["intermediate_size"]  # every layer is an MoE layer
    return Qwen3_5MoeTextConfig(
        **fields,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_size,
        shared_expert_intermediate_size=shape.shared_size,
    )


QWEN3_5_MOE = Architecture(
    name="qwen3_5_moe_text",
    dense={"qwen3_5_text": DenseLayout(zero_centred_norms=True)},
    convert_config=convert_config,
    shared=GATED_SHARED_EXPERT,
)
