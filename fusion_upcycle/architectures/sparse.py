"""`Sparse<Dense>` as a target: our own class for any dense family of `fusion_upcycle.models`.

Nothing here is written down a second time: where the FFNs are is read off the dense class, made on
the meta device, and what files call a tensor is transformers' own answer for the very class.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusion_upcycle.architectures.base import (
    Architecture,
    DenseLayout,
    LiveSlot,
    Routing,
    SharedExpert,
)
from fusion_upcycle.architectures.config import REQUIRED, WITH_CODE
from fusion_upcycle.architectures.families import NORMS, ZERO_CENTRED
from fusion_upcycle.architectures.introspection import (
    DenseFFNs,
    dense_ffns,
    dense_view,
    file_slots,
)
from fusion_upcycle.architectures.known_fields import READ_FROM, knows, unknown_fields
from fusion_upcycle.architectures.layout import (
    class_name,
    model_class,
    one_class,
    takes_images,
)
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.checkpoint.view import TURNED
from fusion_upcycle.errors import UpcyclingError, setting, with_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.architectures.shape import MoEShape

#: What the config of ours says, by the field of `MoEShape`.
_FIELDS = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "shared_size": "shared_expert_intermediate_size",
    "normalize_topk_prob": "norm_topk_prob",
    "routing": "moe_routing",
    "router_scores": "scoring_func",
    "capacity_factor": "capacity_factor",
    "routing_group": "routing_group",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseArchitecture(Architecture):
    """Our own class for one dense model.

    Attributes:
        config: of the MoE.
        ffns: of the dense model.
    """

    config: "PreTrainedConfig"
    ffns: DenseFFNs

    @cached_property
    def slots(self) -> dict[str, LiveSlot]:
        """Name in the files -> where that is in the live model."""
        return file_slots(self.config)

    @cached_property
    def _files(self) -> dict[str, str]:
        return {live: name for name, (live, index) in self.slots.items() if not index}

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        """What the files' names of each layer start with, for MoE layers and others alike."""
        every = copy.deepcopy(self.config)
        every.moe_layers = None
        down = self.expert_names["down_proj_DF"].format(expert=0)
        live = f"{self.experts_module}.down_proj"
        found = {
            slot[0].removesuffix(live): name.removesuffix(down)
            for name, slot in file_slots(every).items()
            if name.endswith(down)
        }
        assert found.keys() == {*self.ffns.prefixes}, found
        return tuple(found[prefix] for prefix in self.ffns.prefixes)

    def num_layers(self, config: "PreTrainedConfig") -> int:
        return len(self.ffns.prefixes)

    def stacks(self, config: "PreTrainedConfig") -> dict[str, Sequence[int]]:
        kinds: dict[str, list[int]] = {}
        for layer, prefix in enumerate(self.ffns.prefixes):
            side = next((s for s in ("encoder", "decoder") if f"{s}." in prefix), "")
            kinds.setdefault(side if config.is_encoder_decoder else "", []).append(layer)
        return dict(kinds)

    def ffn_size(self, config: "PreTrainedConfig") -> int:
        return self.ffns.size

    def hidden_size(self, source: "PreTrainedConfig") -> int:
        return self.ffns.hidden_size

    def target_class(self, source: "PreTrainedConfig", config: "PreTrainedConfig") -> str:
        return f"Sparse{class_name(source)}"

    def for_config(self, config: "PreTrainedConfig") -> "SparseArchitecture":
        return _ours(self.ffns, self.config.dense_model_type, config)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse float16 where transformers keeps an FFN's matrices in float32 then.

        Raises:
            UpcyclingError: it does, as of a T5.
        """
        dense = model_class(class_name(dense_config(self.config)))
        kept = {*(getattr(dense, "_keep_in_fp32_modules", None) or ())}
        inside = {word for name in self.ffns.parts.values() for word in name.split(".")}
        if dtype == torch.float16 and kept & inside:
            raise UpcyclingError(
                f"dtype=float16: transformers keeps {', '.join(sorted(kept & inside))} of "
                f"{dense.__name__} in float32 there, whose values are beyond float16, and experts "
                f"have one dtype. Choose {setting('dtype', 'bfloat16')} or float32."
            )

    def view(self, source: TensorSource, config: "PreTrainedConfig") -> TensorSource:
        return dense_view(source, config)

    def layer_prefix(self, config: "PreTrainedConfig", layer: int) -> str:
        return self._prefixes[layer]

    def live_prefix(self, config: "PreTrainedConfig", layer: int) -> str:
        return self.ffns.prefixes[layer]

    def live_slot(self, file_name: str, intermediate_size: int) -> LiveSlot:
        return self.slots.get(file_name, (file_name, ()))

    def file_name(self, live_name: str) -> str:
        return self._files.get(live_name, live_name)

    def pieces(self, live_name: str) -> Sequence[LiveSlot]:
        return [
            (name, index)
            for name, (live, index) in self.slots.items()
            if live == live_name and index
        ]

    def file_prefix(self, live_prefix: str) -> str:
        return self._prefixes[self.ffns.prefixes.index(live_prefix)]

    def ffn_layers(self, model: nn.Module) -> list[nn.Module]:
        from fusion_upcycle.models.modeling_sparse import FAMILIES

        kind = FAMILIES[self.config.dense_model_type][0].layer
        # FSDP2 gives a module a class of its own, derived from the model's.
        return [m for m in model.modules() if kind in (c.__name__ for c in type(m).__mro__)]

    def ffn_entry(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.ffns.at)

    def dense_ffn(self, layer: nn.Module) -> nn.Module:
        from fusion_upcycle.models.modeling_sparse import FAMILIES

        # Where it is spread over the layer, one module after the other.
        rest = FAMILIES[self.config.dense_model_type][0].cleared
        return nn.Sequential(self.ffn_entry(layer), *map(layer.get_submodule, rest))

    def layer_modules(self, model: nn.Module, path: str) -> dict[int, nn.Module]:
        found: dict[int, nn.Module] = {}
        for index, layer in enumerate(self.ffn_layers(model)):
            try:
                found[index] = layer.get_submodule(path)
            except AttributeError:
                continue  # it is dense
        return found


def _ours(ffns: DenseFFNs, dense_type: str, config: "PreTrainedConfig") -> SparseArchitecture:
    """The architecture of a config of ours."""
    from fusion_upcycle.models import modeling_sparse

    at, gated = ffns.at, "gate_proj_FD" in ffns.parts
    up = modeling_sparse.up_name(dense_type, gated)
    files = {"gate": "gate_proj", "up": up, "down": "down_proj"}

    def names(experts: str) -> dict[str, str]:
        found = {}
        for part in ffns.parts:
            kind = "bias" if "bias" in part else "weight"
            found[part] = f"{at}.{experts}.{files[part.partition('_')[0]]}.{kind}"
        return found

    packed = "gate_up_proj" if gated else "up_proj"
    layout = DenseLayout(
        ffn=_source_parts(ffns),
        splits=(lambda _: ffns.splits) if ffns.splits else None,
        turned=ffns.transposed,
        router_norm=ffns.norm,
        zero_centred_norms=dense_type in ZERO_CENTRED,
        kept_whole=True,
    )
    return SparseArchitecture(
        name=f"sparse_{dense_type}",
        dense={dense_type: layout},
        convert_config=convert_config,
        expert_names=names("experts.{expert}"),
        router_name=f"{at}.gate.weight",
        hash_name=f"{at}.hash_table",
        experts_module=f"{at}.experts",
        packed=(packed, "down_proj"),
        routing=Routing(config.scoring_func, "optional"),
        shared=SharedExpert(names("shared_expert.0"), default="none", optional=True),
        moe_layer_fields=moe_layers_field,
        asks_transformers=True,
        may_untie=dense_type == "t5",  # its config cannot say that the head is another tensor
        ships=Path(modeling_sparse.__file__),
        config=config,
        ffns=ffns,
    )


def _source_parts(ffns: DenseFFNs) -> dict[str, str]:
    return {p: n + TURNED if n.endswith(ffns.transposed) else n for p, n in ffns.parts.items()}


def moe_layers_field(moe_layers: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Any layers, by index."""
    return {"moe_layers": None if len(moe_layers) == num_layers else list(moe_layers)}


def for_source(source: "PreTrainedConfig") -> SparseArchitecture:
    """The architecture for a dense model of this config, whose MoE is not decided yet.

    Raises:
        UpcyclingError: FFNs of a form that is not known, or no class.
    """
    if one_class(source).endswith("ForMultipleChoice"):
        raise UpcyclingError(
            f"A {class_name(source)} is run on several texts at once, which no proof here can do. "
            "Upcycle its base model: set architectures in config.json to that class."
        )
    config = _as_sparse(source, {})
    return _ours(dense_ffns(source), source.model_type, config)


def for_config(config: "PreTrainedConfig") -> SparseArchitecture:
    """The architecture of a model of ours.

    Raises:
        UpcyclingError: a config that names no class of ours for this family.
    """
    names = config.architectures
    if not isinstance(names, list) or len(names) != 1 or not _is_ours(names[0], config):
        raise UpcyclingError(
            f"config.json of the {config.model_type} model: architectures={names!r} is no class of "
            "such a model. Set it to the class that the model is of, Sparse and the name of the "
            "dense one."
        )
    return _ours(dense_ffns(dense_config(config)), config.dense_model_type, config)


def _is_ours(name: str, config: "PreTrainedConfig") -> bool:
    if not str(name).startswith("Sparse"):
        return False
    config_class: Any = model_class(name).config_class
    return bool(config_class.model_type == config.model_type)


def dense_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The dense model's config that a sparse one was made of."""
    from transformers import CONFIG_MAPPING

    from fusion_upcycle.models.modeling_sparse import SPARSE_FIELDS

    dropped = {*SPARSE_FIELDS, *_NOT_TAKEN}
    fields = {name: value for name, value in config.to_dict().items() if name not in dropped}
    made = CONFIG_MAPPING[config.dense_model_type](**fields)
    if config.architectures:
        made.architectures = [name.removeprefix("Sparse") for name in config.architectures]
    return made


_NOT_TAKEN = (
    "architectures",
    "auto_map",
    "dense_model_type",
    "model_type",
    "transformers_version",
    READ_FROM,
)


def _as_sparse(source: "PreTrainedConfig", fields: Mapping[str, Any]) -> "PreTrainedConfig":
    from fusion_upcycle.models.modeling_sparse import config_class

    kept = {name: value for name, value in source.to_dict().items() if name not in _NOT_TAKEN}
    made = config_class(type(source))(**kept, **fields)
    if source.architectures:
        made.architectures = [f"Sparse{name}" for name in source.architectures]
    return made


def convert_config(source: "PreTrainedConfig", shape: "MoEShape") -> "PreTrainedConfig":
    """The dense config as it stands, and what its experts are.

    Raises:
        UpcyclingError: a quantised model, one with code of its own, or a feed-forward in chunks.
    """
    from fusion_upcycle.models.modeling_sparse import BIDIRECTIONAL

    fields = source.to_dict()
    for name in (field for field in REQUIRED if field != "is_encoder_decoder"):
        only, remedy = REQUIRED[name]
        if (value := fields.get(name, only)) != only:
            raise UpcyclingError(
                f"config.json of the {source.model_type} source: {name}={value!r} cannot be "
                f"upcycled. {with_settings(remedy)}"
            )
    brings_code = "auto_map" in fields and source.model_type not in WITH_CODE
    if brings_code and "auto_map" not in shape.ignored:
        raise UpcyclingError(
            f"config.json of the {source.model_type} source: the model brings code of its own "
            "(auto_map), which is never run here. Where transformers' own class computes the same, "
            f"pass {setting('ignore_config_fields', [*shape.ignored, 'auto_map'])}."
        )
    _check_unknown(source, fields, shape.ignored)
    if shape.routing == "hash" and takes_images(source):
        raise UpcyclingError(
            f"routing=hash goes by token ids, and a {source.model_type} model is given images. "
            f"Choose {setting('routing', 'expert_choice')} or {setting('routing', 'token_choice')}."
        )
    if shape.routing == "expert_choice" and source.model_type not in BIDIRECTIONAL:
        raise UpcyclingError(
            f"routing=expert_choice: experts would choose among tokens to come, which a "
            f"{source.model_type} must not see. Choose "
            f"{setting('routing', 'token_choice')}."
        )
    own = {field: getattr(shape, name) for name, field in _FIELDS.items()}
    return _as_sparse(source, own | moe_layers_field(shape.moe_layers, shape.num_layers))


def _check_unknown(
    source: "PreTrainedConfig", fields: Mapping[str, Any], ignored: Collection[str]
) -> None:
    """Refuse fields that mean nothing to the source's class, and something to ours.

    Raises:
        UpcyclingError: names them, and those that are nearly the name of a known field.
    """
    from fusion_upcycle.models.modeling_sparse import SPARSE_FIELDS, config_class

    unknown_fields(source, config_class(type(source)), fields, ignored)
    ours = [name for name in SPARSE_FIELDS if not knows(type(source), name)]
    if named := [name for name in ours if fields.get(name) is not None]:
        said = ", ".join(f"{name}={fields[name]!r}" for name in named)
        raise UpcyclingError(
            f"config.json of the {source.model_type} source: field {said}, which "
            f"{type(source).__name__} does not know and an MoE of ours does. Remove it."
        )


@dataclass(frozen=True)
class SparseFamily(Architecture):
    """Our own class, before it is known of which dense model."""

    def for_source(self, source: "PreTrainedConfig") -> Architecture:
        return for_source(source)

    def for_config(self, config: "PreTrainedConfig") -> Architecture:
        return for_config(config)


SPARSE = SparseFamily(
    name="sparse",
    dense=dict.fromkeys(NORMS, DenseLayout()),
    convert_config=convert_config,
    moe_layer_fields=moe_layers_field,
)
