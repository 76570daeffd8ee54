"""Held-out text while training: loss and bits per byte, at intervals and at the end."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L

from fusion_upcycle.texts.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_upcycle.training.module import PretrainingModule


class Validation(L.Callback):
    """Score texts with `fusion_upcycle.texts.perplexity.perplexity`, windows overlapping by half.

    Every device scores all of them, as a sharded model needs.

    Args:
        texts: name -> documents.

    Attributes:
        results: step -> name of the text -> metrics; of this process only, not of one before a
            resume, which is in the logs.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]], tokenizer: "PreTrainedTokenizerBase"):
        self._texts, self._tokenizer = texts, tokenizer
        self.results: dict[int, dict[str, dict[str, float | int]]] = {}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: "PretrainingModule",  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        options = module.options
        if not self._texts or not module.due(options.validate_every):
            return
        found = {
            name: perplexity(
                module.model,
                self._tokenizer,
                documents,
                context_length=options.context_length,
                stride=max(1, options.context_length // 2),
                batch_size=options.micro_batch_size or options.batch_size,
            )
            for name, documents in self._texts.items()
        }
        self.results[trainer.global_step] = found
        module.write(
            {
                f"validation/{name}/{metric}": float(found[name][metric])
                for name in found
                for metric in ("loss_nats_per_token", "bits_per_byte")
            }
        )
