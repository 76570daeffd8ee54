"""What a run is seen by: speed, share of the devices' peak, memory; in logs, bar and record."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from fusion_upcycle.live.cost import TRAINING_PASSES, forward_flops
from fusion_upcycle.report.memory import peak_bytes
from fusion_upcycle.training.checkpoints import CheckpointEvery

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_upcycle.training.module import PretrainingModule
    from fusion_upcycle.training.options import TrainingOptions

#: Words of a GPU's name -> its peak in TFLOP/s: bfloat16, without sparsity, with which NVIDIA's
#: data sheets state twice as much. The first that fits counts.
#: Sources: nvidia.com/en-us/data-center/h100, /h200, /a100, /hgx; the same numbers are torchtitan's
#: (`get_peak_flops`).
PEAK_TFLOPS = {
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
}

#: Columns of the log that depend on clock and machine; two equal runs are equal in all others.
MEASURED = frozenset(
    f"{unit}_per_second{of}" for unit in ("tokens", "examples") for of in ("", "_per_device")
) | {"mfu", "peak_memory_gb", "save_seconds"}


def peak_tflops(device: torch.device) -> float | None:
    """Of a GPU in the table; None for a CPU and for any other, as a guess would be none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((p for part, p in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def _saving(trainer: L.Trainer) -> float:
    """Seconds that training has waited for checkpoints."""
    saving = trainer.checkpoint_callback
    assert isinstance(saving, CheckpointEvery)
    return saving.seconds


class Seen(L.Callback):
    """Speed per device, MFU, memory and seconds of saving of each log, and of the run.

    MFU, model FLOPs utilisation [PaLM, arXiv 2204.02311, appendix B]: FLOPs of the active
    parameters and of attention to what a token sees, forward and backward, recomputation left out,
    over the peak of all devices. Of texts, in windows of one length; without a known peak, none.

    Args:
        model: before it is trained.
    """

    def __init__(self, model: "PreTrainedModel", options: "TrainingOptions"):
        self._options = options
        self._flops = None
        if options.unit == "tokens":
            self._flops = TRAINING_PASSES * forward_flops(model, options.context_length)
        self._largest = 0
        self._peak: float | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        given = self._options.peak_tflops
        self._peak = peak_tflops(trainer.strategy.root_device) if given is None else given

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: "PretrainingModule",  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not module.due(self._options.log_every):
            return
        unit = self._options.unit
        found = self._speed(module.last_metrics[f"{unit}_per_second"], trainer.world_size)
        device = trainer.strategy.root_device
        # In MiB: float32 has 24 bits, and not all devices have float64.
        mine = torch.tensor(peak_bytes(device) / 2**20, device=device)
        largest = float(trainer.strategy.reduce(mine, reduce_op="max"))
        self._largest = round(largest * 2**20)
        found["peak_memory_gb"] = self._largest / 1e9
        found["save_seconds"] = _saving(trainer)
        module.write(found)
        module.last_metrics |= found
        bar = ("mfu", "peak_memory_gb", "save_seconds")
        shown: Any = {name: found[name] for name in bar if name in found}
        module.log_dict(shown, prog_bar=True, logger=False)

    def of_run(self, seconds: float, first_step: int, trainer: L.Trainer) -> dict[str, float | int]:
        """For the record: of all devices together, validation and saving included.

        Args:
            seconds: that the run took.
            first_step: of this process.
        """
        options = self._options
        rate = (options.steps - first_step) * options.per_step / seconds
        found: dict[str, float | int] = {f"{options.unit}_per_second": rate}
        found |= self._speed(rate, trainer.world_size)
        return found | {"peak_memory_bytes": self._largest, "save_seconds": _saving(trainer)}

    @contextmanager
    def exporting(self, trainer: L.Trainer, cost: dict[str, Any]) -> Iterator[None]:
        """Add what the block took to the run's costs and to TensorBoard.

        It cannot be in the folder that is exported, whose record is a part of it.
        """
        began = time.perf_counter()
        yield
        cost["export_seconds"] = time.perf_counter() - began
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                found = {"export_seconds": cost["export_seconds"]}
                logger.log_metrics(found, step=self._options.steps)
                logger.save()

    def _speed(self, per_second: float, world: int) -> dict[str, float]:
        found = {f"{self._options.unit}_per_second_per_device": per_second / world}
        if self._flops is not None and self._peak is not None:
            found["mfu"] = per_second * self._flops / (world * self._peak * 1e12)
        return found
