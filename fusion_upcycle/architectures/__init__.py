"""MoE families, one file each. To add one: its file, its entry here, its line in the tests."""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.cohere2_moe import COHERE2_MOE
from fusion_upcycle.architectures.deepseek_v3 import DEEPSEEK_V3
from fusion_upcycle.architectures.ernie4_5_moe import ERNIE4_5_MOE
from fusion_upcycle.architectures.flex_olmo import FLEX_OLMO
from fusion_upcycle.architectures.glm4_moe import GLM4_MOE
from fusion_upcycle.architectures.granitemoe import GRANITEMOE
from fusion_upcycle.architectures.hunyuan_v1_moe import HUNYUAN_V1_MOE
from fusion_upcycle.architectures.lfm2_moe import LFM2_MOE
from fusion_upcycle.architectures.mixtral import MIXTRAL
from fusion_upcycle.architectures.olmoe import OLMOE
from fusion_upcycle.architectures.qwen2_moe import QWEN2_MOE
from fusion_upcycle.architectures.qwen3_5_moe import QWEN3_5_MOE
from fusion_upcycle.architectures.qwen3_moe import QWEN3_MOE
from fusion_upcycle.architectures.sparse import SPARSE, for_config
from fusion_upcycle.checks import AUTO
from fusion_upcycle.errors import UpcyclingError, require_versions, setting, unknown
from fusion_upcycle.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Whatever runs a model comes through here, and older routers say something else.
require_versions("transformers")


def _check(name: str, family: object) -> None:
    """An entry point is an `Architecture` of its own name."""
    if not isinstance(family, Architecture) or family.name != name:
        raise UpcyclingError(
            f"The entry point {name} in fusion_upcycle.architectures gives {family!r}, which is no "
            f"Architecture named {name!r}. Repair or uninstall its package."
        )


#: Families that dense models become, in the order in which `auto` looks for one.
ARCHITECTURES: Registry[Architecture] = Registry(
    "architectures",
    {
        "mixtral": MIXTRAL,
        "qwen2_moe": QWEN2_MOE,
        "qwen3_moe": QWEN3_MOE,
        "qwen3_5_moe_text": QWEN3_5_MOE,
        "flex_olmo": FLEX_OLMO,
        "granitemoe": GRANITEMOE,
        "ernie4_5_moe": ERNIE4_5_MOE,
        "deepseek_v3": DEEPSEEK_V3,
        "glm4_moe": GLM4_MOE,
        "cohere2_moe": COHERE2_MOE,
        "lfm2_moe": LFM2_MOE,
        "hunyuan_v1_moe": HUNYUAN_V1_MOE,
        "sparse": SPARSE,
    },
    _check,
)

#: The name of our own class for any dense model. Behind transformers' classes, which other software
#: reads.
OWN = "sparse"

#: Families of transformers' own classes: those that can be trained and expanded, beside ours.
MOE_FAMILIES: Registry[Architecture] = ARCHITECTURES.without(OWN).plus(olmoe=OLMOE)

#: MoE families of transformers that cannot be expanded -> why.
_NOT_EXPANDED = {
    "gpt_oss": "its experts have biases and lie transposed and interleaved in their files, which "
    "no expert here can say",
}

#: MoE families whose class in transformers computes something else than it should -> what.
_BROKEN = dict.fromkeys(
    ("nllb-moe", "nllb_moe"),
    "its class in transformers (5.23, 5.24) takes the mask of the chosen experts for their "
    "numbers, so that every token gets w1 * expert 1 + w2 * expert 0, whichever were chosen",
)


#: Models of text and images -> the class of their vision tower.
_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def known_family(config: "PreTrainedConfig") -> Architecture | None:
    """The family of an MoE model, as it is for this config; None for any other model."""
    if hasattr(config, "dense_model_type"):
        return for_config(config)
    return MOE_FAMILIES.get(config.model_type)


def moe_family(config: "PreTrainedConfig") -> Architecture:
    """The family of an MoE model that is to be expanded.

    Raises:
        UpcyclingError: a dense model, or a family that is not known.
    """
    if (family := known_family(config)) is not None:
        return family
    model_type = config.model_type
    if any(model_type in family.dense for family in ARCHITECTURES.values()):
        raise UpcyclingError(
            f"The source is a dense {model_type!r} model, which has no experts to duplicate. Make "
            "an MoE of it first, with sparse_upcycling."
        )
    why = (_NOT_EXPANDED | _BROKEN).get(model_type)
    reason = f": {why}" if why else ""
    raise UpcyclingError(
        f"The source is a {model_type!r} model, which cannot be expanded{reason}. Supported: "
        f"{', '.join(MOE_FAMILIES)}."
    )


def architecture_for(dense_type: str, target: str = AUTO) -> Architecture:
    """The MoE family that a dense `model_type` becomes.

    Args:
        dense_type: of the source.
        target: name of a family, or `auto` for the first that takes the source.

    Raises:
        UpcyclingError: lists what the target, or any target, takes.
    """
    if target in _BROKEN:
        raise UpcyclingError(
            f"target={target}: {_BROKEN[target]}. Choose another {setting('target')}."
        )
    if target != AUTO and target in MOE_FAMILIES and not MOE_FAMILIES[target].dense:
        raise UpcyclingError(
            f"target={target}: no dense model becomes a {target}; it can be expanded only. Choose "
            f"one of: {', '.join(name for name, a in ARCHITECTURES.items() if a.dense)}."
        )
    if target not in (AUTO, *ARCHITECTURES):
        raise unknown("target", str(target), [AUTO, *ARCHITECTURES])
    candidates = [*ARCHITECTURES] if target == AUTO else [target]
    for name in candidates:  # ours first: a package is loaded only where none of them fits
        if dense_type in ARCHITECTURES[name].dense:
            return ARCHITECTURES[name]
    taken = {dense for name in candidates for dense in ARCHITECTURES[name].dense}
    if tower := _TOWERS.get(dense_type):
        raise UpcyclingError(
            f"The source is a whole {dense_type!r} model, of which the vision tower can be "
            f'upcycled. Save it by itself: python -c "from transformers import {tower} as T; '
            f"T.from_pretrained('FOLDER').save_pretrained('FOLDER-vision')\", or use "
            "modelpool=CLIPVisionModelPool/folders inside FusionBench, which takes the tower."
        )
    if dense_type in MOE_FAMILIES or dense_type.startswith("sparse_"):
        raise UpcyclingError(
            f"The source is a {dense_type!r} model, an MoE already. Give it more experts with "
            "expand: python -m fusion_upcycle expand SOURCE OUTPUT, fusion_upcycle.expand, or "
            "method=expert_upcycling inside FusionBench."
        )
    supported = ", ".join(sorted(taken))
    raise UpcyclingError(
        f"The source is a {dense_type!r} model, which cannot be upcycled"
        + (f" to {target}" if target != AUTO else "")
        + f". Supported: {supported}."
    )
