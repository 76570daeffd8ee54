"""Mixtral: softmax over all experts, top-k, always renormalised; no biases, no shared expert.

Top-k weights sum to 1 whatever the router says, so N copies of an expert compute that expert's
function for any router and any k: no scale on `down_proj` is needed (scale 1, exact).
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import (
    LLAMA_LAYOUT,
    NO_EFFECT,
    REQUIRED,
    Architecture,
    carry_fields,
)
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CARRIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)

_NO_BIAS = (
    "Mixtral has no biases. Where they are all zero, set the field to false and remove the bias "
    "tensors; otherwise this model needs a family with biases, which is not supported yet."
)

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def convert_config(
    source: "PreTrainedConfig",
    num_experts: int,
    experts_per_token: int,
    ignored: Collection[str] = (),
) -> "PreTrainedConfig":
    """The Mixtral config whose MoE computes the dense `source` (Llama or Mistral) at step 0.

    Raises:
        UpcyclingError: a field means something that Mixtral cannot express.
    """
    from transformers import MixtralConfig

    fields = carry_fields(
        source,
        target="Mixtral",
        carried=CARRIED,
        required=REQUIRED
        | {"attention_bias": (False, _NO_BIAS), "mlp_bias": (False, _NO_BIAS)}
        # A sliding window in a Llama config is a stray field that Llama itself ignores.
        | (
            {"sliding_window": (None, "Llama ignores it: remove it.")}
            if source.model_type == "llama"
            else {}
        ),
        # pretraining_tp once split the matmuls of Llama 1 and 2; transformers 5 ignores it.
        no_effect=NO_EFFECT | {"pretraining_tp"},
        ignored=ignored,
    )
    # "type" is the old spelling, which transformers keeps beside the new one it made from it
    rope = {key: value for key, value in fields["rope_parameters"].items() if key != "type"}
    fields["rope_parameters"] = rope
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UpcyclingError(
            f"config.json of the {source.model_type} source: rope type {rope_type!r} has not been "
            f"shown to be exact in Mixtral. Supported: {', '.join(ROPE_TYPES)}."
        )
    # Mixtral's own defaults differ (rope theta 1e6, eps 1e-5, 8 KV heads): None must stay None.
    fields.setdefault("sliding_window", None)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        fields.setdefault(token, None)
    return MixtralConfig(
        **fields, num_local_experts=num_experts, num_experts_per_tok=experts_per_token
    )


MIXTRAL = Architecture(
    name="mixtral",
    dense={"llama": LLAMA_LAYOUT, "mistral": LLAMA_LAYOUT},
    convert_config=convert_config,
    expert_names={
        "gate_proj_FD": "block_sparse_moe.experts.{expert}.w1.weight",
        "up_proj_FD": "block_sparse_moe.experts.{expert}.w3.weight",
        "down_proj_DF": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    router_name="block_sparse_moe.gate.weight",
    experts_field="num_local_experts",
    experts_module="mlp.experts",
    router_module="mlp.gate",
)
