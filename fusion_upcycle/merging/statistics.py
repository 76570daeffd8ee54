"""Router statistics beside a merged model: what another expert is added with, later.

In `router_statistics/` of the model's folder: the moments that the prototype router was made of,
and `config.json` of the dense models, as the result has them. Not beside the weights, which some
readers look for by `*.safetensors`.

Shapes: N models, D hidden size.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from fusion_upcycle.checks import dtype_name
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.merging.prototypes import Moments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.merging.merging import Merging

STATISTICS_FOLDER = "router_statistics"
_FILE = "moments.safetensors"


def statistics_bytes(merging: "Merging") -> int:
    """Of the moments of all MoE layers of a merge: D x D in float32 and N x D in float64 each."""
    size = merging.resolved.hidden_size
    layers = len(merging.resolved.moe_layers)
    return layers * size * (4 * size + 8 * len(merging.experts))


def digest(moments: Mapping[int, Moments]) -> str:
    """SHA-256 of the moments of all layers."""
    found = sha256()
    for _, seen in sorted(moments.items()):
        for tensor in (seen.means_ND, seen.summed_DD):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def write_statistics(
    moments: Mapping[int, Moments], config: "PreTrainedConfig", folder: Path
) -> None:
    """Write them into the folder of the model.

    Args:
        config: of the dense models, with `architectures` set.
    """
    place = folder / STATISTICS_FOLDER
    place.mkdir(exist_ok=True)
    tensors = {f"{layer}.means": seen.means_ND.contiguous() for layer, seen in moments.items()}
    tensors |= {f"{layer}.summed": seen.summed_DD.contiguous() for layer, seen in moments.items()}
    save_file(tensors, place / _FILE)
    # Where a model lies on this machine is nobody else's business.
    said = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    text = json.dumps(said, indent=2, default=dtype_name)
    (place / "config.json").write_text(text + "\n", encoding="utf-8")


def read_statistics(
    folder: Path, *, layers: Sequence[int], models: int, hidden_size: int, sha256: str
) -> dict[int, Moments]:
    """The moments in the folder of a merged model.

    Args:
        layers, models, hidden_size: what they are of.
        sha256: their `digest`, from the model's record.

    Raises:
        UpcyclingError: none there, damaged ones, or those of another model.
    """
    path = folder / STATISTICS_FOLDER / _FILE
    if not path.is_file():
        raise UpcyclingError(
            f"{path} is not there, though {folder} was made with router statistics. If the folder "
            f"is a copy, copy it whole; else merge again, with {setting('statistics', True)}."
        )
    try:
        held = load_file(path)
        moments = {
            layer: Moments(held[f"{layer}.means"], held[f"{layer}.summed"]) for layer in layers
        }
    except Exception as error:  # safetensors raises a class of its own
        raise UpcyclingError(f"{path} cannot be read: {error!r}. Copy the folder again.") from error
    shapes = {(tuple(m.means_ND.shape), tuple(m.summed_DD.shape)) for m in moments.values()}
    if shapes != {((models, hidden_size), (hidden_size, hidden_size))} or digest(moments) != sha256:
        raise UpcyclingError(
            f"{path} is damaged, or of another model: it is not what {folder} was made with. Copy "
            f"the folder again, or merge again, with {setting('statistics', True)}."
        )
    return moments
