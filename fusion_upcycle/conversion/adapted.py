"""The tensors of a folder, or of a folder with a LoRA adapter on top of it."""

from typing import TYPE_CHECKING

from fusion_upcycle.architectures import architecture_for
from fusion_upcycle.architectures.introspection import as_renamed, dense_view
from fusion_upcycle.architectures.layout import one_class
from fusion_upcycle.architectures.text_part import text_config, text_tensors, text_type
from fusion_upcycle.checkpoint.adapter import AdapterSource
from fusion_upcycle.checkpoint.adapter_config import read_adapter_config
from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.checks import AUTO
from fusion_upcycle.conversion.matching import Matching
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


#: Where a live model keeps what an adapter changed in it.
_ADAPTED = "adapted_by_fusion_upcycle"


def open_tensors(at: Located, config: "PreTrainedConfig") -> TensorSource:
    """The tensors of a model; of an adapter, those of its base with the adapter on top.

    Args:
        at: where the model is.
        config: of the model, or of the adapter's base.

    Raises:
        UpcyclingError: damaged files; a tensor of the adapter that has no place in the base.
    """
    reader = CheckpointReader(at.folder)
    if at.adapter is None:
        return as_renamed(reader, config)
    architecture_for(config.model_type, AUTO)  # an MoE's files are not what PEFT's names are of
    one_class(config)
    adapter = read_adapter_config(at.adapter, at.folder)
    return Matching(at, adapter, dense_view(reader, config), config).source()


def open_model(at: Located, part: str = "whole") -> "tuple[PreTrainedConfig, TensorSource]":
    """Config and tensors of a model: `read_config` and `open_tensors`.

    Args:
        part: `text` is the text model of a model of text and images; of others all.

    Raises:
        UpcyclingError: as these; an adapter for a text part.
    """
    config = read_config(at.folder)
    if part == "whole" or text_type(config) is None:
        return config, open_tensors(at, config)
    if at.adapter is not None:
        raise UpcyclingError(
            f"{at.adapter} is an adapter of a model of text and more. Merge it into the weights "
            "first (merge_and_unload), and give the merged folder."
        )
    text = text_config(config)
    return text, text_tensors(CheckpointReader(at.folder), text)


def put_on(model: "PreTrainedModel", source: TensorSource) -> None:
    """Give a live base model the tensors that an adapter changes, as its own dtype rounds them."""
    assert isinstance(source, AdapterSource)
    places = model.state_dict(keep_vars=True)
    for name in sorted(source.trained):
        places[name].data.copy_(source.tensor(name))
        source.release([name])
    vars(model)[_ADAPTED] = source.trained


def adapted_tensors(model: "PreTrainedModel") -> frozenset[str] | None:
    """Names of the tensors of a live model that `put_on` changed; None for others."""
    found: frozenset[str] | None = vars(model).get(_ADAPTED)
    return found
