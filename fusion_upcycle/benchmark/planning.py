"""From an experiment to its runs: what each is asked of `fusion_bench`, before anything is run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from fusion_upcycle.benchmark.experiment import Choice, Experiment, Method, TaskPool
from fusion_upcycle.benchmark.overrides import override
from fusion_upcycle.comparison.rows import REFERENCES
from fusion_upcycle.errors import UpcyclingError

PRETRAINED = "_pretrained_"
#: Groups of model pools with a config `folders`: what is named beside the models.
_BESIDE = {
    "CausalLMPool": "tokenizer",
    "CLIPVisionModelPool": "processor",
    "ImageClassificationModelPool": "processor",
    "Seq2SeqLMPool": "tokenizer",
}


@dataclass(frozen=True)
class Pool:
    """A model pool, as an experiment chooses it.

    Attributes:
        choice: its config; models among its options take the place of the config's own.
        shipped: names of the models in the config.
    """

    choice: Choice
    shipped: Sequence[str]

    @property
    def models(self) -> list[str]:
        """Names of its models."""
        own = self.choice.options.get("models")
        return list(self.shipped if own is None else own)

    def arguments(self, kept: Sequence[str]) -> list[str]:
        """Of `fusion_bench`, for some of its models."""
        options = dict(self.choice.options)
        own = options.pop("models", None)
        given = {} if own is None else {name: own[name] for name in own if name in kept}
        left = [name for name in self.shipped if own is None and name in kept]
        return [
            f"modelpool={self.choice.config}",
            *(override(f"modelpool.{name}", v, sign="++") for name, v in options.items()),
            *(f"~modelpool.models.{n}" for n in self.shipped if n not in (*left, *given)),
            *(override(f"modelpool.models.{n}", v, sign="++") for n, v in given.items()),
        ]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One `fusion_bench` run.

    Attributes:
        experiment: its name.
        position: of its row in the experiment.
        folder: of its results, below the experiment's output.
        purpose: test, or trial of a setting.
        row: name of the row that it belongs to.
        settings: that the row says, those that were tried above all.
        group: heading of the row; None is found by the method's class.
        reference: pretrained or finetuned, for models as they are.
        models: fine-tunes that are merged.
        subset: whether these are some of the pool's only.
        seed: of everything random.
        trials: settings that were tried for it.
        taskpools: by name.
        options: of the method, place -> value.
        choices: other arguments of `fusion_bench`, but for seeds and the folder.
    """

    experiment: str
    folder: str
    purpose: str
    row: str
    settings: Mapping[str, Any]
    group: str | None
    reference: str | None
    models: Sequence[str]
    subset: bool
    seed: int
    trials: int
    taskpools: Mapping[str, TaskPool]
    options: Mapping[str, Any]
    choices: Sequence[str]
    position: int = 0

    @property
    def arguments(self) -> list[str]:
        """Of `fusion_bench`."""
        options = [override(f"method.{n}", v, sign="++") for n, v in self.options.items()]
        return [*self.choices, *options]


@dataclass(frozen=True)
class Planned:
    """A row's run with chosen settings, and the trials that they are chosen by."""

    run: Run
    method: Method
    trials: Sequence[Run] = ()

    def with_settings(self, settings: Mapping[str, Any]) -> Run:
        """The run, with settings that were chosen of the trials."""
        return replace(self.run, settings=settings, options={**self.run.options, **settings})


def plan_runs(experiment: Experiment, pool_of: Callable[[Choice], Pool]) -> list[Planned]:
    """All runs, references first.

    Args:
        pool_of: finds the models of a pool.

    Raises:
        UpcyclingError: subsets that the pool has too few models for, rows of one name.
    """
    planned = list(_references(experiment, pool_of(experiment.modelpool)))
    for method in experiment.methods.values():
        pool = pool_of(method.modelpool or experiment.modelpool)
        planned += _of_method(experiment, method, pool)
    folders = [each.run.folder for each in planned]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UpcyclingError(
                f"Two runs would share the folder {folder!r}: give methods other names."
            )
    return planned


def _references(experiment: Experiment, pool: Pool) -> Iterator[Planned]:
    if not experiment.references:
        return
    for model in pool.models:
        base = model == PRETRAINED
        run = Run(
            experiment=experiment.experiment,
            folder=f"references/{'pretrained' if base else _safe(model)}",
            purpose="test",
            row="Pre-trained" if base else f"Fine-tuned ({model})",
            settings={},
            group=REFERENCES,
            reference="pretrained" if base else "finetuned",
            models=() if base else (model,),
            subset=False,
            seed=experiment.seeds[0],
            trials=0,
            taskpools=experiment.taskpools,
            options={},
            choices=(
                "method=dummy",
                *pool.arguments([model]),
                *_tasks(experiment.taskpools),
                *experiment.overrides,
            ),
        )
        yield Planned(run, Method(name=run.row))


def _of_method(experiment: Experiment, method: Method, pool: Pool) -> Iterator[Planned]:
    fine_tunes = [name for name in pool.models if name != PRETRAINED]
    seeds = method.seeds or experiment.seeds
    for chosen in _subsets(method, fine_tunes):
        for seed in seeds:
            kept = [*chosen, *([PRETRAINED] if method.pretrained else [])]
            beginning = _folder(method, pool.choice) or [
                f"method={method.method or method.name}",
                *pool.arguments(kept),
            ]
            parts = [_safe(method.name)]
            parts += [_safe("+".join(chosen))] if method.subsets else []
            parts += [f"seed_{seed}"] if len(seeds) > 1 else []
            run = Run(
                experiment=experiment.experiment,
                folder="/".join(parts),
                purpose="test",
                row=method.label or method.name,
                settings=_shown(method),
                group=method.group or ("Other Models" if method.folder else None),
                reference=None,
                models=() if method.folder else tuple(chosen),
                subset=bool(method.subsets) and len(chosen) < len(fine_tunes),
                seed=seed,
                trials=0,
                taskpools=experiment.taskpools,
                options=method.options,
                choices=(
                    *beginning,
                    *_tasks(experiment.taskpools),
                    *experiment.overrides,
                    *method.overrides,
                ),
            )
            yield _with_trials(run, method, experiment, beginning)


def _with_trials(
    run: Run, method: Method, experiment: Experiment, beginning: Sequence[str]
) -> Planned:
    """Every combination of what is to be tried, on validation data."""
    if not method.trials:
        return Planned(run, method)
    assert experiment.validation is not None  # the reader looked
    pools = experiment.validation.taskpools
    choices = (*beginning, *_tasks(pools), *experiment.overrides, *method.overrides)
    trials = []
    for number, values in enumerate(product(*method.trials.values())):
        settings = dict(zip(method.trials, values, strict=True))
        trials.append(
            replace(
                run,
                folder=f"{run.folder}/trials/{number}",
                purpose="trial",
                settings=settings,
                taskpools=pools,
                options={**run.options, **settings},
                choices=choices,
            )
        )
    final = replace(run, folder=f"{run.folder}/chosen", settings={}, trials=len(trials))
    return Planned(final, method, tuple(trials))


def _shown(method: Method) -> dict[str, Any]:
    """Settings that the row says: numbers and names among the options, unless a label says it all;
    what is tried is said in any case, once it is chosen."""
    if method.label is not None:
        return {}
    return {n: v for n, v in method.options.items() if isinstance(v, int | float | str)}


def _subsets(method: Method, fine_tunes: Sequence[str]) -> list[tuple[str, ...]]:
    if not method.subsets:
        return [tuple(fine_tunes)]
    for size in method.subsets:
        if size > len(fine_tunes):
            raise UpcyclingError(
                f"methods.{method.name}.subsets={list(method.subsets)}: the pool has "
                f"{len(fine_tunes)} fine-tunes only ({', '.join(fine_tunes)})."
            )
    return [chosen for size in method.subsets for chosen in combinations(fine_tunes, size)]


def _folder(method: Method, choice: Choice) -> list[str] | None:
    """A model made elsewhere: a pool of it alone, of the kind of the experiment's."""
    if method.folder is None:
        return None
    folder = str(Path(method.folder).expanduser().absolute())
    group = choice.config.partition("/")[0]
    group = group if group in _BESIDE else "CausalLMPool"
    beside = _BESIDE[group]
    given = folder if beside == "tokenizer" else choice.options.get("processor")
    return [
        "method=dummy",
        f"modelpool={group}/folders",
        override(f"modelpool.models.{PRETRAINED}", folder, sign="+"),
        *([] if given is None else [override(f"modelpool.{beside}", given)]),
    ]


def _tasks(pools: Mapping[str, TaskPool]) -> list[str]:
    arguments = ["taskpool=several"]
    for name, pool in pools.items():
        place = f"taskpool.pools.{name}"
        arguments.append(f"+taskpool@{place}={pool.config}")
        arguments += [
            override(f"{place}.{option}", value, sign="++")
            for option, value in pool.options.items()
        ]
    return arguments


def _safe(name: str) -> str:
    """A name as a folder's."""
    text = "".join(c if c.isalnum() or c in "+-_." else "_" for c in name)
    return text if text.strip(".") else f"_{text}"
