"""Lightning's strategy for parts of a model: every process saves and loads its own, beside the run.

Weights and moments go by parameter name through torch's distributed checkpoints, so that any number
of processes, in any layout, goes on from them. All that is saved are tensors: no code is run by
loading.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from fusion_upcycle.architectures.layout import tied_names
from fusion_upcycle.checkpoint.digests import digest
from fusion_upcycle.training.saved import MOMENTS, PARTS_FOLDER, WEIGHTS, SavedParts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = ("exp_avg", "exp_avg_sq", "step")
#: As long as a disk may keep one process waiting.
_TIMEOUT = timedelta(hours=2)


class PartsStrategy(ModelParallelStrategy):
    """Of a `fusion_upcycle.training.sharding.Part`.

    Attributes:
        saving: name -> SHA-256 of the files that this process writes of the last checkpoint, once
            they are on the disk; None before one.
    """

    def __init__(self, processes: int):
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)
        self.saving: Future[dict[str, str]] | None = None
        self._hashing = ThreadPoolExecutor(1)
        self._group: Any = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: it goes another way than Lightning's own entries."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Nothing, likewise."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Copy this process's part, and write it while training goes on; see `saving`."""
        assert storage_options is None
        # Another group than the steps': the processes talk in both at once.
        self._group = self._group or dist.new_group(backend="gloo", timeout=_TIMEOUT)
        folder = Path(filepath).parent / PARTS_FOLDER
        writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        written: Any = async_save(
            _named(self._trained, self.optimizers[0]),
            storage_writer=writer,
            process_group=self._group,
            async_stager=_Copies(),
        )
        self.saving = self._hashing.submit(_hashed, written, folder, self.global_rank)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Fill the model and the optimizer in place; returns what Lightning restores itself."""
        path = Path(checkpoint_path)
        SavedParts(path.parent).fill(_named(self._trained, self.optimizers[0]))
        return self.checkpoint_io.load_checkpoint(path)

    @property
    def _trained(self) -> "PreTrainedModel":
        module: Any = self.lightning_module
        return module.model


def _hashed(written: Future[Any], folder: Path, process: int) -> dict[str, str]:
    """Wait for a process's files, and hash them.

    Raises:
        OSError: a process could not write; all are told.
    """
    try:
        written.result()
    except CheckpointException as error:
        first, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"process {first}: {reason}") from error
    files = sorted(folder.glob(f"__{process}_*"))
    return {f"{PARTS_FOLDER}/{path.name}": digest(path) for path in files}


def _named(model: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint, those of the model and optimizer themselves.

    Moments of parameters that have not been trained yet are made, as zeros.
    """
    second = tied_names(model)
    weights = {name: t for name, t in model.state_dict().items() if name not in second}
    found = {WEIGHTS + name: tensor.detach() for name, tensor in weights.items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                for kind in _KINDS[:2]:
                    state[kind] = torch.zeros_like(parameter)
                state["step"] = torch.zeros((), device=parameter.device)
            for kind in _KINDS:
                found[f"{MOMENTS}{names[parameter]}/{kind}"] = state[kind]
    return found


class _Copies:
    """What torch asks of a stager; its own fail on sharded tensors of the CPU."""

    _synchronize_after_execute = should_synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.detach().to("cpu", copy=True) for name, t in state_dict.items()}

    def synchronize_staging(self) -> None:
        """It is done when `stage` has ended."""

    def close(self) -> None:
        """Nothing to give back."""
