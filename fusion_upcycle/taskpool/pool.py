"""What our task pools have in common: options that must be known, a tokenizer, plain configs."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.files import by_name
from fusion_upcycle.live import loading
from fusion_upcycle.report import write_run_record
from fusion_upcycle.report.program import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FUSION_BENCH_KEYS = ("_recursive_", "_usage_", "_version_")
_NOT_TASKS = ("average", "cost", "groups", "model_info", "routing")  # which tables read as such


def check_options(pool: BaseTaskPool, given: Mapping[str, Any]) -> None:
    """Refuse what the class does not take: FusionBench itself would only warn.

    Raises:
        UpcyclingError: an unknown option.
    """
    options = [name for name in inspect.signature(type(pool)).parameters if name != "kwargs"]
    for name in given:
        if name not in _FUSION_BENCH_KEYS:
            raise unknown(f"option of {type(pool).__name__}:", name, options)


def plain(value: Any) -> Any:
    """Plain Python for a config node; anything else as it is."""
    is_config = isinstance(value, DictConfig | ListConfig)
    return OmegaConf.to_container(value, resolve=True) if is_config else value


def in_record(value: Any) -> Any:
    """As a record can hold it: what is in memory, as a model, by its class."""
    if isinstance(value, Mapping):
        return {str(key): in_record(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [in_record(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def named_texts(texts: Any) -> dict[str, Any]:
    """Texts by name, as plain Python.

    Raises:
        UpcyclingError: no text, or a text with a name of the report.
    """
    return named(plain(texts), "texts", "text, {name: file}")


def named(given: Any, option: str, example: str) -> dict[str, Any]:
    """What an option of a task pool names: the tasks of its report.

    Args:
        given: a mapping; a path alone goes by its own name.
        example: of what it must hold, for the error.

    Raises:
        UpcyclingError: nothing, or something with a name of the report.
    """
    given = by_name(given)
    if not isinstance(given, Mapping) or not given:
        said = "is empty" if not given else f"is {given!r}, which has no names"
        raise UpcyclingError(f"taskpool.{option} {said}: name at least one {example}.")
    for name in _NOT_TASKS:
        if name in given:
            raise UpcyclingError(f"taskpool.{option}.{name} is a name of the report: rename it.")
    return {str(name): value for name, value in given.items()}


def load_tokenizer(pool: BaseTaskPool, name: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer that was named, else that of the program's model pool.

    Raises:
        UpcyclingError: there is neither, or no such folder.
    """
    if name is not None:
        loading.require_findable(name, "taskpool.tokenizer")
        return loading.load_tokenizer(name)
    program = pool._program
    if program is None or getattr(program.modelpool, "tokenizer", None) is None:
        raise UpcyclingError(
            "There is no tokenizer: set taskpool.tokenizer (path or Hub name), or run with a "
            "model pool that has one (modelpool.tokenizer)."
        )
    loading.require_findable(program.modelpool.tokenizer, "modelpool.tokenizer")
    return program.modelpool.load_tokenizer()


def to_device(pool: BaseTaskPool, model: "PreTrainedModel") -> None:
    """To the program's device, where a merge left its result on the CPU; prepares the program."""
    prepare(pool._program)
    if pool._program is not None and next(model.parameters()).device.type == "cpu":
        model.to(pool._program.fabric.device)


@rank_zero_only
def leave_record(
    pool: BaseTaskPool, config: Mapping[str, Any], evaluations: list[dict[str, Any]]
) -> None:
    """Write the run record's section `taskpool`: for a pool among several, its part by its name."""
    write = getattr(pool, "_write_record", partial(write_run_record, "taskpool"))
    write({"config": config, "evaluations": evaluations})
