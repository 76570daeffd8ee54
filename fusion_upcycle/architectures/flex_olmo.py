"""FlexOlmo: OLMo 2's decoder (norms after attention and FFN) with Qwen-style experts.

Softmax over all experts, top-k, renormalised if `norm_topk_prob`, which is written as true (the
class default is false): N copies of an expert compute that expert's function for any router.
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import Architecture, DenseLayout, Routing
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The FlexOlmo config whose MoE computes the dense OLMo 2 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that FlexOlmo cannot express.
    """
    from transformers import FlexOlmoConfig

    fields = carry_fields(
        source,
        target="FlexOlmo",
        carried={"attention_bias"},
        ignored=shape.ignored,
    )
    return FlexOlmoConfig(
        **fields | {"intermediate_size": shape.expert_size},
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        norm_topk_prob=shape.normalize_topk_prob,
    )


FLEX_OLMO = Architecture(
    name="flex_olmo",
    dense={"olmo2": DenseLayout(router_norm=None)},
    convert_config=convert_config,
    routing=Routing(normalised="optional"),
    remapped_fields=frozenset({"intermediate_size"}),
)
