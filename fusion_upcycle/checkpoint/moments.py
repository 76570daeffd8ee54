"""AdamW's moments in the folder of a trained model: their file and how it is read."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.errors import UpcyclingError, setting

#: In the folder of a trained model. Not beside the weights, which are read by `*.safetensors`.
MOMENTS_FILE = "training/optimizer.safetensors"


#: Parameter name -> AdamW's state of it: `exp_avg`, `exp_avg_sq`, `step`.
Moments = dict[str, dict[str, Tensor]]


KINDS = ("exp_avg", "exp_avg_sq")


_PREFIX = "model."  # of the model in the Lightning module


def save_moments(state: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write a checkpoint's optimizer state, by name, into the folder of a model."""
    write_moments({n.removeprefix(_PREFIX): dict(v) for n, v in state.items()}, folder)


def write_moments(moments: Moments, folder: Path) -> None:
    """Write moments into the folder of the model whose parameters they name."""
    path = folder / MOMENTS_FILE
    path.parent.mkdir(exist_ok=True)
    tensors = {
        f"{name}/{kind}": value.contiguous()
        for name, values in moments.items()
        for kind, value in values.items()
    }
    save_file(tensors, path)


def read_moments(folder: Path) -> Moments:
    """The moments in the folder of a trained model, as they were saved.

    Raises:
        UpcyclingError: none there.
    """
    reader = moments_reader(folder)
    saved: Moments = {}
    for key in reader.specs:
        name, _, kind = key.rpartition("/")
        saved.setdefault(name, {})[kind] = reader.tensor(key).clone()
    return saved


def moments_reader(folder: Path) -> CheckpointReader:
    """The file of moments in the folder of a trained model; its names are `PARAMETER/KIND`.

    Raises:
        UpcyclingError: none there, or a file that is damaged or not one of ours.
    """
    path = folder / MOMENTS_FILE
    if not path.is_file():
        raise UpcyclingError(
            f"optimizer_state={folder} has no {MOMENTS_FILE}: give the folder of a model that was "
            f"trained with {setting('save_moments', True)}, or pass "
            f"{setting('optimizer_state', None)}."
        )
    reader = CheckpointReader(path.parent, file=path.name)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, spec in reader.specs.items():
        name, _, kind = key.rpartition("/")
        shapes.setdefault(name, {})[kind] = spec.shape
    for name, kinds in shapes.items():
        whole = kinds.keys() == {*KINDS, "step"} and kinds["step"] == ()
        if not whole or kinds["exp_avg"] != kinds["exp_avg_sq"]:
            raise UpcyclingError(
                f"{path}: {name} has {kinds}, which are not AdamW's moments of one parameter. Give "
                "the folder of a model that continued_pretraining saved, or null."
            )
    return reader
