"""A run's config as FusionBench composes it, checked for what the experiment names wrongly.

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
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion_upcycle.benchmark.overrides import override
from fusion_upcycle.benchmark.planning import Run
from fusion_upcycle.errors import UpcyclingError, unknown

#: Parts of a run that are configs with a class.
GROUPS = ("method", "modelpool", "taskpool")
#: Of a composed config, what changes no result.
_ASIDE = ("path", "print_config", "print_function_call")


@contextlib.contextmanager
def composing() -> Iterator[None]:
    """FusionBench's own config tree, as its command line finds it; its prints are not ours."""
    from fusion_bench.utils.hydra_utils import get_default_config_path

    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        initialize_config_dir(get_default_config_path(), version_base=None),
    ):
        yield


def config_of(run: Run, folder: Path) -> tuple[DictConfig, list[str]]:
    """The config of a run, and the arguments of `fusion_bench` that give it.

    Runs of one method are composed once, and their options set after: composing takes 0.1 s.

    Raises:
        UpcyclingError: a config or an option that is not there.
    """
    plainly = _check_all_options(run)
    arguments = [*run.arguments, override("path.log_dir", str(folder))]
    given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    seeds = {place: run.seed for place in ("seed", *_seed_places(plainly)) if place not in given}
    arguments += [override(place, seed) for place, seed in seeds.items()]
    OverridesParser.create().parse_overrides(arguments)
    whole = composed(run.choices)
    config = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    options = {f"method.{name}": value for name, value in run.options.items()}
    for place, value in {**options, **seeds, "path.log_dir": str(folder)}.items():
        OmegaConf.update(config, place, value, merge=True, force_add=True)
    return config, arguments


def composed(arguments: Sequence[str]) -> DictConfig:
    config = _composed(tuple(arguments))
    HydraConfig.instance().set_config(config)  # for interpolations of the job's name
    return config


@cache  # composing takes 0.1 s, and trials of one method differ in their options only
def _composed(arguments: tuple[str, ...]) -> DictConfig:
    try:
        return compose("fabric_model_fusion", list(arguments), return_hydra_config=True)
    except MissingConfigException as error:
        raise _no_config(error.missing_cfg_file or "", str(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UpcyclingError(str(error).split("\n\n")[0]) from error


def _no_config(missing: Any, said: str) -> UpcyclingError:
    """With the nearest names: a group has more than a hundred."""
    name = re.sub(r"\.yaml$", "", str(missing))
    group, _, rest = name.partition("/")
    if group not in GROUPS:
        return UpcyclingError(said.split("\n\n")[0])
    nearest = get_close_matches(rest, list(_configs(group)), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return UpcyclingError(
        f"There is no config {group}={rest} in FusionBench or fusion_upcycle.{hint}"
    )


def _configs(group: str) -> Iterator[str]:
    """All names of a group, those in folders too."""
    loader = GlobalHydra.instance().config_loader()
    folders: list[str] = [group]
    while folders:
        folder = folders.pop()
        for name in loader.get_group_options(folder, ObjectType.CONFIG):
            yield f"{folder}/{name}".removeprefix(f"{group}/")
        folders += [f"{folder}/{n}" for n in loader.get_group_options(folder, ObjectType.GROUP)]


def _check_all_options(run: Run) -> DictConfig:
    """Places that options name must be there: FusionBench itself would only warn.

    Returns the config without them.
    """
    choices = [argument for argument in run.choices if not argument.startswith("++")]
    check_options(choices, "method", run.options, "options", nested=True)
    for name, pool in run.taskpools.items():
        check_options(choices, f"taskpool.pools.{name}", pool.options, f"{name}.options", False)
    return composed(choices)


def check_options(
    arguments: Sequence[str], place: str, options: Mapping[str, Any], where: str, nested: bool
) -> None:
    """Refuse places that are not in a config, nor parameters of its class.

    Args:
        arguments: that compose it.
        place: of the config.
        options: place in it -> value.
        where: of the options, for the error.
        nested: whether places inside its parts are looked at too.

    Raises:
        UpcyclingError: a place that is not there, with the nearest that is.
    """
    if not options:
        return
    node = OmegaConf.select(composed(arguments), place)
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
    method = OmegaConf.to_container(config.method)
    assert isinstance(method, dict)
    places = ["method.seed"] if "seed" in method else []
    for name, part in method.items():
        if isinstance(part, dict) and "seed" in part:
            places.append(f"method.{name!s}.seed")
    return places


def resolve(config: DictConfig) -> dict[str, Any]:
    """Plain Python of all but Hydra's own.

    Raises:
        UpcyclingError: a value that must be given and is not.
    """
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise UpcyclingError(f"{', '.join(sorted(missing))} is not set: add it to the options.")
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UpcyclingError(str(error).split("\n")[0]) from error


def config_hash(resolved: Mapping[str, Any], folder: Path) -> str:
    """Of all that decides the result; not of where it is written."""
    kept = {name: value for name, value in resolved.items() if name not in _ASIDE}
    text = json.dumps(kept, sort_keys=True, default=str).replace(str(folder), "{folder}")
    return hashlib.sha256(text.encode()).hexdigest()
