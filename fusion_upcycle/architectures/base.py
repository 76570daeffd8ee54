"""What one MoE family is: accepted dense models, config mapping, tensor names, routing."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fusion_upcycle.architectures.layout import layer_prefix, target_class
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import ALL_PARTS

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from fusion_upcycle.architectures.shape import MoEShape

#: (parameter name in the live model, index into it; () is the whole parameter)
LiveSlot = tuple[str, tuple[Any, ...]]

#: Ending of a fused tensor's name -> (ending of a part's name, its rows), in order.
Splits = Mapping[str, Sequence[tuple[str, int]]]

#: A dense FFN in Llama's layout, which most decoder families share; relative to the layer.
LLAMA_FFN = {
    "gate_proj_FD": "mlp.gate_proj.weight",
    "up_proj_FD": "mlp.up_proj.weight",
    "down_proj_DF": "mlp.down_proj.weight",
}

#: One tensor per expert and matrix, as in Qwen's MoEs, OLMoE, DeepSeek and many others.
QWEN_EXPERT_NAMES = {
    "gate_proj_FD": "mlp.experts.{expert}.gate_proj.weight",
    "up_proj_FD": "mlp.experts.{expert}.up_proj.weight",
    "down_proj_DF": "mlp.experts.{expert}.down_proj.weight",
}


@dataclass(frozen=True)
class DenseLayout:
    """The files of a dense model.

    Attributes:
        ffn: part of `Expert` -> name of the tensor, relative to the decoder layer.
        derived: endings of buffers that old checkpoints carry and every model recomputes.
        splits: config -> fused tensors that are to be seen split, if the family has any.
        turned: endings of the names of matrices that lie transposed.
        zeros: tensors of a layer that the MoE has and this family has not, where zero is the same.
        zeroed_padding: whether transformers zeroes the embedding of `pad_token_id` when it loads
            the dense model, whatever the file says.
        router_norm: weight of the RMS norm whose output the FFN is given, and so the router; None
            where no norm stands between, as in models with norms after attention and FFN.
        zero_centred_norms: whether norms multiply by 1 + weight.
        kept_whole: whether layers that stay dense keep their tensors as the source has them.
        remapped_fields: as an `Architecture`'s, for this dense family alone.
        plain_config: config -> one of the same model whose `intermediate_size` is the FFN's width,
            where the family may say it in another way.
    """

    ffn: Mapping[str, str] = field(default_factory=lambda: LLAMA_FFN)
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)
    splits: Callable[["PreTrainedConfig"], Splits] | None = None
    turned: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    zeroed_padding: bool = False
    router_norm: str | None = "post_attention_layernorm.weight"
    zero_centred_norms: bool = False
    kept_whole: bool = False
    remapped_fields: frozenset[str] = frozenset()
    plain_config: Callable[["PreTrainedConfig"], "PreTrainedConfig"] | None = None


LLAMA_LAYOUT = DenseLayout()


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token uses: names relative to the layer.

    Attributes:
        names: part of `Expert` -> name.
        gate_name: of a sigmoid gate, which is 1/2 when its weight is zero; None adds the shared
            expert's output as it is.
        default: what `shared_expert=auto` is.
        in_experts: whether the config gives the width as a number of routed experts.
        optional: whether a model without one has no tensors of it; else they have width 0.
        as_routed: whether it is always there and as wide as a routed expert: `none` is then `zero`.
    """

    names: Mapping[str, str]
    gate_name: str | None = None
    default: Literal["copy", "none"] = "copy"
    in_experts: bool = False
    optional: bool = False
    as_routed: bool = False


@dataclass(frozen=True)
class Routing:
    """How a family turns router logits into the weights of the top-k experts.

    Attributes:
        scores: of an expert.
        normalised: whether top-k weights are divided by their sum: `always`, or as
            `normalize_topk_prob` says.
        selection_bias: file name, relative to the layer, of a bias [E] that is added for the choice
            of experts only; made zero, and kept in float32.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: Literal["always", "optional"] = "always"
    selection_bias: str | None = None


class Place(NamedTuple):
    """One matrix of one expert in the files: tensor name relative to the layer, and elements."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Architecture:
    """One MoE family. All names are those of the checkpoint *files*, relative to a decoder layer.

    Defaults are the layout that most families share.

    Attributes:
        name: the family's `model_type`.
        dense: accepted dense `model_type` -> layout of its files; none for a family that can only
            be expanded.
        convert_config: (dense config, `MoEShape`) -> config of the MoE; raises
            `UpcyclingError` naming what cannot be expressed. None where `dense` is empty.
        expert_names: part of `Expert` -> name with an `{expert}` placeholder: the classic names,
            one tensor per expert and matrix, which vLLM and llama.cpp read. Without the placeholder
            one tensor holds all experts, gate before up.
        router_name: name of the router weight [E, D].
        hash_name: name of the table [V, K] of hash routing, in families that have it.
        router_module: the live module that routes, where it is not the one that has the weight.
        experts_field: the config's own name for the number of experts.
        experts_module: the live module that holds all experts packed.
        packed: names in it: of the matrices on the inside, gate before up [E, 2F, D] or up alone
            [E, F, D], and of down [E, D, F].
        live_names: names that differ in the live model, beside the experts' -> live name.
        routing: how top-k weights are made.
        shared: the shared expert of families that have one.
        moe_layer_fields: (indices of the MoE layers, number of layers) -> config fields that say
            so, or None where the family cannot; None if every layer must be an MoE layer.
        remapped_fields: fields that dense and MoE config share by name but not by meaning, so that
            `convert_config` sets them on purpose.
        asks_transformers: whether every name in the files is transformers' own answer for the very
            model, so that there is nothing to compare it with.
        may_untie: whether the class keeps a second tensor that its config says is tied and that
            differs in the file, as transformers does for any.
        ships: modelling file of our own that goes into an output folder.
        known_fields: fields of the MoE's config -> the only value, or type of values, with which
            what is said here is true; another one is refused where an MoE is read.
    """

    name: str
    dense: Mapping[str, DenseLayout] = field(default_factory=dict)
    convert_config: Callable[["PreTrainedConfig", "MoEShape"], "PreTrainedConfig"] | None = None
    expert_names: Mapping[str, str] = field(default_factory=lambda: QWEN_EXPERT_NAMES)
    router_name: str = "mlp.gate.weight"
    hash_name: str | None = None
    router_module: str = ""
    experts_field: str = "num_experts"
    experts_module: str = "mlp.experts"
    packed: tuple[str, str] = ("gate_up_proj", "down_proj")
    live_names: Mapping[str, str] = field(default_factory=dict)
    routing: Routing = Routing()
    shared: SharedExpert | None = None
    moe_layer_fields: Callable[[Sequence[int], int], dict[str, Any] | None] | None = None
    remapped_fields: frozenset[str] = frozenset()
    asks_transformers: bool = False
    ships: Path | None = None
    may_untie: bool = False
    known_fields: Mapping[str, Any] = field(default_factory=dict)

    def check_known(self, config: "PreTrainedConfig") -> None:
        """Refuse an MoE of this family that is another than is known here.

        Raises:
            UpcyclingError: one of `known_fields` has another value.
        """
        for name, only in self.known_fields.items():
            value = getattr(config, name)
            if not (isinstance(value, only) if isinstance(only, type) else value == only):
                raise UpcyclingError(
                    f"config.json of the {self.name} model: {name}={value!r} is not known here, "
                    f"only {getattr(only, '__name__', repr(only))} is. No remedy is known."
                )

    @property
    def packed_names(self) -> tuple[str, str]:
        """Live names of the matrices of a layer's experts, as `packed` has them."""
        inside, down = self.packed
        return f"{self.experts_module}.{inside}", f"{self.experts_module}.{down}"

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of `Expert` that this family's experts have, in the order of `ALL_PARTS`."""
        return tuple(part for part in ALL_PARTS if part in self.expert_names)

    def for_source(self, source: "PreTrainedConfig") -> "Architecture":
        """The family as it is for this dense model; most are the same for all."""
        return self

    def for_config(self, config: "PreTrainedConfig") -> "Architecture":
        """The family as it is for an MoE of this config; most are the same for all."""
        return self

    def target_class(self, source: "PreTrainedConfig", config: "PreTrainedConfig") -> str:
        """The class of the result, for the source's.

        Raises:
            UpcyclingError: a class that has no counterpart.
        """
        return target_class(source, config)

    def num_layers(self, config: "PreTrainedConfig") -> int:
        """The number of FFNs, for source and result alike."""
        return int(config.num_hidden_layers)

    def stacks(self, config: "PreTrainedConfig") -> dict[str, Sequence[int]]:
        """Name of each stack of layers -> their indices; the only one has no name."""
        return {"": range(self.num_layers(config))}

    def ffn_size(self, source: "PreTrainedConfig") -> int:
        """F, the neurons of a dense model's FFN."""
        return int(source.intermediate_size)

    def hidden_size(self, source: "PreTrainedConfig") -> int:
        """D."""
        return int(source.hidden_size)

    def layer_prefix(self, config: "PreTrainedConfig", layer: int) -> str:
        """What the files' names of a layer's tensors start with."""
        return layer_prefix(config, layer)

    def live_prefix(self, config: "PreTrainedConfig", layer: int) -> str:
        """What live names of a layer's tensors start with, in the dense model and in the MoE."""
        return layer_prefix(config, layer)

    def check_dtype(self, dtype: "torch.dtype") -> None:
        """Refuse a dtype that the experts of this family cannot have.

        Raises:
            UpcyclingError: it is beyond what transformers lets the dense model have.
        """

    def view(self, source: TensorSource, config: "PreTrainedConfig") -> TensorSource:
        """A dense source under the names that `dense` goes by."""
        return source

    def pieces(self, live_name: str) -> Sequence[LiveSlot]:
        """Files' tensors that make up a live one, with their places; none where it is one."""
        return []

    def file_prefix(self, live_prefix: str) -> str:
        """What the files' names of a layer's tensors start with, for its live names' start."""
        return live_prefix

    def ffn_layers(self, model: "PreTrainedModel") -> list["nn.Module"]:
        """The layers of a live model that hold an FFN or an MoE, in order."""
        return list(model.base_model.get_submodule("layers").children())

    def ffn_entry(self, layer: "nn.Module") -> "nn.Module":
        """The module of a dense model's layer that is given what its FFN is given."""
        dense = next(iter(self.dense.values()))
        return layer.get_submodule(dense.ffn["gate_proj_FD"].split(".")[0])

    def dense_ffn(self, layer: "nn.Module") -> "nn.Module":
        """The FFN of a layer of the dense model."""
        return self.ffn_entry(layer)

    def live_half(self, part: str) -> tuple[str, int | None]:
        """Where the live module of experts has a part: name, and which half of its rows if two."""
        inside, down = self.packed
        kind = "_bias" if "bias" in part else ""
        if part.startswith("down"):
            return down + kind, None
        half = None if "gate_proj_FD" not in self.parts else int(part.startswith("up"))
        return inside + kind, half

    def layer_modules(self, model: "nn.Module", path: str) -> dict[int, "nn.Module"]:
        """Layer -> its live module at `path`, of the layers that have one, in order."""
        place = re.compile(rf"(?:^|\.)layers\.(\d+)\.{re.escape(path)}$")
        found = {
            int(match[1]): module
            for name, module in model.named_modules()
            if (match := place.search(name))
        }
        return dict(sorted(found.items()))

    @property
    def packed_parameters(self) -> tuple[str, ...]:
        """Live names of all tensors that hold the experts of a layer."""
        names = dict.fromkeys(self.live_half(part)[0] for part in self.parts)
        return tuple(f"{self.experts_module}.{name}" for name in names)

    @property
    def live_router_name(self) -> str:
        """Live name of the router weight."""
        return self.live_names.get(self.router_name, self.router_name)

    @property
    def live_router_module(self) -> str:
        """The live module that routes."""
        return self.router_module or self.live_router_name.removesuffix(".weight")

    @property
    def live_bias_name(self) -> str | None:
        """Live name of the selection bias; None without one."""
        bias = self.routing.selection_bias
        return None if bias is None else self.live_names.get(bias, bias)

    def place(self, expert: int, part: str, elements: int) -> Place:
        """Where the files have one matrix of `elements` = F * D elements."""
        name = self.expert_names[part]
        if "{expert}" in name:
            return Place(name.format(expert=expert), 0, elements)
        together = [other for other in self.parts if self.expert_names[other] == name]
        start = (expert * len(together) + together.index(part)) * elements
        return Place(name, start, start + elements)

    def live_slot(self, file_name: str, intermediate_size: int) -> LiveSlot:
        """Where a tensor of the file lives in transformers' in-memory layout.

        Experts are packed there, as `packed_names` has them. Every other tensor keeps its name, or
        is in `live_names`.
        """
        head, dot, tail = file_name.partition("layers.")
        layer, _, relative = tail.partition(".")
        if not dot or not layer.isdigit():
            return file_name, ()
        prefix = f"{head}layers.{layer}."
        if relative in self.live_names:
            return prefix + self.live_names[relative], ()
        for part, pattern in self.expert_names.items():
            before, placeholder, after = pattern.partition("{expert}")
            if placeholder and relative.startswith(before) and relative.endswith(after):
                expert = int(relative[len(before) : len(relative) - len(after)])
                gate_up, down = self.packed_names
                if part == "down_proj_DF":
                    return prefix + down, (expert,)
                start = 0 if part == "gate_proj_FD" else intermediate_size
                return prefix + gate_up, (expert, slice(start, start + intermediate_size))
        return file_name, ()

    def file_name(self, live_name: str) -> str:
        """The file's name of a tensor that is not an expert's."""
        for in_file, live in self.live_names.items():
            if live_name.endswith("." + live):
                return live_name.removesuffix(live) + in_file
        return live_name


def dense_layers_field(moe_layers: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Qwen's way to keep layers dense: any of them, by index."""
    return {"mlp_only_layers": sorted(set(range(num_layers)) - set(moe_layers))}


def first_dense_field(moe_layers: Sequence[int], num_layers: int) -> dict[str, Any] | None:
    """DeepSeek's way: the first layers are dense, all others MoE layers."""
    first = moe_layers[0]
    whole = list(moe_layers) == list(range(first, num_layers))
    return {"first_k_dense_replace": first} if whole else None


def ungated_shared_experts(*, optional: bool = False) -> SharedExpert:
    """DeepSeek's shared experts: one wide FFN whose output is added as it is."""
    names = {part: name.replace("mlp.", "mlp.shared_experts.") for part, name in LLAMA_FFN.items()}
    default: Literal["copy", "none"] = "none" if optional else "copy"
    return SharedExpert(names, default=default, in_experts=True, optional=optional)
