"""How far apart two models are on the same tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_upcycle.architectures.layout import takes_images
from fusion_upcycle.checkpoint.tokenizer_file import tokenizing
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import positions_of
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.texts.tokens import check_vocabulary, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Arguments of a forward pass, by name.
Inputs = Mapping[str, Tensor]

#: Largest difference of an exact conversion, relative to the largest value of the reference.
TOLERANCE = 1e-4
NUM_TOKENS = 128
#: Of log probabilities, at a time: those of all tokens can be larger than an FFN.
_ROWS = 16

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
        share_lost: of what the reference's outputs say beyond one answer for all inputs, the share
            that the other's do not: 0 for the same function, 1 for that one answer (the mean over
            the sample; where it has one row, all outputs equal), more where it is contradicted.
            KL to KL, for hidden states squared distance to squared distance.
    """

    max_abs: float
    mean_abs: float
    scale: float
    kl_nats: float | None = None
    argmax_agreement: float | None = None
    share_lost: float | None = None

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
    rows = reference.reshape(-1, reference.shape[-1])
    one_answer = rows.mean(0) if len(rows) > 1 else torch.zeros_like(rows[0])
    largest, mean = difference.max().item(), difference.mean().item()
    kl = agreement = None
    lost, all_of_it = difference.square().mean(), (rows - one_answer).square().mean()
    del difference  # as large as all logits
    if logits:
        p, q = reference.log_softmax(-1), other.log_softmax(-1)
        lost, all_of_it = _kl(p, q), _kl(p, _mean_answer(p))
        kl = lost.item()
        agreement = (reference.argmax(-1) == other.argmax(-1)).double().mean().item()
    return Distance(
        largest,
        mean,
        reference.abs().max().item(),
        kl,
        agreement,
        (lost / all_of_it).item() if all_of_it > 0 else None,
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Mean KL divergence in nats, of log probabilities."""
    pairs = zip(
        p.flatten(0, -2).split(_ROWS), q.expand_as(p).flatten(0, -2).split(_ROWS), strict=True
    )
    per_row = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs])
    # Rounding can make a KL of zero come out as -1e-9.
    return per_row.mean().clamp(min=0)


def _mean_answer(p: Tensor) -> Tensor:
    """The one answer that is nearest to all of these log probabilities; uniform for a single one.

    Of all answers that ignore the input, their mean has the least KL.
    """
    rows = p.reshape(-1, p.shape[-1])
    if len(rows) == 1:
        return torch.zeros_like(rows[0]).log_softmax(-1)
    return rows.logsumexp(0) - math.log(len(rows))


@torch.inference_mode()
def compare_live(dense: "PreTrainedModel", moe: "PreTrainedModel", inputs: Inputs) -> Distance:
    """Both models in memory, in their own dtype, on their own devices."""
    with evaluating(dense, experts="eager"), evaluating(moe, experts="eager"):
        reference, is_logits = output_of(dense, inputs)
        return distance(reference.cpu(), output_of(moe, inputs)[0].cpu(), logits=is_logits)


@dataclass(frozen=True)
class Models:
    """Source and result of a conversion in memory, for whoever asks for them."""

    source: "Callable[[], PreTrainedModel]"
    result: "Callable[[], PreTrainedModel]"


@dataclass(frozen=True)
class Sample:
    """What both models are run on.

    Attributes:
        inputs: `input_ids` [1, T], for a T5 `decoder_input_ids` beside; or `pixel_values`.
        words: where they come from.
    """

    inputs: Inputs
    words: str


def take_sample(tokenizer_file: Path | None, config: "PreTrainedConfig") -> Sample:
    """What a model of this config is run on: tokens of a fixed text, or a few images.

    Args:
        tokenizer_file: `tokenizer.json`; without one tokens are random.
        config: with `architectures` set.

    Raises:
        UpcyclingError: the tokenizer is damaged or does not fit the model's vocabulary.
    """
    if config.architectures and takes_images(config):
        images = _images(config.num_channels, config.image_size)
        return Sample({"pixel_values": images}, f"{len(images)} images made on the spot")
    ids, words = _sample_ids(tokenizer_file, config)
    if not config.is_encoder_decoder:
        return Sample({"input_ids": ids}, words)
    if isinstance(config.eos_token_id, int):  # which T5's classifiers look for
        ids = torch.cat([ids[:, :-1], torch.tensor([[config.eos_token_id]])], dim=1)
    return Sample({"input_ids": ids, "decoder_input_ids": ids}, words)


def _images(channels: int, size: int | Sequence[int]) -> Tensor:
    """Smooth random pictures [4, C, H, W] of mean 0 and standard deviation 1."""
    height, width = (size, size) if isinstance(size, int) else size
    coarse = torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (height, width), mode="bicubic")
    return (images - images.mean()) / images.std()


def _sample_ids(tokenizer_file: Path | None, config: "PreTrainedConfig") -> tuple[Tensor, str]:
    """Token ids [1, T], and where they come from."""
    count = min(NUM_TOKENS, positions_of(config) or NUM_TOKENS)
    if tokenizer_file is None or not tokenizer_file.is_file():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (1, count), generator=generator)
        return ids, f"{count} random token ids (no tokenizer.json at hand)"
    tokenizer = read_tokenizer(tokenizer_file)
    with tokenizing(tokenizer_file):
        found = tokenizer.encode(SAMPLE_TEXT).ids
    if not found:
        raise UpcyclingError(
            f"{tokenizer_file} gives no token for a plain text. Use the tokenizer that belongs to "
            "the model."
        )
    check_vocabulary(max(found), config.vocab_size, str(tokenizer_file))
    ids = torch.tensor([found])
    return ids[:, :count], f"{ids[:, :count].shape[1]} tokens of a sample text"


def compute_dtype(model: "PreTrainedModel") -> torch.dtype:
    """The dtype in which a model computes: that of its weights, or what it is streamed in."""
    return getattr(model, "streamed_dtype", model.dtype)


def output_of(model: "PreTrainedModel", inputs: Inputs) -> tuple[Tensor, bool]:
    """Logits of a model with a head, or last hidden states of a backbone; and which.

    Of the few others, all tensors of floating-point numbers that they give, one after the other.
    """
    device = model.device
    # A streamed model computes on the CPU; its own weights are on the meta device.
    given: dict[str, Any] = {
        name: tensor if device.type == "meta" else tensor.to(device)
        for name, tensor in inputs.items()
    }
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].to(compute_dtype(model))
    else:
        given["use_cache"] = False
    output = model(**given)
    if "logits" in output:
        return output.logits, True
    if "last_hidden_state" in output:
        return output.last_hidden_state, False
    flat = [value for given in output.values() for value in _tensors(given)]
    return torch.cat([value.flatten() for value in flat]), False


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for inside in value for t in _tensors(inside)] if isinstance(value, tuple) else []
