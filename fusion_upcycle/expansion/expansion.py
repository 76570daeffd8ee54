"""An expansion as a conversion: a larger MoE of the same family, one expert at a time.

`fusion_upcycle.expansion.plan` makes it.

Shape suffixes: E source experts, M experts of the result, F intermediate size, D hidden size.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec
from fusion_upcycle.conversion.card import CardWords, public_name
from fusion_upcycle.conversion.conversion import Conversion
from fusion_upcycle.conversion.rules import RouterRows, Rule, SelectionBias
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.expansion.proof import prove_expansion
from fusion_upcycle.expert_init import ExpertInit
from fusion_upcycle.experts import Expert, generator_for, part_shape
from fusion_upcycle.verification.function import Models, Sample
from fusion_upcycle.verification.proof import Findings


@dataclass(kw_only=True)
class Expansion(Conversion):
    """A planned expansion of an MoE.

    Attributes:
        num_experts: E, experts per MoE layer of the source.
        expert_shape: F and D.
        source_parameters: of the source's class, tied ones once.
        router_rows: MoE layer -> router [M, D], where `options.router_extension` does not make it.
        selection_biases: MoE layer -> selection bias [M], likewise; None copies that of the source.
    """

    method = "expert upcycling"
    _wider: ClassVar[str] = "a source in float32"

    options: ExpansionOptions
    num_experts: int
    expert_shape: tuple[int, int]
    source_parameters: int
    router_rows: Mapping[int, Tensor] | None = None
    selection_biases: Mapping[int, Tensor] | None = None

    @property
    def total_experts(self) -> int:
        """M, experts per MoE layer of the result."""
        return len(next(iter(self.plan.source_experts.values())))

    @property
    def layers(self) -> list[int]:
        """Indices of the MoE layers, ascending."""
        return list(self.plan.source_experts)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is added, so that every tensor is the source's."""
        return self.total_experts == self.num_experts and self.router_rows is None

    @property
    def experts_per_token(self) -> tuple[int, int]:
        """Top-k of the source and of the result."""
        return self.source_config.num_experts_per_tok, self.config.num_experts_per_tok

    @property
    def claims_exact(self) -> bool:
        """Whether the result computes the source's function."""
        before, after = self.experts_per_token
        return self.is_identity and before == after

    def with_router(
        self,
        rows: Mapping[int, Tensor],
        biases: Mapping[int, Tensor] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> "Expansion":
        """The same expansion with these routers [M, D], and selection biases [M], of each layer.

        Args:
            details: what the record says of them.

        Raises:
            UpcyclingError: other layers or shapes, or biases where the family has none.
        """
        if biases is not None and self.architecture.routing.selection_bias is None:
            raise UpcyclingError(
                f"selection_biases: {self.architecture.name} has no selection bias. Leave them out."
            )
        total = self.total_experts
        for what, given, shape in (
            ("router_rows", rows, (total, self.expert_shape[1])),
            ("selection_biases", biases, (total,)),
        ):
            if given is None:
                continue
            if given.keys() != self.plan.source_experts.keys():
                raise UpcyclingError(
                    f"{what} are of layers {sorted(given)}, but the MoE layers are {self.layers}. "
                    f"Give {list(shape)} for each of these."
                )
            for layer, tensor in given.items():
                if tuple(tensor.shape) != shape:
                    raise UpcyclingError(
                        f"{what} of layer {layer} have shape {list(tensor.shape)}. Give "
                        f"{list(shape)}, for the {total} experts of the result."
                    )
        rules = dict(self.rules)
        for layer in self.layers:
            rules[self.router_name(layer)] = RouterRows(layer)
            if (name := self.bias_name(layer)) is not None and biases is not None:
                rules[name] = SelectionBias(layer)
        return replace(
            self,
            router_rows=rows,
            selection_biases=biases,
            rules=rules,
            details={**self.details, **(details or {})},
            _last_expert=None,
        )

    def with_state(self, state: Path | None, new_moments: str) -> "Expansion":
        """The same expansion, whose record says which optimizer state is expanded with it."""
        if state is None:
            return self
        said = {"optimizer_state": {"source": str(state), "new_moments": new_moments}}
        return replace(self, details={**self.details, **said})

    def origin_kind(self, name: str) -> str:
        """What a proof compares this tensor with."""
        match self.rules[name]:
            case RouterRows() if self.router_rows is not None:
                return "router_rows_as_given"
            case SelectionBias() if self.selection_biases is not None:
                return "router_rows_as_given"
        return super().origin_kind(name)

    def check_router(self) -> None:
        """Refuse an expansion whose router is still to be made of calibration text.

        Raises:
            UpcyclingError: names the extension and the remedy.
        """
        calibrated = self.options.calibrated
        if calibrated is not None and self.router_rows is None and not self.is_identity:
            raise UpcyclingError(
                f"router_extension={calibrated.name} makes the router's rows of calibration text, "
                f"and there is none. Give {setting('calibration', {'NAME': 'FILE'})}, or choose "
                f"{setting('router_extension', 'noise')}."
            )

    @property
    def router_sha256(self) -> dict[str, str | None] | None:
        """Digests of the `rows` and `biases` that were given, as written; None without rows."""
        if self.router_rows is None:
            return None
        rows, biases = self.router_rows, self.selection_biases

        def digest(tensors: Mapping[int, Tensor], name_of: Callable[[int], str | None]) -> str:
            found = sha256()
            for layer in self.layers:
                name = name_of(layer)
                assert name is not None  # or `with_router` has refused
                written = tensors[layer].cpu().to(self.specs[name].dtype)
                found.update(written.double().numpy().tobytes())
            return found.hexdigest()

        return {
            "rows": digest(rows, self.router_name),
            "biases": None if biases is None else digest(biases, self.bias_name),
        }

    def router_name(self, layer: int) -> str:
        """Name in the files of the router, [E, D] in the source and [M, D] in the result."""
        return self.architecture.layer_prefix(self.config, layer) + self.architecture.router_name

    def bias_name(self, layer: int) -> str | None:
        """Name in the files of the selection bias, [E] and [M]; None where the family has none."""
        name = self.architecture.routing.selection_bias
        return None if name is None else self.architecture.layer_prefix(self.config, layer) + name

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of the source and of the result, total and active per token."""
        source = self.source_parameters
        total = sum(spec.numel for spec in self.specs.values())
        expert = sum(math.prod(self._shape(part)) for part in self.architecture.parts)
        layers = len(self.layers) * expert
        before, after = self.experts_per_token
        return {
            "source": source,
            "source_active": source - (self.num_experts - before) * layers,
            "total": total,
            "active": total - (self.total_experts - after) * layers,
        }

    def about(self, sources: Mapping[str, Any]) -> dict[str, Any]:
        """The family, how many experts there were and are, and what router was given."""
        before, after = self.experts_per_token
        return {
            "family": self.architecture.name,
            "num_experts": {"before": self.num_experts, "after": self.total_experts},
            "experts_per_token": {"before": before, "after": after},
            "router_sha256": self.router_sha256,
        }

    def in_words(self, record: Mapping[str, Any]) -> CardWords:
        """What the model card says."""
        version, source = record["versions"]["fusion_upcycle"], public_name(record["source"])
        experts, chosen = record["num_experts"], record["experts_per_token"]
        by = f", by {record['importance']['metric']}" if "importance" in record else ""
        counts, proof = record["parameters"], record["proof"]
        caveat = "At step 0 the model computes the same function as its source, as was checked."
        if proof["claim"] == "approximate":
            caveat = (
                "Growing with top-k fixed does not keep the function: the model differs from its "
                f"source before training, by the distance above ({proof.get('reason')})."
            )
        if "lost" in proof:
            caveat = f"**As it is, the model {proof['lost']}.**"
        return CardWords(
            f"""A sparse Mixture-of-Experts model grown from `{source}` \
with fusion_upcycle {version}:
each of {len(record["plan"])} MoE layers went from {experts["before"]} to {experts["after"]} \
experts (expert upcycling, arXiv 2604.19835;
selection: {record["options"]["selection"]}{by}). The router picks {chosen["after"]} experts for \
each token, and picked {chosen["before"]}.
It has not been trained since.""",
            {
                "parameters of the source, total": counts["source"],
                "parameters of the source, active per token": counts["source_active"],
            },
            "same function as the source",
            caveat,
        )

    @property
    def _changed_fields(self) -> set[str]:
        aliases = self.config.attribute_map
        names = {self.architecture.experts_field, "num_experts_per_tok"}
        return names | {aliases[name] for name in names if name in aliases}

    def _prove_function(
        self, result: TensorSource, *, mode: str, sample: Sample, models: Models, progress: bool
    ) -> Findings:
        return prove_expansion(
            self, result, mode=mode, sample=sample, models=models, progress=progress
        )

    def _initialiser(self, expert: int) -> ExpertInit:
        return self.options.initialise_copy

    def _shape(self, part: str) -> tuple[int, ...]:
        return part_shape(part, *self.expert_shape)

    def _source_expert(self, layer: int, expert: int) -> tuple[Expert, Iterable[str]]:
        origin = self.plan.source_experts[layer][expert]
        prefix = self.architecture.layer_prefix(self.config, layer)
        parts, names = {}, []
        for part in self.architecture.parts:
            shape = self._shape(part)
            place = self.architecture.place(origin, part, math.prod(shape))
            names.append(name := prefix + place.name)
            flat = self.source.tensor(name).reshape(-1)[place.start : place.stop]
            parts[part] = flat.view(shape)
        return Expert.from_parts(parts), names

    def _made_alone(self, rule: Rule, spec: TensorSpec) -> Tensor:
        match rule:
            case RouterRows():
                return self._router(rule.layer).to(spec.dtype)
            case SelectionBias():
                # ERNIE 4.5 has it as [1, M].
                return self._selection_bias(rule.layer).to(spec.dtype).view(spec.shape)
        raise AssertionError(rule)

    def _router(self, layer: int) -> Tensor:
        """The router [M, D]."""
        if self.router_rows is not None:
            return self.router_rows[layer].cpu()
        weight_ED = self.source.tensor(self.router_name(layer))
        plan = self.plan.source_experts[layer]
        self.check_router()
        if self.options.extends_by_bias:
            return weight_ED[list(plan)]
        generator = generator_for(self.options.seed, layer, 0, "router_extension")
        return self.options.extend_router(weight_ED, plan, generator)

    def _selection_bias(self, layer: int) -> Tensor:
        """The selection bias [M]."""
        if self.selection_biases is not None:
            return self.selection_biases[layer].cpu()
        name = self.bias_name(layer)
        assert name is not None
        bias_E, plan = self.source.tensor(name).reshape(-1), self.plan.source_experts[layer]
        if not self.options.extends_by_bias:
            return bias_E[list(plan)]
        generator = generator_for(self.options.seed, layer, 0, "selection_bias")
        return self.options.extend_router(bias_E, plan, generator)
