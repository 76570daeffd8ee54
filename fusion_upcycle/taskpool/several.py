"""FusionBench task pool: several task pools on the one model that a method yields."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.utils import instantiate

from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from torch import nn


@auto_register_config
class SeveralTaskPools(BaseTaskPool):
    """Task pools of any class, in turn; the report is `{name: report of that pool}`.

    Args:
        pools: name -> config of a task pool, with `_target_`.

    Raises:
        UpcyclingError: no pool; `evaluate` raises it, with the pool's name, for one that gives no
            report.
    """

    def __init__(self, pools: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not pools:
            raise UpcyclingError(
                "taskpool.pools is empty: add at least one task pool, as in "
                "+taskpool@taskpool.pools.perplexity=CausalLMPerplexityTaskPool/demo."
            )
        self._pools: dict[str, BaseTaskPool] = {
            str(name): instantiate(pool, _recursive_=False) for name, pool in pools.items()
        }

    def evaluate(self, model: "nn.Module", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Evaluate the model on every pool.

        Raises:
            UpcyclingError: a pool that gives no report, by its name.
        """
        reports: dict[str, Any] = {}
        for name, pool in self._pools.items():
            pool._program = self._program
            report = pool.evaluate(model, *args, **kwargs)
            if report is None:
                raise UpcyclingError(
                    f"taskpool.pools.{name}: {type(pool).__name__} gives no report, so that there "
                    "is nothing to compare. Use another task pool."
                )
            reports[name] = report
        return reports
