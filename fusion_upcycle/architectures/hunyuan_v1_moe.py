"""Hunyuan-MoE: softmax, top-k, always renormalised; a shared expert as wide as a routed one.

Every layer has the shared expert, without a gate: a copy takes half of the function by its scale,
or its `down_proj` is zero, also where none is asked for: it cannot be left out. The router is
float32 in a model of half precision.
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import (
    LLAMA_FFN,
    LLAMA_LAYOUT,
    Architecture,
    SharedExpert,
)
from fusion_upcycle.architectures.config import carry_fields
from fusion_upcycle.errors import UpcyclingError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

_OTHER_CODE = "transformers' own class ignores it, and so computes another model than it asks for."


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The Hunyuan-MoE config whose MoE computes the dense Hunyuan `source` at step 0.

    Raises:
        UpcyclingError: a field means something that Hunyuan-MoE cannot express, or a shared expert
            that is not as wide as a routed one.
    """
    from transformers import HunYuanMoEV1Config

    if shape.shared_size != shape.expert_size:
        raise UpcyclingError(
            "The shared expert of a hunyuan_v1_moe is as wide as a routed one: "
            f"{shape.expert_size}, not {shape.shared_size}. Choose "
            f"{setting('shared_expert', 'zero')} and no "
            f"{setting('shared_expert_intermediate_size')}, or whole FFNs as experts."
        )
    fields = carry_fields(
        source,
        target="Hunyuan-MoE",
        config_class=HunYuanMoEV1Config,
        carried={"attention_bias", "eod_token_id"},
        # In published configs, from before transformers knew the family.
        required={"use_qk_norm": (True, _OTHER_CODE), "use_cla": (False, _OTHER_CODE)},
        no_effect={"pretraining_tp"},
        ignored=shape.ignored,
    )
    return HunYuanMoEV1Config(
        **fields | {"intermediate_size": shape.expert_size},
        num_experts=shape.num_experts,
        moe_topk=shape.experts_per_token,
    )


HUNYUAN_V1_MOE = Architecture(
    name="hunyuan_v1_moe",
    dense={"hunyuan_v1_dense": LLAMA_LAYOUT},
    convert_config=convert_config,
    router_name="mlp.gate.wg.weight",
    router_module="mlp.gate",
    shared=SharedExpert(
        {part: name.replace("mlp.", "mlp.shared_mlp.") for part, name in LLAMA_FFN.items()},
        as_routed=True,
    ),
    remapped_fields=frozenset({"intermediate_size"}),
    known_fields={"moe_topk": int},
)
