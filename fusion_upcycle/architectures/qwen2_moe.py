"""Qwen2-MoE: softmax, top-k, renormalised if `norm_topk_prob`; a gated shared expert beside.

The block adds `sigmoid(shared_expert_gate . h) * shared_expert(h)` to the routed experts. With a
zero gate the factor is 1/2, so a shared copy of the FFN takes half of the function, and the routed
experts' `down_proj` is scaled by 1/2 (exact: a power of two). Biases of q, k and v are carried;
each layer keeps its own kind of attention.

The files always have a shared expert: without one it has width 0, which transformers reads and vLLM
refuses. llama.cpp ignores `norm_topk_prob`, and a zero gate gives it NaN: not for that reader.
"""

from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.base import (
    LLAMA_LAYOUT,
    Architecture,
    DenseLayout,
    Routing,
    SharedExpert,
    dense_layers_field,
)
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

#: Qwen's shared expert, behind a sigmoid gate.
GATED_SHARED_EXPERT = SharedExpert(
    names={
        "gate_proj_FD": "mlp.shared_expert.gate_proj.weight",
        "up_proj_FD": "mlp.shared_expert.up_proj.weight",
        "down_proj_DF": "mlp.shared_expert.down_proj.weight",
    },
    gate_name="mlp.shared_expert_gate.weight",
)

_NO_BIAS = "Qwen2-MoE has biases on q, k and v only; this model has one on the output or the FFN."
_SEED_OSS = {
    "attention_bias": (
        True,
        "Qwen2-MoE always has biases on q, k and v. Without them this model "
        "is a Llama: set model_type and architectures to that.",
    ),
    "attention_out_bias": (False, _NO_BIAS + " Choose {target=sparse}."),
    "residual_dropout": (
        0.0,
        "Qwen2-MoE has no such dropout, which training would use. Set it to 0 in config.json (the "
        "forward pass of a trained model does not change), or choose {target=sparse}.",
    ),
}


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The Qwen2-MoE config whose MoE computes the dense `source` at step 0.

    Takes Qwen2, Llama and Seed-OSS.

    Raises:
        UpcyclingError: a field means something that Qwen2-MoE cannot express.
    """
    from transformers import Qwen2MoeConfig

    fields = carry_fields(
        source,
        target="Qwen2-MoE",
        config_class=Qwen2MoeConfig,
        carried={"max_window_layers"},
        required={"attention_bias": (False, _NO_BIAS), "mlp_bias": (False, _NO_BIAS)}
        | (_SEED_OSS if source.model_type == "seed_oss" else {}),
        no_effect={"layer_types", "sliding_window", "use_sliding_window", "pretraining_tp"},
        ignored=shape.ignored,
    )
    return Qwen2MoeConfig(
        **fields,
        **_attention(source),
        qkv_bias=True,  # where a Llama has none, zeros: vLLM and llama.cpp do not look at this
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_size,
        shared_expert_intermediate_size=shape.shared_size,
        norm_topk_prob=shape.normalize_topk_prob,
        decoder_sparse_step=1,
        **dense_layers_field(shape.moe_layers, shape.num_layers),
    )


def _attention(source: "PreTrainedConfig") -> dict[str, Any]:
    """Which layers have a window. Said layer by layer: the class's own default pattern differs."""
    count = source.num_hidden_layers
    kinds = getattr(source, "layer_types", None) or ["full_attention"] * count
    if "sliding_attention" not in kinds:
        return {"use_sliding_window": False, "layer_types": kinds}
    window = source.sliding_window
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}


QWEN2_MOE = Architecture(
    name="qwen2_moe",
    dense={
        "qwen2": LLAMA_LAYOUT,
        "llama": DenseLayout(zeros=tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
        "seed_oss": LLAMA_LAYOUT,
    },
    convert_config=convert_config,
    routing=Routing(normalised="optional"),
    moe_layer_fields=dense_layers_field,
    shared=GATED_SHARED_EXPERT,
    remapped_fields=frozenset({"sliding_window", "use_sliding_window"}),
)
