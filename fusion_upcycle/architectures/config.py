"""Config fields: carried, required, without effect, or refused by name; and how to write them."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.known_fields import (
    READ_FROM,
    knows,
    remove_or_ignore,
    unknown_fields,
)
from fusion_upcycle.errors import UpcyclingError, setting, with_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def carry_fields(
    source: "PreTrainedConfig",
    *,
    target: str,
    config_class: Any = None,
    carried: Collection[str] = (),
    required: Mapping[str, tuple[Any, str]] | None = None,
    no_effect: Collection[str] = (),
    rope_types: Collection[str] = ROPE_TYPES,
    ignored: Collection[str],
) -> dict[str, Any]:
    """Sort the fields of `source` into carried, required, and without effect; refuse the rest.

    Args:
        target: what errors call the result's family.
        config_class: of the result, so that fields which neither class knows are let through; None
            refuses these too.
        carried: fields copied under the same name, beside `CARRIED`.
        required: field -> (the only value that `target` can express, remedy); before `carried`,
            beside `REQUIRED` and `STRAY`.
        no_effect: fields that change no forward pass, beside `NO_EFFECT`.
        rope_types: those that have been shown to be exact.
        ignored: fields that the user declares to be without effect.

    Returns:
        The carried fields, ready for the target's config class: where the source says None (or
        nothing) and the classes' defaults differ, None is said.
    """
    family = source.model_type
    required = REQUIRED | STRAY.get(family, {}) | dict(required or {})
    fields = {name: value for name, value in source.to_dict().items() if value is not None}
    if "auto_map" in fields and family not in WITH_CODE and "auto_map" not in ignored:
        raise UpcyclingError(
            f"config.json of the {family} source: the model brings code of its own (auto_map), "
            f"which is never run here. Where transformers' own class computes the "
            f"same, pass {setting('ignore_config_fields', [*ignored, 'auto_map'])}."
        )
    for name, (only, remedy) in required.items():
        if (value := fields.get(name, only)) != only:
            raise UpcyclingError(
                f"config.json of the {family} source: {name}={value!r} cannot be expressed by "
                f"{target} (only {only!r} can). {with_settings(remedy)}"
            )
    known = {*required, *CARRIED, *carried, *NO_EFFECT, *no_effect, *ignored, READ_FROM}
    others = {name: value for name, value in fields.items() if name not in known}
    if config_class is not None:
        harmless = unknown_fields(source, config_class, others, ignored)
        defaults = config_class().to_dict()
        others = {
            name: value
            for name, value in others.items()
            if name not in harmless
            # what the target alone has, and says likewise
            and (knows(type(source), name) or defaults.get(name) != value)
        }
    if others:
        named = ", ".join(f"{name}={value!r}" for name, value in others.items())
        raise UpcyclingError(
            f"config.json of the {family} source: field {named}; {target} may not express what it "
            f"does. If it changes nothing in the forward pass, {remove_or_ignore(others, ignored)}."
        )
    result: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    result |= {name: v for name, v in fields.items() if name in CARRIED or name in carried}
    for name in required.keys() & result.keys():
        del result[name]
    # "type" is the old spelling, which transformers keeps beside the new one it made from it
    rope = {key: value for key, value in result["rope_parameters"].items() if key != "type"}
    if rope.get("rope_type", "default") not in rope_types:
        raise UpcyclingError(
            f"config.json of the {family} source: rope type {rope['rope_type']!r} has not been "
            f"shown to be exact in {target}. Supported: {', '.join(rope_types)}."
        )
    return result | {"rope_parameters": rope}


def no_window(source: "PreTrainedConfig", target: str) -> None:
    """Refuse a model in which a layer has a sliding window."""
    if (getattr(source, "layer_types", None) is not None) and one_window(source, target):
        raise UpcyclingError(
            f"config.json of the {source.model_type} source: its layers have a sliding window of "
            f"{source.sliding_window}, and {target} has none. Choose a {setting('target')} that "
            "has one, or set use_sliding_window to false in config.json if the window is never "
            "reached."
        )


def one_window(source: "PreTrainedConfig", target: str) -> int | None:
    """The sliding window of all layers, None where none has one; mixed layers are refused."""
    kinds = set(source.layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return int(source.sliding_window)
    raise UpcyclingError(
        f"config.json of the {source.model_type} source: layer_types mixes {sorted(kinds)}, but "
        f"{target} has one kind of attention for all layers. No remedy is known for this target."
    )


#: Fields that every decoder family has under the same name, with the same meaning.
CARRIED = frozenset(
    {
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "use_cache",
        "vocab_size",
    }
)

#: Fields of every transformers config that do not touch a causal LM's forward pass.
NO_EFFECT = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
    }
)

_QUANTISED = (
    "The checkpoint is quantised: upcycle the unquantised one, or dequantise it first "
    "(model.dequantize() and save_pretrained in transformers)."
)

#: Fields that no conversion of ours can honour, whatever the family.
REQUIRED = {
    "chunk_size_feed_forward": (0, "Set it to 0."),
    "is_encoder_decoder": (False, "Only decoder models can be upcycled."),
    "quantization_config": (None, _QUANTISED),
    # of other software: compressed-tensors' older name, MLX
    "compression_config": (None, _QUANTISED),
    "quantization": (None, _QUANTISED),
}


#: Families whose published checkpoints name the code that later became transformers' own class.
WITH_CODE = frozenset({"phi3", "ernie4_5", "ernie4_5_moe", "deepseek_v3", "youtu"})

_LAYER_NORMS = {"rms_norm_eps": (None, "The family has LayerNorms and ignores it: remove it.")}

#: Dense `model_type` -> fields that it ignores itself, but that a target would obey.
STRAY = {
    "llama": {"sliding_window": (None, "Llama ignores it: remove it.")},
    "seed_oss": {"sliding_window": (None, "Seed-OSS ignores it: remove it.")},
    "cohere": _LAYER_NORMS,
    "cohere2": _LAYER_NORMS,
}

#: Noise of every transformers config where it says what all say: a reader of a causal language
#: model looks at none of it, one of a classifier needs its labels.
_USUAL = frozenset(
    {
        "chunk_size_feed_forward",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
    }
)


def readable_config(config: "PreTrainedConfig") -> dict[str, Any]:
    """`config.json` in the spellings of transformers 5 and of older readers, both at once.

    transformers 5 writes `rope_parameters` and `dtype`, and one of `num_experts` and
    `num_local_experts`; older readers (transformers 4, vLLM, llama.cpp) look for `rope_theta`,
    `rope_scaling`, `partial_rotary_factor`, `torch_dtype`, and the other one.
    """
    from transformers import PreTrainedConfig

    if hasattr(config, "dense_model_type"):  # ours: what transformers writes, and our code's place
        from fusion_upcycle.models import auto_map

        return config.to_dict() | {"auto_map": auto_map(config)}
    usual = PreTrainedConfig().to_dict()
    written = config.to_dict().items()
    data = {k: v for k, v in written if k not in _USUAL or v != usual[k]}
    data.pop("_name_or_path", None)
    rope = data.get("rope_parameters")
    if rope:
        data["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            data["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if "partial_rotary_factor" in rope:
            data["partial_rotary_factor"] = rope["partial_rotary_factor"]
    for name in ("num_experts", "num_local_experts"):
        if name in config.attribute_map:  # one name for the other
            data[name] = getattr(config, name)
    if data.get("dtype") is not None:
        data["torch_dtype"] = data["dtype"]
    return data
