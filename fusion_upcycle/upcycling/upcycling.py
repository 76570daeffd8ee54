"""Sparse upcycling as a conversion: a dense model is an MoE with one expert.

`fusion_upcycle.upcycling.plan` makes the rules.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec, cast
from fusion_upcycle.conversion.card import CardWords, public_name
from fusion_upcycle.conversion.conversion import Conversion, scaled
from fusion_upcycle.conversion.rules import (
    Carried,
    HashTable,
    Initialised,
    Joined,
    Repeated,
    RouterRows,
    Rule,
)
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expert_init import ExpertInit
from fusion_upcycle.experts import Expert, generator_for, part_shape, take_neurons
from fusion_upcycle.router_init import hash_table
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.upcycling.proof import prove_upcycling
from fusion_upcycle.upcycling.resolution import ResolvedOptions, resolve
from fusion_upcycle.upcycling.shards import repeat_neurons
from fusion_upcycle.verification.function import Models, Sample
from fusion_upcycle.verification.proof import Findings


@dataclass(kw_only=True)
class Upcycling(Conversion):
    """A planned sparse upcycling; a merge is one from several models.

    Attributes:
        options: what was asked for, and in `resolved` what it means here.
        ffn_names: MoE layer -> for each source expert, part of `Expert` -> name in the source.
        router_rows: MoE layer -> router [E, D], where `options.router_init` does not make it.
    """

    method = "sparse upcycling"

    options: UpcyclingOptions
    resolved: ResolvedOptions
    ffn_names: Mapping[int, Sequence[Mapping[str, str]]]
    router_rows: Mapping[int, Tensor] | None = None

    def about(self, sources: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing beside the common fields."""
        return {}

    def in_words(self, record: Mapping[str, Any]) -> CardWords:
        """What the model card says."""
        options, version = record["options"], record["versions"]["fusion_upcycle"]
        source = public_name(record["source"])
        proof = record["proof"]
        caveat = "At step 0 the model computes the same function as its source, as was checked."
        if proof["claim"] == "approximate":
            caveat = (
                "What was asked for does not keep the function: the model differs from its source "
                "before training, by the distance above."
            )
        if "lost" in proof:
            caveat = f"**As it is, the model {proof['lost']}.**"
        return CardWords(
            f"""A sparse Mixture-of-Experts model upcycled from the dense model \
`{source}` with fusion_upcycle
{version}: the FFN of each of {len(record["plan"])} layers became {options["num_experts"]} experts,
{self._routing_in_words}. It has not been trained
since.""",
            {"parameters of the dense source": record["parameters"]["dense"]},
            "same function as the source",
            caveat,
        )

    @property
    def _routing_in_words(self) -> str:
        options, chosen = self.options, self.options.experts_per_token
        if options.routing == "hash":
            return f"of which a table gives {chosen} to each token id"
        if options.routing == "expert_choice":
            taken = f"{options.capacity_factor:g} / {options.num_experts}"
            return f"each of which takes {taken} of the tokens, those that a new router says"
        return f"of which a new router picks {chosen} for each token"

    def _prove_function(
        self, result: TensorSource, *, mode: str, sample: Sample, models: Models, progress: bool
    ) -> Findings:
        return prove_upcycling(
            self, result, mode=mode, sample=sample, models=models, progress=progress
        )

    @property
    def _changed_fields(self) -> frozenset[str]:
        dense = self.architecture.dense[self.source_config.model_type]
        return self.architecture.remapped_fields | dense.remapped_fields

    def _made_alone(self, rule: Rule, spec: TensorSpec) -> Tensor:
        match rule:
            case Repeated():
                source = cast(self.source.tensor(rule.source), rule.source, spec.dtype)
                repeated = repeat_neurons(rule.part, source, rule.size)
                return scaled(repeated, rule.scale, rule.source)
            case RouterRows():
                return self._router(rule.layer).to(spec.dtype)
            case HashTable():
                generator = generator_for(self.options.seed, rule.layer, 0, "hash")
                ids, chosen = spec.shape
                return hash_table(ids, chosen, self.options.num_experts, generator)
        raise AssertionError(rule)

    def _router(self, layer: int) -> Tensor:
        """[E, D], the experts of a virtual group with the same row."""
        if self.router_rows is not None:
            return self.router_rows[layer]
        group, size = self.resolved.sharding.granularity, self.resolved.hidden_size
        norm, input_rms = self._router_input(layer)
        initialise = self.options.router_initialiser(input_rms)
        try:
            rows = [
                initialise(size, generator_for(self.options.seed, layer, first, "router"))
                for first in range(0, self.options.num_experts, group)
            ]
        except UpcyclingError as error:
            raise UpcyclingError(f"Router of layer {layer}, behind {norm}: {error}") from error
        return torch.stack(rows).repeat_interleave(group, dim=0)

    def _router_input(self, layer: int) -> tuple[str, float]:
        """The norm before a layer's router, and the root mean square of what it gives.

        A norm gives each dimension about the mean square of its weight, whatever the tokens; where
        there is none, the inputs are taken to have size 1.
        """
        dense = self.architecture.dense[self.source_config.model_type]
        if dense.router_norm is None:
            return "no norm", 1.0
        name = self.architecture.live_prefix(self.source_config, layer) + dense.router_norm
        # Cast and summed exactly: the same for every source of these weights.
        weight_D = cast(self.source.tensor(name), name, self.dtype).double()
        factors_D = weight_D + 1.0 if dense.zero_centred_norms else weight_D
        squares = factors_D.square().tolist()
        bias = name.removesuffix("weight") + "bias"
        if bias in self.source.specs:  # of a LayerNorm
            squares += cast(self.source.tensor(bias), bias, self.dtype).double().square().tolist()
        return name, math.sqrt(math.fsum(squares) / len(factors_D))

    def _initialiser(self, expert: int) -> ExpertInit:
        return self.options.expert_initialiser(expert)

    def _scaled(self, rule: Initialised, made: Tensor) -> Tensor:
        name = f"{rule.part} of layer {rule.layer}'s FFN"
        return scaled(made, self.resolved.scales[rule.part], name)

    def _source_expert(self, layer: int, expert: int) -> tuple[Expert, Iterable[str]]:
        names = self.ffn_names[layer][self.plan.source_experts[layer][expert]]
        # Cast before, so that a source of another dtype and a model loaded in the asked-for
        # one give the same bits.
        source = Expert.from_parts(
            {part: cast(self.source.tensor(name), name, self.dtype) for part, name in names.items()}
        )
        if not self.resolved.sharding.whole:
            neurons = self.resolved.sharding.neurons(self.options.seed, layer, expert)
            source = take_neurons(source, neurons)
        return source, names.values()

    def with_full_capacity(self) -> "Upcycling":
        """The same conversion where in expert choice every expert takes all tokens.

        Itself for other routings, and where weights are not normalised: those of C experts are
        scaled as C sum up, not as all do.
        """
        if self.options.routing != "expert_choice" or not self.options.normalize_topk_prob:
            return self
        config = copy.deepcopy(self.config)
        config.capacity_factor = float(self.options.num_experts)
        options = replace(self.options, capacity_factor=config.capacity_factor)
        resolved = resolve(options, self.architecture, self.source_config)
        return replace(self, config=config, options=options, resolved=resolved, _last_expert=None)

    def with_copied_experts(self) -> "Upcycling":
        """The same conversion with plain copies as experts; exact wherever `resolved.exact`."""
        options = replace(self.options, expert_init="copy")
        rules = dict(self.rules)
        if self.resolved.sharding.whole:  # else each takes other neurons
            rules = {name: self._copied(rule) for name, rule in rules.items()}
        return replace(
            self,
            options=options,
            rules=rules,
            resolved=replace(self.resolved, asked=options),
            _last_expert=None,
        )

    def _copied(self, rule: Rule) -> Rule:
        """A rule as it is where experts are plain copies."""
        match rule:
            case Joined():
                return Joined([self._copied(part) for part in rule.rules])
            case Initialised():
                (source,) = self._sources(rule)
                return Carried(source, self.resolved.scales[rule.part])
        return rule

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
        sizes = self.resolved.expert_size, self.resolved.hidden_size
        expert = sum(math.prod(part_shape(part, *sizes)) for part in self.architecture.parts)
        idle = sum(
            self.options.num_experts - self._experts_of_a_token(layer)
            for layer in self.plan.source_experts
        )
        return {
            "dense": sum(self.source.specs[name].numel for name in used),
            "total": total,
            "active": total - round(idle * expert),
        }

    def _experts_of_a_token(self, layer: int) -> float:
        """That a token goes to in a layer; in expert choice, on average."""
        routed = self.options.routing == "expert_choice"
        if not routed or layer in self.architecture.stacks(self.source_config).get("decoder", ()):
            return self.options.experts_per_token
        return min(self.options.capacity_factor, self.options.num_experts)

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
