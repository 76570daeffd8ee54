"""Do configs of several models say the same forward pass? Where may they differ, and whose counts?

The rule: a field counts if transformers' own code of the model speaks of it, its config class or
its modelling file, and it is none of those that are known to change no output of a trained model
(ids of special tokens, generation, training, initialisation, ...: `_changes_nothing`). In those
that do not count the result has the value of one model, `main`.
"""

import inspect
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures.config import WITH_CODE
from fusion_upcycle.architectures.layout import model_class
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.verification.names import meaning

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Ids of special tokens: who writes or reads text looks at them, and classifiers (`_reads_ids`).
TOKEN_IDS = frozenset(
    f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "cls", "mask", "unk")
)
#: Of how a model is trained, initialised, run or saved.
_OF_USE = frozenset(
    {
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "initializer_range",
        "keys_to_ignore_at_inference",
        "pretraining_tp",
        "scale_attn_by_inverse_layer_idx_at_init",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "torchscript",
        "use_cache",
    }
)
_TRAINING = re.compile(
    r"dropout|_pdrop$|layerdrop|drop_path|^initiali[sz]er|_init_std$|_loss_coef|^label_smoothing"
)
#: Fields from which a class makes `layer_types`, where these are not said.
_OF_LAYER_TYPES = frozenset({"max_window_layers", "sliding_window_pattern", "use_sliding_window"})
#: Said by the tensors and by `MergeSource`.
_VOCABULARY = "vocab_size"
_POSITIONS = "max_position_embeddings"
#: Kinds of rope that never look at the number of positions; and those that do without a factor.
_ROPE_WITHOUT = frozenset({"default", "linear", "llama3"})
_ROPE_BY_FACTOR = frozenset({"yarn", "longrope"})
#: Old spellings, and the fields of `rope_parameters` that they are.
_ROPE_SPELLINGS = {"rope_theta": ("rope_theta",), "rope_scaling": ("rope_type", "factor")}


def vocabulary_of(config: "PreTrainedConfig") -> int:
    """Token ids of a model; 0 for one that is given images."""
    return int(getattr(config, "vocab_size", 0))


@dataclass(frozen=True)
class Agreement:
    """Configs that say the same forward pass.

    Attributes:
        main: the model whose values the result has.
        fields: field in which they differ -> model -> its value, main's first.
    """

    main: str = ""
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def in_words(self) -> list[str]:
        """What was taken from where, for people."""
        if not self.fields:
            return []
        names = ", ".join(self.fields)
        return [f"config.json differs in {names}: the values are those of {self.main}"]


def agree(
    configs: Mapping[str, "PreTrainedConfig"], main: str, ignored: Collection[str] = ()
) -> Agreement:
    """Compare all configs with that of `main`.

    Args:
        configs: model -> its config, with `architectures`.
        main: the model whose values count where nothing depends on them.
        ignored: fields that the user declares to be without effect; they have main's value.

    Raises:
        UpcyclingError: another model or another forward pass, naming the fields.
    """
    reference = _fields(configs[main])
    found: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        if name == main:
            continue
        _refuse_strange(name, config, ignored)
        fields = _fields(config)
        differing = [
            field
            for field in sorted(reference.keys() | fields.keys())
            if reference.get(field) != fields.get(field)
        ]
        counting = [
            field
            for field in differing
            if not _ignored(field, ignored)
            and not _changes_nothing(field, configs[main], config, (reference, fields))
        ]
        if counting:
            names = dict.fromkeys(field.partition(".")[0] for field in counting)
            said = ", ".join(
                f"{field}={fields.get(field)!r}, not {reference.get(field)!r}" for field in counting
            )
            raise UpcyclingError(
                f"Model {name} differs from model {main} (config.json): {said}. Only models of "
                "one architecture and shape can be merged. If the difference is none, take the "
                f"value of {main}: {setting('ignore_config_fields', [*names])}."
            )
        for field in differing:
            values = found.setdefault(field, {main: reference.get(field)})
            values[name] = fields.get(field)
    return Agreement(main, dict(sorted(found.items())))


def _fields(config: "PreTrainedConfig") -> dict[str, Any]:
    """What a config says, under the names that all families share, rope field by field."""
    standard = {own: name for name, own in config.attribute_map.items()}
    fields = {standard.get(name, name): value for name, value in meaning(config).items()}
    rope = fields.pop("rope_parameters")
    for kind, value in rope.items():
        parts = value if isinstance(value, dict) else {"": value}
        for part, inner in parts.items():
            where = f"rope_parameters.{kind}" + (f".{part}" if part else "")
            if inner is not None:
                fields[where] = inner
    if fields.get("head_dim", 0) is None and fields.get("num_attention_heads"):
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if fields.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    return fields | {"model_type": config.model_type, "architectures": config.architectures}


def _ignored(field: str, ignored: Collection[str]) -> bool:
    """Whether the user has named a field, rope's by any of its spellings."""
    head, _, rest = field.partition(".")
    old = [old for old, parts in _ROPE_SPELLINGS.items() if rest.rpartition(".")[2] in parts]
    return bool({field, head, *(old if rest else ())} & {*ignored})


def _changes_nothing(
    field: str,
    config: "PreTrainedConfig",
    other: "PreTrainedConfig",
    said: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> bool:
    """Whether models that differ in this field compute the same, given the rest."""
    if field in ("model_type", "architectures") or field.startswith("rope_parameters."):
        return False
    if field == _VOCABULARY:
        return True
    if field == _POSITIONS:
        return not _reads_positions(config) and not _reads_positions(other)
    if field in TOKEN_IDS:
        return not _reads_ids(config)
    if field in _OF_USE or field in _of_generation() or _TRAINING.search(field):
        return True
    layers = [fields.get("layer_types") for fields in said]
    if layers[0] and layers[0] == layers[1]:
        windowed = any("sliding" in kind or "chunked" in kind for kind in layers[0])
        if field in _OF_LAYER_TYPES or (field == "sliding_window" and not windowed):
            return True
    return not _spoken_of(field, config)


def _of_generation() -> Collection[str]:
    """Fields of a `generation_config.json`, which older configs hold themselves."""
    from transformers import GenerationConfig

    # Which token a decoder begins with is what an encoder-decoder is.
    return GenerationConfig().to_dict().keys() - {"decoder_start_token_id"}


def _reads_positions(config: "PreTrainedConfig") -> bool:
    """Whether the number of positions changes what the model computes at each of them."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or not _spoken_of("rope_parameters", config):
        return True  # learned positions, or tables by their number
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if kind]
    return not all(
        kind.get("rope_type") in _ROPE_WITHOUT
        or (kind.get("rope_type") in _ROPE_BY_FACTOR and kind.get("factor") is not None)
        for kind in kinds
    )


def _reads_ids(config: "PreTrainedConfig") -> bool:
    """Whether a forward pass looks for special tokens in its input."""
    classifies = any(
        "Classification" in name or "Question" in name for name in config.architectures or ()
    )
    return classifies or "roberta" in config.model_type  # whose positions begin behind padding


def _spoken_of(field: str, config: "PreTrainedConfig") -> bool:
    """Whether transformers' code of this model knows the field."""
    kind = type(config)
    if field in {*kind().to_dict(), *kind.attribute_map}:
        return True
    code = inspect.getsource(kind)
    if config.architectures:
        module = sys.modules[model_class(config.architectures[0]).__module__]
        code += inspect.getsource(module)
    return re.search(rf"""(config\.|["']){re.escape(field)}\b""", code) is not None


def _refuse_strange(name: str, config: "PreTrainedConfig", ignored: Collection[str]) -> None:
    """Refuse what main alone is looked at for when the target's config is made.

    Raises:
        UpcyclingError: a quantised model, or one with code of its own.
    """
    if getattr(config, "quantization_config", None) and "quantization_config" not in ignored:
        raise UpcyclingError(
            f"Model {name} is quantised (quantization_config in its config.json). Merge the "
            "unquantised one, or dequantise it first (model.dequantize() and save_pretrained in "
            "transformers)."
        )
    if getattr(config, "auto_map", None) and not (
        config.model_type in WITH_CODE or "auto_map" in ignored
    ):
        raise UpcyclingError(
            f"Model {name} brings code of its own (auto_map in its config.json), which is never "
            "run here. Where transformers' own class computes the same, pass "
            f"{setting('ignore_config_fields', ['auto_map'])}."
        )
