"""What dense models and our own MoEs of them look like inside, read off the classes themselves.

Where the FFNs are is seen on the dense class, made on the meta device; what files call a tensor is
transformers' own answer for the very class.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusion_upcycle.architectures.base import LiveSlot, Splits
from fusion_upcycle.architectures.families import LEFT_OUT, NORMS
from fusion_upcycle.architectures.layout import built, class_name, empty_model
from fusion_upcycle.checkpoint.split import SplitSource
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.checkpoint.view import RenamedSource
from fusion_upcycle.errors import UpcyclingError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class DenseFFNs:
    """The FFNs of a dense model.

    Attributes:
        prefixes: what the live names of each one's layer start with.
        parts: part of `Expert` -> name relative to the layer, fused ones as if they were split.
        hidden_size: D.
        size: F, neurons.
        splits: fused tensors, by their endings.
        transposed: endings of the names of matrices that lie transposed.
        at: relative name of the module that the MoE takes the place of.
        norm: weight of the norm before it, relative; None without one.
    """

    prefixes: tuple[str, ...]
    parts: Mapping[str, str]
    hidden_size: int
    size: int
    splits: Splits
    transposed: tuple[str, ...]
    at: str
    norm: str | None


def dense_ffns(config: "PreTrainedConfig") -> DenseFFNs:
    """Where the FFNs of the dense model of this config are.

    Args:
        config: with `architectures` set.

    Raises:
        UpcyclingError: FFNs of a form that is not known, or of several sizes.
    """
    return _dense_ffns(_key(config), _Held(config))


class _Held:
    """A config as an argument of a cached function, told apart by the other argument."""

    def __init__(self, config: "PreTrainedConfig"):
        self.config = copy.deepcopy(config)

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)


def _key(config: "PreTrainedConfig") -> str:
    # `to_dict` leaves the class out where it says nothing of it.
    return json.dumps([config.architectures, config.to_dict()], default=str, sort_keys=True)


@lru_cache(maxsize=8)
def _dense_ffns(_: str, held: _Held) -> DenseFFNs:
    from fusion_upcycle.models.modeling_sparse import find_ffns

    config = held.config
    model = built(config)
    try:
        found = find_ffns(model, config.model_type)
    except ValueError as error:
        raise UpcyclingError(
            f"{class_name(config)} cannot become an MoE: {error}. Report it with the config.json."
        ) from error
    seen = {_parts(layer, form) for _, layer, form in found}
    if len(seen) > 1:
        raise UpcyclingError(
            f"The FFNs of this {config.model_type} model differ from layer to layer "
            f"({', '.join(sorted(map(str, seen)))}), which no config of ours can say."
        )
    parts, hidden, size, splits, transposed = next(iter(seen))
    name, _, form = found[0]
    tensors = model.state_dict()
    norms = [f"{norm}.weight" for norm in NORMS[config.model_type]]
    return DenseFFNs(
        tuple(f"{name}." for name, _, _ in found),
        dict(parts),
        hidden,
        size,
        dict(splits),
        transposed,
        form.at,
        next((norm for norm in norms if f"{name}.{norm}" in tensors), None),
    )


def _parts(layer: nn.Module, form: Any) -> tuple[Any, ...]:
    """Names, sizes, splits and transposed names of one FFN, hashable."""
    up, bias = layer.get_submodule(form.up), layer.get_submodule(form.up).bias is not None
    transposed = type(up).__name__ == "Conv1D"
    weight: Any = up.weight
    rows, hidden = weight.shape[::-1] if transposed else weight.shape
    names, splits = {}, []
    if form.fused:
        size, head = rows // 2, form.up.rpartition(".")[0]
        halves = [f"{head}.gate_half", f"{head}.up_half"]
        for kind in ("weight", "bias") if bias else ("weight",):
            cut = tuple((f"{half}.{kind}", size) for half in halves)
            splits.append((f"{form.up}.{kind}", cut))
        modules = {"gate": halves[0], "up": halves[1], "down": form.down}
    else:
        size = rows
        modules = {"gate": form.gate, "up": form.up, "down": form.down}
    for part, module in modules.items():
        if module is not None:
            names[f"{part}_proj_{'DF' if part == 'down' else 'FD'}"] = f"{module}.weight"
            if bias:
                names[f"{part}_bias_{'D' if part == 'down' else 'F'}"] = f"{module}.bias"
    turned = (f"{form.up}.weight", f"{form.down}.weight") if transposed else ()
    return tuple(names.items()), hidden, size, tuple(splits), turned


def file_slots(config: "PreTrainedConfig") -> dict[str, LiveSlot]:
    """What transformers calls each tensor in a file -> where it is in the live model.

    Args:
        config: of one of our models, with `architectures` set.
    """
    return _file_slots(_key(config), _Held(config))


@lru_cache(maxsize=8)
def _file_slots(_: str, held: _Held) -> dict[str, LiveSlot]:
    """Found by saving numbers in the tensors' place: each shows up under its file's name."""
    from transformers.core_model_loading import revert_weight_conversion

    from fusion_upcycle.models.modeling_sparse import SparseExperts

    model = empty_model(held.config)
    slots: list[LiveSlot] = []
    numbers: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        first = len(slots)
        if isinstance(module, SparseExperts):
            size, halves = module.intermediate_dim, 2 if ".gate_up" in name else 1
            for expert in range(module.num_experts):
                for half in range(halves):
                    rows = (slice(half * size, (half + 1) * size),) if halves == 2 else ()
                    slots.append((name, (expert, *rows)))
            shape = (module.num_experts, halves, 1)[: tensor.dim()]
        else:
            slots.append((name, ()))
            shape = (1,)
        numbers[name] = torch.arange(first, len(slots)).view(shape)
    saved = revert_weight_conversion(model, numbers)
    for name, number in saved.items():
        if number.numel() > 1:
            raise UpcyclingError(
                f"transformers saves several tensors of a {type(model).__name__} as one, {name}. "
                f"Choose {setting('moe_layers', 'all')}: experts have tensors of their own."
            )
    return {name: slots[int(number)] for name, number in saved.items()}


def as_renamed(source: TensorSource, config: "PreTrainedConfig") -> TensorSource:
    """A checkpoint whose names transformers changes as it loads them, by the names it gives them.

    Such as the text half of a Qwen3.5, which is saved under the names of the whole.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_checkpoint_conversion_mapping(config.model_type) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    patterns = [pattern for entry in renamings for pattern in entry.source_patterns]
    renamed = any(re.search(pattern, name) for name in source.specs for pattern in patterns)
    if not renamed or len(config.architectures or ()) != 1:
        return source
    model = built(config)
    state = model.state_dict()
    names = {name: name for name in source.specs}
    for name in source.specs.keys() - state.keys():
        live, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        if live in state and live not in names:
            names[live] = names.pop(name)
    return RenamedSource(source, names) if any(n != own for n, own in names.items()) else source


def dense_view(source: TensorSource, config: "PreTrainedConfig") -> TensorSource:
    """A dense checkpoint under the names that transformers gives its tensors in the live model.

    Old names, and a base model's without its prefix, are read as transformers reads them; what it
    cuts in parts is cut.

    Raises:
        UpcyclingError: two tensors for one place, or one that transformers makes in another way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Chunk,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    model = built(config)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    left_out = LEFT_OUT.get(config.model_type, ())
    names: dict[str, str] = {}
    splits: dict[str, list[tuple[str, int]]] = {}
    for name, spec in source.specs.items():
        live, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if live not in state and name in state:
            live, pattern = rename_source_key(name, [], [], prefix, state)
        if live not in state and any(re.search(left, name) for left in left_out):
            continue
        found = [live]
        if pattern is not None:
            made = next(entry for entry in converters if pattern in entry.source_patterns)
            if not all(isinstance(step, Chunk) and step.dim == 0 for step in made.operations):
                raise UpcyclingError(
                    f"Source tensor {name} is not what {class_name(config)} has in memory. Load "
                    "the model with transformers, and save it again (save_pretrained)."
                )
            first, *_ = made.target_patterns
            found = [live.replace(first, part) for part in made.target_patterns]
            splits[name] = [(part, spec.shape[0] // len(found)) for part in found]
        for part in found:
            if part in names:
                raise UpcyclingError(
                    f"Source tensors {names[part]} and {name} are both {part} of "
                    f"{class_name(config)}. Remove the one that is not used."
                )
            names[part] = part if pattern is not None else name
    return RenamedSource(SplitSource(source, splits), names)
