"""What runs left behind, ours and others', as one kind of result."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from fusion_upcycle.checks import is_number
from fusion_upcycle.comparison.metrics import primary_metric
from fusion_upcycle.errors import UpcyclingError, plain
from fusion_upcycle.report.record import MANIFEST_NAME, RECORD_NAME
from fusion_upcycle.untrusted import read_json

PROGRAM_REPORT = "program_report.json"
_LARGEST = 10**300
#: What a benchmark's record says of its run.
_KINDS: dict[str, type | UnionType] = {
    "experiment": str,
    "row": str,
    "settings": dict,
    "position": int,
    "group": str,
    "reference": str | None,
    "models": list,
    "subset": bool,
    "seed": int | None,
    "trials": int,
    "tasks": dict,
    "error": str | None,
    "arguments": list,
}
#: Keys of a task pool's report that are no tasks.
NOT_TASKS = ("average", "model_info", "cost", "routing", "groups")
_LOOKED_FOR = (
    f"{RECORD_NAME} of `python -m fusion_upcycle benchmark`, {PROGRAM_REPORT} of fusion_bench, "
    "results_*.json of lm-eval"
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        source: the file that it is read from.
        experiment: that it belongs to.
        row: its name in the tables.
        settings: that the row's label says.
        position: of its row in the experiment.
        group: heading above it.
        reference: pretrained or finetuned, for models as they are.
        models: fine-tunes that took part.
        subset: whether these are some of a pool's only.
        seed: of the run.
        trials: settings that were tried on validation data for it.
        report: task pool -> its report.
        tasks: task pool -> `metric`, `better`, `unseen`, as the experiment said them.
        error: why it failed; None where it did not.
        arguments: of `fusion_bench`, which repeat it.
        seconds: of the whole run.
        tokens: that it was trained on, where it was.
        proof: in words, of a model that we made.
    """

    source: Path
    row: str
    report: Mapping[str, Any]
    experiment: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    position: int = 0
    group: str = "Other Models"
    reference: str | None = None
    models: Sequence[str] = ()
    subset: bool = False
    seed: int | None = None
    trials: int = 0
    tasks: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    arguments: Sequence[str] = ()
    seconds: float | None = None
    tokens: float | None = None
    proof: str | None = None

    def __post_init__(self) -> None:
        """Refuse what tables could not be made of.

        Raises:
            TypeError: something of another kind; the readers put it down to the file.
        """
        tasks = [task for task in self.tasks.values() if isinstance(task, dict)]
        unseen = [task.get("unseen") or [] for task in tasks]
        known = len(tasks) == len(self.tasks) and all(isinstance(names, list) for names in unseen)
        if not known or not all(isinstance(name, str) for names in unseen for name in names):
            raise TypeError(f"tasks is {self.tasks!r:.60}")
        if not all(isinstance(name, str) for name in self.models):
            raise TypeError(f"models is {self.models!r:.60}")
        for name in ("seconds", "tokens"):
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise TypeError(f"{name} is {value!r:.60}")

    @property
    def label(self) -> str:
        """The row's name, with its setting."""
        said = [f"{name.rpartition('.')[2]}={_short(v)}" for name, v in self.settings.items()]
        parts = ["+".join(self.models)] if self.subset else []
        inside = ", ".join([*parts, *said])
        return f"{self.row} ({inside})" if inside else self.row


def read_results(places: Iterable[str | Path]) -> list[Result]:
    """All results in folders and files, in the order of their paths.

    Raises:
        UpcyclingError: a place that is not there or is not JSON, or no result in any of them.
    """
    found: list[Result] = []
    paths = [Path(place).expanduser() for place in places]
    for path in paths:
        if not path.exists():
            raise UpcyclingError(f"{path} does not exist. Give folders of runs, or report files.")
        with _reading(path):
            found += _of_file(path) if path.is_file() else _of_folder(path)
    if not found:
        said = ", ".join(map(str, paths)) or "no place"
        raise UpcyclingError(f"There is no result in {said}. Looked for {_LOOKED_FOR}.")
    return found


def _of_folder(folder: Path) -> Iterator[Result]:
    paths = sorted(folder.rglob("*.json"))
    current = {
        manifest.parent: {manifest.parent / run for run in _read(manifest).get("runs", ())}
        for manifest in paths
        if manifest.name == MANIFEST_NAME
    }
    for path in paths:
        if any(root in path.parents and path.parent not in runs for root, runs in current.items()):
            continue  # of an earlier form of the experiment
        with _reading(path):
            if path.name == RECORD_NAME:
                yield from _of_record(path)
            elif path.name == PROGRAM_REPORT:
                if not _is_benchmark(path.with_name(RECORD_NAME)):
                    yield _of_program_report(path, path.parent.name, _read(path))
            elif path.name.startswith("results_"):
                yield _of_lm_eval(path, _read(path))


def _of_file(path: Path) -> Iterator[Result]:
    if path.name == RECORD_NAME:
        yield from _of_record(path)
        return
    content = _read(path)
    if isinstance(content.get("results"), dict):
        yield _of_lm_eval(path, content)
    elif all(isinstance(v, dict) for v in content.values()) and any(
        isinstance(task, dict)
        for report in content.values()
        for name, task in report.items()
        if name not in NOT_TASKS
    ):
        for row, report in content.items():  # as FusionBench's examples keep many: {row: report}
            yield _of_program_report(path, row, report)
    else:
        yield _of_program_report(path, path.parent.name, content)


def _is_benchmark(path: Path) -> bool:
    return path.is_file() and "benchmark" in _read(path)


def _of_record(path: Path) -> Iterator[Result]:
    record = _read(path)
    section = record.get("benchmark")
    if not isinstance(section, dict) or section["purpose"] != "test":
        return
    method = record.get("method") or {}
    training = record.get("training") or method
    yield Result(
        source=path,
        report={pool: _without_members(report) for pool, report in section["report"].items()},
        seconds=section["costs"].get("wall_seconds"),
        tokens=(training.get("final") or {}).get("tokens"),
        proof=_proof(method.get("proof")),
        **{name: _of_kind(name, section[name], kind) for name, kind in _KINDS.items()},
    )


def _of_kind(name: str, value: Any, kind: type | UnionType) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r:.60}")
    return value


def _proof(proof: Any) -> str | None:
    """A proof of ours in words."""
    if not isinstance(proof, dict) or "holds" not in proof:
        return None
    function = proof.get("function") or {}
    if proof["holds"] and "max_abs" in function:
        return f"holds; largest logit difference {function['max_abs']:.1e}"
    return "holds" if proof["holds"] else "does not hold"


def _of_program_report(path: Path, row: str, report: Any) -> Result:
    if not isinstance(report, dict):
        raise UpcyclingError(f"{path} holds no report of tasks: {report!r:.60}.")
    pooled = all(
        isinstance(part, dict) and "model_info" in part for part in report.values()
    ) and bool(report)
    return Result(source=path, row=row, report=report if pooled else {"tasks": report})


def _of_lm_eval(path: Path, content: Mapping[str, Any]) -> Result:
    """lm-eval's own file: `acc,none` and `acc_stderr,none` of each task and group."""
    tasks = {
        str(task): dict(_plain_metrics(metrics))
        for task, metrics in (content.get("results") or {}).items()
    }
    if not tasks:
        raise UpcyclingError(f"{path} holds no results of lm-eval.")
    name = content.get("model_name") or path.parent.name
    report = _without_members({**tasks, "groups": content.get("group_subtasks") or {}})
    return Result(source=path, row=str(name), report={"lm_eval": report})


def _without_members(report: Any) -> Any:
    """A group with a number of its own stands for its tasks, which an average would count twice."""
    groups = report.get("groups") if isinstance(report, dict) else None
    if not groups:
        return report
    numbered = [name for name in groups if primary_metric(report.get(name) or {}, None)]
    inside = {member for name in numbered for member in groups[name]}
    return {name: scores for name, scores in report.items() if name not in inside}


def _plain_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        metric, _, kind = name.partition(",")
        if isinstance(value, int | float) and name != "alias":
            yield metric if kind in ("", "none") else name, float(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _shown(read_json(path))
    except UpcyclingError as error:
        raise UpcyclingError(f"{error} Or leave it out of the report.") from error
    return content if isinstance(content, dict) else {}


def _shown(content: Any) -> Any:
    """What a file says, as it can stand in tables and on pages."""
    if isinstance(content, str):
        return plain(content)
    if isinstance(content, dict):
        return {plain(name): _shown(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_shown(value) for value in content]
    if type(content) is int and abs(content) > _LARGEST:
        raise UpcyclingError("A number in it is too large to be one.")
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong in the block is put down to the file: it holds something else."""
    try:
        yield
    except UpcyclingError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UpcyclingError(
            f"{path} holds no result that can be read ({error!r}). Leave it out."
        ) from error


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
