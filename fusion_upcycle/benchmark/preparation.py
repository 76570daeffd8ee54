"""Each run's config, composed and looked at before the first run: what is refused, is refused here.

This imports FusionBench: it runs in a process forked from the warm server, see `processes`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fusion_upcycle.benchmark.composition import (
    GROUPS,
    check_options,
    composed,
    composing,
    config_hash,
    config_of,
    resolve,
)
from fusion_upcycle.benchmark.experiment import Choice, Experiment
from fusion_upcycle.benchmark.overrides import quoted
from fusion_upcycle.benchmark.planning import Planned, Pool, Run, plan_runs
from fusion_upcycle.benchmark.request import Request
from fusion_upcycle.errors import UpcyclingError


class Plan(list[tuple[Planned, list[Request]]]):
    """Rows with their prepared runs: the trials where there are some, else the run itself."""

    cuda: bool = False


def prepare(experiment: Experiment, output: Path) -> Plan:
    """All runs that can be known before the trials.

    Raises:
        UpcyclingError: a config, option, model or task pool that cannot be used.
    """
    import torch

    with composing():
        planned = plan_runs(experiment, partial(_pool, overrides=experiment.overrides))
        plan, looked_at = Plan(), set[str]()
        for position, row in enumerate(planned):
            runs = [replace(run, position=position) for run in row.trials or [row.run]]
            row = replace(row, run=replace(row.run, position=position))
            plan.append((row, [_prepared(run, output, looked_at) for run in runs]))
        plan.cuda = torch.cuda.is_available()
        return plan


def prepare_runs(runs: Sequence[Run], output: Path) -> list[Request]:
    """Runs whose settings were chosen by trials."""
    with composing():
        looked_at = set[str]()
        return [_prepared(run, output, looked_at) for run in runs]


def _pool(choice: Choice, overrides: Sequence[str]) -> Pool:
    arguments = [f"modelpool={choice.config}", *overrides]
    check_options(arguments, "modelpool", choice.options, "modelpool.options", nested=False)
    models = composed(arguments)["modelpool"].get("models") or {}
    pool = Pool(choice, [str(name) for name in models])
    if not isinstance(pool.choice.options.get("models", {}), Mapping) or not pool.models:
        raise UpcyclingError(
            f"The model pool {choice.config} has no models: set modelpool.options.models to a "
            "mapping, {_pretrained_: PATH, math: PATH}."
        )
    return pool


def _prepared(run: Run, output: Path, looked_at: set[str]) -> Request:
    folder = (output / run.folder).absolute()
    try:
        config, arguments = config_of(run, folder)
        resolved = resolve(config)
        _look(config, looked_at)
    except UpcyclingError as error:
        raise UpcyclingError(f"{run.row}: {error}") from error
    return Request(
        folder=folder,
        arguments=tuple(arguments),
        config_hash=config_hash(resolved, folder),
        facts={
            "experiment": run.experiment,
            "position": run.position,
            "purpose": run.purpose,
            "row": run.row,
            "settings": dict(run.settings),
            "group": run.group or _group(str(resolved["method"].get("_target_"))),
            "reference": run.reference,
            "models": list(run.models),
            "subset": run.subset,
            "seed": run.seed,
            "trials": run.trials,
            "tasks": {
                name: {"metric": pool.metric, "better": pool.better, "unseen": list(pool.unseen)}
                for name, pool in run.taskpools.items()
            },
        },
    )


def _look(config: DictConfig, looked_at: set[str]) -> None:
    """Make method and pools, which load nothing yet; what is wrong in our own words is refused.

    What another class raises is left to its run, where it is recorded and the others go on.
    """
    from fusion_bench.utils import instantiate

    for group in GROUPS:
        key = f"{group}:{OmegaConf.to_yaml(config[group], resolve=True)}"
        if key in looked_at:
            continue
        looked_at.add(key)
        try:
            made = instantiate(config[group])
        except Exception as error:
            ours = _ours(error)
            if ours is not None:
                raise UpcyclingError(str(ours)) from error
            continue
        if group == "modelpool":
            _check_models(made, looked_at)


def _ours(error: BaseException | None) -> UpcyclingError | None:
    while error is not None and not isinstance(error, UpcyclingError):
        error = error.__cause__ or error.__context__
    return error


def _check_models(pool: Any, looked_at: set[str]) -> None:
    for name, entry in dict(getattr(pool, "_models", None) or {}).items():
        if isinstance(entry, DictConfig | dict):
            entry = entry.get("pretrained_model_name_or_path")
        if isinstance(entry, str) and entry not in looked_at:
            looked_at.add(entry)
            _require_model(entry, f"modelpool.models.{name}={quoted(entry)}")


def _require_model(source: str, where: str) -> None:
    """A folder that is there, or a Hub id that is cached or can be reached."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise UpcyclingError(f"{where} is not a folder. Give the folder that holds config.json.")
    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().repo_info(source, timeout=10)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UpcyclingError(
            f"{where} is neither a folder here nor in the Hugging Face Hub's cache, and the Hub "
            f"did not give it: {str(error).splitlines()[0]}"
        ) from error


def _group(target: str) -> str:
    """The heading that FusionBench's own tables put a method under."""
    if "ContinuedPretraining" in target:
        return "Continued Pre-training"
    words = re.findall("[A-Z][a-z]+|[a-z]+|[A-Z]+", target)
    if "ensemble" in map(str.lower, words):
        return "Model Ensemble"
    mixing = {"upscaling", "upcycling", "upcycle", "moe", "smile", "mixture"}
    ours = target.startswith("fusion_upcycle.")
    return "Model Mixing" if ours or mixing & set(map(str.lower, words)) else "Model Merging"
