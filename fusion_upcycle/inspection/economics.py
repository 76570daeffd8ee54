"""What a model costs: parameters, bytes, FLOPs per token and for training, by arithmetic alone.

A multiplication and an addition are 2 FLOPs. Norms, activations, softmax and the states of linear
attention are left out, as is usual: below 1 % of a model of this kind.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.models.modeling_sparse import BIDIRECTIONAL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.upcycling.upcycling import Upcycling

#: Forward and backward pass together cost 3 forward passes (arXiv 2001.08361, section 2.1).
TRAINING_PASSES = 3


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        total, active: parameters, and those that a token uses.
        bytes: of all parameters in the model's dtype.
        flops: of the forward pass, per token.
    """

    total: int
    active: int
    bytes: int
    flops: float

    def training_flops(self, tokens: float) -> float:
        """FLOPs of training on this many tokens, without recomputed activations."""
        return TRAINING_PASSES * self.flops * tokens


@dataclass(frozen=True)
class Economics:
    """The models that an upcycling is to be compared with; all share its attention.

    Attributes:
        dense: the source.
        upcycled: the MoE. One trained from scratch costs the same per token, but starts from
            nothing.
        equal_active: a dense model with as many parameters as the MoE has active ones: the same
            layers with a wider FFN.
    """

    dense: Cost
    upcycled: Cost
    equal_active: Cost


def economics(upcycling: "Upcycling", context_length: int) -> Economics:
    """The costs of a planned upcycling and of what it is compared with.

    Args:
        upcycling: the plan; nothing is read.
        context_length: tokens of a sequence, for the attention scores.

    Raises:
        UpcyclingError: `context_length` below 1.
    """
    if context_length < 1:
        raise UpcyclingError(f"context_length={context_length} must be 1 or more.")
    counts = upcycling.parameters
    scores = attention_score_flops(upcycling.source_config, context_length)
    lookup = embedding_parameters(upcycling)[0]

    def cost(total: int, active: int, size: int) -> Cost:
        return Cost(total, active, size, 2 * (active - lookup) + scores)

    dense_bytes = sum(spec.nbytes for spec in upcycling.source.specs.values())
    active = counts["active"]
    return Economics(
        dense=cost(counts["dense"], counts["dense"], dense_bytes),
        upcycled=cost(counts["total"], active, upcycling.total_bytes),
        equal_active=cost(active, active, active * upcycling.dtype.itemsize),
    )


def embedding_parameters(upcycling: "Upcycling") -> tuple[int, int]:
    """Parameters of embeddings that are only looked up, and of embeddings and output head together.

    Tied embeddings are the output head as well, whose product with the hidden state is computed.
    """
    specs = upcycling.specs
    embeddings = sum(s.numel for name, s in specs.items() if name.endswith("embed_tokens.weight"))
    head = sum(s.numel for name, s in specs.items() if name == "lm_head.weight")
    tied = class_name(upcycling.config).endswith("ForCausalLM") and not head
    return (0 if tied else embeddings), embeddings + head


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
