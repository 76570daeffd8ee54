"""FusionBench task pool: how well a causal language model predicts held-out text."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.taskpool.dummy import get_model_summary
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import max_positions
from fusion_upcycle.live.sending import sending
from fusion_upcycle.report import Measured
from fusion_upcycle.taskpool.pool import (
    check_options,
    leave_record,
    load_tokenizer,
    named_texts,
    plain,
    to_device,
)
from fusion_upcycle.texts.documents import load_documents
from fusion_upcycle.texts.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST_DEFAULT_CONTEXT = 1024  # tokens
_HALF_INTERVAL = 1.96  # standard errors: 95 % of a normal distribution
RANDOM = "random"
_METRICS = ("loss_nats_per_token", "perplexity", "bits_per_byte")


@auto_register_config
class CausalLMPerplexityTaskPool(BaseTaskPool):
    """Perplexity and bits per byte on named texts, see ``fusion_upcycle.texts.perplexity``.

    Args:
        texts: name -> where its documents are, see ``fusion_upcycle.texts.documents``.
        tokenizer: path or Hub name; None for the model pool's own.
        context_length: tokens per window; None for the model's positions, 1024 at most.
        stride: tokens from one window to the next; None for half the context.
        batch_size: windows per forward pass.
        experts: of an MoE, for bounds of what its routing could give: name of each text -> index of
            the expert that all its tokens go to, or ``random``: each token goes to as many experts
            as ever, drawn anew in each layer. None leaves it to the routers.

    ``evaluate`` returns ``{name: metrics, "average": ..., "model_info": ...}`` and adds its report
    to the section ``taskpool`` of the run record, one entry in ``evaluations`` for each model that
    the method yields. The average is the plain mean over the texts of nats per token and of bits
    per byte; its perplexity is the exponential of that mean loss; its interval is that of a normal
    distribution, where every text has an error.

    Raises:
        UpcyclingError: an unknown option, no text, or a text with a name of the report.
    """

    def __init__(
        self,
        texts: Mapping[str, Any],
        tokenizer: str | None = None,
        context_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        experts: Mapping[str, int] | str | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(self, kwargs)
        super().__init__(**kwargs)
        self.texts: dict[str, Any] = named_texts(texts)
        self.experts = _checked_experts(plain(experts), self.texts)
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Score ``model``, a transformers causal LM, on all texts; the report is plain JSON."""
        tokenizer = load_tokenizer(self, self.tokenizer)
        to_device(self, model)
        context_length = self.context_length
        if context_length is None:
            limit = max_positions(model)
            context_length = min(limit or _LONGEST_DEFAULT_CONTEXT, _LONGEST_DEFAULT_CONTEXT)
        stride = self.stride if self.stride is not None else max(1, context_length // 2)

        report: dict[str, Any] = {}
        with Measured() as cost:
            for name, specification in self.texts.items():
                documents = load_documents(specification, f"taskpool.texts.{name}")
                with self._routed(model, name):
                    report[name] = perplexity(
                        model,
                        tokenizer,
                        documents,
                        context_length=context_length,
                        stride=stride,
                        batch_size=self.batch_size,
                        progress=True,
                    )
        report["average"] = _average([report[name] for name in self.texts])
        report.update(get_model_summary(model))
        self._evaluations.append({"report": report, **cost.as_record()})
        self._leave(report, context_length, stride)
        return report

    def _routed(self, model: "PreTrainedModel", text: str) -> AbstractContextManager[None]:
        """In which the tokens of a text go where ``experts`` says."""
        if self.experts is None:
            return nullcontext()
        return sending(model, None if self.experts == RANDOM else self.experts[text])

    @rank_zero_only
    def _leave(self, report: dict[str, Any], context_length: int, stride: int) -> None:
        """Print the table and write the run record."""
        table = Table(title=f"held-out text, context {context_length}, stride {stride}")
        table.add_column("text")
        for metric in _METRICS:
            table.add_column(metric.replace("_", " "), justify="right")
        for name in (*self.texts, "average"):
            table.add_row(name, *(_with_error(report[name], metric) for metric in _METRICS))
        Console().print(table)
        settings = {
            "texts": self.texts,
            "tokenizer": self.tokenizer,
            "context_length": context_length,
            "stride": stride,
            "batch_size": self.batch_size,
            "experts": self.experts,
        }
        leave_record(self, settings, self._evaluations)


def _checked_experts(experts: Any, texts: Mapping[str, Any]) -> Any:
    """What ``experts`` may be.

    Raises:
        UpcyclingError: neither ``random`` nor an expert of each text.
    """
    if experts is None or experts == RANDOM:
        return experts
    if (
        not isinstance(experts, Mapping)
        or experts.keys() != texts.keys()
        or any(type(expert) is not int for expert in experts.values())
    ):
        wanted = ", ".join(f"{text}: {index}" for index, text in enumerate(texts))
        raise UpcyclingError(
            f"taskpool.experts={experts!r} must be {RANDOM}, or the expert of each text, as in "
            f"{{{wanted}}}."
        )
    return dict(experts)


def _with_error(scores: dict[str, Any], metric: str) -> str:
    error = scores.get(f"{metric}_stderr")
    return f"{scores[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _average(results: list[dict[str, Any]]) -> dict[str, float]:
    """Plain means; texts are independent, so that the squares of their errors add."""
    number = len(results)
    loss = sum(result["loss_nats_per_token"] for result in results) / number
    bits = sum(result["bits_per_byte"] for result in results) / number
    average = {"loss_nats_per_token": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}
    for metric in ("loss_nats_per_token", "bits_per_byte"):
        errors = [result.get(f"{metric}_stderr") for result in results]
        known = [error for error in errors if error is not None]
        if len(known) == number:
            average[f"{metric}_stderr"] = math.hypot(*known) / number
    if "loss_nats_per_token_stderr" in average:  # of an exponential, to first order
        average["perplexity_stderr"] = average["perplexity"] * average["loss_nats_per_token_stderr"]
    if "bits_per_byte_stderr" in average:
        reach = _HALF_INTERVAL * average["bits_per_byte_stderr"]
        average |= {"bits_per_byte_low": bits - reach, "bits_per_byte_high": bits + reach}
    return average
