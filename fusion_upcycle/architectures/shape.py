"""The shape of a Mixture-of-Experts model that a dense one becomes, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """What a family's `convert_config` writes into the config beside the dense model's fields.

    Attributes:
        num_experts: routed experts per MoE layer.
        experts_per_token: top-k.
        expert_size: width of a routed expert.
        shared_size: width of the shared expert, 0 for none.
        moe_layers: indices of the layers that become MoE layers, ascending.
        num_layers: of the model.
        normalize_topk_prob: whether the weights of a token's experts are divided by their sum.
        routing: who chooses: `token_choice`, `expert_choice` or `hash`.
        router_scores: `softmax` or `sigmoid`.
        capacity_factor: of expert choice, C.
        routing_group: of expert choice: among whose tokens experts choose.
        ignored: unknown fields of the dense config that the user knows to be without effect.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_size: int
    moe_layers: Sequence[int]
    num_layers: int
    normalize_topk_prob: bool
    routing: str = "token_choice"
    router_scores: str = "softmax"
    capacity_factor: float = 2.0
    routing_group: str = "batch"
    ignored: Sequence[str] = ()
