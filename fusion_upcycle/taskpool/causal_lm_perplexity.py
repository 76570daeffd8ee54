"""FusionBench task pool: how well a causal language model predicts held-out text."""

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.taskpool.dummy import get_model_summary
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.live.inputs import max_positions
from fusion_upcycle.report import Measured, write_run_record
from fusion_upcycle.texts.documents import load_documents
from fusion_upcycle.texts.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FUSION_BENCH_KEYS = ("_recursive_", "_usage_", "_version_")
_LONGEST_DEFAULT_CONTEXT = 1024  # tokens
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

    ``evaluate`` returns ``{name: metrics, "average": ..., "model_info": ...}`` and adds its report
    to the section ``taskpool`` of the run record, one entry in ``evaluations`` for each model that
    the method yields. The average is the plain mean over the texts of nats per token and of bits
    per byte; its perplexity is the exponential of that mean loss.

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
        **kwargs: Any,
    ) -> None:
        options = [n for n in inspect.signature(type(self)).parameters if n != "kwargs"]
        for name in kwargs:
            if name not in _FUSION_BENCH_KEYS:
                raise unknown(f"option of {type(self).__name__}:", name, options)
        super().__init__(**kwargs)
        self.texts: dict[str, Any] = (
            OmegaConf.to_container(texts, resolve=True)  # type: ignore[assignment]
            if isinstance(texts, DictConfig)
            else texts
        )
        if not isinstance(self.texts, Mapping) or not self.texts:
            raise UpcyclingError("taskpool.texts is empty: name at least one text, {name: file}.")
        reserved = {"average", "model_info"} & self.texts.keys()
        if reserved:
            raise UpcyclingError(
                f"taskpool.texts.{reserved.pop()} is a name of the report: rename it."
            )
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Score ``model``, a transformers causal LM, on all texts; the report is plain JSON."""
        tokenizer = self._load_tokenizer()
        if self._program is not None and next(model.parameters()).device.type == "cpu":
            model.to(self._program.fabric.device)  # merging leaves its result on the CPU
        context_length = self.context_length
        if context_length is None:
            limit = max_positions(model)
            context_length = min(limit or _LONGEST_DEFAULT_CONTEXT, _LONGEST_DEFAULT_CONTEXT)
        stride = self.stride if self.stride is not None else max(1, context_length // 2)

        report: dict[str, Any] = {}
        with Measured() as cost:
            for name, specification in self.texts.items():
                report[name] = perplexity(
                    model,
                    tokenizer,
                    load_documents(specification, f"taskpool.texts.{name}"),
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

    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.tokenizer is not None:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.tokenizer)
        if self._program is None or getattr(self._program.modelpool, "tokenizer", None) is None:
            raise UpcyclingError(
                "There is no tokenizer: set taskpool.tokenizer (path or Hub name), or run with a "
                "model pool that has one (modelpool.tokenizer)."
            )
        return self._program.modelpool.load_tokenizer()

    @rank_zero_only
    def _leave(self, report: dict[str, Any], context_length: int, stride: int) -> None:
        """Print the table and write the run record."""
        table = Table(title=f"held-out text, context {context_length}, stride {stride}")
        table.add_column("text")
        for metric in _METRICS:
            table.add_column(metric.replace("_", " "), justify="right")
        for name in (*self.texts, "average"):
            table.add_row(name, *(f"{report[name][metric]:.4f}" for metric in _METRICS))
        Console().print(table)
        settings = {
            "texts": self.texts,
            "tokenizer": self.tokenizer,
            "context_length": context_length,
            "stride": stride,
            "batch_size": self.batch_size,
        }
        write_run_record("taskpool", {"config": settings, "evaluations": self._evaluations})


def _average(results: list[dict[str, float | int]]) -> dict[str, float]:
    loss = sum(result["loss_nats_per_token"] for result in results) / len(results)
    bits = sum(result["bits_per_byte"] for result in results) / len(results)
    return {"loss_nats_per_token": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}
