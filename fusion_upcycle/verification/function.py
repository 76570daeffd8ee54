"""How far apart two models are on the same tokens."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.texts.tokens import check_vocabulary, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Largest difference of an exact conversion, relative to the largest value of the reference.
TOLERANCE = 1e-4
NUM_TOKENS = 128

SAMPLE_TEXT = (
    "The train from Basel left at 7:42 and crossed the Rhine in fog. Nobody spoke until "
    "Karlsruhe, where a boy asked whether 17 * 23 is 391; it is. def area(r): return 3.14159 * "
    "r ** 2  # in m^2. Water boils at 100 °C, but on a mountain it boils sooner, because the air "
    'presses less. She wrote: "If the sum of two odd numbers is even, then so is their '
    'difference." Later they bought bread, cheese and two apples for 6.40 francs.'
)


@dataclass(frozen=True)
class Distance:
    """Outputs of two models on the same tokens: logits, or hidden states for backbones.

    Attributes:
        max_abs, mean_abs: absolute difference.
        scale: largest absolute value of the reference.
        kl_nats: mean KL(dense || upcycled) per token in nats; None for hidden states.
        argmax_agreement: share of tokens with the same most likely next token; likewise.
    """

    max_abs: float
    mean_abs: float
    scale: float
    kl_nats: float | None = None
    argmax_agreement: float | None = None

    @property
    def within_tolerance(self) -> bool:
        """False for NaN and infinity too."""
        return self.max_abs <= TOLERANCE * self.scale < float("inf")

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.max_abs)

    def to_json(self) -> dict[str, Any]:
        """What is not finite is None: JSON has no other way to say it."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: v if math.isfinite(v) else None for name, v in found.items()}


def distance(reference: Tensor, other: Tensor, *, logits: bool) -> Distance:
    """Compare outputs [..., V]; computed in at least float32."""
    dtype = torch.promote_types(reference.dtype, torch.float32)
    reference, other = reference.to(dtype), other.to(dtype)
    difference = (reference - other).abs()
    kl = agreement = None
    if logits:
        p, q = reference.log_softmax(-1), other.log_softmax(-1)
        # Rounding can make a KL of zero come out as -1e-9.
        kl = (p.exp() * (p - q)).sum(-1).mean().clamp(min=0).item()
        agreement = (reference.argmax(-1) == other.argmax(-1)).double().mean().item()
    return Distance(
        difference.max().item(),
        difference.mean().item(),
        reference.abs().max().item(),
        kl,
        agreement,
    )


@torch.inference_mode()
def compare_live(dense: "PreTrainedModel", moe: "PreTrainedModel", ids: Tensor) -> Distance:
    """Both models in memory, in their own dtype, on their own devices."""
    with evaluating(dense, experts="eager"), evaluating(moe, experts="eager"):
        reference, is_logits = output_of(dense, ids)
        return distance(reference.cpu(), output_of(moe, ids)[0].cpu(), logits=is_logits)


@dataclass(frozen=True)
class Models:
    """Source and result of a conversion in memory, for whoever asks for them."""

    source: "Callable[[], PreTrainedModel]"
    result: "Callable[[], PreTrainedModel]"


@dataclass(frozen=True)
class Tokens:
    """What both models are run on.

    Attributes:
        ids: [1, T].
        words: where they come from.
    """

    ids: Tensor
    words: str


def sample_tokens(tokenizer_file: Path | None, config: "PreTrainedConfig") -> Tokens:
    """Tokens of a fixed text, or random ones where there is no `tokenizer.json`.

    Raises:
        UpcyclingError: the tokenizer is damaged or does not fit the model's vocabulary.
    """
    count = min(NUM_TOKENS, config.max_position_embeddings)
    if tokenizer_file is None or not tokenizer_file.is_file():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (1, count), generator=generator)
        return Tokens(ids, f"{count} random token ids (no tokenizer.json at hand)")
    found = read_tokenizer(tokenizer_file).encode(SAMPLE_TEXT).ids
    if not found:
        raise UpcyclingError(
            f"{tokenizer_file} gives no token for a plain text. Use the tokenizer that belongs to "
            "the model."
        )
    check_vocabulary(max(found), config.vocab_size, str(tokenizer_file))
    ids = torch.tensor([found])
    return Tokens(ids[:, :count], f"{ids[:, :count].shape[1]} tokens of a sample text")


def layers_of(model: "PreTrainedModel") -> nn.ModuleList:
    layers = model.base_model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def output_of(model: "PreTrainedModel", ids: Tensor) -> tuple[Tensor, bool]:
    """Logits of a causal LM, or last hidden states of a backbone; and which."""
    device = model.device
    # A streamed model computes on the CPU; its own weights are on the meta device.
    output = model(input_ids=ids if device.type == "meta" else ids.to(device), use_cache=False)
    if "logits" in output:
        return output.logits, True
    return output.last_hidden_state, False
