"""Sparse upcycling as a lazy mapping: every target tensor, made when asked for, in pieces.

A dense model is an MoE with one expert. Each tensor of the target has one rule that says where it
comes from (`fusion_upcycle.planning` makes them). Nothing is read until a sink asks: a checkpoint
folder or a live model, which so get the same bits.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource, TensorSpec
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import EXPERT_PARTS, DuplicationPlan, Expert, generator_for
from fusion_upcycle.options import UpcyclingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Carried:
    """Rule: the source tensor of this name, bit for bit (cast where a dtype was asked for).

    `scale` is the exactness scale of a `down_proj`: see the family's routing.
    """

    source: str
    scale: float = 1.0


@dataclass(frozen=True)
class Initialised:
    """Rule: one matrix of the expert that the initialiser makes from the layer's dense FFN."""

    layer: int
    expert: int
    part: str
    scale: float = 1.0


@dataclass(frozen=True)
class RouterRows:
    """Rule: the router of a layer, one fresh row for each expert."""

    layer: int


@dataclass(frozen=True)
class Zeros:
    """Rule: nothing from the source; a gate or output that starts at zero."""


Rule = Carried | Initialised | RouterRows | Zeros


@dataclass
class Upcycling:
    """A planned conversion: the target's tensors as a mapping that is computed lazily.

    Attributes:
        source: where tensors come from.
        source_config: of the dense model, with `architectures` and `dtype` set.
        config: of the MoE.
        rules: target tensor name -> where it comes from, in the order of writing.
        specs: target tensor name -> dtype and shape.
    """

    source: TensorSource
    source_config: "PreTrainedConfig"
    config: "PreTrainedConfig"
    architecture: Architecture
    options: UpcyclingOptions
    plan: DuplicationPlan
    dtype: torch.dtype
    rules: dict[str, Rule]
    specs: dict[str, TensorSpec]
    _ffn_names: Mapping[int, Mapping[str, str]]
    _last_expert: tuple[tuple[int, int], Expert] | None = field(default=None, repr=False)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor as flat pieces in order, at most about 8 MiB resident for carried ones."""
        rule = self.rules[name]
        if isinstance(rule, Carried):
            for chunk in self.source.chunks(rule.source):
                yield _scaled(self._cast(chunk, rule.source), rule.scale)
        else:
            yield from self.tensor(name).reshape(-1).split(CHUNK_ELEMENTS)

    def tensor(self, name: str) -> Tensor:
        """One whole target tensor. Treat it as read-only: it may be a view of the source."""
        rule = self.rules[name]
        if isinstance(rule, Carried):
            return _scaled(self._cast(self.source.tensor(rule.source), rule.source), rule.scale)
        if isinstance(rule, Zeros):
            return torch.zeros(self.specs[name].shape, dtype=self.dtype)
        if isinstance(rule, Initialised):
            made = getattr(self._expert(rule.layer, rule.expert), rule.part)
            tensor = _scaled(made, rule.scale)
        else:
            tensor = torch.stack(
                [
                    self.options.initialise_router_row(
                        self.config.hidden_size,
                        generator_for(self.options.seed, rule.layer, expert, "router"),
                    )
                    for expert in range(len(self.plan.source_experts[rule.layer]))
                ]
            )
        return self._cast(tensor, name)

    def _expert(self, layer: int, expert: int) -> Expert:
        """The initialised expert; the last one is kept: its matrices are asked for in turn."""
        if self._last_expert is None or self._last_expert[0] != (layer, expert):
            self._last_expert = None  # free it before making the next
            names = self._ffn_names[layer]
            # Cast before, so that a source of another dtype and a model loaded in the asked-for
            # one give the same bits.
            source = Expert(
                *(self._cast(self.source.tensor(names[part]), names[part]) for part in EXPERT_PARTS)
            )
            generator = generator_for(self.options.seed, layer, expert, "expert")
            made = self.options.initialise_expert(source, generator)
            self._last_expert = (layer, expert), made
            self.source.release(names.values())
        return self._last_expert[1]

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.dtype == self.dtype:
            return tensor
        result = tensor.to(self.dtype)
        if result.isinf().any() and not tensor.isinf().any():
            raise UpcyclingError(
                f"Source tensor {name} has values up to {tensor.abs().max():.3g}, beyond the "
                f"range of {self.dtype}. Choose dtype=bfloat16 or float32."
            )
        return result

    def release(self, names: Iterable[str]) -> None:
        """Give back what `tensor` read of the source for these."""
        rules = (self.rules[name] for name in names)
        self.source.release(rule.source for rule in rules if isinstance(rule, Carried))

    def with_copied_experts(self) -> "Upcycling":
        """The same conversion with plain copies as experts; exact wherever this one is sound."""
        rules: dict[str, Rule] = {
            name: Carried(self._ffn_names[rule.layer][rule.part], rule.scale)
            if isinstance(rule, Initialised)
            else rule
            for name, rule in self.rules.items()
        }
        options = replace(self.options, expert_init="copy")
        return replace(self, rules=rules, options=options, _last_expert=None)

    @cached_property
    def claims_exact(self) -> bool:
        """Whether the result computes the dense function at step 0 (in exact arithmetic)."""
        return self.options.preserves_function

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters of the dense source and of the result, total and active per token."""
        total = sum(spec.numel for spec in self.specs.values())
        ffn = {name for names in self._ffn_names.values() for name in names.values()}
        used = ffn | {rule.source for rule in self.rules.values() if isinstance(rule, Carried)}
        idle = self.options.num_experts - self.options.experts_per_token
        return {
            "dense": sum(self.source.specs[name].numel for name in used),
            "total": total,
            "active": total - idle * sum(self.source.specs[name].numel for name in ffn),
        }

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale
