"""What an experiment's YAML says, read and checked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fusion_upcycle.errors import UpcyclingError, unknown

Node = TypeVar("Node")
BETTER = ("lower", "higher")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A config of FusionBench or of ours, and what is changed in it.

    Attributes:
        config: its name, as in `CausalLMPool/demo`.
        options: place in it -> value; a mapping is merged.
    """

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskPool(Choice):
    """A task pool, and how its numbers are shown.

    Attributes:
        metric: that the tables show; None leaves that to the report.
        better: lower or higher; None likewise.
        unseen: tasks for which no model of the pool was fine-tuned.
    """

    metric: str | None = None
    better: str | None = None
    unseen: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Where settings are chosen.

    Attributes:
        taskpools: as those of the experiment.
        metric: place in their reports, as in `perplexity.average.bits_per_byte`.
        better: lower or higher.
    """

    taskpools: Mapping[str, TaskPool]
    metric: str
    better: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the comparison, or several.

    Attributes:
        name: its key in the YAML.
        method: config of a FusionBench method; None is the name.
        options: of the method, place -> value.
        overrides: of its runs, as `fusion_bench` takes them.
        trials: option -> values to try on validation data; all combinations.
        label: of its row; None is the name.
        group: heading above the row; None is found by the method's class.
        seeds: one run for each; None are the experiment's.
        subsets: sizes of subsets of the fine-tunes: a run for each subset. None takes all at once.
        pretrained: whether the model pool keeps the base model.
        modelpool: instead of the experiment's.
        folder: of a model made elsewhere, of the kind of the pool; nothing is run.
    """

    name: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    trials: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    label: str | None = None
    group: str | None = None
    seeds: Sequence[int] | None = None
    subsets: Sequence[int] | None = None
    pretrained: bool = True
    modelpool: Choice | None = None
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One YAML: models, task pools, methods. `config/benchmark.yaml` explains each key."""

    experiment: str
    modelpool: Choice
    taskpools: Mapping[str, TaskPool]
    methods: Mapping[str, Method]
    validation: Validation | None
    references: bool
    seeds: Sequence[int]
    equal_trials: bool
    overrides: Sequence[str]
    title: str | None = None


def read_experiment(config: Mapping[str, Any]) -> Experiment:
    """The experiment of a composed config, as plain Python.

    Raises:
        UpcyclingError: a key, name or value that cannot be used; where, and what is known.
    """
    for name in ("modelpool", "taskpools"):
        if config.get(name) in (None, "???", {}):
            raise UpcyclingError(
                f"{name} is not set: give the experiment "
                + ("a model pool, as in CausalLMPool/demo." if name == "modelpool" else _POOL)
            )
    experiment = Experiment(
        experiment=str(config["experiment"]),
        title=config["title"],
        modelpool=_choice(config["modelpool"], "modelpool"),
        taskpools=_taskpools(config["taskpools"], "taskpools"),
        methods={
            name: _method(name, entry, f"methods.{name}")
            for name, entry in _mapping(config["methods"] or {}, "methods").items()
        },
        validation=_validation(config["validation"]),
        references=_flag(config["references"], "references"),
        seeds=_seeds(config["seeds"], "seeds"),
        equal_trials=_flag(config["equal_trials"], "equal_trials"),
        overrides=_strings(config["overrides"], "overrides"),
    )
    if not experiment.methods and not experiment.references:
        raise UpcyclingError("methods is empty and references is false: there is nothing to run.")
    _check_trials(experiment)
    return experiment


_POOL = "at least one task pool, {name: CausalLMPerplexityTaskPool/demo}."


def _check_trials(experiment: Experiment) -> None:
    counts = {name: trial_count(m) for name, m in experiment.methods.items() if m.trials}
    if counts and experiment.validation is None:
        raise UpcyclingError(
            f"methods.{next(iter(counts))}.trials needs validation data to choose by: set "
            "validation={taskpools: {...}, metric: POOL.average.METRIC, better: lower}."
        )
    if experiment.equal_trials and len(set(counts.values())) > 1:
        said = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UpcyclingError(
            f"Methods try unequal numbers of settings ({said}), which favours those that try more. "
            "Give each as many, or set equal_trials=false."
        )


def trial_count(method: Method) -> int:
    """The number of settings that a method tries; 0 where nothing is tried."""
    count = 1 if method.trials else 0
    for values in method.trials.values():
        count *= len(values)
    return count


def _method(name: str, entry: Any, where: str) -> Method:
    entry = {} if entry is None else entry
    if isinstance(entry, str):
        entry = {"method": entry}
    node = _checked(Method, entry, where, without=("name",))
    if "modelpool" in node and node["modelpool"] is not None:
        node["modelpool"] = _choice(node["modelpool"], f"{where}.modelpool")
    if node.get("subsets") is not None:
        node["subsets"] = _sizes(node["subsets"], f"{where}.subsets")
    if node.get("seeds") is not None:
        node["seeds"] = _seeds(node["seeds"], f"{where}.seeds")
    node["overrides"] = _strings(node.get("overrides") or (), f"{where}.overrides")
    node["options"] = _mapping(node.get("options") or {}, f"{where}.options")
    node["trials"] = _mapping(node.get("trials") or {}, f"{where}.trials")
    for option, values in node["trials"].items():
        if not isinstance(values, list) or not values:
            raise UpcyclingError(f"{where}.trials.{option}={values!r} must be a list of values.")
    _flag(node.get("pretrained", True), f"{where}.pretrained")
    method = Method(name=name, **node)
    if method.folder is not None:
        if not Path(method.folder).expanduser().is_dir():
            raise UpcyclingError(f"{where}.folder={method.folder} is not a folder.")
        for key in ("method", "options", "trials", "subsets", "modelpool"):
            if node.get(key):
                raise UpcyclingError(
                    f"{where}.{key} and {where}.folder exclude each other: a folder is evaluated "
                    "as it is."
                )
    return method


def _validation(node: Any) -> Validation | None:
    if node is None:
        return None
    node = _checked(Validation, node, "validation")
    if node["better"] not in BETTER:
        raise unknown("validation.better", str(node["better"]), BETTER)
    pools = _taskpools(node.pop("taskpools"), "validation.taskpools")
    validation = Validation(taskpools=pools, **node)
    pool = validation.metric.partition(".")[0]
    if pool not in pools:
        raise unknown("task pool in validation.metric:", pool, pools)
    return validation


def _taskpools(nodes: Any, where: str) -> dict[str, TaskPool]:
    nodes = _mapping(nodes, where)
    if not nodes:
        raise UpcyclingError(f"{where} is empty: give {_POOL}")
    pools = {}
    for name, node in nodes.items():
        here = f"{where}.{name}"
        if not name.isidentifier():
            raise UpcyclingError(f"{here}: the name of a task pool is letters, digits and _.")
        checked = _checked(TaskPool, {"config": node} if isinstance(node, str) else node, here)
        if checked.get("better") not in (None, *BETTER):
            raise unknown(f"{here}.better", str(checked["better"]), BETTER)
        pools[name] = TaskPool(**checked)
    return pools


def _choice(node: Any, where: str) -> Choice:
    return Choice(**_checked(Choice, {"config": node} if isinstance(node, str) else node, where))


def _checked(
    kind: type[Any], node: Any, where: str, without: Collection[str] = ()
) -> dict[str, Any]:
    """A mapping whose keys are fields of a dataclass, none missing."""
    known = [f for f in fields(kind) if f.name not in without]
    node = _mapping(node, where)
    for name in node:
        if name not in {f.name for f in known}:
            raise unknown(f"key of {where}:", name, [f.name for f in known])
    for f in known:
        if f.default is MISSING and f.default_factory is MISSING and f.name not in node:
            raise UpcyclingError(f"{where}.{f.name} is not set.")
    return node


def _mapping(node: Any, where: str) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        raise UpcyclingError(f"{where}={node!r} must be a mapping, {{name: ...}}.")
    return {str(name): value for name, value in node.items()}


def _strings(node: Any, where: str) -> list[str]:
    if not isinstance(node, Sequence) or isinstance(node, str):
        raise UpcyclingError(f"{where}={node!r} must be a list.")
    return [str(text) for text in node]


def _seeds(node: Any, where: str) -> list[int]:
    if not isinstance(node, Sequence) or not node or not all(_is_whole(seed) for seed in node):
        raise UpcyclingError(f"{where}={node!r} must be a list of whole numbers, as in [0, 1, 2].")
    if len(set(node)) < len(node):
        raise UpcyclingError(f"{where}={node!r} names a seed twice.")
    return list(node)


def _sizes(node: Any, where: str) -> list[int]:
    sizes = [node] if _is_whole(node) else node
    if not isinstance(sizes, list) or not sizes or not all(_is_whole(n) and n > 0 for n in sizes):
        raise UpcyclingError(f"{where}={node!r} must be a size or a list of sizes, as in [2, 3].")
    return sizes


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UpcyclingError(f"{where}={value!r} must be true or false.")
    return value
