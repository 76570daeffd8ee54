"""Mixtral: softmax over all experts, top-k, always renormalised; no biases, no shared expert.

Top-k weights sum to 1 whatever the router says, so N copies of an expert compute that expert's
function for any router and any k: no scale on `down_proj` is needed (scale 1, exact).
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import LLAMA_LAYOUT, Architecture, DenseLayout, Splits
from fusion_upcycle.architectures.config import ROPE_TYPES, carry_fields
from fusion_upcycle.errors import UpcyclingError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

_NO_BIAS = (
    "Mixtral has no biases. A Llama with attention biases fits {target=granitemoe}; where the "
    "biases are all zero, set the field to false and remove the bias tensors."
)


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The Mixtral config whose MoE computes the dense `source` at step 0.

    Takes Llama, Mistral, Phi-3 and, as far as its queries are not scaled, Ministral 3.

    Raises:
        UpcyclingError: a field means something that Mixtral cannot express.
    """
    from transformers import MixtralConfig

    is_phi3 = source.model_type == "phi3"
    if is_phi3:
        _require_full_rotation(source)
    fields = carry_fields(
        source,
        target="Mixtral",
        config_class=MixtralConfig,
        carried={"sliding_window"},
        required={"attention_bias": (False, _NO_BIAS), "mlp_bias": (False, _NO_BIAS)}
        | (_PHI3_REQUIRED if is_phi3 else {}),
        # pretraining_tp once split the matmuls of Llama 1 and 2; transformers 5 ignores it.
        no_effect={"pretraining_tp"} | (_PHI3_NO_EFFECT if is_phi3 else set()),
        rope_types=_ROPE_TYPES.get(source.model_type, ROPE_TYPES),
        ignored=shape.ignored,
    )
    if is_phi3:
        fields["head_dim"] = source.hidden_size // source.num_attention_heads
    if source.model_type == "ministral3":
        _require_unscaled_queries(source)
        rope = fields["rope_parameters"]  # part of which only Ministral 3 knows
        fields["rope_parameters"] = {k: v for k, v in rope.items() if k not in _MINISTRAL3_ROPE}
    return MixtralConfig(
        **{"sliding_window": None} | fields | {"intermediate_size": shape.expert_size},
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
    )


_ROPE_TYPES = {"phi3": (*ROPE_TYPES, "longrope"), "ministral3": ("yarn",)}
_MINISTRAL3_ROPE = ("llama_4_scaling_beta", "max_position_embeddings")
_NO_DROPOUT = "Mixtral has no such dropout, which training would use. Set it to 0."
_PHI3_REQUIRED = {"resid_pdrop": (0.0, _NO_DROPOUT), "embd_pdrop": (0.0, _NO_DROPOUT)}
#: Said again in `rope_parameters`, whose values count.
_PHI3_NO_EFFECT = {"original_max_position_embeddings", "partial_rotary_factor"}


def _require_full_rotation(source: "PreTrainedConfig") -> None:
    share = source.rope_parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise UpcyclingError(
            f"config.json of the phi3 source: partial_rotary_factor={share} cannot be expressed by "
            "Mixtral, which rotates whole heads. No remedy is known."
        )


def _require_unscaled_queries(source: "PreTrainedConfig") -> None:
    """Ministral 3 multiplies queries by 1 + beta ln(1 + floor(position / original length))."""
    rope = source.rope_parameters
    # Without a factor, rope would change with the maximum that is asked for below.
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings", "factor"):
        if rope.get(name) is None:
            raise UpcyclingError(
                f"config.json of the ministral3 source: rope_parameters does not say {name}, which "
                "the model cannot be known without. Add it."
            )
    beta, original = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    if beta and source.max_position_embeddings > original:
        raise UpcyclingError(
            f"config.json of the ministral3 source: from position {original} on, queries are "
            f"scaled (llama_4_scaling_beta={beta}), which Mixtral cannot express, and "
            f"max_position_embeddings={source.max_position_embeddings} is beyond that. If an MoE "
            f"for texts of up to {original} tokens will do, set max_position_embeddings to that; "
            f"else choose {setting('target', 'sparse')}."
        )


def _phi3_splits(config: "PreTrainedConfig") -> Splits:
    """q, k and v are one matrix in Phi-3's files, and gate and up another."""
    head_dim = config.hidden_size // config.num_attention_heads
    rows = {"q": config.num_attention_heads * head_dim}
    rows |= dict.fromkeys("kv", config.num_key_value_heads * head_dim)
    return {
        "self_attn.qkv_proj.weight": [(f"self_attn.{x}_proj.weight", n) for x, n in rows.items()],
        "mlp.gate_up_proj.weight": [
            (f"mlp.{x}_proj.weight", config.intermediate_size) for x in ("gate", "up")
        ],
    }


MIXTRAL = Architecture(
    name="mixtral",
    dense={
        "llama": LLAMA_LAYOUT,
        "mistral": LLAMA_LAYOUT,
        "phi3": DenseLayout(splits=_phi3_splits),
        "ministral3": DenseLayout(remapped_fields=frozenset({"rope_parameters"})),
    },
    convert_config=convert_config,
    expert_names={
        "gate_proj_FD": "block_sparse_moe.experts.{expert}.w1.weight",
        "up_proj_FD": "block_sparse_moe.experts.{expert}.w3.weight",
        "down_proj_DF": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    router_name="block_sparse_moe.gate.weight",
    experts_field="num_local_experts",
    live_names={"block_sparse_moe.gate.weight": "mlp.gate.weight"},
    remapped_fields=frozenset({"intermediate_size"}),
)
