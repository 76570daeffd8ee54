"""Objectives on packed texts: the next token, and masked tokens.

Shapes: B windows, T tokens of a window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import max_positions, num_embeddings
from fusion_upcycle.models.modeling_sparse import BIDIRECTIONAL
from fusion_upcycle.texts.documents import named_documents
from fusion_upcycle.texts.perplexity import perplexity
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.training.data import PackedText, Tokens, pack_sources
from fusion_upcycle.training.fit import document_positions
from fusion_upcycle.training.objectives.base import IGNORED, Batch, Objective, require_tokenizer
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of BERT: what share of the tokens is to be told, and what stands there instead of them.
_MASKED, _AS_MASK, _AS_RANDOM = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Windows:
    """A text's windows of T tokens, and the token behind each."""

    text: PackedText
    context_length: int

    @property
    def name(self) -> str:
        return self.text.name

    @property
    def digest(self) -> str:
        return self.text.digest

    def __len__(self) -> int:
        return self.text.windows(self.context_length)

    def example(self, index: int, number: int) -> dict[str, Any]:
        window = self.text.window(index, self.context_length)
        return {"ids": torch.from_numpy(window.astype(np.int64))}

    def to_json(self) -> dict[str, Any]:
        return self.text.to_json()


class CausalLM(Objective):
    """The next token of decoders, of packed texts.

    Raises:
        UpcyclingError: a backbone, an encoder, too few positions, or no tokenizer.
    """

    name = "causal_lm"
    loss = "lm_nats_per_token"
    unit = "tokens"
    pipeline_tag = "text-generation"
    scores = ("loss_nats_per_token", "bits_per_byte")

    def __init__(self, model: "PreTrainedModel", processor: Any, options: TrainingOptions):
        super().__init__(model, processor, options)
        if model.get_output_embeddings() is None:
            raise UpcyclingError(
                f"{type(model).__name__} does not predict tokens: give a causal language model."
            )
        dense_type = getattr(model.config, "dense_model_type", model.config.model_type)
        if dense_type in BIDIRECTIONAL and not model.config.is_decoder:
            raise UpcyclingError(
                f"A {type(model).__name__} without is_decoder=true sees the token that it is to "
                "predict. Load it with its head for masked tokens (AutoModelForMaskedLM)."
            )
        require_tokenizer(processor, self.name)
        _check_length(options, max_positions(model))
        self._embeddings = num_embeddings(model)
        self._separator: int | None = None

    @classmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        is_text = model.main_input_name == "input_ids" and not model.config.is_encoder_decoder
        return is_text and not MaskedLM.fits(model)

    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[Windows]:
        texts = pack_sources(data, self._processor, cache)
        for text in texts:
            check_vocabulary(text.largest, self._embeddings, f"data.{text.name}: the tokenizer")
        self._separator = texts[0].separator
        return [Windows(text, self._options.context_length) for text in texts]

    def hold_out(self, validation: Mapping[str, Any] | None, cache: Path) -> None:
        self._held_out = named_documents(validation, "validation")

    def inputs(self, model: "PreTrainedModel", batch: Batch) -> dict[str, Any]:
        inputs_BT = batch["ids"][:, :-1]
        found = {"input_ids": inputs_BT, "use_cache": False}
        if self._options.attention == "document":
            assert self._separator is not None
            found["position_ids"] = document_positions(inputs_BT, self._separator)
        return found

    def targets(self, batch: Batch) -> Tensor:
        return batch["ids"][:, 1:]

    def score(self, model: "PreTrainedModel", name: str) -> dict[str, Any]:
        """Perplexity and bits per byte, in windows that overlap by half."""
        context_length = self._options.context_length
        return perplexity(
            model,
            self._processor,
            self._held_out[name],
            context_length=context_length,
            stride=max(1, context_length // 2),
            batch_size=self._batch_size,
        )


@dataclass(frozen=True)
class MaskedWindows(Windows):
    """A text's windows, each between the tokenizer's tokens of begin and end, some tokens masked.

    As in BERT (arXiv 1810.04805), 15 % of the tokens, one at least, are to be told: in 80 % of
    these places stands the mask, in 10 % any token, and in the rest the token itself.

    Attributes:
        around: tokens of begin and end, [] where the tokenizer has none.
        mask: token id.
        special: token ids that are never masked.
        plain: token ids that may stand there by chance.
        seed: of the draws.
    """

    around: tuple[Tokens, Tokens]
    mask: int
    special: Tokens
    plain: Tokens
    seed: int

    @property
    def _inside(self) -> int:
        return self.context_length - sum(map(len, self.around))

    def __len__(self) -> int:
        return self.text.windows(self._inside)

    def example(self, index: int, number: int) -> dict[str, Any]:
        begin, end = self.around
        window = np.concatenate([begin, self.text.window(index, self._inside)[:-1], end])
        places = torch.from_numpy(np.flatnonzero(~np.isin(window, self.special)))
        ids = torch.from_numpy(window.astype(np.int64))
        generator = torch.Generator().manual_seed(hash((self.seed, number)) % 2**63)
        chosen = places[torch.randperm(len(places), generator=generator)]
        chosen = chosen[: max(1, round(_MASKED * len(places)))]
        labels = torch.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        draws = torch.rand(len(chosen), generator=generator)
        others = torch.randint(len(self.plain), (len(chosen),), generator=generator)
        by_chance = torch.from_numpy(self.plain.astype(np.int64))[others]
        kept = torch.where(draws < _AS_MASK + _AS_RANDOM, by_chance, ids[chosen])
        ids[chosen] = kept.masked_fill(draws < _AS_MASK, self.mask)
        return {"input_ids": ids, "labels": labels}


class MaskedLM(Objective):
    """Masked tokens of encoders, of packed texts.

    Raises:
        UpcyclingError: too few positions, no tokenizer, or one without a mask.
    """

    name = "masked_lm"
    loss = "masked_lm_nats_per_token"
    unit = "tokens"
    pipeline_tag = "fill-mask"

    def __init__(self, model: "PreTrainedModel", processor: Any, options: TrainingOptions):
        super().__init__(model, processor, options)
        require_tokenizer(processor, self.name)
        if processor.mask_token_id is None:
            raise UpcyclingError(
                "The tokenizer has no mask token, which masked_lm puts in the place of others: "
                "give the model's own tokenizer, or set tokenizer.mask_token."
            )
        _check_length(options, _usable_positions(model))
        self._embeddings = num_embeddings(model)

    @classmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        return is_one_of(model, "MODEL_FOR_MASKED_LM_MAPPING_NAMES")

    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[Windows]:
        tokenizer = self._processor
        separator = tokenizer.sep_token_id
        separator = tokenizer.eos_token_id if separator is None else separator
        begin = np.array([i for i in [tokenizer.cls_token_id] if i is not None], dtype=np.int32)
        end = np.array([separator] if len(begin) else [], dtype=np.int32)
        if self._options.context_length <= len(begin) + len(end) + 1:
            raise UpcyclingError(
                f"context_length={self._options.context_length} has no room for text between the "
                "tokens of begin and end. Raise it."
            )
        special = np.array(sorted({*tokenizer.all_special_ids, separator}), dtype=np.int32)
        plain = np.setdiff1d(np.arange(len(tokenizer), dtype=np.int32), special)
        check_vocabulary(len(tokenizer) - 1, self._embeddings)
        return [
            MaskedWindows(
                text,
                self._options.context_length,
                (begin, end),
                tokenizer.mask_token_id,
                special,
                plain,
                self._options.seed,
            )
            for text in pack_sources(data, tokenizer, cache, where=where, separator=separator)
        ]

    def inputs(self, model: "PreTrainedModel", batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"]}

    def targets(self, batch: Batch) -> Tensor:
        return batch["labels"]

    def counted(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())


def is_one_of(model: "PreTrainedModel", mapping: str) -> bool:
    """Whether transformers has the model's class, or that which ours is made of, in a mapping."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for found in getattr(modeling_auto, mapping).values():
        names.update([found] if isinstance(found, str) else found)
    return not names.isdisjoint(kind.__name__ for kind in type(model).__mro__)


def _check_length(options: TrainingOptions, limit: int | None) -> None:
    if limit is not None and options.context_length > limit:
        raise UpcyclingError(
            f"context_length={options.context_length} is longer than the model's {limit} positions "
            f"(max_position_embeddings): use at most {limit}."
        )


def _usable_positions(model: "PreTrainedModel") -> int | None:
    """RoBERTa's positions begin behind that of padding."""
    limit = max_positions(model)
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return limit if limit is None or padding is None else limit - padding - 1
