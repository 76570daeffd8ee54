"""Which parameter is what: freezing, learning rates and weight decay go by these groups."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from fusion_upcycle.live.experts import find_experts
from fusion_upcycle.live.routers import Routers
from fusion_upcycle.models.modeling_sparse import FAMILIES
from fusion_upcycle.training.options import TrainingOptions
from fusion_upcycle.training.router_rate import RouterRate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = ("attn", "attention")
_EMBEDDINGS = ("embed", "wte", "wpe")
_FFN = ("mlp", "shared_expert", "shared_experts")


def group_of_parameters(model: "PreTrainedModel", routers: Routers) -> dict[str, str]:
    """Name of each parameter of a model -> its group, one of `options.GROUPS`.

    `routers`: their weights; `experts`: routed experts; `ffn`: dense FFNs and shared experts;
    `attention`: projections, and linear attention; `embeddings`: of tokens, patches and positions,
    and what reads tokens out; `norms`: all norms, also inside attention; `others`: gates of shared
    experts, heads of classifiers and what else there is.
    """
    embeddings = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if isinstance(module, nn.Module)
        for parameter in module.parameters()
    }
    of_routers = {id(p) for module in routers.modules.values() for p in module.parameters()}
    packed = find_experts(model, routers).values()
    of_experts = {id(p) for module in packed for p in module.parameters()}
    of_ffns = {id(p) for p in _dense_ffns(model)}
    groups = {}
    for name, parameter in model.named_parameters():
        parts, words = name.split("."), name.lower().split(".")
        if id(parameter) in of_routers:
            group = "routers"
        elif id(parameter) in embeddings:
            group = "embeddings"
        elif any("norm" in word or word.startswith("ln_") for word in words):
            group = "norms"
        elif id(parameter) in of_experts:
            group = "experts"
        elif id(parameter) in of_ffns:
            group = "ffn"
        elif any(kind in word for kind in _ATTENTION for word in words):
            group = "attention"
        elif any(part in _FFN for part in parts) and "shared_expert_gate" not in parts:
            group = "ffn"
        elif any(kind in word for kind in _EMBEDDINGS for word in words):
            group = "embeddings"
        else:
            group = "others"
        groups[name] = group
    return groups


def _dense_ffns(model: "PreTrainedModel") -> Iterator[nn.Parameter]:
    """Of families whose FFNs go by other names than most, also where some layers have experts."""
    config = model.config
    forms = FAMILIES.get(getattr(config, "dense_model_type", config.model_type), ())
    for layer in model.modules():
        for form in forms:
            if type(layer).__name__ != form.layer:
                continue
            for path in filter(None, (form.gate, form.up, form.down)):
                try:
                    yield from layer.get_submodule(path).parameters()
                except AttributeError:
                    continue  # another form, or a layer with experts


def freeze(model: "PreTrainedModel", groups: dict[str, str], options: TrainingOptions) -> None:
    """Set `requires_grad` of every parameter; selection biases are never trained by gradient."""
    for name, parameter in model.named_parameters():
        trained = groups[name] not in options.freeze and not name.endswith(
            "e_score_correction_bias"
        )
        parameter.requires_grad_(trained)


def optimizer_groups(
    model: "PreTrainedModel",
    groups: dict[str, str],
    options: TrainingOptions,
    router_rate: RouterRate | None,
) -> list[dict[str, Any]]:
    """Parameter groups of AdamW, with their `names` and largest `learning_rate`.

    Weight decay is for matrices only: norms, biases and other vectors have none, also where those
    of all experts are packed, [E, F]. What is sharded
    among other processes (experts, in expert parallelism) has groups of its own, as torch asks.
    """
    rates = {False: options.learning_rate}
    if router_rate is not None:
        rates[True] = router_rate.value
    found: dict[tuple[bool, bool, Any], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_router, packed = groups[name] == "routers", groups[name] == "experts"
        decayed = parameter.ndim - packed >= 2
        group = found.setdefault(
            (is_router, decayed, getattr(parameter, "device_mesh", None)),
            {
                "params": [],
                "names": [],
                "learning_rate": rates[is_router],
                "weight_decay": options.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(found.values())


def count_parameters(model: "PreTrainedModel", routers: Routers) -> dict[str, int]:
    """Parameters of a model, in total and active per token."""
    total, idle = model.num_parameters(), 0
    for layer, module in find_experts(model, routers).items():
        unused = 1 - routers.experts_on_average[layer] / routers.num_experts
        idle += round(unused * sum(parameter.numel() for parameter in module.parameters()))
    return {"total": total, "active": total - idle}
