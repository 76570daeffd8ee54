"""GraniteMoe: top-k of the logits, then softmax, so weights sum to 1; four multipliers; no shared.

Its files hold all experts of a layer in two tensors: `input_linear` [E, 2F, D], gate rows before up
rows, and `output_linear` [E, D, F]. The multipliers of embeddings, attention, residuals and logits
make it the only family that takes Granite and MiniCPM; its attention biases, the one that takes a
Llama with those.
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import LLAMA_LAYOUT, Architecture
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

_MULTIPLIERS = {
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
}
_NO_BIAS = "GraniteMoe has biases in attention only, none in the FFN. No remedy is known."


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The GraniteMoe config whose MoE computes the dense `source` (Granite, Llama) at step 0.

    Raises:
        UpcyclingError: a field means something that GraniteMoe cannot express.
    """
    from transformers import GraniteMoeConfig

    fields = carry_fields(
        source,
        target="GraniteMoe",
        config_class=GraniteMoeConfig,
        carried=_MULTIPLIERS | {"attention_bias"},
        required={"mlp_bias": (False, _NO_BIAS)},
        no_effect={"pretraining_tp"},
        ignored=shape.ignored,
    )
    if source.model_type == "llama":  # whose attention scale is not a field
        fields["attention_multiplier"] = source.head_dim**-0.5
    return GraniteMoeConfig(
        **fields | {"intermediate_size": shape.expert_size},
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
    )


GRANITEMOE = Architecture(
    name="granitemoe",
    dense={"granite": LLAMA_LAYOUT, "llama": LLAMA_LAYOUT},
    convert_config=convert_config,
    expert_names={
        "gate_proj_FD": "block_sparse_moe.input_linear.weight",
        "up_proj_FD": "block_sparse_moe.input_linear.weight",
        "down_proj_DF": "block_sparse_moe.output_linear.weight",
    },
    router_name="block_sparse_moe.router.layer.weight",
    experts_field="num_local_experts",
    experts_module="block_sparse_moe.experts",
    live_names={
        "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
        "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
    },
    remapped_fields=frozenset({"intermediate_size"}),
)
