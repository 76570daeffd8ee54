"""The routers of a live model: found by the family's `Architecture`, heard by forward hooks.

`Routers.listening` hears what they say, `hearing_inputs` what they, or other modules, are given.

Works for every family in `fusion_upcycle.architectures`, also where transformers' own class has no
balance loss. Shapes: L MoE layers, E experts, N tokens, K experts per token, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_upcycle.architectures import MOE_FAMILIES, known_family
from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Routed:
    """What the routers of one forward pass said, layer by layer.

    Attributes:
        logits: of each MoE layer, [N, E], with gradient.
        chosen: experts of each token, [N, K]; in expert choice, tokens of each expert, [E, C].
    """

    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)


@dataclass
class Routers:
    """All routers of a model, by layer.

    The hooks stay until `close`, as adding and removing them would compile the model anew for each
    pass.

    Attributes:
        modules: layer index -> router; empty where routing is by hash, too.
        num_experts: E, the same for all layers; 0 for a dense model.
        experts_per_token: K.
        architecture: the family; None for a dense model.
        bias_owners: for each router, the module that holds its selection bias; none without one.
        stacks: name of a stack of layers -> places of its routers among `modules`; the only one
            has no name.
    """

    modules: dict[int, nn.Module]
    num_experts: int = 0
    experts_per_token: int = 0
    architecture: Architecture | None = None
    bias_owners: Sequence[nn.Module] = ()
    stacks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    _heard: Routed | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        hooked = self.modules.values()
        self._handles = [module.register_forward_hook(self._hear) for module in hooked]

    def close(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()

    def __bool__(self) -> bool:
        return bool(self.modules)

    @contextmanager
    def listening(self) -> Iterator[Routed]:
        """Record one forward pass.

        Nothing is heard after the block, where activation checkpointing runs the layers again.
        """
        self._heard = routed = Routed()
        try:
            yield routed
        finally:
            self._heard = None

    def _hear(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._heard is not None:
            logits, _, chosen = output
            self._heard.logits.append(logits.flatten(0, -2))
            self._heard.chosen.append(chosen.flatten(0, -2))

    @property
    def expert_choice(self) -> list[bool]:
        """Of each router, whether experts choose tokens."""
        routings = [getattr(module, "routing", None) for module in self.modules.values()]
        return [routing == "expert_choice" for routing in routings]

    def used_experts(self, layer: int) -> float:
        """Experts that a token of an MoE layer is sent to, on average."""
        router: Any = self.modules.get(layer)
        if getattr(router, "routing", None) == "expert_choice":
            return float(min(router.capacity_factor, self.num_experts))
        return float(self.experts_per_token)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Router probabilities of the balance loss: softmax, or sigmoid scores over their sum."""
        assert self.architecture is not None
        if self.architecture.routing.scores == "softmax":
            return logits.float().softmax(-1)
        scores = logits.float().sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def weight(self, layer: int) -> nn.Parameter:
        """The router's weight [E, D] in an MoE layer."""
        assert self.architecture is not None
        name = self.architecture.live_router_name
        inside = name.removeprefix(self.architecture.live_router_module + ".")
        return self.modules[layer].get_parameter(inside)

    def selection_biases(self) -> list[Tensor]:
        """The biases of the choice of experts, as the model holds them; none if it has none."""
        if self.architecture is None or self.architecture.live_bias_name is None:
            return []
        _, _, name = self.architecture.live_bias_name.rpartition(".")
        return [getattr(owner, name) for owner in self.bias_owners]


def find_routers(model: "PreTrainedModel") -> Routers:
    """The routers of a model; none for a dense one.

    Raises:
        UpcyclingError: an MoE model of a family that is not in `fusion_upcycle.architectures`, or
            one that is not as known there.
    """
    config = model.config.get_text_config()
    architecture = known_family(config)
    if architecture is None:
        if any("router_logits" in (m._can_record_outputs or {}) for m in _submodels(model)):
            raise UpcyclingError(
                f"{config.model_type} is an MoE family whose routers are not known, so that "
                f"neither balance nor health could be watched. Known: {', '.join(MOE_FAMILIES)}. "
                "To add one: a file in fusion_upcycle/architectures."
            )
        return Routers({})
    architecture.check_known(config)
    path = architecture.live_router_module
    modules = architecture.layer_modules(model, path)
    if getattr(config, "moe_routing", None) == "hash":
        return Routers({}, config.num_experts, config.num_experts_per_tok, architecture)
    if not modules:
        raise UpcyclingError(f"This {config.model_type} model has no MoE layer in {path}.")
    first: Any = next(iter(modules.values()))
    owner, _, _ = (architecture.live_bias_name or "").rpartition(".")
    owners = architecture.layer_modules(model, owner) if owner else {}
    return Routers(
        modules,
        num_experts=first.num_experts,
        experts_per_token=first.top_k,
        architecture=architecture,
        bias_owners=[owners[layer] for layer in modules] if owners else (),
        stacks={
            name: [place for place, layer in enumerate(modules) if layer in layers]
            for name, layers in architecture.stacks(config).items()
        },
    )


@contextmanager
def hearing_inputs(
    modules: Mapping[int, nn.Module], hear: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within the block, `hear` is told what each module is about to be run on.

    Args:
        modules: layer -> module.
        hear: called with the layer and its hidden states [N, D], where the module's weights are.
    """
    with ExitStack() as hooks:
        for layer, module in modules.items():

            def told(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
                hear(layer, args[0].flatten(0, -2))

            hooks.callback(module.register_forward_pre_hook(told).remove)
        yield


def _submodels(model: nn.Module) -> Iterator["PreTrainedModel"]:
    from transformers import PreTrainedModel

    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def expert_counts(chosen_NK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, [E], float32 (exact up to 16.7 million per expert)."""
    chosen = chosen_NK.flatten()
    ones = torch.ones(len(chosen), device=chosen.device)
    return ones.new_zeros(num_experts).scatter_add_(0, chosen, ones)
