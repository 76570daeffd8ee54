"""Cohere 2 MoE: top-k of the logits, then softmax, so weights sum to 1; parallel attention and FFN.

Attention and FFN of a layer read the same LayerNorm, which is thus the norm before the router. Rope
is in layers with a window only; each layer of a Cohere 2 keeps its kind. A Cohere has rope in all
layers and no window: it gets one that no text reaches. Written with no shared expert (which the
class would average with the routed ones) and every layer an MoE layer. The class can choose experts
by sigmoid too: such a model is not known here, and refused where an MoE is read.
"""

from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.base import Architecture, DenseLayout
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The Cohere 2 MoE config whose MoE computes the dense Cohere or Cohere 2 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that Cohere 2 MoE cannot express.
    """
    from transformers import Cohere2MoeConfig

    fields = carry_fields(
        source,
        target="Cohere 2 MoE",
        config_class=Cohere2MoeConfig,
        carried={
            "attention_bias",
            "layer_norm_eps",
            "layer_types",
            "logit_scale",
            "sliding_window",
        },
        required=_REQUIRED[source.model_type],
        no_effect=_NO_EFFECT,
        ignored=shape.ignored,
    )
    fields.setdefault("head_dim", source.hidden_size // source.num_attention_heads)
    if source.model_type == "cohere":
        kinds = ["sliding_attention"] * shape.num_layers
        fields |= {"layer_types": kinds, "sliding_window": _BEYOND_ANY_TEXT}
    rope = fields["rope_parameters"]
    # Fields of the class, which it does not read where there are `rope_parameters`.
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return Cohere2MoeConfig(
        **fields | older | {"intermediate_size": shape.expert_size},
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        num_shared_experts=0,
        expert_selection_fn="softmax",
        mlp_layer_types=["sparse"] * shape.num_layers,
    )


_BEYOND_ANY_TEXT = 2**30
_OTHER_CODE = "transformers' own class ignores it, and so computes another model than it asks for."
_REQUIRED: dict[str, dict[str, tuple[Any, str]]] = {
    "cohere": {"use_qk_norm": (False, "It has no norms on q and k. Choose {target=sparse}.")},
    # In published configs, from before transformers knew the family.
    "cohere2": {
        "position_embedding_type": ("rope_gptj", _OTHER_CODE),
        "rotary_pct": (1.0, _OTHER_CODE),
        "use_gated_activation": (True, _OTHER_CODE),
        "use_parallel_block": (True, _OTHER_CODE),
        "use_qk_norm": (False, _OTHER_CODE),
    },
}
#: Said again in `layer_types` and `tie_word_embeddings`, or of how it was trained.
_NO_EFFECT = {
    "cache_implementation",
    "layer_switch",
    "order_of_interleaved_layers",
    "sliding_window_pattern",
    "use_embedding_sharing",
    "use_parallel_embedding",
}

COHERE2_MOE = Architecture(
    name="cohere2_moe",
    dense=dict.fromkeys(("cohere2", "cohere"), DenseLayout(router_norm="input_layernorm.weight")),
    convert_config=convert_config,
    remapped_fields=frozenset({"intermediate_size"}),
    known_fields={"expert_selection_fn": "softmax"},
)
