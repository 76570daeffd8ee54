"""The text model inside of a model of text and images: its config, and its tensors by its names.

Nothing is known of single families but three whose text model has no class of its own for causal
language modelling: which tensors are the text model's follows from the names and shapes that
transformers' class of it has.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.layout import empty_model
from fusion_upcycle.checkpoint.tensors import TensorSource, is_buffer
from fusion_upcycle.checkpoint.view import RenamedSource
from fusion_upcycle.errors import UpcyclingError, plain_logger, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = plain_logger(__name__)

#: Text models that have the positions of an image in their rope, and so no class by themselves; of
#: text alone the three positions are one, and they are these families.
_OF_TEXT_ALONE = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
#: What the rope of these says of the positions of an image.
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
#: Fields of the whole that its text model has as well.
_OF_ALL = (
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "auto_map",
)


def text_type(config: "PreTrainedConfig") -> str | None:
    """The family of the text model that is a part of a model; None where it is no part."""
    text = getattr(config, "text_config", None)
    if text is None or not hasattr(text, "model_type"):
        return None
    return _OF_TEXT_ALONE.get(text.model_type, str(text.model_type))


def text_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The config of the text model by itself, as a causal language model.

    Raises:
        UpcyclingError: transformers has no causal language model of this family.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, text = text_type(config) or "", copy.deepcopy(config.text_config)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if name is None:
        raise UpcyclingError(
            f"The text part of a {config.model_type!r} model is a {kind!r}, of which transformers "
            "has no causal language model. No remedy is known."
        )
    if kind != text.model_type:
        fields = text.to_dict()
        rope = fields["rope_parameters"]
        rope = {key: value for key, value in rope.items() if key not in _OF_IMAGES}
        rope = {key: "default" if value == "mrope" else value for key, value in rope.items()}
        target = CONFIG_MAPPING[kind]
        known = {*target().to_dict()} - {"model_type", "architectures", "transformers_version"}
        fields = {key: value for key, value in fields.items() if key in known}
        text = target(**fields | {"rope_parameters": rope})
    for field in _OF_ALL:
        if getattr(text, field, None) is None and (value := getattr(config, field, None)):
            setattr(text, field, value)
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    text.architectures = [name]
    return text


def text_tensors(source: TensorSource, config: "PreTrainedConfig") -> TensorSource:
    """The tensors of the text model by its own names; says which others are left out.

    Args:
        source: of the whole model.
        config: of the text model by itself.

    Raises:
        UpcyclingError: the text model is not there, or there twice.
    """
    names = text_names(source, config)
    left = Counter(
        ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
        for name in source.specs.keys() - {*names.values()}
    )
    if left:
        parts = ", ".join(f"{part} ({count} tensors)" for part, count in sorted(left.items()))
        log.warning("part=text: left out of the result is %s.", parts)
    return RenamedSource(source, names)


def text_names(source: TensorSource, config: "PreTrainedConfig") -> dict[str, str]:
    """Name of a tensor in the text model -> its name in the whole model.

    Raises:
        UpcyclingError: as `text_tensors`.
    """
    model = empty_model(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    base = f"{model.base_model_prefix}."
    inner = [name.removeprefix(base) for name in wanted if name.startswith(base)]
    inner = [name for name in inner if not is_buffer(name)]
    first = next(name for name in inner if ".0." in name)
    prefixes = [
        prefix
        for prefix in (n.removesuffix(first) for n in source.specs if n.endswith(first))
        if all(
            prefix + name in source.specs
            and source.specs[prefix + name].shape == wanted[base + name]
            for name in inner
        )
    ]
    if len(prefixes) != 1:
        there = "is not there" if not prefixes else f"is there {len(prefixes)} times"
        raise UpcyclingError(
            f"The text part, a {config.model_type}, {there}: no single beginning of tensor names "
            f"has {first} and all its others in their shapes. The checkpoint is incomplete, or its "
            "config.json of another model."
        )
    (prefix,) = prefixes
    # All that lies there, so that what the class does not know is refused and not left out.
    others = [p for p in _siblings(source, prefix) if prefix.startswith(f"{p}.") is False]
    names = {
        base + name.removeprefix(prefix): name
        for name in source.specs
        if name.startswith(prefix) and not name.startswith(tuple(f"{p}." for p in others))
    }
    for head, shape in wanted.items():
        if not head.startswith(base):
            found = [n for n in source.specs if n == head or n.endswith(f".{head}")]
            found = [n for n in found if source.specs[n].shape == shape]
            if len(found) == 1:
                names[head] = found[0]
    return names


def _siblings(source: TensorSource, prefix: str) -> set[str]:
    """Towers of images or sounds that lie beside the text model, below the same beginning."""
    below = {name.removeprefix(prefix).split(".")[0] for name in source.specs}
    return {
        prefix + part
        for part in below
        if any(word in part for word in ("visual", "vision", "audio", "image", "projector"))
    }


def key_mapping(source: TensorSource, config: "PreTrainedConfig") -> dict[str, str]:
    """For `from_pretrained` of the text model: pattern of a name in the file -> name in the model.

    Raises:
        UpcyclingError: as `text_tensors`.
    """
    return _as_patterns(text_names(source, config))


def _as_patterns(names: Mapping[str, str]) -> dict[str, str]:
    return {f"^{re.escape(there)}$": here for here, there in names.items() if here != there}


def refuse_whole(config: "PreTrainedConfig", taken: Any) -> None:
    """Refuse a model of which only the text part can be taken, with the remedy.

    Args:
        taken: families that are.

    Raises:
        UpcyclingError: it is one.
    """
    if config.model_type not in taken and (kind := text_type(config)) in taken:
        raise UpcyclingError(
            f"The source is a {config.model_type!r} model of text and more, of which the text part "
            f"(a {kind}) can be taken: pass {setting('part', 'text')}."
        )
