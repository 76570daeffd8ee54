"""What transformers makes of a folder: all of it in memory, or which of its tensors it finds."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion_upcycle.architectures.layout import class_name, model_class
from fusion_upcycle.architectures.text_part import key_mapping, text_type
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.errors import ProofError
from fusion_upcycle.report.progress import loading_bars, without_load_report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SHOWN = 3  # tensors that an error names


def check_load_keys(folder: Path) -> None:
    """Load a folder as transformers does, to the meta device: which tensors would it find?

    Its own code renames, fuses experts and ties heads; no weight is read.

    Raises:
        ProofError: a tensor that it misses, does not expect, or expects in another shape.
    """
    config = read_config(folder)
    kind: Any = model_class(class_name(config))
    with without_load_report():
        try:
            _, info = kind.from_pretrained(
                folder,
                config=config,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed, and refused below
            )
        except Exception as error:  # of a generation_config.json whatever its checks make of it
            raise ProofError(
                f"transformers' {kind.__name__} cannot load {folder}: {error!r:.300}"
            ) from error
    words = {
        "missing_keys": "does not find",
        "unexpected_keys": "has no place for",
        "mismatched_keys": "expects in another shape",
    }
    for problem, verb in words.items():
        if found := sorted(key if isinstance(key, str) else key[0] for key in info[problem]):
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ProofError(
                f"transformers' {kind.__name__} {verb} {', '.join(found[:_SHOWN])}{more} in "
                f"{folder}: what it loads is not what was made."
            )


def load_model(
    folder: Path, config: "PreTrainedConfig", *, dtype: torch.dtype, progress: bool
) -> "PreTrainedModel":
    """Load a folder with transformers' own class for a config, which it may not be of itself."""
    with loading_bars(progress):
        kind: Any = model_class(class_name(config))
        whole, more = read_config(folder), {}
        is_part = text_type(whole) is not None and whole.model_type != config.model_type
        if is_part:
            more = {"key_mapping": key_mapping(CheckpointReader(folder), config)}
        with without_load_report() if is_part else nullcontext():  # of all that is no part of it
            model: PreTrainedModel = kind.from_pretrained(
                folder, config=copy.deepcopy(config), dtype=dtype, **more
            )
    return model
