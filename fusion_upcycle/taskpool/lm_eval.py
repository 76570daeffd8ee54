"""FusionBench task pool: lm-eval's tasks, by its Python API."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.taskpool.dummy import get_model_summary
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from fusion_upcycle.checks import require_flag, require_whole
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.report import Measured
from fusion_upcycle.taskpool.pool import (
    check_options,
    leave_record,
    load_tokenizer,
    plain,
    to_device,
)
from fusion_upcycle.taskpool.scores import STDERR, average, is_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
class LMEvalTaskPool(BaseTaskPool):
    """lm-eval's own numbers for any causal language model, in FusionBench's report.

    Args:
        tasks: names of tasks and groups.
        include_path: folder of further task YAMLs.
        num_fewshot: examples before each question; None is as each task says.
        limit: questions of each task at most; None is all.
        batch_size: sequences per forward pass.
        apply_chat_template: ask as in a conversation.
        tokenizer: path or Hub name; None for the model pool's own.
        seed: of few-shot examples and of everything random in a task.

    ``evaluate`` returns ``{task: {metric: value, metric_stderr: value}, "average": ...,
    "groups": {group: [task, ...]}, "model_info": ...}``: lm-eval's ``acc,none`` is ``acc`` here;
    metrics of other filters keep their name, as ``exact_match,strict-match``. Groups are tasks,
    where lm-eval averages them; ``groups`` says of which. The average is the plain mean, over the
    tasks asked for, of each metric that all of them have; its error is that of independent tasks.
    The run record's section ``taskpool`` is as that of ``CausalLMPerplexityTaskPool``, with the
    versions of the tasks.

    Raises:
        UpcyclingError: lm-eval is not installed, an option that cannot be used, or no task;
            ``evaluate`` raises it for unknown tasks.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        apply_chat_template: bool = False,
        tokenizer: str | None = None,
        seed: int = 1234,
        **kwargs: Any,
    ) -> None:
        check_options(self, kwargs)
        super().__init__(**kwargs)
        if find_spec("lm_eval") is None:
            raise UpcyclingError("lm-eval is missing: pip install 'fusion-upcycle[eval]'.")
        names = plain(tasks)
        self.tasks: list[str] = [names] if isinstance(names, str) else list(names or ())
        if not self.tasks:
            raise UpcyclingError("taskpool.tasks is empty: name at least one task of lm-eval.")
        require_whole("taskpool.batch_size", batch_size, at_least=1)
        for name in ("num_fewshot", "limit"):
            if getattr(self, name) is not None:
                require_whole(f"taskpool.{name}", getattr(self, name), at_least=0)
        require_flag("taskpool.apply_chat_template", apply_chat_template)
        if include_path is not None and not Path(include_path).expanduser().is_dir():
            raise UpcyclingError(f"taskpool.include_path={include_path} is not a folder.")
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Ask ``model``, a transformers causal LM, all tasks; its modes are restored."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        manager = self._manager()
        tokenizer = load_tokenizer(self, self.tokenizer)
        to_device(self, model)
        with Measured() as cost, evaluating(model):
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=self.tasks,
                task_manager=manager,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                apply_chat_template=self.apply_chat_template,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
                log_samples=False,
                bootstrap_iters=100_000,  # of lm-eval's own command
            )
        assert found is not None  # only on other ranks than the first
        report: dict[str, Any] = {
            name: dict(_plain_metrics(scores)) for name, scores in _scores(found).items()
        }
        report["groups"] = {group: list(of) for group, of in found["group_subtasks"].items() if of}
        report["average"] = average([report[name] for name in self.tasks if name in report])
        report.update(get_model_summary(model))
        versions = {name: str(version) for name, version in found["versions"].items()}
        self._evaluations.append({"report": report, "versions": versions, **cost.as_record()})
        self._leave(report)
        return report

    def _manager(self) -> Any:
        """lm-eval's catalogue of tasks, in which all that are asked for must be."""
        from lm_eval.tasks import TaskManager

        include = self.include_path and str(Path(self.include_path).expanduser())
        if include:  # its own thousands take seconds to read; groups may name some of them
            manager = TaskManager(include_path=include, include_defaults=False)
            if set(self.tasks) <= set(manager.all_subtasks):
                return manager
        manager = TaskManager(include_path=include)
        for name in self.tasks:
            if name not in manager.all_tasks:
                raise _unknown_task(name, manager.all_tasks)
        return manager

    @rank_zero_only
    def _leave(self, report: dict[str, Any]) -> None:
        """Print the table and write the run record."""
        table = Table(title="lm-eval")
        for header in ("task", "metric", "value", "stderr"):
            table.add_column(header, justify="left" if header in ("task", "metric") else "right")
        for name, scores in report.items():
            if name in ("model_info", "groups"):
                continue
            for metric, value in scores.items():
                if is_error(metric):
                    continue
                error = scores.get(_error_of(metric))
                table.add_row(name, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
        Console().print(table)
        settings = {
            name: getattr(self, name)
            for name in (
                "tasks",
                "include_path",
                "num_fewshot",
                "limit",
                "batch_size",
                "apply_chat_template",
                "tokenizer",
                "seed",
            )
        }
        leave_record(self, settings, self._evaluations)


def _unknown_task(name: str, known: Sequence[str]) -> UpcyclingError:
    """With the nearest names only: lm-eval has thousands."""
    from difflib import get_close_matches

    nearest = get_close_matches(name, known, n=3, cutoff=0.6)
    if not nearest:
        return UpcyclingError(
            f"Unknown task {name!r} of lm-eval: `lm_eval ls tasks` lists them, and "
            "taskpool.include_path adds a folder of yours."
        )
    return unknown("task of lm-eval:", name, nearest)


def _scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """Tasks, and groups with their averages."""
    return {**found["results"], **found.get("groups", {})}


def _plain_metrics(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers only: lm-eval writes N/A for an error that it cannot tell."""
    for name, value in scores.items():
        metric, _, kind = name.partition(",")
        if isinstance(value, int | float) and kind:
            yield metric if kind == "none" else name, float(value)


def _error_of(metric: str) -> str:
    name, comma, kind = metric.partition(",")
    return f"{name}{STDERR}{comma}{kind}"
