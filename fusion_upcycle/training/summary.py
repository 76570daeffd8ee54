"""What a run says of itself: before it, what it will keep; after it, one line."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.errors import setting
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOMENTS = 2  # of AdamW for each parameter that is trained


def moments_in_words(model: "PreTrainedModel", options: TrainingOptions, output: Path) -> str:
    """How large AdamW's moments are, and whether they will be kept.

    Args:
        model: as it is trained: moments have the dtypes of its parameters.
    """
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    size = in_bytes(_MOMENTS * sum(p.numel() * p.element_size() for p in trained))
    if options.save_moments:
        return f"AdamW's moments: {size}, kept in {output}."
    return (
        f"AdamW's moments: {size}, not kept in {output}; {setting('save_moments', True)} keeps "
        "them, for runs that go on from there."
    )


def in_one_line(record: Mapping[str, Any], output: Path | None) -> str:
    """What was trained, what the loss came to, where the model is.

    Args:
        record: of a run, `training.json`.
    """
    unit = "tokens" if "tokens_trained" in record else "examples"
    first, final = record["first"], record["final"]
    (name,) = first
    loss = f"{name.rpartition('_nats_per_')[0].replace('_', ' ')} loss"
    place = "in memory only" if output is None else f"saved to {output}"
    return (
        f"Trained on {record[f'{unit}_trained']:,} {unit} in {record['steps']:,} steps: {loss} "
        f"{first[name]:.4f} -> {final[name]:.4f} nats per {name.rpartition('_')[2]}; {place}."
    )


def in_bytes(number: float) -> str:
    """Of a size, in words: `1.38 GB`."""
    unit, factor = next(pair for pair in _UNITS if number >= pair[1] or pair[1] == 1)
    return f"{number / factor:.3g} {unit}"


_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("bytes", 1))
