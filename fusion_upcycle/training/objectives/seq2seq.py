"""The objective of encoder-decoder models: targets of inputs.

Shapes: B examples, S tokens of an input, T of a target, padding included.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import num_embeddings, require_decoder_start
from fusion_upcycle.tables.pairs import Pairs, load_pairs, target_ids
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.training.objectives.base import (
    IGNORED,
    SPLITS,
    Batch,
    Objective,
    require_tokenizer,
)
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenPairs:
    """Inputs and targets as token ids."""

    name: str
    inputs: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]]
    truncated: int

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.inputs, self.targets]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.inputs)

    def example(self, index: int, number: int) -> dict[str, Any]:
        ids, labels = torch.tensor(self.inputs[index]), torch.tensor(self.targets[index])
        return {"input_ids": ids, "labels": labels}

    def to_json(self) -> dict[str, Any]:
        return {
            "examples": len(self),
            "input_tokens": sum(map(len, self.inputs)),
            "target_tokens": sum(map(len, self.targets)),
            "truncated_inputs": self.truncated,
            "sha256": self.digest,
        }


class Seq2Seq(Objective):
    """The tokens of a target, given its input and those before.

    Raises:
        UpcyclingError: no tokenizer, or one that cannot pad.
    """

    name = "seq2seq"
    loss = "seq2seq_nats_per_token"
    pipeline_tag = "text2text-generation"

    def __init__(self, model: "PreTrainedModel", processor: Any, options: TrainingOptions):
        super().__init__(model, processor, options)
        require_tokenizer(processor, self.name)
        if processor.pad_token_id is None:
            raise UpcyclingError(
                "The tokenizer has no padding token, which fills inputs up to the longest of a "
                "batch: set tokenizer.pad_token."
            )
        require_decoder_start(model)
        self._embeddings = num_embeddings(model)

    @classmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        shifts = hasattr(model, "prepare_decoder_input_ids_from_labels")
        return bool(model.config.is_encoder_decoder and model.get_output_embeddings() and shifts)

    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[TokenPairs]:
        return [
            self._tokenised(name, load_pairs(given, f"{where}.{name}", splits=SPLITS[where]))
            for name, given in data.items()
        ]

    def _tokenised(self, name: str, pairs: Pairs) -> TokenPairs:
        tokenizer, limit = self._processor, self._options.context_length
        whole = tokenizer(list(pairs.inputs), verbose=False)["input_ids"]
        inputs = tokenizer(list(pairs.inputs), truncation=True, max_length=limit)["input_ids"]
        targets = [target_ids(tokenizer, target, pairs.where) for target in pairs.targets]
        for number, target in enumerate(targets):
            if len(target) > limit:
                raise UpcyclingError(
                    f"{pairs.where}: the target of example {number} has {len(target)} tokens, more "
                    f"than context_length={limit}. Raise it, or leave the example out."
                )
        _check_ids(tokenizer, [*inputs, *targets], self._embeddings, pairs.where)
        return TokenPairs(name, inputs, targets, sum(len(ids) > limit for ids in whole))

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Padded to the longest: inputs by the tokenizer's padding token, labels by `IGNORED`."""
        inputs = [example["input_ids"] for example in examples]
        padding = self._processor.pad_token_id
        labels = [example["labels"] for example in examples]
        return {
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in inputs], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def inputs(self, model: "PreTrainedModel", batch: Batch) -> dict[str, Any]:
        shifted: Any = model.prepare_decoder_input_ids_from_labels
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": shifted(labels=batch["labels"]),
            "use_cache": False,
        }

    def targets(self, batch: Batch) -> Tensor:
        return batch["labels"]

    def counted(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def kept(self, batch: Batch) -> dict[str, Tensor]:
        # The decoder's token before each target counts, that is as many as there are.
        return {"encoder": batch["attention_mask"] == 1, "decoder": batch["labels"] != IGNORED}


def _check_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Sequence[int]], known: int, where: str
) -> None:
    largest = max((max(ids) for ids in texts if ids), default=0)
    check_vocabulary(max(largest, tokenizer.pad_token_id), known, f"{where}: the tokenizer")
