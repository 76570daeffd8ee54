"""How the demo models are trained: every number that the result depends on."""

from dataclasses import dataclass

from fusion_upcycle.demo.texts import DOMAINS

BASE = "base"
MODELS = (BASE, *DOMAINS)  # the base, and one fine-tune per domain


@dataclass(frozen=True)
class Recipe:
    """Shape and training of the base and of its fine-tunes; the default is the shipped recipe.

    Learning rates rise linearly over the first ``warmup_share`` of the steps and fall to zero as a
    cosine. ``base_mix`` is each domain's probability in a base batch, in the order of ``DOMAINS``.
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    context_length: int = 256  # tokens, which are bytes
    batch_size: int = 8  # windows of context_length
    base_steps: int = 540
    base_mix: tuple[float, float, float] = (0.4, 0.4, 0.2)
    finetune_steps: int = 100
    finetune_share: float = 0.5  # of the base's learning rates
    matrix_learning_rate: float = 0.02  # Muon
    other_learning_rate: float = 6e-3  # Adam
    warmup_share: float = 0.05
    seed: int = 0
    version: int = 2  # raised when the training code changes what it makes: part of the cache key


@dataclass(frozen=True)
class MoERecipe:
    """The demo MoE: the base upcycled, and trained on the three domains with AdamW.

    Drop-upcycling and a weak balance loss make experts that differ, so that growing by copies with
    top-k fixed visibly hurts, as in a large MoE.
    """

    num_experts: int = 4
    experts_per_token: int = 2
    expert_init: str = "drop"
    tokens: int = 1_200_000
    batch_size: int = 8
    learning_rate: float = 2e-3  # falls to zero as a cosine
    weight_decay: float = 0.1
    balance_weight: float = 0.01
    seed: int = 0
    version: int = 1  # raised when code changes what is made: part of the cache key
