"""What a live model costs per token: parameters that take part.

A multiplication and an addition are 2 FLOPs; norms, activations and softmax are left out.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from fusion_upcycle.live.experts import find_experts
from fusion_upcycle.live.routers import find_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What image models call the positions that they add, where these are no module.
_POSITIONS = "position_embeddings"


def active_parameters(model: "PreTrainedModel") -> int:
    """Parameters that one token uses: all, less the experts that it is not sent to.

    In expert choice that is so on average: an expert takes `capacity_factor / num_experts` of the
    tokens. Of an encoder and a decoder these are of a token of each.

    Routed experts are those of a family in `fusion_upcycle.architectures`, and, as FusionBench
    makes them, lists `experts` of modules that send a token to `top_k` of them.

    Raises:
        UpcyclingError: an MoE family that is not known.
    """
    routers = find_routers(model)
    try:
        used = routers.experts_on_average
        idle = sum(
            round(parameter.numel() // routers.num_experts * (routers.num_experts - used[layer]))
            for layer, module in find_experts(model, routers).items()
            for parameter in module.parameters()
        )
    finally:
        routers.close()
    for module in model.modules():
        experts: Any = getattr(module, "experts", None)
        top_k: Any = getattr(module, "top_k", None)
        if isinstance(experts, nn.ModuleList) and isinstance(top_k, int):
            held = sum(parameter.numel() for parameter in experts.parameters())
            idle += held * (len(experts) - top_k) // len(experts)
    return model.num_parameters() - idle


def looked_up_parameters(model: "PreTrainedModel") -> int:
    """Parameters of embeddings that are only looked up or added; a tied output head is not."""
    head: Any = model.get_output_embeddings()
    found = {
        id(parameter): parameter.numel()
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding) or name == _POSITIONS
    }
    if head is not None:
        found.pop(id(head.weight), None)
    return sum(found.values())


def head_of_images(model: "PreTrainedModel") -> int:
    """Parameters of matrices behind the layers of a model of images, which see it once, pooled.

    Those of keys and values of a pooling head (SigLIP) count among them.
    """
    inside = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) or name.endswith("embeddings")
        for parameter in module.parameters()
    }
    return sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in inside)
