"""What transformers itself expects of a model: the oracle for completeness, on the meta device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_upcycle.checkpoint.tensors import TensorSpec
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The class that `config.architectures[0]` names, parameters on the meta device.

    Buffers (rotary frequencies) are real, so that the model can run once it is given weights.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False):
        with no_init_weights():  # values of tensors without data: three quarters of the time
            model = model_class(class_name(config))._from_config(config)
        model.tie_weights(recompute_mapping=False)  # as the initialisation would have done
    return model


def built(config: "PreTrainedConfig") -> "PreTrainedModel":
    """`empty_model` of a config that may be anything.

    Raises:
        UpcyclingError: a config from which transformers cannot build the class.
    """
    try:
        return empty_model(config)
    except UpcyclingError:
        raise
    except Exception as error:  # a size, an activation, ...: whatever the class makes of it
        raise UpcyclingError(
            f"transformers cannot build {class_name(config)} from what config.json says: "
            f"{error!r}. Repair the field that it names."
        ) from error


def one_class(config: "PreTrainedConfig") -> str:
    """The model class that a config names.

    Raises:
        UpcyclingError: it names none, or several.
    """
    from transformers.models.auto import modeling_auto

    if isinstance(config.architectures, list) and len(config.architectures) == 1:
        return class_name(config)
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    usual = causal.get(config.model_type) or modeling_auto.MODEL_MAPPING_NAMES[config.model_type]
    raise UpcyclingError(
        f"The source's config.json says architectures={config.architectures!r}, not what class "
        f'the model is. Set it to ["{usual}"].'
    )


def model_class(name: str) -> "type[PreTrainedModel]":
    """The class of this name: transformers', or ours, `Sparse` and the name of a dense one.

    Raises:
        UpcyclingError: neither has it.
    """
    import transformers

    from fusion_upcycle.models import modeling_sparse

    found = getattr(transformers, name, None) or getattr(modeling_sparse, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UpcyclingError(
            f"transformers has no model class {name}, which config.json names (architectures). "
            "Set it to the class that the model is of."
        )
    return found


def takes_images(config: "PreTrainedConfig") -> bool:
    """Whether the model of this config is given images, not token ids."""
    return model_class(class_name(config)).main_input_name == "pixel_values"


def class_name(config: "PreTrainedConfig") -> str:
    """The model class that a config is of."""
    assert config.architectures and len(config.architectures) == 1, config.architectures
    return config.architectures[0]


def own_class_name(model: "PreTrainedModel") -> str:
    """The class that a live model is of: transformers' or ours, whatever FSDP2 made of it."""
    import transformers

    from fusion_upcycle.models import modeling_sparse

    # FSDP2 gives a model a class of its own, derived from the model's.
    names = (cls.__name__ for cls in type(model).__mro__)
    known = (transformers, modeling_sparse)
    return next(name for name in names if any(hasattr(module, name) for module in known))


@dataclass(frozen=True)
class FileLayout:
    """What a checkpoint folder of a model holds, in transformers' classic per-expert names.

    Attributes:
        specs: tensor name -> dtype and shape, tied tensors once. A few tensors are float32 in a
            model of half precision (selection biases, some routers).
        tied: second names of tied tensors -> first name (`lm_head.weight` -> the embeddings).
    """

    specs: dict[str, TensorSpec]
    tied: dict[str, str]


def file_layout(config: "PreTrainedConfig") -> FileLayout:
    """The files' layout by transformers' own class and its own way of saving.

    Raises:
        UpcyclingError: a config from which transformers cannot build the class.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = built(config)
    state = with_kept_dtypes(model)
    tensors = revert_weight_conversion(model, state)
    # Saving renames, and does not touch, what is tied.
    files = {id(tensor): name for name, tensor in tensors.items()}
    tied = {files[id(state[a])]: files[id(state[b])] for a, b in tied_names(model).items()}
    specs = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items() if n not in tied}
    return FileLayout(specs, tied)


def tied_names(model: "PreTrainedModel") -> dict[str, str]:
    """Second names of tied tensors -> first name, in the live model."""
    return dict(model.all_tied_weights_keys) if _ties(model.config) else {}


def _ties(config: "PreTrainedConfig") -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def with_kept_dtypes(model: "PreTrainedModel") -> dict[str, "Tensor"]:
    """The model's state dict, cast where transformers keeps float32 when it loads a file."""
    from transformers.core_model_loading import build_glob_alternation

    state = model.state_dict()
    if plan := model._get_dtype_plan(model.dtype):
        alternation, groups, _ = build_glob_alternation(list(plan))
        for name in state:
            if match := alternation.search(name):
                state[name] = state[name].to(plan[groups[match.lastgroup or ""]])
    return state


def target_class(source: "PreTrainedConfig", target: "PreTrainedConfig") -> str:
    """The target's class for the source's: causal LM to causal LM, backbone to backbone.

    Raises:
        UpcyclingError: the source is neither (a classifier, say).
    """
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    source_class = one_class(source)
    for names in (causal, modeling_auto.MODEL_MAPPING_NAMES):
        if names.get(source.model_type) == source_class:
            return str(names[target.model_type])
    raise UpcyclingError(
        f"The source is a {source_class}, as its config.json says (architectures). Only causal "
        f"language models and backbones can be upcycled: {causal[source.model_type]}, "
        f"{modeling_auto.MODEL_MAPPING_NAMES[source.model_type]}."
    )


def layer_prefix(config: "PreTrainedConfig", layer: int) -> str:
    """What the names of a decoder layer's tensors start with."""
    return ("model." if class_name(config).endswith("ForCausalLM") else "") + f"layers.{layer}."
