"""Sparse upcycling as a lazy mapping: every target tensor, made when asked for, in pieces.

A dense model is an MoE with one expert. Each tensor of the target has one rule that says where it
comes from (`fusion_upcycle.planning` makes them). Nothing is read until a sink asks: a checkpoint
folder or a live model, which so get the same bits.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource, TensorSpec, cast
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.experts import EXPERT_PARTS, DuplicationPlan, Expert, generator_for
from fusion_upcycle.options import UpcyclingOptions
from fusion_upcycle.resolution import ResolvedOptions
from fusion_upcycle.rules import (
    Carried,
    Initialised,
    Joined,
    Repeated,
    RouterRows,
    Rule,
    Zeros,
)
from fusion_upcycle.shards import repeat_neurons, take_neurons

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass
class Upcycling:
    """A planned conversion: the target's tensors as a `TensorSource` that is computed lazily.

    Attributes:
        source: where tensors come from.
        source_config: of the dense model, with `architectures` and `dtype` set.
        config: of the MoE.
        options: what was asked for, and in `resolved` what it means here.
        rules: target tensor name -> where it comes from, in the order of writing.
        specs: target tensor name -> dtype and shape.
        ffn_names: MoE layer -> for each source expert, part of `Expert` -> name in the source.
        router_rows: MoE layer -> router [E, D], where `options.router_init` does not make it.
        averaged: names of the source's tensors that are means over several models.
    """

    source: TensorSource
    source_config: "PreTrainedConfig"
    config: "PreTrainedConfig"
    architecture: Architecture
    options: UpcyclingOptions
    resolved: ResolvedOptions
    plan: DuplicationPlan
    dtype: torch.dtype
    rules: dict[str, Rule]
    specs: dict[str, TensorSpec]
    ffn_names: Mapping[int, Sequence[Mapping[str, str]]]
    router_rows: Mapping[int, Tensor] | None = None
    averaged: frozenset[str] = frozenset()
    _last_expert: tuple[tuple[int, int], Expert] | None = field(default=None, repr=False)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The tensor as flat pieces in order, at most about 8 MiB resident for carried ones."""
        end = self.specs[name].numel if stop is None else stop
        return self._pieces(self.rules[name], self.specs[name], start, end)

    def tensor(self, name: str) -> Tensor:
        """One whole target tensor. Treat it as read-only: it may be a view of the source."""
        rule, spec = self.rules[name], self.specs[name]
        if isinstance(rule, Joined):
            return torch.cat(list(self.chunks(name))).view(spec.shape)
        tensor = self._made(rule, spec)
        assert tensor.shape == spec.shape, (name, tensor.shape, spec)
        return tensor

    def _pieces(self, rule: Rule, spec: TensorSpec, start: int, end: int) -> Iterator[Tensor]:
        if isinstance(rule, Joined):
            size = spec.numel // len(rule.rules)
            for index, part in enumerate(rule.rules):
                first, last = max(start - index * size, 0), min(end - index * size, size)
                if first < last:
                    yield from self._pieces(part, TensorSpec(spec.dtype, (size,)), first, last)
        elif isinstance(rule, Carried):
            for chunk in self.source.chunks(rule.source, start, end):
                yield _scaled(cast(chunk, rule.source, spec.dtype), rule.scale, rule.source)
        else:
            flat = self._made(rule, spec).reshape(-1)
            assert flat.numel() == spec.numel, (rule, spec)
            yield from flat[start:end].split(CHUNK_ELEMENTS)

    def _made(self, rule: Rule, spec: TensorSpec) -> Tensor:
        """What a rule other than `Joined` makes, in the dtype of `spec`."""
        match rule:
            case Carried():
                source = self.source.tensor(rule.source)
                return _scaled(cast(source, rule.source, spec.dtype), rule.scale, rule.source)
            case Repeated():
                source = cast(self.source.tensor(rule.source), rule.source, spec.dtype)
                repeated = repeat_neurons(rule.part, source, rule.size)
                return _scaled(repeated, rule.scale, rule.source)
            case Zeros():
                return torch.zeros(spec.shape, dtype=spec.dtype)
            case Initialised():
                made = getattr(self._expert(rule.layer, rule.expert), rule.part)
                name = f"{rule.part} of layer {rule.layer}'s FFN"
                return cast(_scaled(made, self.resolved.scales[rule.part], name), name, spec.dtype)
            case RouterRows():
                return self._router(rule.layer).to(spec.dtype)
        raise AssertionError(rule)

    def _router(self, layer: int) -> Tensor:
        """[E, D], the experts of a virtual group with the same row."""
        if self.router_rows is not None:
            return self.router_rows[layer]
        group = self.resolved.sharding.granularity
        rows = [
            self.options.initialise_router_row(
                self.config.hidden_size, generator_for(self.options.seed, layer, first, "router")
            )
            for first in range(0, self.options.num_experts, group)
        ]
        return torch.stack(rows).repeat_interleave(group, dim=0)

    def _expert(self, layer: int, expert: int) -> Expert:
        """The initialised expert; the last one is kept: its matrices are asked for in turn."""
        if self._last_expert is None or self._last_expert[0] != (layer, expert):
            self._last_expert = None  # free it before making the next
            names = self.ffn_names[layer][self.plan.source_experts[layer][expert]]
            # Cast before, so that a source of another dtype and a model loaded in the asked-for
            # one give the same bits.
            source = Expert(
                *(
                    cast(self.source.tensor(names[part]), names[part], self.dtype)
                    for part in EXPERT_PARTS
                )
            )
            if not self.resolved.sharding.whole:
                neurons = self.resolved.sharding.neurons(self.options.seed, layer, expert)
                source = take_neurons(source, neurons)
            generator = generator_for(self.options.seed, layer, expert, "expert")
            made = self.options.expert_initialiser(expert)(source, generator)
            for part in EXPERT_PARTS:
                if (
                    not getattr(made, part).isfinite().all()
                    and getattr(source, part).isfinite().all()
                ):
                    raise UpcyclingError(
                        f"expert_init gives expert {expert} of layer {layer} values of {part} that "
                        f"{self.dtype} cannot hold. Choose other options of it, or dtype=float32."
                    )
            self._last_expert = (layer, expert), made
            self.source.release(names.values())
        return self._last_expert[1]

    def release(self, names: Iterable[str]) -> None:
        """Give back what `tensor` read of the source for these."""
        rules = (self.rules[name] for name in names)
        self.source.release(r.source for r in rules if isinstance(r, Carried | Repeated))

    def with_copied_experts(self) -> "Upcycling":
        """The same conversion with plain copies as experts; exact wherever `resolved.exact`."""
        options = replace(self.options, expert_init="copy")
        return replace(
            self,
            options=options,
            resolved=replace(self.resolved, asked=options),
            _last_expert=None,
        )

    @cached_property
    def rounds_scales(self) -> bool:
        """Whether weights are scaled by other than powers of two in half precision."""
        return self.dtype.itemsize < 4 and not self.resolved.scales_are_powers_of_two

    def unrounded(self) -> "Upcycling":
        """The same conversion in float32."""
        float32 = {name: TensorSpec(torch.float32, s.shape) for name, s in self.specs.items()}
        return replace(self, dtype=torch.float32, specs=float32, _last_expert=None)

    @cached_property
    def claims_exact(self) -> bool:
        """Whether the result computes the dense function at step 0 (in exact arithmetic)."""
        one_source = all(len(sources) == 1 for sources in self.ffn_names.values())
        return one_source and self.resolved.exact and self.options.preserves_function

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters of a dense source and of the result, total and active per token."""
        total = sum(spec.numel for spec in self.specs.values())
        used = {name for rule in self.rules.values() for name in self._sources(rule)}
        for _, *others in self.ffn_names.values():  # of further source models
            used -= {name for names in others for name in names.values()}
        idle = self.options.num_experts - self.options.experts_per_token
        expert = 3 * self.resolved.expert_size * self.config.hidden_size
        return {
            "dense": sum(self.source.specs[name].numel for name in used),
            "total": total,
            "active": total - idle * len(self.resolved.moe_layers) * expert,
        }

    def _sources(self, rule: Rule) -> list[str]:
        """Names of the source tensors that a rule reads."""
        match rule:
            case Carried() | Repeated():
                return [rule.source]
            case Initialised():
                expert = self.plan.source_experts[rule.layer][rule.expert]
                return [self.ffn_names[rule.layer][expert][rule.part]]
            case Joined():
                return [name for part in rule.rules for name in self._sources(part)]
        return []

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def _scaled(tensor: Tensor, scale: float, name: str) -> Tensor:
    """`tensor * scale`; `name` is that of the source, for the error."""
    if scale == 1.0:
        return tensor
    result = tensor * scale
    if scale > 1.0 and result.isinf().any() and not tensor.isinf().any():
        raise UpcyclingError(
            f"Source tensor {name} reaches {tensor.abs().max():.3g}, which times {scale:g}, "
            f"the exactness scale, is beyond {tensor.dtype}. Choose dtype=bfloat16 or float32."
        )
    return result
