"""MoE families, one file each. To add one: its file, its entry here, its line in the tests."""

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.deepseek_v3 import DEEPSEEK_V3
from fusion_upcycle.architectures.ernie4_5_moe import ERNIE4_5_MOE
from fusion_upcycle.architectures.flex_olmo import FLEX_OLMO
from fusion_upcycle.architectures.glm4_moe import GLM4_MOE
from fusion_upcycle.architectures.granitemoe import GRANITEMOE
from fusion_upcycle.architectures.mixtral import MIXTRAL
from fusion_upcycle.architectures.qwen2_moe import QWEN2_MOE
from fusion_upcycle.architectures.qwen3_5_moe import QWEN3_5_MOE
from fusion_upcycle.architectures.qwen3_moe import QWEN3_MOE
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.options import AUTO

#: In the order in which `auto` looks for a family that takes the source.
ARCHITECTURES: dict[str, Architecture] = {
    family.name: family
    for family in (
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        QWEN3_5_MOE,
        FLEX_OLMO,
        GRANITEMOE,
        ERNIE4_5_MOE,
        DEEPSEEK_V3,
        GLM4_MOE,
    )
}


def architecture_for(dense_type: str, target: str = AUTO) -> Architecture:
    """The MoE family that a dense `model_type` becomes.

    Args:
        dense_type: of the source.
        target: name of a family, or `auto` for the first that takes the source.

    Raises:
        UpcyclingError: lists what the target, or any target, takes.
    """
    if target not in (AUTO, *ARCHITECTURES):
        raise unknown("target", str(target), [AUTO, *ARCHITECTURES])
    candidates = list(ARCHITECTURES.values()) if target == AUTO else [ARCHITECTURES[target]]
    for architecture in candidates:
        if dense_type in architecture.dense:
            return architecture
    supported = ", ".join(sorted({name for a in candidates for name in a.dense}))
    raise UpcyclingError(
        f"The source is a {dense_type!r} model, which cannot be upcycled"
        + (f" to {target}" if target != AUTO else "")
        + f". Supported: {supported}."
    )
