"""FusionBench task pool: what a model costs to hold and to run."""

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.taskpool.dummy import get_model_summary

from fusion_upcycle.checks import require_whole
from fusion_upcycle.live.cost import active_parameters, forward_flops, head_of_images
from fusion_upcycle.live.inputs import (
    image_shape,
    image_tokens,
    logits_of_last,
    max_positions,
    num_embeddings,
)
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.report import Measured
from fusion_upcycle.report.memory import peak_bytes, reset_peak
from fusion_upcycle.taskpool.pool import check_options, leave_record, to_device
from fusion_upcycle.texts.reading import start_of_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
class ModelCostTaskPool(BaseTaskPool):
    """Parameters, FLOPs, bytes, speed and memory of the model that a method yields.

    Args:
        prompt_tokens: of each sequence; less where the model has fewer positions. A model of images
            is given images, which have as many tokens as they have.
        new_tokens: that each sequence is continued by, one at a time, with a cache.
        batch_size: sequences, or images, at once.
        repeats: of each measurement, of which the median counts; one more before them does not.

    ``evaluate`` returns ``{"cost": {...}, "model_info": {...}}``: ``total_parameters``;
    ``active_parameters`` of one token, in expert choice on average; ``flops_per_token`` of the
    forward pass, 2 for each active parameter that is multiplied, with attention at
    ``prompt_tokens``, as in ``inspection``; of a T5 both are of a token of the input and one of the
    output together, and what sees an image once is shared among its tokens. ``bytes`` of the
    weights; ``prefill_tokens_per_second``, and of models that generate
    ``decode_tokens_per_second``, of all sequences together, on random tokens or pixels;
    ``peak_memory_bytes``, the largest memory meanwhile, of the device where it is a GPU, else of
    the whole process with its libraries; of models of images ``tokens_per_image``.

    Speed depends on the machine and on what else it does: compare rows of one experiment only.

    Raises:
        UpcyclingError: an unknown option, or one below 1.
    """

    def __init__(
        self,
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        batch_size: int = 1,
        repeats: int = 5,
        **kwargs: Any,
    ) -> None:
        check_options(self, kwargs)
        super().__init__(**kwargs)
        for name in ("prompt_tokens", "new_tokens", "batch_size", "repeats"):
            require_whole(f"taskpool.{name}", getattr(self, name), at_least=1)
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Measure ``model``, a transformers model of text or images; its modes are restored."""
        to_device(self, model)
        images = model.main_input_name == "pixel_values"
        prompt, new = (image_tokens(model), 0) if images else self._lengths(model)
        active = active_parameters(model)
        # A head of images sees one token of each.
        rarely = head_of_images(model) * (1 - 1 / prompt) if images else 0
        with Measured() as measured:
            prefill, decode, peak = self._speed(model, prompt, new)
        cost = {
            "total_parameters": model.num_parameters(),
            "active_parameters": active,
            "flops_per_token": forward_flops(model, prompt) - 2 * rarely,
            "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "prefill_tokens_per_second": self.batch_size * prompt / prefill,
            "peak_memory_bytes": peak,
        }
        if new:
            cost["decode_tokens_per_second"] = self.batch_size * new / decode
        if images:
            cost["tokens_per_image"] = prompt
        report = {"cost": cost, **get_model_summary(model)}
        self._evaluations.append({"report": report, **measured.as_record()})
        settings = {
            "prompt_tokens": prompt,
            "new_tokens": new,
            "batch_size": self.batch_size,
            "repeats": self.repeats,
        }
        leave_record(self, settings, self._evaluations)
        return report

    def _lengths(self, model: "PreTrainedModel") -> tuple[int, int]:
        """Tokens of a prompt, and those that it is continued by."""
        limit = max_positions(model)
        new = self.new_tokens if limit is None else min(self.new_tokens, limit // 2)
        new = new if model.can_generate() else 0
        return (self.prompt_tokens if limit is None else min(self.prompt_tokens, limit - new)), new

    def _inputs(self, model: "PreTrainedModel", prompt: int) -> dict[str, Any]:
        """Random sequences of so many tokens, or random images."""
        generator = torch.Generator().manual_seed(0)
        if model.main_input_name == "pixel_values":
            pixels = torch.randn(self.batch_size, *image_shape(model), generator=generator)
            return {"pixel_values": pixels.to(model.device, model.dtype)}
        shape = (self.batch_size, prompt)
        ids_BT = torch.randint(num_embeddings(model), shape, generator=generator).to(model.device)
        if model.config.is_encoder_decoder:
            start_B1 = torch.full_like(ids_BT[:, :1], start_of_decoder(model))
            return {"input_ids": ids_BT, "decoder_input_ids": start_B1, "use_cache": True}
        generates = model.can_generate()
        return {"input_ids": ids_BT, "use_cache": generates, **logits_of_last(model, 1)}

    @torch.inference_mode()
    def _speed(self, model: "PreTrainedModel", prompt: int, new: int) -> tuple[float, float, int]:
        """Seconds of reading a prompt and of continuing it, and the peak of memory."""
        inputs = self._inputs(model, prompt)
        reset_peak(model.device)

        def now() -> float:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            return time.perf_counter()

        # Each has its own clock: a difference of two would be noise where one of them is short.
        reading, going_on = [], []
        with evaluating(model):
            for _ in range(1 + self.repeats):
                began = now()
                outputs = model(**inputs)
                read = now()
                for _ in range(new):
                    outputs = model(**_next(model, outputs))
                reading.append(read - began)
                going_on.append(now() - read)
        return median(reading[1:]), median(going_on[1:]), peak_bytes(model.device)


def _next(model: Any, outputs: Any) -> dict[str, Any]:
    """What goes on from a forward pass by its most likely token."""
    ids_B1 = outputs.logits[:, -1:].argmax(-1)
    given = {"past_key_values": outputs.past_key_values, "use_cache": True}
    if model.config.is_encoder_decoder:
        seen = (outputs.encoder_last_hidden_state,)
        return given | {"encoder_outputs": seen, "decoder_input_ids": ids_B1}
    return given | {"input_ids": ids_B1}
