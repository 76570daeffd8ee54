"""The protocol of every operation: a planned conversion, lazy, that proves and describes itself.

Each tensor of the target has one rule that says where it comes from. Nothing is read until a sink
asks: a checkpoint folder or a live model, which so get the same bits. An operation (sparse
upcycling, merging, expansion) is a subclass: it makes its experts and routers, and owns its part of
the proof, of the record and of the card. `fusion_upcycle.conversion.run` does the rest; an
operation whose folders can be proven again has `replan(record)` in its own `run`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource, TensorSpec, cast
from fusion_upcycle.checks import dtype_name
from fusion_upcycle.conversion.rules import Carried, Initialised, Joined, Repeated, Rule, Zeros
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.expert_init import ExpertInit
from fusion_upcycle.experts import DuplicationPlan, Expert, generator_for
from fusion_upcycle.verification.function import Models, Sample
from fusion_upcycle.verification.names import check_names, check_shared_fields
from fusion_upcycle.verification.proof import Findings, Proof
from fusion_upcycle.verification.tensors import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fusion_upcycle.conversion.card import CardWords


class ConversionOptions(Protocol):
    """What every kind of options has."""

    @property
    def seed(self) -> int: ...

    def to_json(self) -> dict[str, Any]:
        """Everything needed to repeat the run, as plain data."""
        ...


@dataclass(kw_only=True)
class Conversion(ABC):
    """The target's tensors as a `TensorSource` that is computed lazily.

    Attributes:
        source: where tensors come from.
        source_config: of the source, with `architectures` and `dtype` set.
        config: of the result.
        options: what was asked for.
        plan: where each expert comes from.
        dtype: of the result, but for tensors that are kept in another.
        rules: target tensor name -> where it comes from, in the order of writing.
        specs: target tensor name -> dtype and shape.
        averaged: names of the source's tensors that are means over several models.
        details: what scoring and calibration found on the way, for the record.
    """

    #: Of the operation, in records and on cards.
    method: ClassVar[str]
    #: To its sources, as the Hub calls it (`base_model_relation`).
    relation: ClassVar[str] = "finetune"
    #: What to do where half precision cannot hold a value.
    _wider: ClassVar[str] = "dtype=float32"

    source: TensorSource
    source_config: "PreTrainedConfig"
    config: "PreTrainedConfig"
    architecture: Architecture
    options: ConversionOptions
    plan: DuplicationPlan
    dtype: torch.dtype
    rules: dict[str, Rule]
    specs: dict[str, TensorSpec]
    averaged: frozenset[str] = frozenset()
    details: Mapping[str, Any] = field(default_factory=dict)
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

    def release(self, names: Iterable[str]) -> None:
        """Give back what `tensor` read of the source for these."""
        rules = (self.rules[name] for name in names)
        self.source.release(r.source for r in rules if isinstance(r, Carried | Repeated))

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def bytes_beside(self) -> int:
        """Of what is put beside the weights, where that is of any size."""
        return 0

    def origin_kind(self, name: str) -> str:
        """What a proof compares this tensor with."""
        rule = self.rules[name]
        if isinstance(rule, Carried) and rule.source in self.averaged:
            return "bit_equal_to_average"
        parts = rule.rules if isinstance(rule, Joined) else [rule]
        carried = all(isinstance(part, Carried) and part.scale == 1.0 for part in parts)
        return "bit_equal_to_source" if carried else "bit_equal_to_second_draw"

    def origin(self, name: str, start: int) -> Hashable:
        """What stands in a target tensor from this element on.

        Where two ranges of one length, each within one part of an expert, have the same origin,
        they have the same bits: in a result too, once `check_tensors` has compared it.
        """
        rule, at = self.rules[name], start
        if isinstance(rule, Joined):
            part, at = divmod(start, self.specs[name].numel // len(rule.rules))
            rule = rule.rules[part]
        if isinstance(rule, Carried):
            return rule.source, rule.scale, rule.start + at
        return name, start

    @property
    @abstractmethod
    def parameters(self) -> dict[str, int]:
        """Parameters of the source and of the result, total and active per token."""

    @property
    @abstractmethod
    def claims_exact(self) -> bool:
        """Whether the result computes the source's function at step 0 (in exact arithmetic)."""

    @abstractmethod
    def about(self, sources: Mapping[str, Any]) -> dict[str, Any]:
        """What the record of this operation says beside the common fields, or instead of them.

        Args:
            sources: name of each source model -> its identity.
        """

    @abstractmethod
    def in_words(self, record: Mapping[str, Any]) -> "CardWords":
        """What the model card says of this operation, from the finished record."""

    @abstractmethod
    def _prove_function(
        self, result: TensorSource, *, mode: str, sample: Sample, models: Models, progress: bool
    ) -> Findings:
        """The operation's own part of `prove`, for tensors and names that are right."""

    @property
    def _changed_fields(self) -> Collection[str]:
        """The config's fields that this operation is there to change."""
        return self.architecture.remapped_fields

    def record(self, sources: Mapping[str, Any]) -> dict[str, Any]:
        """The record of this conversion: what was asked for, planned and found before writing."""
        return {
            "method": self.method,
            "class": class_name(self.config),
            "dtype": dtype_name(self.dtype),
            "options": self.options.to_json(),
            "plan": self.plan.to_json(),
            "parameters": self.parameters,
            **self.about(sources),
            **self.details,
        }

    def prove(
        self,
        result: TensorSource,
        *,
        mode: str,
        sample: Sample,
        models: Models,
        progress: bool = False,
    ) -> Proof:
        """Prove a result: names and all tensors, what it claims of its function, the config.

        Args:
            result: the tensors that were made, from the written folder or the live model.
            mode: `layers` (streaming, in float32), `logits` (both models in memory) or `none`.
            sample: what to run the models on.
            models: source and result in memory, for `mode="logits"`.
            progress: show progress bars.

        Raises:
            ProofError: a tensor differs, or a claim is false.
        """
        claim = "exact" if self.claims_exact else "approximate"
        if mode == "none":
            return Proof("none", claim)
        started = time.perf_counter()
        check_names(self.config, self.architecture)
        tensors = check_tensors(self, result, progress=progress)
        found = self._prove_function(
            result, mode=mode, sample=sample, models=models, progress=progress
        )
        check_shared_fields(self.source_config, self.config, self._changed_fields)
        return Proof(
            mode,
            claim,
            found.holds,
            sample.words,
            tensors,
            found.function,
            found.details,
            round(time.perf_counter() - started, 3),
            f"{found.words}; {sum(tensors.values())} tensors bit-equal; {sample.words}",
        )

    @abstractmethod
    def _source_expert(self, layer: int, expert: int) -> tuple[Expert, Iterable[str]]:
        """What an expert is made from, in the dtype of the result, and the tensors it was read of.

        The expert may be a view of these.
        """

    @abstractmethod
    def _initialiser(self, expert: int) -> ExpertInit:
        """The initialiser of expert `expert` of a layer."""

    @abstractmethod
    def _made_alone(self, rule: Rule, spec: TensorSpec) -> Tensor:
        """What a rule of this kind of conversion alone makes, in the dtype of `spec`."""

    def _scaled(self, rule: Initialised, made: Tensor) -> Tensor:
        """One matrix of an initialised expert, with the scale that its part is given."""
        return made

    def _pieces(self, rule: Rule, spec: TensorSpec, start: int, end: int) -> Iterator[Tensor]:
        if isinstance(rule, Joined):
            size = spec.numel // len(rule.rules)
            for index, part in enumerate(rule.rules):
                first, last = max(start - index * size, 0), min(end - index * size, size)
                if first < last:
                    yield from self._pieces(part, TensorSpec(spec.dtype, (size,)), first, last)
        elif isinstance(rule, Carried):
            for chunk in self.source.chunks(rule.source, rule.start + start, rule.start + end):
                yield scaled(cast(chunk, rule.source, spec.dtype), rule.scale, rule.source)
        else:
            flat = self._made(rule, spec).reshape(-1)
            assert flat.numel() == spec.numel, (rule, spec)
            yield from flat[start:end].split(CHUNK_ELEMENTS)

    def _made(self, rule: Rule, spec: TensorSpec) -> Tensor:
        """What a rule other than `Joined` makes, in the dtype of `spec`."""
        match rule:
            case Carried():
                assert rule.start == 0, rule
                source = self.source.tensor(rule.source)
                return scaled(cast(source, rule.source, spec.dtype), rule.scale, rule.source)
            case Zeros():
                return torch.zeros(spec.shape, dtype=spec.dtype)
            case Initialised():
                made = self._scaled(rule, getattr(self._expert(rule.layer, rule.expert), rule.part))
                return cast(made, f"{rule.part} of layer {rule.layer}'s FFN", spec.dtype)
        return self._made_alone(rule, spec)

    def _expert(self, layer: int, expert: int) -> Expert:
        """The initialised expert; the last one is kept: its matrices are asked for in turn."""
        if self._last_expert is None or self._last_expert[0] != (layer, expert):
            self._last_expert = None  # free it before making the next
            source, names = self._source_expert(layer, expert)
            generator = generator_for(self.options.seed, layer, expert, "expert")
            made = self._initialiser(expert)(source, generator)
            for part, tensor in made.parts.items():
                if not tensor.isfinite().all() and getattr(source, part).isfinite().all():
                    raise UpcyclingError(
                        f"expert_init gives expert {expert} of layer {layer} values of {part} that "
                        f"{self.dtype} cannot hold. Choose other options of it, or {self._wider}."
                    )
            self._last_expert = (layer, expert), made
            self.source.release(names)
        return self._last_expert[1]


def scaled(tensor: Tensor, scale: float, name: str) -> Tensor:
    """`tensor * scale`; `name` is that of the source, for the error.

    Raises:
        UpcyclingError: the product is beyond the dtype.
    """
    if scale == 1.0:
        return tensor
    result = tensor * scale
    if scale > 1.0 and result.isinf().any() and not tensor.isinf().any():
        raise UpcyclingError(
            f"Source tensor {name} reaches {tensor.abs().max():.3g}, which times {scale:g}, "
            f"the exactness scale, is beyond {tensor.dtype}. Choose "
            f"{setting('dtype', 'bfloat16')} or float32."
        )
    return result
