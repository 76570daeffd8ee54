"""FusionBench task pool: several task pools on the one model that a method yields."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.compat.taskpool import load_taskpool_from_config
from fusion_bench.utils import instantiate

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.report import write_run_record
from fusion_upcycle.report.program import prepare

if TYPE_CHECKING:
    from torch import nn


@auto_register_config
class SeveralTaskPools(BaseTaskPool):
    """Task pools of any class, in turn; the report is `{name: report of that pool}`.

    Args:
        pools: name -> config of a task pool, as FusionBench takes it.

    The run record's section `taskpool` is `{name: section of that pool}`, of the pools of ours.

    Raises:
        UpcyclingError: no pool, or, with the pool's name, what a pool of ours refuses; `evaluate`
            raises it too, and for a pool that gives no report.
        RuntimeError: with the pool's name, what another pool raises.
    """

    def __init__(self, pools: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not pools:
            raise UpcyclingError(
                "taskpool.pools is empty: add at least one task pool, as in "
                "+taskpool@taskpool.pools.perplexity=CausalLMPerplexityTaskPool/demo."
            )
        self._pools: dict[str, Any] = {}
        self._records: dict[str, Any] = {}
        for name, pool in pools.items():
            with _named(name):
                self._pools[str(name)] = _made(pool)

    def evaluate(self, model: "nn.Module", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Evaluate the model on every pool.

        Raises:
            UpcyclingError: by the pool's name, what a pool of ours refuses, or no report.
            RuntimeError: by the pool's name, what another pool raises.
        """
        reports: dict[str, Any] = {}
        prepare(self._program)
        for name, pool in self._pools.items():
            self._set_up(name, pool)
            with _named(name):
                report = pool.evaluate(model, *args, **kwargs)
                if report is None:
                    raise UpcyclingError(
                        f"{type(pool).__name__} gives no report, so that there is nothing to "
                        "compare. Use another task pool."
                    )
            reports[name] = report
        return reports

    def _set_up(self, name: str, pool: Any) -> None:
        """Hand on what FusionBench's program gives to a task pool."""
        pool._program = self._program
        if hasattr(pool, "_fabric_instance"):
            pool._fabric_instance = getattr(self._program, "fabric", None)
        pool._write_record = partial(self._write_record, name)

    def _write_record(self, name: str, record: Mapping[str, Any]) -> None:
        self._records[name] = record
        write_run_record("taskpool", self._records)


def _made(pool: Any) -> Any:
    """As FusionBench's program makes it: without `_target_`, a config of its version 0.1."""
    if "_target_" not in pool:
        return load_taskpool_from_config(pool)
    return instantiate(pool, _recursive_=False)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which pool failed; our own errors stay errors of the user's input."""
    try:
        yield
    except Exception as error:
        ours: BaseException | None = error
        while ours is not None and not isinstance(ours, UpcyclingError):
            ours = ours.__cause__
        if ours is not None:
            raise UpcyclingError(f"taskpool.pools.{name}: {ours}") from error
        said = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"taskpool.pools.{name}: {said}") from error
