"""What the FusionBench algorithms that make an MoE have in common."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from fusion_bench import BaseAlgorithm, BaseModelPool
from hydra.utils import instantiate
from omegaconf import DictConfig

from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checks import AUTO, dtype_name
from fusion_upcycle.conversion.run import OutputOptions
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.method.pool import FUSION_BENCH_KEYS, plain
from fusion_upcycle.report.record import write_run_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_upcycle.conversion.conversion import Conversion
    from fusion_upcycle.conversion.run import Converted
    from fusion_upcycle.verification import Proof

log = logging.getLogger(__name__)


class ConversionAlgorithm(BaseAlgorithm):
    """Checks of arguments and classes, and reports; what is converted, a subclass says."""

    #: Classes of models that are accepted; None leaves that to the families.
    _accepted: tuple[str, ...] | None = None
    _targets: tuple[str, ...] = (AUTO, *ARCHITECTURES)
    #: Where models of other classes go.
    _elsewhere: str
    # FusionBench's decorator makes an attribute of every argument.
    save_checkpoint: str | None
    verify: str
    return_model: bool

    def __init__(self, **kwargs: Any):
        for name in kwargs:
            if name not in FUSION_BENCH_KEYS:
                raise unknown("option of the method:", name, self._config_mapping.values())
        super().__init__(**kwargs)

    def _output_options(self, overwrite: bool, max_shard_size: int | str) -> OutputOptions:
        if not self.return_model and self.save_checkpoint is None:
            raise UpcyclingError(
                "return_model=false without save_checkpoint would throw the result away. Set "
                "method.save_checkpoint=FOLDER."
            )
        return OutputOptions(overwrite, max_shard_size)

    def _check_class(self, name: str) -> None:
        if self._accepted is not None and name not in self._accepted:
            raise UpcyclingError(
                f"{type(self).__name__} takes a {' or '.join(self._accepted)}, not a {name}. "
                f"{self._elsewhere}"
            )

    def _finish(self, converted: "Converted") -> "PreTrainedModel | None":
        """Report a streamed conversion, and load it if the model is asked for."""
        self._report(converted)
        if not self.return_model:
            return None
        model_class = getattr(transformers, converted.record["class"])
        return model_class.from_pretrained(converted.output, dtype=converted.record["dtype"])

    def _report(self, converted: "Converted") -> None:
        log.info("Written to %s; %s", converted.output, converted.proof)
        kept = (
            *("class", "source", "sources", "experts", "calibration", "dtype", "options", "plan"),
            *("num_experts", "experts_per_token", "importance", "router", "optimizer_state"),
            *("parameters", "bytes", "proof"),
        )
        record = {key: converted.record[key] for key in kept if key in converted.record}
        self._record(record | {"output": str(converted.output), "costs": converted.costs})

    def _report_live(
        self, conversion: "Conversion", proof: "Proof", about: Mapping[str, Any] | None = None
    ) -> None:
        log.info("Converted in memory; %s", proof)
        self._record(
            {
                "class": class_name(conversion.config),
                "dtype": dtype_name(conversion.dtype),
                "options": conversion.options.to_json(),
                "plan": conversion.plan.to_json(),
                "parameters": conversion.parameters,
                "proof": proof.to_json(),
            }
            | dict(about or {})
        )

    def _record(self, record: dict[str, Any]) -> None:
        path = write_run_record("method", {"algorithm": type(self).__name__} | record)
        if path is not None:
            log.info("Run record: %s", path)


def save_companions(moe: "PreTrainedModel", pool: BaseModelPool | None, folder: Path) -> list[str]:
    """Generation config of a live model, and the tokenizer of its pool, if it has one."""
    before = set(folder.iterdir())
    if moe.can_generate():
        moe.generation_config.save_pretrained(folder)
    if pool is not None and getattr(pool, "tokenizer", None) is not None:
        pool.load_tokenizer().save_pretrained(folder)
    return sorted(str(path.relative_to(folder)) for path in set(folder.iterdir()) - before)


def initialiser(spec: Any) -> Any:
    """A Hydra node with `_target_` becomes a function; names and functions stay."""
    if isinstance(spec, DictConfig | dict) and "_target_" in spec:
        return instantiate(spec, _partial_=True)
    return plain(spec)
