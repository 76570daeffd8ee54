"""DeepSeek-V3: latent attention, sigmoid scores with a selection bias.

Takes Youtu-LLM, whose dense layers are DeepSeek-V3's. Written with one routing group,
`routed_scaling_factor` 1, a zero selection bias and no multi-token prediction; routing as in
`glm4_moe`. When transformers 5.23 loads a Youtu model it zeroes the embedding of `pad_token_id`,
whatever the file says: a file in which that is not zero is refused.
"""

from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.base import (
    Architecture,
    DenseLayout,
    Routing,
    first_dense_field,
    ungated_shared_experts,
)
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

_LATENT_ATTENTION = {
    "attention_bias",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rope_interleave",
    "v_head_dim",
}


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The DeepSeek-V3 config whose MoE computes the dense Youtu `source` at step 0.

    Raises:
        UpcyclingError: a field means something that DeepSeek-V3 cannot express.
    """
    from transformers import DeepseekV3Config

    fields = carry_fields(
        source,
        target="DeepSeek-V3",
        config_class=DeepseekV3Config,
        carried=_LATENT_ATTENTION,
        # The first follows from the others; the second is for models that are made anew.
        no_effect={"qk_head_dim", "embedding_initializer_range"},
        ignored=shape.ignored,
    )
    return DeepseekV3Config(
        **{"q_lora_rank": None} | fields,
        **routed_fields(shape),
    )


def routed_fields(shape: "MoEShape") -> dict[str, Any]:
    """The fields that say how tokens are routed, in families that have them from DeepSeek-V3."""
    layers = first_dense_field(shape.moe_layers, shape.num_layers)
    assert layers is not None
    return {
        **layers,
        "n_routed_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_size,
        "n_shared_experts": shape.shared_size // shape.expert_size,
        "norm_topk_prob": shape.normalize_topk_prob,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_mtp_layers": 0,
    }


SIGMOID_ROUTING = Routing(
    scores="sigmoid", normalised="optional", selection_bias="mlp.gate.e_score_correction_bias"
)

DEEPSEEK_V3 = Architecture(
    name="deepseek_v3",
    dense={"youtu": DenseLayout(zeroed_padding=True)},
    convert_config=convert_config,
    experts_field="n_routed_experts",
    routing=SIGMOID_ROUTING,
    shared=ungated_shared_experts(),
    moe_layer_fields=first_dense_field,
)
