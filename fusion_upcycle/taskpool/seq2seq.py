"""FusionBench task pool: sequence-to-sequence models on inputs and targets."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.taskpool.dummy import get_model_summary

from fusion_upcycle.checks import require_whole
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import require_decoder_start
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.report import Measured
from fusion_upcycle.tables.pairs import load_pairs
from fusion_upcycle.taskpool.pool import (
    check_options,
    leave_record,
    load_tokenizer,
    named,
    plain,
    to_device,
)
from fusion_upcycle.taskpool.scores import average, print_scores
from fusion_upcycle.taskpool.seq2seq_scores import METRICS, score_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
class Seq2SeqTaskPool(BaseTaskPool):
    """T5 and others, dense or MoE, on local files or data sets of the Hub.

    Args:
        tasks: name -> examples, see ``fusion_upcycle.tables.pairs``.
        tokenizer: path or Hub name; None for the model pool's own.
        batch_size: examples per forward pass.
        max_input_tokens: of an input; the rest is cut off, and ``truncated_inputs`` says of how
            many. None cuts nothing.

    ``evaluate`` returns ``{task: metrics, "average": ..., "model_info": ...}``. Metrics, each with
    its standard error over examples as ``METRIC_stderr``: ``accuracy``, where a task has labels,
    counts examples whose target is the label of highest likelihood (with the token that ends it;
    of equals the first); ``exact_match`` those that greedy decoding answers to the letter, but for
    white space around; ``loss_nats_per_token`` is over all tokens of the targets, the ends too. The
    average is the plain mean over tasks of each metric that all of them have. The run record's
    section ``taskpool`` is as that of ``CausalLMPerplexityTaskPool``.

    Inputs of a batch are padded to the longest: a model whose routing sees the whole batch, as by
    expert choice, may score otherwise with another ``batch_size``.

    Raises:
        UpcyclingError: an unknown option, no task, a task with a name of the report, or a number
            below 1; ``evaluate`` raises it for models, tokenizers and files that cannot be used.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_input_tokens: int | None = 512,
        **kwargs: Any,
    ) -> None:
        check_options(self, kwargs)
        super().__init__(**kwargs)
        self.tasks: dict[str, Any] = named(plain(tasks), "tasks", "task, {name: file.jsonl}")
        require_whole("taskpool.batch_size", batch_size, at_least=1)
        if max_input_tokens is not None:
            require_whole("taskpool.max_input_tokens", max_input_tokens, at_least=1)
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Score ``model``, a transformers sequence-to-sequence model; its modes are restored.

        Raises:
            UpcyclingError: a model of another kind, or a tokenizer or task that cannot be used.
        """
        if not model.config.is_encoder_decoder:
            raise UpcyclingError(
                f"A {type(model).__name__} is no sequence-to-sequence model. Use "
                "CausalLMPerplexityTaskPool or LMEvalTaskPool."
            )
        require_decoder_start(model)
        tasks = {
            name: load_pairs(given, f"taskpool.tasks.{name}", splits=["test"])
            for name, given in self.tasks.items()
        }
        tokenizer = load_tokenizer(self, self.tokenizer)
        to_device(self, model)
        report: dict[str, Any] = {}
        with Measured() as cost, evaluating(model):
            for name, pairs in tasks.items():
                report[name] = score_pairs(
                    model,
                    tokenizer,
                    pairs,
                    batch_size=self.batch_size,
                    max_input_tokens=self.max_input_tokens,
                )
        report["average"] = average([report[name] for name in tasks])
        report.update(get_model_summary(model))
        self._evaluations.append({"report": report, **cost.as_record()})
        print_scores("sequence to sequence", report, METRICS)
        settings = {
            "tasks": self.tasks,
            "tokenizer": self.tokenizer,
            "batch_size": self.batch_size,
            "max_input_tokens": self.max_input_tokens,
        }
        leave_record(self, settings, self._evaluations)
        return report
