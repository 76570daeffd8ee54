"""MoE families, one file each. To add one: its file, its entry here, its line in the tests."""

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.mixtral import MIXTRAL
from fusion_upcycle.errors import UpcyclingError

ARCHITECTURES: dict[str, Architecture] = {MIXTRAL.name: MIXTRAL}


def architecture_for(dense_type: str) -> Architecture:
    """The MoE family for a dense `model_type`; `UpcyclingError` lists the supported ones."""
    for architecture in ARCHITECTURES.values():
        if dense_type in architecture.dense:
            return architecture
    supported = ", ".join(sorted({name for a in ARCHITECTURES.values() for name in a.dense}))
    raise UpcyclingError(
        f"The source is a {dense_type!r} model, which cannot be upcycled. Supported: {supported}."
    )
