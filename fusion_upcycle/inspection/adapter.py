"""What an adapter is, in words."""

import re
from collections import Counter

from fusion_upcycle.checkpoint.adapter import AdapterSource
from fusion_upcycle.checkpoint.adapter_config import WEIGHTS_FILE, read_adapter_config
from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.conversion.adapted import open_model


def adapter_in_words(at: Located) -> str:
    """Kind, size and places of an adapter, and what it is put on.

    Raises:
        UpcyclingError: an adapter that does not fit its base.
    """
    assert at.adapter is not None
    _, source = open_model(at)
    assert isinstance(source, AdapterSource)
    said = read_adapter_config(at.adapter, at.folder)
    specs = CheckpointReader(at.adapter, file=WEIGHTS_FILE).specs
    places = Counter(_place(name) for name in source.trained)
    return (
        f"{at.adapter} is a {'DoRA' if said.dora else 'LoRA'} adapter of rank {said.said['r']} "
        f"(alpha {said.said['lora_alpha']:g}) on {at.folder}: "
        f"{sum(spec.numel for spec in specs.values()):,} parameters, which change "
        + ", ".join(f"{count} x {place}" for place, count in sorted(places.items()))
        + "."
    )


def _place(name: str) -> str:
    """`self_attn.q_proj.weight` for `model.layers.3.self_attn.q_proj.weight`."""
    return re.split(r"\.\d+\.", name)[-1]
