"""What one MoE family is: accepted dense models, config mapping, tensor names, routing."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.options import UpcyclingOptions

#: (parameter name in the live model, index into it; () is the whole parameter)
LiveSlot = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class DenseLayout:
    """File names of a dense FFN, relative to its decoder layer: part of `Expert` -> name."""

    ffn: Mapping[str, str]
    #: Name endings of buffers that old checkpoints carry and every model recomputes.
    derived: tuple[str, ...]


#: Llama's layout, which most decoder families share.
LLAMA_LAYOUT = DenseLayout(
    ffn={
        "gate_proj_FD": "mlp.gate_proj.weight",
        "up_proj_FD": "mlp.up_proj.weight",
        "down_proj_DF": "mlp.down_proj.weight",
    },
    derived=("rotary_emb.inv_freq",),
)


#: One tensor per expert and matrix, as in Qwen's MoEs, OLMoE, DeepSeek and many others.
QWEN_EXPERT_NAMES = {
    "gate_proj_FD": "mlp.experts.{expert}.gate_proj.weight",
    "up_proj_FD": "mlp.experts.{expert}.up_proj.weight",
    "down_proj_DF": "mlp.experts.{expert}.down_proj.weight",
}


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token uses, behind a sigmoid gate: names relative to the layer."""

    names: Mapping[str, str]
    gate_name: str


@dataclass(frozen=True)
class Architecture:
    """One MoE family. All names are those of the checkpoint *files*, relative to a decoder layer.

    Defaults are the layout that most families share.

    Attributes:
        name: the family's `model_type`.
        dense: accepted dense `model_type` -> layout of its files.
        convert_config: (dense config, options) -> config of the MoE; raises `UpcyclingError` naming
            what cannot be expressed.
        expert_names: part of `Expert` -> name with an `{expert}` placeholder. The classic names,
            one tensor per expert and matrix, which vLLM and llama.cpp read.
        router_name: name of the router weight [E, D].
        experts_field: the config's own name for the number of experts.
        experts_module: the live module that holds all experts packed.
        router_module: the live module of the router.
        shared: the shared expert of families that have one.
        remapped_fields: fields that dense and MoE config share by name but not by meaning, so that
            `convert_config` sets them on purpose.
    """

    name: str
    dense: Mapping[str, DenseLayout]
    convert_config: Callable[["PreTrainedConfig", "UpcyclingOptions"], "PreTrainedConfig"]
    expert_names: Mapping[str, str] = field(default_factory=lambda: QWEN_EXPERT_NAMES)
    router_name: str = "mlp.gate.weight"
    experts_field: str = "num_experts"
    experts_module: str = "mlp.experts"
    router_module: str = "mlp.gate"
    shared: SharedExpert | None = None
    remapped_fields: frozenset[str] = frozenset()

    def live_slot(self, file_name: str, intermediate_size: int) -> LiveSlot:
        """Where a tensor of the file lives in transformers' in-memory layout.

        Experts are packed there: `gate_up_proj` [E, 2F, D] with the gate rows first, and
        `down_proj` [E, D, F]. Every other tensor keeps its name, or is the router.
        """
        head, dot, tail = file_name.partition("layers.")
        layer, _, relative = tail.partition(".")
        if not dot or not layer.isdigit():
            return file_name, ()
        prefix = f"{head}layers.{layer}."
        if relative == self.router_name:
            return f"{prefix}{self.router_module}.weight", ()
        for part, pattern in self.expert_names.items():
            before, after = pattern.split("{expert}")
            if relative.startswith(before) and relative.endswith(after):
                expert = int(relative[len(before) : len(relative) - len(after)])
                experts, size = f"{prefix}{self.experts_module}.", intermediate_size
                if part == "down_proj_DF":
                    return f"{experts}down_proj", (expert,)
                rows = slice(0, size) if part == "gate_proj_FD" else slice(size, 2 * size)
                return f"{experts}gate_up_proj", (expert, rows)
        return file_name, ()


def carry_fields(
    source: "PreTrainedConfig",
    *,
    target: str,
    carried: Collection[str] = (),
    required: Mapping[str, tuple[Any, str]] | None = None,
    no_effect: Collection[str] = (),
    ignored: Collection[str],
) -> dict[str, Any]:
    """Sort the fields of `source` into carried, required, and without effect; refuse the rest.

    Args:
        carried: fields copied under the same name, beside `CARRIED`.
        required: field -> (the only value that `target` can express, remedy); before `carried`,
            beside `REQUIRED` and `STRAY`.
        no_effect: fields that change no forward pass, beside `NO_EFFECT`.
        ignored: fields that the user declares to be without effect.

    Returns:
        The carried fields, ready for the target's config class: where the source says None (or
        nothing) and the classes' defaults differ, None is said.
    """
    family = source.model_type
    required = REQUIRED | STRAY.get(family, {}) | dict(required or {})
    result: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    for name, value in source.to_dict().items():
        if value is None:
            continue
        if name in required:
            only, remedy = required[name]
            if value != only:
                raise UpcyclingError(
                    f"config.json of the {family} source: {name}={value!r} cannot be expressed by "
                    f"{target} (only {only!r} can). {remedy}"
                )
        elif name in CARRIED or name in carried:
            result[name] = value
        elif name not in NO_EFFECT and name not in no_effect and name not in ignored:
            raise UpcyclingError(
                f"config.json of the {family} source: unknown field {name}={value!r}; {target} may "
                "not express what it does. If it changes nothing in the forward pass, remove it "
                f"or pass ignore_config_fields=[{name}]."
            )
    # "type" is the old spelling, which transformers keeps beside the new one it made from it
    rope = {key: value for key, value in result["rope_parameters"].items() if key != "type"}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise UpcyclingError(
            f"config.json of the {family} source: rope type {rope['rope_type']!r} has not been "
            f"shown to be exact in {target}. Supported: {', '.join(ROPE_TYPES)}."
        )
    return result | {"rope_parameters": rope}


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

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

#: Fields of every transformers config that do not touch a causal LM's forward pass.
NO_EFFECT = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
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

#: Fields that no conversion of ours can honour, whatever the family.
REQUIRED = {
    "chunk_size_feed_forward": (0, "Set it to 0."),
    "is_encoder_decoder": (False, "Only decoder models can be upcycled."),
    "quantization_config": (
        None,
        "The checkpoint is quantised: upcycle the unquantised one, or dequantise it first "
        "(model.dequantize() and save_pretrained in transformers).",
    ),
    "auto_map": (
        None,
        "The model wants code from its repository to be run, which is never done here. If its "
        "code equals transformers' own class, remove auto_map from config.json.",
    ),
}


#: Dense `model_type` -> fields that it ignores itself, but that a target would obey.
STRAY = {"llama": {"sliding_window": (None, "Llama ignores it: remove it.")}}

#: Noise of every transformers config: no reader of a causal LM looks at it.
_NOT_WRITTEN = frozenset(
    {
        "_name_or_path",
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
    `rope_scaling`, `torch_dtype`, and the other one.
    """
    data = {key: value for key, value in config.to_dict().items() if key not in _NOT_WRITTEN}
    rope = data.get("rope_parameters")
    if rope:
        data["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            data["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    for name in ("num_experts", "num_local_experts"):
        if name in config.attribute_map:  # one name for the other
            data[name] = getattr(config, name)
    if data.get("dtype") is not None:
        data["torch_dtype"] = data["dtype"]
    return data
