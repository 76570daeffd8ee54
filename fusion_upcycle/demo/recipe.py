"""How the demo models were trained: every number that the result depends on."""

from dataclasses import dataclass
from typing import Any

from fusion_upcycle.demo.texts import DOMAINS

CONTEXT_LENGTH = 128  # tokens, which are bytes
BATCH_SIZE = 8  # windows

#: Llama's, and what Mixtral has beside them.
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MOE_SHAPE = SHAPE | {
    "intermediate_size": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.0,
}


@dataclass(frozen=True)
class Recipe:
    """Training of one model.

    Attributes:
        what: in words.
        start: the model it starts from; None is random weights.
        config: fields of a new model.
        split: of the text.
        domains: of the text.
        tokens: budget; steps are of `BATCH_SIZE` windows.
        learning_rate: of AdamW; after a linear warm-up over `warmup_steps` it is constant, but for
            the last `decay_share` of the budget, in which it falls linearly to zero.
        moments: whether AdamW's moments are kept, so that training can go on.
    """

    what: str
    start: str | None
    config: dict[str, Any] | None
    split: str
    domains: tuple[str, ...]
    tokens: int
    learning_rate: float
    warmup_steps: int
    decay_share: float
    moments: bool = False

    def options(self) -> dict[str, Any]:
        """As `fusion_upcycle.training.options` takes them."""
        steps = self.tokens // (BATCH_SIZE * CONTEXT_LENGTH)
        return {
            "tokens": self.tokens,
            "context_length": CONTEXT_LENGTH,
            "batch_size": BATCH_SIZE,
            "schedule": "wsd",
            "warmup_share": self.warmup_steps / steps,
            "decay_share": self.decay_share,
            "final_share": 0.0,
            "learning_rate": self.learning_rate,
            "router_learning_rate": self.learning_rate,
            "accelerator": "cpu",  # the same on every machine, and tiny models gain little
        }


TRUNK, BASE, MOE = "trunk", "base", "moe"
RECIPES = {
    BASE: Recipe(
        "the base: learning rate decayed to zero, as published models are",
        None, SHAPE, "train", DOMAINS, 4_096_000, 8e-3, 100, 0.5,
    ),
    TRUNK: Recipe(
        "the base before its decay: the same training at a constant learning rate",
        None, SHAPE, "train", DOMAINS, 4_096_000, 8e-3, 100, 0.0,
    ),
    **{
        domain: Recipe(
            f"the base, fine-tuned on {domain}",
            BASE, None, "continued", (domain,), 409_600, 2e-3, 20, 0.5,
        )
        for domain in DOMAINS
    },
    MOE: Recipe(
        "a Mixtral of 16 experts, top-2, from random weights: one to grow",
        None, MOE_SHAPE, "train", DOMAINS, 8_192_000, 8e-3, 100, 0.0, moments=True,
    ),
}  # fmt: skip
MODELS = tuple(RECIPES)
