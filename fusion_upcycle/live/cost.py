"""What a live model costs per token: parameters that take part, and FLOPs.

A multiplication and an addition are 2 FLOPs; norms, activations and softmax are left out.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from fusion_upcycle.live.experts import find_experts
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.models.modeling_sparse import BIDIRECTIONAL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: What image models call the positions that they add, where these are no module.
_POSITIONS = "position_embeddings"

#: Forward and backward pass together cost 3 forward passes (arXiv 2001.08361, section 2.1).
TRAINING_PASSES = 3


def forward_flops(model: "PreTrainedModel", context_length: int) -> float:
    """Of a token in a sequence of so many: 2 for each active parameter, and attention scores."""
    matrices = active_parameters(model) - looked_up_parameters(model)
    return 2 * matrices + attention_score_flops(model.config.get_text_config(), context_length)


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


def attention_score_flops(config: "PreTrainedConfig", context_length: int) -> float:
    """FLOPs per token of query x key and weights x value, forward, mean over a sequence.

    Of a causal one, per layer `2 * heads * (d_qk + d_v) * a`, where a token attends to `a`
    positions on the mean: `(T + 1) / 2`, or less in a sliding window. That is half of PaLM's count
    (arXiv 2204.02311, appendix B), which does not use that attention is causal, and Kaplan's
    `2 * n_layer * n_ctx * d_attn` (arXiv 2001.08361, table 1). Layers of linear attention have no
    scores. In a model in which a token sees those behind it too (BERT, ViT) it attends to all T
    positions; of a T5 it is that of a token of the input and one of the output, each of T,
    together.
    """
    family = getattr(config, "dense_model_type", config.model_type)
    if config.is_encoder_decoder:
        causal = (context_length + 1) / 2
        layers, decoder = config.num_layers, config.num_decoder_layers
        attended = layers * context_length + decoder * (causal + context_length)
        return 2 * config.num_heads * 2 * config.d_kv * attended
    heads = config.num_attention_heads
    if config.model_type in ("youtu", "deepseek_v3"):  # compressed keys and values: two widths
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        widths = 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    all_seen = family in BIDIRECTIONAL
    attended = (_reached if all_seen else _attended)(config, context_length)
    return sum(2 * heads * widths * positions for positions in attended)


def _reached(config: "PreTrainedConfig", length: int) -> Iterable[float]:
    """The same where a token sees those behind it too."""
    window = getattr(config, "local_attention", None) or length  # of ModernBERT
    for kind in getattr(config, "layer_types", None) or [None] * config.num_hidden_layers:
        yield min(window, length) if kind == "sliding_attention" else length


def _attended(config: "PreTrainedConfig", length: int) -> Iterable[float]:
    """For each layer with attention scores, the mean number of positions a token attends to."""
    window = getattr(config, "sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    for kind in kinds:
        if kind == "full_attention":
            yield (length + 1) / 2
        elif kind == "sliding_attention":
            assert window is not None
            reach = min(window, length)
            yield reach - reach * (reach - 1) / (2 * length)
