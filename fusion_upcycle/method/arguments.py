"""Constructor arguments of the FusionBench classes: those of a dataclass, shown, not repeated."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from inspect import Parameter
from typing import Any, TypeVar

from fusion_bench import BaseAlgorithm
from hydra.utils import instantiate
from omegaconf import DictConfig

from fusion_upcycle.errors import unknown
from fusion_upcycle.method.pool import FUSION_BENCH_KEYS, plain
from fusion_upcycle.method.spelling import spelled_by_maker

Algorithm = TypeVar("Algorithm", bound=type[BaseAlgorithm])


def takes_options(
    options: type, *, without: Collection[str] = ()
) -> Callable[[Algorithm], Algorithm]:
    """Class decorator: `__init__` shows the options of a dataclass that it takes as `**kwargs`.

    FusionBench's `auto_register_config`, which goes above this one, reads the signature: each
    option becomes an attribute, and part of the `config` that repeats the run.

    Args:
        options: the dataclass. Options that `__init__` names itself stay where they are.
        without: options that the class takes in another form.
    """

    def decorate(algorithm: Algorithm) -> Algorithm:
        init = algorithm.__init__
        signature = inspect.signature(init)
        own = list(signature.parameters.values())
        assert own[-1].kind is Parameter.VAR_KEYWORD, algorithm
        added = [
            Parameter(
                option.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if option.default is MISSING else option.default,
                annotation=option.type,
            )
            for option in fields(options)
            if option.name not in {*signature.parameters, *without}
        ]
        shown = signature.replace(parameters=[*own[:-1], *added, own[-1]])
        algorithm.__init__ = spelled_by_maker(init)
        algorithm.__init__.__signature__ = shown
        return algorithm

    return decorate


def sort_arguments(
    algorithm: BaseAlgorithm, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an algorithm was given besides its own arguments: keys of FusionBench, and options.

    Raises:
        UpcyclingError: an argument that is unknown.
    """
    for name in given:
        if name not in algorithm._config_mapping.values():
            raise unknown("option of the method:", name, algorithm._config_mapping.values())
    keys = {name: value for name, value in given.items() if name in FUSION_BENCH_KEYS}
    return keys, {name: initialiser(given[name]) for name in given if name not in keys}


def initialiser(spec: Any) -> Any:
    """A Hydra node with `_target_` becomes a function; names and functions stay."""
    if isinstance(spec, DictConfig | dict) and "_target_" in spec:
        return instantiate(spec, _partial_=True)
    return plain(spec)
