"""GLM-4.5 MoE: sigmoid scores, a selection bias, renormalised if `norm_topk_prob`.

The sigmoid family for Llama, Qwen2 and Qwen3: of those that transformers knows, it alone has both
biases on q, k and v and norms on q and k. Written with one routing group, `routed_scaling_factor` 1
and a zero selection bias, which loss-free balancing can move later; the bias stays float32 in a
model of half precision. Top-k weights then sum to 1, so N copies of an expert compute that expert's
function for any router. The shared experts have no gate: a copy takes half of the function by its
scale; without one they have width 0.
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import (
    LLAMA_LAYOUT,
    Architecture,
    first_dense_field,
    ungated_shared_experts,
)
from fusion_upcycle.architectures.config import carry_fields, no_window
from fusion_upcycle.architectures.deepseek_v3 import SIGMOID_ROUTING, routed_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

_NO_BIAS = "GLM-4.5 MoE has biases on q, k and v only; this model has one elsewhere."


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The GLM-4.5 MoE config whose MoE computes the dense `source` (Llama, Qwen2, Qwen3) at step 0.

    Raises:
        UpcyclingError: a field means something that GLM-4.5 MoE cannot express.
    """
    from transformers import Glm4MoeConfig

    fields = carry_fields(
        source,
        target="GLM-4.5 MoE",
        config_class=Glm4MoeConfig,
        required={"attention_bias": (False, _NO_BIAS), "mlp_bias": (False, _NO_BIAS)},
        no_effect={
            "layer_types",
            "max_window_layers",
            "pretraining_tp",
            "sliding_window",
            "use_sliding_window",
        },
        ignored=shape.ignored,
    )
    no_window(source, "GLM-4.5 MoE")
    # Said on purpose: the class rotates half of each head otherwise, and finds the size of a head
    # in a field that it does not list.
    fields["rope_parameters"] = fields["rope_parameters"] | {"partial_rotary_factor": 1.0}
    fields.setdefault("head_dim", source.hidden_size // source.num_attention_heads)
    return Glm4MoeConfig(
        **fields,
        **routed_fields(shape),
        attention_bias=source.model_type == "qwen2",
        use_qk_norm=source.model_type == "qwen3",
    )


GLM4_MOE = Architecture(
    name="glm4_moe",
    dense={"qwen3": LLAMA_LAYOUT, "qwen2": LLAMA_LAYOUT, "llama": LLAMA_LAYOUT},
    convert_config=convert_config,
    experts_field="n_routed_experts",
    routing=SIGMOID_ROUTING,
    shared=ungated_shared_experts(),
    moe_layer_fields=first_dense_field,
    remapped_fields=frozenset({"attention_bias"}),
)
