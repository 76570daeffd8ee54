"""OLMoE: softmax over all experts, top-k, renormalised if `norm_topk_prob`; no shared expert.

It can be expanded, not made: its norms on q and k span all heads and stand before attention, which
no dense family of transformers has (OLMo 2 has its norms after: `flex_olmo`).
"""

from fusion_upcycle.architectures.base import Architecture, Routing

OLMOE = Architecture(name="olmoe", routing=Routing(normalised="optional"))
