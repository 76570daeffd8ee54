"""The objective of decoders: the next token.

Shapes: B windows, T tokens of a window.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import max_positions, num_embeddings
from fusion_upcycle.live.sharing import ALONE, Share
from fusion_upcycle.models.modeling_sparse import BIDIRECTIONAL
from fusion_upcycle.texts.documents import named_documents
from fusion_upcycle.texts.perplexity import perplexity
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.training.data import pack_sources
from fusion_upcycle.training.fit import document_positions
from fusion_upcycle.training.objectives.base import Batch, Objective, require_tokenizer
from fusion_upcycle.training.objectives.masked_lm import MaskedLM
from fusion_upcycle.training.objectives.texts import Windows, check_length, separator_of
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        check_length(options, max_positions(model))
        self._embeddings = num_embeddings(model)
        self._separator: int | None = None

    @classmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        is_text = model.main_input_name == "input_ids" and not model.config.is_encoder_decoder
        return is_text and not MaskedLM.fits(model)

    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[Windows]:
        own = [self._processor.eos_token_id]
        separator = separator_of(self._processor, self._options.separator, own)
        texts = pack_sources(data, self._processor, cache, separator=separator)
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

    def score(self, model: "PreTrainedModel", name: str, share: Share = ALONE) -> dict[str, Any]:
        """Perplexity and bits per byte, in windows that overlap by half."""
        context_length = self._options.context_length
        return perplexity(
            model,
            self._processor,
            self._held_out[name],
            context_length=context_length,
            stride=max(1, context_length // 2),
            batch_size=self._batch_size,
            share=share,
        )
