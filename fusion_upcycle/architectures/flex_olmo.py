"""FlexOlmo: OLMo 2's decoder (norms after attention and FFN) with Qwen-style experts.

Softmax over all experts, top-k, renormalised if `norm_topk_prob`, which is written as true (the
class default is false): N copies of an expert compute that expert's function for any router.
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import LLAMA_LAYOUT, Architecture, Routing
from fusion_upcycle.architectures.config import carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.resolution import ResolvedOptions


def convert_config(source: "PreTrainedConfig", options: "ResolvedOptions") -> "PreTrainedConfig":
    """The FlexOlmo config whose MoE computes the dense OLMo 2 `source` at step 0.

    Raises:
        UpcyclingError: a field means something that FlexOlmo cannot express.
    """
    from transformers import FlexOlmoConfig

    fields = carry_fields(
        source,
        target="FlexOlmo",
        carried={"attention_bias"},
        ignored=options.asked.ignore_config_fields,
    )
    return FlexOlmoConfig(
        **fields | {"intermediate_size": options.expert_size},
        num_experts=options.asked.num_experts,
        num_experts_per_tok=options.asked.experts_per_token,
        norm_topk_prob=options.asked.normalize_topk_prob,
    )


FLEX_OLMO = Architecture(
    name="flex_olmo",
    dense={"olmo2": LLAMA_LAYOUT},
    convert_config=convert_config,
    routing=Routing(normalised="optional"),
    remapped_fields=frozenset({"intermediate_size"}),
)
