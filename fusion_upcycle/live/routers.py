"""The routers of a live model: found by the family's `Architecture`, heard by forward hooks.

`Routers.listening` hears what they say, `hearing_inputs` what they, or other modules, are given.

Works for every family in `fusion_upcycle.architectures`, also where transformers' own class has no
balance loss, and for every routing of our own class. Shapes: L MoE layers, E experts, N tokens, K
experts per token, C tokens per expert, D hidden size.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_upcycle.architectures import MOE_FAMILIES, known_family
from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import own_class_name
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.models.modeling_sparse import given_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class Routed:
    """What the routers of one forward pass said, layer by layer.

    Attributes:
        logits: of each MoE layer, [N, E], with gradient; where a table of token ids says the
            experts, the logarithm of even shares of these.
        chosen: experts of each token, [N, K]; in expert choice, tokens of each expert, [E, C],
            padding among them where there are too few others. `Routers.sent` says the same for
            every routing.
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
        stacks: name of a stack of layers -> places of its routers among `layers`; the only one
            has no name.
        tables: layer index -> MoE whose experts a table of token ids says; empty for others.
    """

    modules: dict[int, nn.Module]
    num_experts: int = 0
    experts_per_token: int = 0
    architecture: Architecture | None = None
    bias_owners: Sequence[nn.Module] = ()
    stacks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tables: dict[int, nn.Module] = field(default_factory=dict)
    _heard: Routed | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        hooked = self.modules.values()
        self._handles = [module.register_forward_hook(self._hear) for module in hooked]
        hashed = self.tables.values()
        self._handles += [module.register_forward_hook(self._look_up) for module in hashed]

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

    def _look_up(self, module: Any, args: Any, output: Tensor) -> None:
        if self._heard is not None:
            chosen_NK = module.hash_table[given_token_ids(args[0])].flatten(0, -2)
            shares_NE = _counted(chosen_NK, self.num_experts) / chosen_NK.shape[-1]
            self._heard.logits.append(shares_NE.log())
            self._heard.chosen.append(chosen_NK)

    @property
    def layers(self) -> list[int]:
        """Indices of the MoE layers, in the order in which they are heard."""
        return [*self.modules, *self.tables]

    @property
    def expert_choice(self) -> list[bool]:
        """Of each router, whether experts choose tokens."""
        routings = [getattr(module, "routing", None) for module in self.modules.values()]
        return [routing == "expert_choice" for routing in routings]

    @property
    def experts_on_average(self) -> dict[int, float]:
        """MoE layer -> how many experts a token is sent to; in expert choice on average."""
        found = dict.fromkeys(self.layers, float(self.experts_per_token))
        for layer, by_experts in zip(self.modules, self.expert_choice, strict=True):
            if by_experts:
                router: Any = self.modules[layer]
                found[layer] = min(float(router.capacity_factor), float(self.num_experts))
        return found

    def sent(self, routed: Routed) -> list[Tensor]:
        """How often each token was sent to each expert, [N, E], layer by layer, for any routing.

        In expert choice padding may be among them, if only with weight 0: leave its rows out.
        """
        by_experts = self.expert_choice or [False] * len(self.tables)
        found = []
        for turned, logits_NE, chosen in zip(by_experts, routed.logits, routed.chosen, strict=True):
            # An expert's tokens are counted as a token's experts are, the other way round.
            counted = _counted(chosen, len(logits_NE) if turned else self.num_experts)
            found.append(counted.T if turned else counted)
        return found

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
    if hasattr(config, "dense_model_type"):  # of a model whose class its config may not name
        config = copy.copy(config)
        config.architectures = [own_class_name(model)]
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
    if getattr(config, "moe_routing", None) == "hash":
        return _hashed(model, config, architecture)
    path = architecture.live_router_module
    modules = architecture.layer_modules(model, path)
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
        stacks=_stacks(architecture, config, modules),
    )


def _hashed(
    model: "PreTrainedModel", config: "PreTrainedConfig", architecture: Architecture
) -> Routers:
    """Of one of our models without routers."""
    block, _, _ = architecture.experts_module.rpartition(".")
    held = architecture.layer_modules(model, architecture.experts_module)
    blocks = architecture.layer_modules(model, block)
    return Routers(
        {},
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        architecture=architecture,
        stacks=_stacks(architecture, config, held),
        tables={layer: blocks[layer] for layer in held},
    )


def _stacks(
    architecture: Architecture, config: "PreTrainedConfig", layers: Iterable[int]
) -> dict[str, list[int]]:
    return {
        name: [place for place, layer in enumerate(layers) if layer in stack]
        for name, stack in architecture.stacks(config).items()
    }


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


def _counted(chosen_XY: Tensor, size: int) -> Tensor:
    """How often each of `size` numbers stands in each row, [X, size], whole numbers in float32."""
    ones = torch.ones(chosen_XY.shape, device=chosen_XY.device)
    return ones.new_zeros(len(chosen_XY), size).scatter_add_(1, chosen_XY, ones)
