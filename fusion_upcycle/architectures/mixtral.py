"""Mixtral: softmax over all experts, top-k, always renormalised; no biases, no shared expert.

Top-k weights sum to 1 whatever the router says, so N copies of an expert compute that expert's
function for any router and any k: no scale on `down_proj` is needed (scale 1, exact).
"""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import LLAMA_LAYOUT, Architecture, carry_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.options import UpcyclingOptions

_NO_BIAS = (
    "Mixtral has no biases. Where they are all zero, set the field to false and remove the bias "
    "tensors; otherwise this model needs a family with biases, which is not supported yet."
)


def convert_config(source: "PreTrainedConfig", options: "UpcyclingOptions") -> "PreTrainedConfig":
    """The Mixtral config whose MoE computes the dense `source` (Llama or Mistral) at step 0.

    Raises:
        UpcyclingError: a field means something that Mixtral cannot express.
    """
    from transformers import MixtralConfig

    fields = carry_fields(
        source,
        target="Mixtral",
        carried={"sliding_window"},
        required={"attention_bias": (False, _NO_BIAS), "mlp_bias": (False, _NO_BIAS)},
        # pretraining_tp once split the matmuls of Llama 1 and 2; transformers 5 ignores it.
        no_effect={"pretraining_tp"},
        ignored=options.ignore_config_fields,
    )
    return MixtralConfig(
        **{"sliding_window": None} | fields,
        num_local_experts=options.num_experts,
        num_experts_per_tok=options.experts_per_token,
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
)
