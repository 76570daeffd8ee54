"""A live model as a source, and transformers' own class filled with what was planned."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.initialization import no_init_weights

from fusion_upcycle.architectures.layout import class_name, model_class
from fusion_upcycle.architectures.text_part import text_type
from fusion_upcycle.checkpoint.tensors import aligned
from fusion_upcycle.conversion.conversion import Conversion
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.live.tensors import LiveTensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def live_config(model: "PreTrainedModel") -> "PreTrainedConfig":
    """The config of a live model as a source; its tensors' dtype counts, not that of its config."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = None
    return config


def require_folder_for_part(config: "PreTrainedConfig", part: str) -> None:
    """Refuse the text part of a model in memory, which is made from folder to folder.

    Raises:
        UpcyclingError: it is asked for.
    """
    if part == "text" and text_type(config) is not None:
        raise UpcyclingError(
            "part=text goes from folder to folder, without the rest in memory: pass "
            f"{setting('save_checkpoint', 'FOLDER')}, or use fusion_upcycle.upcycle."
        )


def fill_live(conversion: Conversion, source: "PreTrainedModel") -> "PreTrainedModel":
    """transformers' own class with the planned tensors; device, mode and the like from `source`."""
    kind = model_class(class_name(conversion.config))
    config = copy.deepcopy(conversion.config)
    with no_init_weights(), source.device:
        moe = kind._from_config(
            config, dtype=conversion.dtype, attn_implementation=source.config._attn_implementation
        )
    architecture, state = conversion.architecture, moe.state_dict()
    for name, spec in conversion.specs.items():  # some are kept in another dtype than the rest
        live_name, _ = architecture.live_slot(name, 1)
        module, _, attribute = live_name.rpartition(".")
        getattr(moe.get_submodule(module), attribute).data = state[live_name].to(spec.dtype)
    _tie(moe, {architecture.live_slot(name, 1)[0] for name in conversion.specs})
    live = LiveTensors(moe, architecture, conversion.specs)
    # Nothing is initialised: what is not filled below would be uninitialised memory.
    whole = {t.data_ptr(): t.numel() for t in moe.state_dict().values()}  # tied tensors once
    assert sum(s.numel for s in live.specs.values()) == sum(whole.values())
    with torch.no_grad():
        for name in conversion.specs:
            for made, place in aligned(conversion.chunks(name), live.chunks(name)):
                place.copy_(made)
    if source.can_generate():
        moe.generation_config = copy.deepcopy(source.generation_config)
    moe.train(source.training)
    return moe


def _tie(model: "PreTrainedModel", own: set[str]) -> None:
    """Tie what is tied, but for tensors with a value of their `own`: a T5 may have such a head."""
    for name in own & model.all_tied_weights_keys.keys():
        del model.all_tied_weights_keys[name]
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, attribute, nn.Parameter(getattr(owner, attribute).detach().clone()))
    model.tie_weights(recompute_mapping=False)  # skipped together with the initialisation
