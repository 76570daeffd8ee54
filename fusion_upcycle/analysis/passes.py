"""What an analysis runs a model on: texts or images of several domains, one forward pass each.

Layers of a stack see the same tokens: all of a window or an image, and of a T5 the encoder's layers
the first half of a window and the decoder's the second (`fusion_upcycle.texts.reading`).

Shapes: B windows or images, T tokens of one, N = B * T.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fusion_upcycle.analysis.token_classes import TokenClasses
from fusion_upcycle.analysis.windows import UNITS, Batch, DomainWindows, domain_windows
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import image_tokens, max_positions, num_embeddings
from fusion_upcycle.models.modeling_sparse import BIDIRECTIONAL
from fusion_upcycle.tables.images import image_mode, prepared
from fusion_upcycle.texts.reading import start_of_decoder
from fusion_upcycle.texts.tokens import check_vocabulary

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens of one window, less where the model has fewer positions.
WINDOW_TOKENS = 512
#: Windows or images of one forward pass.
BATCH_SIZE = 8


@dataclass(frozen=True)
class Tokens:
    """What the layers of one stack see in a forward pass.

    Attributes:
        counted_N: whether a token is counted: it is neither padding nor a start token.
        units_N: the unit of each token.
        classes_N: index into `TOKEN_CLASSES` of each token; None for images.
    """

    counted_N: Tensor
    units_N: Tensor
    classes_N: Tensor | None


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        domain: its index.
        arguments: of the model.
        stacks: name of a stack of layers -> its tokens.
    """

    domain: int
    arguments: Mapping[str, Any]
    stacks: Mapping[str, Tokens]


class Material(Protocol):
    """The texts or images of all domains."""

    @property
    def unit(self) -> str:
        """What a domain label belongs to when labels are permuted."""
        ...

    @property
    def domains(self) -> Mapping[str, Mapping[str, int]]:
        """Domain -> how much there is of it: `documents` or `images`, and `tokens`."""
        ...

    @property
    def counted(self) -> Mapping[str, int]:
        """Name of a stack -> tokens of all domains that its layers see."""
        ...

    def passes(self) -> Iterator[Pass]:
        """All of it, domain by domain."""
        ...


def material(
    model: "PreTrainedModel", processor: Any, data: Mapping[str, Sequence[Any]], *, tokens: int
) -> Material:
    """What `data` gives this model to see.

    Args:
        processor: the model's tokenizer or image processor.
        data: domain -> documents, or images of PIL for a model that takes images.
        tokens: of each domain at most; at least one image.

    Raises:
        UpcyclingError: no domain, a domain without tokens or images, images for a model of texts or
            the other way round, or a tokenizer of another model.
    """
    if model.main_input_name == "pixel_values":
        return _Images.of(model, processor, data, tokens)
    length = min(max_positions(model) or WINDOW_TOKENS, WINDOW_TOKENS)
    windows = domain_windows(
        processor,
        data,
        tokens=tokens,
        length=length,
        started=not model.config.is_encoder_decoder,
    )
    check_vocabulary(windows.largest, num_embeddings(model))
    return _Texts(model, processor, windows)


@dataclass(frozen=True)
class _Texts:
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    windows: DomainWindows

    @property
    def unit(self) -> str:
        return self.windows.unit

    @property
    def domains(self) -> dict[str, dict[str, int]]:
        windows = self.windows
        return {
            name: {"documents": windows.documents(name), "tokens": windows.tokens(name)}
            for name in windows.windows
        }

    @property
    def counted(self) -> dict[str, int]:
        every = [window for found in self.windows.windows.values() for window in found]
        total = sum(window.counted for window in every)
        if not self.model.config.is_encoder_decoder:
            return {"": total}
        second = sum(len(window.ids) // 2 for window in every)
        return {"encoder": total - second, "decoder": second}

    def passes(self) -> Iterator[Pass]:
        classes = TokenClasses(self.tokenizer)

        def seen(part: Batch) -> Tokens:
            flat = part.ids_BT.flatten()
            return Tokens(part.counted_BT.flatten(), part.units_BT.flatten(), classes(flat))

        for batch in self.windows.batches(BATCH_SIZE):
            given: dict[str, Any] = {"input_ids": batch.ids_BT, "use_cache": False}
            if not self.model.config.is_encoder_decoder:
                if getattr(self.model.config, "dense_model_type", None) in BIDIRECTIONAL:
                    given["attention_mask"] = batch.kept_BT.long()
                yield Pass(batch.domain, given, {"": seen(batch)})
                continue
            first, second = _halves(batch, start_of_decoder(self.model))
            given |= {
                "input_ids": first.ids_BT,
                "attention_mask": first.kept_BT.long(),
                "decoder_input_ids": second.ids_BT,
            }
            yield Pass(batch.domain, given, {"encoder": seen(first), "decoder": seen(second)})


def _halves(batch: Batch, start: int) -> tuple[Batch, Batch]:
    """The first half of each window, and the second behind the decoder's start token."""
    lengths_B = batch.kept_BT.sum(1)
    middle_B = (lengths_B + 1) // 2
    first = batch.part(torch.zeros_like(middle_B), middle_B)
    second = batch.part(middle_B - 1, lengths_B - middle_B + 1)
    second.ids_BT[:, 0], second.counted_BT[:, 0] = start, False
    return first, second


@dataclass(frozen=True)
class _Images:
    """Images, the same number of tokens each."""

    model: "PreTrainedModel"
    processor: Any
    images: Mapping[str, Sequence["Image"]]
    chosen: Mapping[str, Sequence[int]]
    tokens_each: int
    unit: str = "image"

    @classmethod
    def of(
        cls,
        model: "PreTrainedModel",
        processor: Any,
        images: Mapping[str, Sequence["Image"]],
        tokens: int,
    ) -> "_Images":
        if tokens < 1:
            raise UpcyclingError(f"tokens={tokens} of each domain must be 1 or more.")
        if not images:
            raise UpcyclingError("There are no images: name at least one domain, as NAME=FOLDER.")
        each = image_tokens(model)
        chosen = {}
        for domain, found in images.items():
            if len(found) == 0:
                raise UpcyclingError(
                    f"There are no images of {domain}. Give some, or leave it out."
                )
            if isinstance(found[0], str):
                raise UpcyclingError(
                    f"A {type(model).__name__} takes images, and of {domain} there are texts. Give "
                    "images."
                )
            count = min(len(found), max(1, tokens // each))
            chosen[domain] = [index * len(found) // count for index in range(count)]
        return cls(model, processor, images, chosen, each)

    @property
    def domains(self) -> dict[str, dict[str, int]]:
        return {
            name: {"images": len(chosen), "tokens": len(chosen) * self.tokens_each}
            for name, chosen in self.chosen.items()
        }

    @property
    def counted(self) -> dict[str, int]:
        return {"": sum(map(len, self.chosen.values())) * self.tokens_each}

    def passes(self) -> Iterator[Pass]:
        mode = image_mode(self.model.config)
        for domain, (name, chosen) in enumerate(self.chosen.items()):
            for start in range(0, len(chosen), BATCH_SIZE):
                numbers = range(start, min(start + BATCH_SIZE, len(chosen)))
                images = [self.images[name][chosen[number]] for number in numbers]
                pixels = torch.stack([prepared(image, self.processor, mode) for image in images])
                units = (torch.tensor(numbers) % UNITS).repeat_interleave(self.tokens_each)
                tokens = Tokens(torch.ones(len(units), dtype=torch.bool), units, None)
                given = {"pixel_values": pixels.to(self.model.dtype)}
                yield Pass(domain, given, {"": tokens})
