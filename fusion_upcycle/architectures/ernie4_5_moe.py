"""ERNIE 4.5 MoE: softmax, top-k by score plus a selection bias, always renormalised.

The bias takes part in the choice of experts only and starts at zero; the weights are the scores
themselves, divided by their sum, so N copies of an expert compute that expert's function for any
router. Router and bias stay float32 in a model of half precision. The shared experts have no gate:
a copy takes half of the function by its scale.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.base import (
    LLAMA_LAYOUT,
    Architecture,
    Routing,
    ungated_shared_experts,
)
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

_NO_BIAS = "The experts of ERNIE 4.5 MoE have no biases. No remedy is known."


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The ERNIE 4.5 MoE config whose MoE computes the dense ERNIE 4.5 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that ERNIE 4.5 MoE cannot express.
    """
    from transformers import Ernie4_5_MoeConfig

    fields = carry_fields(
        source,
        target="ERNIE 4.5 MoE",
        config_class=Ernie4_5_MoeConfig,
        required={"use_bias": (False, _NO_BIAS)},
        ignored=shape.ignored,
    )
    layers = _moe_layer_fields(shape.moe_layers, shape.num_layers)
    assert layers is not None
    return Ernie4_5_MoeConfig(
        **fields,
        **layers,
        moe_num_experts=shape.num_experts,
        moe_k=shape.experts_per_token,
        moe_intermediate_size=shape.expert_size,
        moe_num_shared_experts=shape.shared_size // shape.expert_size,
    )


def _moe_layer_fields(moe_layers: Sequence[int], num_layers: int) -> dict[str, Any] | None:
    """Every n-th layer between a first and a last one: layers l with (l + 1) mod n = 0."""
    first, last = moe_layers[0], moe_layers[-1]
    for interval in range(1, num_layers + 1):
        if list(moe_layers) == [x for x in range(first, last + 1) if (x + 1) % interval == 0]:
            return {
                "moe_layer_start_index": first,
                "moe_layer_end_index": last,
                "moe_layer_interval": interval,
            }
    return None


ERNIE4_5_MOE = Architecture(
    name="ernie4_5_moe",
    dense={"ernie4_5": LLAMA_LAYOUT},
    convert_config=convert_config,
    experts_field="moe_num_experts",
    live_names={
        "mlp.moe_statics.e_score_correction_bias": "mlp.gate.moe_statics.e_score_correction_bias"
    },
    routing=Routing(selection_bias="mlp.moe_statics.e_score_correction_bias"),
    shared=ungated_shared_experts(optional=True),
    moe_layer_fields=_moe_layer_fields,
)
