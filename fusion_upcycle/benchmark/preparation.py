"""Each run's config, composed and looked at before the first run: what is refused, is refused here.

This imports FusionBench: it runs in a process forked from the warm server, see `processes`.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion_upcycle.benchmark.experiment import Choice, Experiment
from fusion_upcycle.benchmark.overrides import override, quoted
from fusion_upcycle.benchmark.planning import Planned, Run, plan_runs
from fusion_upcycle.benchmark.request import Request
from fusion_upcycle.errors import UpcyclingError, unknown

#: Of a composed config, what changes no result.
_ASIDE = ("path", "print_config", "print_function_call")
_GROUPS = ("method", "modelpool", "taskpool")


class Plan(list[tuple[Planned, list[Request]]]):
    """Rows with their prepared runs: the trials where there are some, else the run itself."""

    cuda: bool = False


def prepare(experiment: Experiment, output: Path) -> Plan:
    """All runs that can be known before the trials.

    Raises:
        UpcyclingError: a config, option, model or task pool that cannot be used.
    """
    import torch

    with _composing():
        planned = plan_runs(experiment, partial(_models, overrides=experiment.overrides))
        plan, looked_at = Plan(), set[str]()
        for row in planned:
            runs = list(row.trials) or [row.run]
            plan.append((row, [_prepared(run, output, looked_at) for run in runs]))
        plan.cuda = torch.cuda.is_available()
        return plan


def prepare_runs(runs: Sequence[Run], output: Path) -> list[Request]:
    """Runs whose settings were chosen by trials."""
    with _composing():
        looked_at = set[str]()
        return [_prepared(run, output, looked_at) for run in runs]


@contextlib.contextmanager
def _composing() -> Iterator[None]:
    """FusionBench's own config tree, as its command line finds it; its prints are not ours."""
    from fusion_bench.utils.hydra_utils import get_default_config_path

    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        initialize_config_dir(get_default_config_path(), version_base=None),
    ):
        yield


def _models(choice: Choice, overrides: Sequence[str]) -> list[str]:
    arguments = [f"modelpool={choice.config}", *overrides]
    _check_options(arguments, "modelpool", choice.options, "modelpool.options", nested=False)
    changes = [override(f"modelpool.{n}", v, sign="++") for n, v in choice.options.items()]
    node = _compose([*arguments, *changes])["modelpool"]
    models = node.get("models") or {}
    if not isinstance(models, DictConfig) or not models:
        raise UpcyclingError(
            f"The model pool {choice.config} has no models: set modelpool.options.models."
        )
    return [str(name) for name in models]


def _prepared(run: Run, output: Path, looked_at: set[str]) -> Request:
    where = f"{run.row}"
    folder = (output / run.folder).absolute()
    arguments = [*run.arguments, override("path.log_dir", str(folder))]
    try:
        _check_all_options(run)
        config = _compose(arguments)
        seeds = [f"{place}={run.seed}" for place in ("seed", *_seed_places(config))]
        given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
        arguments += [seed for seed in seeds if seed.partition("=")[0] not in given]
        config = _compose(arguments)
        resolved = _resolved(config)
        _look(config, looked_at)
    except UpcyclingError as error:
        raise UpcyclingError(f"{where}: {error}") from error
    return Request(
        folder=folder,
        arguments=tuple(arguments),
        config_hash=_hash(resolved, folder),
        facts={
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


def _compose(arguments: Sequence[str]) -> DictConfig:
    try:
        config = compose("fabric_model_fusion", list(arguments), return_hydra_config=True)
    except MissingConfigException as error:
        raise _no_config(error.missing_cfg_file or "", str(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UpcyclingError(str(error).split("\n\n")[0]) from error
    HydraConfig.instance().set_config(config)  # for interpolations of the job's name
    return config


def _no_config(missing: Any, said: str) -> UpcyclingError:
    """With the nearest names: a group has more than a hundred."""
    name = re.sub(r"\.yaml$", "", str(missing))
    group, _, rest = name.partition("/")
    if group not in _GROUPS:
        return UpcyclingError(said.split("\n\n")[0])
    nearest = get_close_matches(rest, list(_configs(group)), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return UpcyclingError(
        f"There is no config {group}={rest} in FusionBench or fusion_upcycle.{hint}"
    )


def _configs(group: str) -> Iterator[str]:
    """All names of a group, those in folders too."""
    loader = GlobalHydra.instance().config_loader()
    folders = [group]
    while folders:
        folder = folders.pop()
        for name in loader.get_group_options(folder, ObjectType.CONFIG):
            yield f"{folder}/{name}".removeprefix(f"{group}/")
        folders += [f"{folder}/{n}" for n in loader.get_group_options(folder, ObjectType.GROUP)]


def _check_all_options(run: Run) -> None:
    """Places that options name must be there: FusionBench itself would only warn."""
    choices = [a for a in run.arguments if re.match(r"\+?(method|taskpool)[/@.\w]*=", a)]
    kept = [a for a in choices if not re.match(r"method\.", a) and not a.startswith("++")]
    heads = [a for a in kept if "." not in a.partition("=")[0] or "@" in a]
    _check_options(heads, "method", run.settings, "options", nested=True)
    for name, pool in run.taskpools.items():
        _check_options(heads, f"taskpool.pools.{name}", pool.options, f"{name}.options", False)


def _check_options(
    arguments: Sequence[str], place: str, options: Mapping[str, Any], where: str, nested: bool
) -> None:
    if not options:
        return
    node = OmegaConf.select(_compose(arguments), place)
    known = {str(name) for name in node} | set(_parameters(node))
    for option in options:
        head, _, rest = option.partition(".")
        if head not in known:
            raise unknown(f"option in {where}:", head, known - {"_target_", "_recursive_"})
        inner = OmegaConf.select(node, head)
        if nested and rest and isinstance(inner, DictConfig) and inner:
            names = {str(name) for name in inner} | set(_parameters(inner))
            if rest.partition(".")[0] not in names:
                raise unknown(f"option in {where}.{head}:", rest, names - {"_target_"})


def _parameters(node: Any) -> list[str]:
    """What the class of a config takes."""
    from hydra.utils import get_object

    target = node.get("_target_") if isinstance(node, DictConfig) else None
    try:
        signature = inspect.signature(get_object(target)) if target else None
    except Exception:  # a class that cannot be imported: its run will say so
        signature = None
    return list(signature.parameters) if signature else []


def _seed_places(config: DictConfig) -> list[str]:
    """Where the method itself has a seed."""
    method = config.get("method") or {}
    places = ["method.seed"] if "seed" in method else []
    for name, part in method.items():
        if isinstance(part, DictConfig) and "seed" in part:
            places.append(f"method.{name}.seed")
    return places


def _resolved(config: DictConfig) -> dict[str, Any]:
    kept = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    missing = OmegaConf.missing_keys(kept)
    if missing:
        raise UpcyclingError(f"{', '.join(sorted(missing))} is not set: add it to the options.")
    try:
        return OmegaConf.to_container(kept, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UpcyclingError(str(error).split("\n")[0]) from error


def _hash(resolved: Mapping[str, Any], folder: Path) -> str:
    """Of all that decides the result; not of where it is written."""
    kept = {name: value for name, value in resolved.items() if name not in _ASIDE}
    text = json.dumps(kept, sort_keys=True, default=str).replace(str(folder), "{folder}")
    return hashlib.sha256(text.encode()).hexdigest()


def _look(config: DictConfig, looked_at: set[str]) -> None:
    """Make method and pools, which load nothing yet; what is wrong in our own words is refused.

    What another class raises is left to its run, where it is recorded and the others go on.
    """
    from fusion_bench.utils import instantiate

    for group in _GROUPS:
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
