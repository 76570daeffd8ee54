"""The tensors in a checkpoint, read one at a time; loading them runs no code."""

import pickle
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from fusion_upcycle.checkpoint.tensors import TensorSpec
from fusion_upcycle.errors import UpcyclingError

#: In a checkpoint: Lightning's, tensors and plain data.
STATE_FILE = "state.pt"
#: In a checkpoint: the folder of torch's files, one for each process.
PARTS_FOLDER = "parts"
#: Before the live name of a tensor in them.
WEIGHTS, MOMENTS = "model.", "optimizer."


class Saved(Protocol):
    """What is saved by name: `model.NAME`, and of AdamW `optimizer.NAME/KIND`.

    Attributes:
        specs: name -> dtype and shape of the whole tensor.
    """

    specs: dict[str, TensorSpec]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, to be read only."""
        ...


def open_saved(checkpoint: Path) -> Saved:
    """The tensors of a checkpoint that `strategy=fsdp` or another one has saved.

    Raises:
        UpcyclingError: no checkpoint, or a damaged one.
    """
    if (checkpoint / PARTS_FOLDER).is_dir():
        return SavedParts(checkpoint)
    if not (checkpoint / STATE_FILE).is_file():
        raise UpcyclingError(
            f"{checkpoint} is no checkpoint: it has neither {PARTS_FOLDER} nor {STATE_FILE}. Give "
            "one of the folders step-* of a run's checkpoints."
        )
    return SavedWhole(checkpoint)


def load_state(path: Path) -> dict[str, Any]:
    """What is in a checkpoint's `STATE_FILE`, its tensors mapped from the disk."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class SavedWhole:
    """The tensors that one process has saved, mapped from the disk.

    Args:
        checkpoint: folder.
    """

    def __init__(self, checkpoint: Path):
        state = load_state(checkpoint / STATE_FILE)
        self._tensors: dict[str, Tensor] = dict(state["state_dict"])
        for name, kinds in state["optimizer_states"][0]["state"].items():
            for kind, tensor in kinds.items():
                self._tensors[f"{MOMENTS}{name.removeprefix(WEIGHTS)}/{kind}"] = tensor
        self.specs = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class SavedParts:
    """The tensors that processes have saved of a checkpoint, whatever their number and layout.

    Args:
        checkpoint: folder.

    Attributes:
        specs: name -> dtype and shape of the whole.

    Raises:
        UpcyclingError: a folder without such tensors, or a damaged one.
    """

    def __init__(self, checkpoint: Path):
        self._reader = _Reader(checkpoint / PARTS_FOLDER)
        found: dict[str, Any] = dict(self._reader.read_metadata().state_dict_metadata)
        self.specs = {
            name: TensorSpec(each.properties.dtype, tuple(each.size))
            for name, each in found.items()
        }

    def fill(self, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
        """Fill tensors, sharded or not, by their names.

        Args:
            alone: this process does not wait for others that fill theirs.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=self._reader, no_dist=alone)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in memory."""
        spec = self.specs[name]
        found = torch.empty(spec.shape, dtype=spec.dtype)
        self.fill({name: found}, alone=True)
        return found


class _Reader(FileSystemReader):
    """Whose metadata, a pickle, may name what torch writes there and nothing else."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is not None:  # it is asked for with every tensor
            return self._metadata
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found: Metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, OSError) as error:
            raise UpcyclingError(
                f"{path} cannot be read ({error}). Give a checkpoint that strategy=fsdp has saved."
            ) from error
        assert found.storage_meta is not None
        found.storage_meta.load_id = self.load_id
        self._metadata = found
        return found


class _Unpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("collections", "OrderedDict"),
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module in self._MODULES and "." not in name) or (module, name) in self._NAMES or dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
