"""dots.llm1 MoE: the attention of Qwen3, the routing of DeepSeek-V3 (sigmoid, selection bias).

A family is one `Architecture`: which dense models it takes, how their config becomes its own, where
its files have what. This one shares its layout with GLM-4.5 MoE.
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

_NO_BIAS = "dots.llm1 takes no biases from a Qwen3 model."


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The dots.llm1 config whose MoE computes the dense Qwen3 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that dots.llm1 cannot express.
    """
    from transformers import Dots1Config

    fields = carry_fields(
        source,
        target="dots.llm1",
        config_class=Dots1Config,
        carried={"max_window_layers"},
        required={"attention_bias": (False, _NO_BIAS)},
        no_effect={"layer_types", "sliding_window", "use_sliding_window"},
        ignored=shape.ignored,
    )
    no_window(source, "dots.llm1")
    return Dots1Config(**{"sliding_window": None} | fields, **routed_fields(shape))


DOTS1 = Architecture(
    name="dots1",
    dense={"qwen3": LLAMA_LAYOUT},
    convert_config=convert_config,
    experts_field="n_routed_experts",
    routing=SIGMOID_ROUTING,
    shared=ungated_shared_experts(),
    moe_layer_fields=first_dense_field,
    remapped_fields=frozenset({"sliding_window"}),
)
