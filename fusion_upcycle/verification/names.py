"""Do names and config mean to transformers what they mean to us? Its own code is the oracle."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.config import NO_EFFECT
from fusion_upcycle.architectures.layout import class_name, file_layout, model_class
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.errors import ProofError
from fusion_upcycle.live.tensors import LiveTensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Shape of a model small enough to be made for every proof.
_MICRO = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "layer_types": ["full_attention"],
    "mlp_layer_types": ["sparse"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 1, 1],
    },
}


def check_names(config: "PreTrainedConfig", architecture: Architecture) -> None:
    """Our file names against transformers' own, bit by bit, on a micro model of the family.

    The rest of the proof reads and writes through our name table, so that two experts' matrices
    swapped in it would look right everywhere.

    Raises:
        ProofError: names the first tensor that transformers keeps elsewhere.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if architecture.asks_transformers:
        return
    config = copy.deepcopy(config)
    for name, value in _MICRO.items():
        if getattr(config, name, None):  # absent, or 0 for a shared expert that is not there
            setattr(config, name, value)
    setattr(config, architecture.experts_field, 3)
    config.num_experts_per_tok = 1
    if architecture.moe_layer_fields is not None:
        for name, value in (architecture.moe_layer_fields([0], 1) or {}).items():
            setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(class_name(config))._from_config(config)
    ours = LiveTensors(model, architecture, file_layout(config).specs)
    theirs = revert_weight_conversion(model, model.state_dict())
    for name in ours.specs:
        if not torch.equal(ours.tensor(name), theirs[name]):
            raise ProofError(f"transformers keeps another tensor under the name {name}.")


def check_written_config(folder: Path, config: "PreTrainedConfig") -> None:
    """What transformers reads from the folder's `config.json` against the config that was planned.

    Raises:
        ProofError: names the fields that differ.
    """
    written, planned = meaning(read_config(folder)), meaning(config)
    if written != planned:
        raise ProofError(f"{folder / 'config.json'} differs: {differences(written, planned)}.")


def check_shared_fields(
    source: "PreTrainedConfig", result: "PreTrainedConfig", changed: Collection[str] = ()
) -> None:
    """Fields that the configs of source and result share must have the same value.

    The tokens of a proof may not reach what a field does: a sliding window of 4096, a rope scaling
    beyond the first positions.

    Args:
        changed: fields that the conversion is there to change.

    Raises:
        ProofError: names the fields that differ.
    """
    before, after = meaning(source), meaning(result)
    shared = before.keys() & after.keys() - {*changed}
    before, after = ({name: c[name] for name in shared} for c in (before, after))
    if before != after:
        raise ProofError(f"Config fields changed by the conversion: {differences(after, before)}.")


def meaning(config: "PreTrainedConfig") -> dict[str, Any]:
    """The fields that decide the forward pass."""
    # A few classes have the old spellings of `rope_parameters` as fields, and do not read them.
    unread = NO_EFFECT | {"rope_theta", "rope_scaling"}
    fields = {name: v for name, v in config.to_dict().items() if name not in unread}
    rope = fields.get("rope_parameters") or {}
    # "type" is the old spelling; to rotate all of a head is what every class does if not told else
    silent = {"type": rope.get("type"), "partial_rotary_factor": 1.0}
    meant = {k: v for k, v in rope.items() if k not in silent or silent[k] != v}
    return fields | {"rope_parameters": meant}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The fields that differ, in words."""
    names = sorted(found.keys() | expected.keys())
    return ", ".join(
        f"{name}={found.get(name)!r}, not {expected.get(name)!r}"
        for name in names
        if found.get(name) != expected.get(name)
    )
