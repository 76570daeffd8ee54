"""What one MoE family is: accepted dense models, config mapping, tensor names, routing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fusion_upcycle.experts import EXPERT_PARTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
        zeros: tensors of a layer that the MoE has and this family has not, where zero is the same.
        zeroed_padding: whether transformers zeroes the embedding of `pad_token_id` when it loads
            the dense model, whatever the file says.
        router_norm: weight of the RMS norm whose output the FFN is given, and so the router; None
            where no norm stands between, as in models with norms after attention and FFN.
        zero_centred_norms: whether norms multiply by 1 + weight.
    """

    ffn: Mapping[str, str] = field(default_factory=lambda: LLAMA_FFN)
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)
    splits: Callable[["PreTrainedConfig"], Splits] | None = None
    zeros: tuple[str, ...] = ()
    zeroed_padding: bool = False
    router_norm: str | None = "post_attention_layernorm.weight"
    zero_centred_norms: bool = False


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
    """

    names: Mapping[str, str]
    gate_name: str | None = None
    default: Literal["copy", "none"] = "copy"
    in_experts: bool = False
    optional: bool = False


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
        experts_field: the config's own name for the number of experts.
        experts_module: the live module that holds all experts packed.
        live_names: names that differ in the live model, beside the experts' -> live name.
        routing: how top-k weights are made.
        shared: the shared expert of families that have one.
        moe_layer_fields: (indices of the MoE layers, number of layers) -> config fields that say
            so, or None where the family cannot; None if every layer must be an MoE layer.
        remapped_fields: fields that dense and MoE config share by name but not by meaning, so that
            `convert_config` sets them on purpose.
    """

    name: str
    dense: Mapping[str, DenseLayout] = field(default_factory=dict)
    convert_config: Callable[["PreTrainedConfig", "MoEShape"], "PreTrainedConfig"] | None = None
    expert_names: Mapping[str, str] = field(default_factory=lambda: QWEN_EXPERT_NAMES)
    router_name: str = "mlp.gate.weight"
    experts_field: str = "num_experts"
    experts_module: str = "mlp.experts"
    live_names: Mapping[str, str] = field(default_factory=dict)
    routing: Routing = Routing()
    shared: SharedExpert | None = None
    moe_layer_fields: Callable[[Sequence[int], int], dict[str, Any] | None] | None = None
    remapped_fields: frozenset[str] = frozenset()

    @property
    def packed_names(self) -> tuple[str, str]:
        """Live names of a layer's experts: gate before up [E, 2F, D], and down [E, D, F]."""
        return f"{self.experts_module}.gate_up_proj", f"{self.experts_module}.down_proj"

    @property
    def live_router_name(self) -> str:
        """Live name of the router weight."""
        return self.live_names.get(self.router_name, self.router_name)

    def place(self, expert: int, part: str, elements: int) -> Place:
        """Where the files have one matrix of `elements` = F * D elements."""
        name = self.expert_names[part]
        if "{expert}" in name:
            return Place(name.format(expert=expert), 0, elements)
        together = [other for other in EXPERT_PARTS if self.expert_names[other] == name]
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
