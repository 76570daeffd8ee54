"""What a model costs: parameters, bytes, FLOPs per token and for training, by arithmetic alone.

A multiplication and an addition are 2 FLOPs. Norms, activations, softmax and the states of linear
attention are left out, as is usual: below 1 % of a model of this kind.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.cost import TRAINING_PASSES, attention_score_flops

if TYPE_CHECKING:
    from fusion_upcycle.upcycling.upcycling import Upcycling


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
