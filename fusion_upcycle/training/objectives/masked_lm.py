"""The objective of encoders: masked tokens.

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
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.training.data import Tokens, pack_sources
from fusion_upcycle.training.objectives.base import (
    IGNORED,
    Batch,
    Objective,
    is_one_of,
    require_tokenizer,
)
from fusion_upcycle.training.objectives.texts import Windows, check_length, separator_of
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of BERT: what share of the tokens is to be told, and what stands there instead of them.
_MASKED, _AS_MASK, _AS_RANDOM = 0.15, 0.8, 0.1


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
                "give the tokenizer that the model was trained with."
            )
        check_length(options, max_positions(model))
        self._embeddings = num_embeddings(model)

    @classmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        return is_one_of(model, "MODEL_FOR_MASKED_LM_MAPPING_NAMES")

    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[Windows]:
        tokenizer = self._processor
        own = [tokenizer.sep_token_id, tokenizer.eos_token_id]
        separator = separator_of(tokenizer, self._options.separator, own)
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
