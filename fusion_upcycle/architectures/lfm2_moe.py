"""LFM2-MoE: short convolutions and attention in turn; sigmoid scores with a selection bias.

Top-k weights are divided by their sum plus 1e-6, so that N copies of an expert fall short of its
function by a millionth of that, more for small scores: far less than what a proof allows. The bias
is a buffer of the block, float32 in a model of half precision, and written as zero.

LFM2 may say the width of its FFN as that of an ungated one, from which its class reckons its own:
such a config is first said plainly.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.base import Architecture, DenseLayout, Routing
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The LFM2-MoE config whose MoE computes the dense LFM2 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that LFM2-MoE cannot express.
    """
    from transformers import Lfm2MoeConfig

    fields = carry_fields(
        plain_config(source),
        target="LFM2-MoE",
        config_class=Lfm2MoeConfig,
        carried={"conv_L_cache", "conv_bias", "layer_types", "norm_eps"},
        required=_REQUIRED,
        no_effect=_NO_EFFECT,
        ignored=shape.ignored,
    )
    layers = _dense_layers_field(shape.moe_layers, shape.num_layers)
    assert layers is not None
    return Lfm2MoeConfig(
        **fields,
        **layers,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_size,
        norm_topk_prob=shape.normalize_topk_prob,
        routed_scaling_factor=1.0,
        use_expert_bias=True,
    )


def plain_config(source: "PreTrainedConfig") -> "PreTrainedConfig":
    """The same LFM2 with the width of its FFN in `intermediate_size`, as its class reckons it."""
    if not source.block_auto_adjust_ff_dim:
        return source
    source, multiple = copy.deepcopy(source), source.block_multiple_of
    width = int(source.block_ffn_dim_multiplier * int(2 * source.intermediate_size / 3))
    source.intermediate_size = -(-width // multiple) * multiple
    source.block_auto_adjust_ff_dim = False
    return source


_OTHER_CODE = "transformers' own class ignores it, and so computes another model than it asks for."
#: Of published configs, from before transformers knew the family.
_REQUIRED = {"block_use_swiglu": (True, _OTHER_CODE), "use_pos_enc": (True, _OTHER_CODE)}
#: Said in other fields, whose values count, or of models that are made anew.
_NO_EFFECT = {
    "block_auto_adjust_ff_dim",
    "block_dim",
    "block_ffn_dim_multiplier",
    "block_mlp_init_scale",
    "block_multiple_of",
    "block_norm_eps",
    "block_out_init_scale",
    "block_use_xavier_init",
    "conv_dim",
    "conv_dim_out",
    "conv_use_xavier_init",
    "full_attn_idxs",
    "num_heads",
}


def _dense_layers_field(moe_layers: Sequence[int], num_layers: int) -> dict[str, Any] | None:
    """The first layers are dense, all others MoE layers."""
    first = moe_layers[0]
    whole = list(moe_layers) == list(range(first, num_layers))
    return {"num_dense_layers": first} if whole else None


LFM2_MOE = Architecture(
    name="lfm2_moe",
    dense={
        "lfm2": DenseLayout(
            ffn={
                "gate_proj_FD": "feed_forward.w1.weight",
                "up_proj_FD": "feed_forward.w3.weight",
                "down_proj_DF": "feed_forward.w2.weight",
            },
            router_norm="ffn_norm.weight",
            plain_config=plain_config,
        )
    },
    convert_config=convert_config,
    expert_names={
        "gate_proj_FD": "feed_forward.experts.{expert}.w1.weight",
        "up_proj_FD": "feed_forward.experts.{expert}.w3.weight",
        "down_proj_DF": "feed_forward.experts.{expert}.w2.weight",
    },
    router_name="feed_forward.gate.weight",
    experts_module="feed_forward.experts",
    routing=Routing("sigmoid", "optional", selection_bias="feed_forward.expert_bias"),
    moe_layer_fields=_dense_layers_field,
    known_fields={"use_expert_bias": True},
)
