"""A merge as a conversion: an upcycling from several models of one shape.

`fusion_upcycle.merging.plan` makes it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.conversion.card import CardWords, public_name
from fusion_upcycle.merging.agreement import Agreement, vocabulary_of
from fusion_upcycle.merging.options import MergingOptions
from fusion_upcycle.merging.proof import prove_merging
from fusion_upcycle.merging.prototypes import Moments
from fusion_upcycle.merging.source import DenseView, MergeSource
from fusion_upcycle.merging.statistics import digest, statistics_bytes, write_statistics
from fusion_upcycle.upcycling.upcycling import Upcycling
from fusion_upcycle.verification.function import Models, Sample
from fusion_upcycle.verification.proof import Findings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: FusionBench's name of the model that the others were trained from.
BASE = "_pretrained_"


@dataclass(frozen=True)
class DenseModel:
    """One of the models.

    Attributes:
        config: with `architectures` set.
        source: its tensors.
        trained: of an adapter, names of the tensors that it changes; None for a whole model.
    """

    config: "PreTrainedConfig"
    source: TensorSource
    trained: Collection[str] | None = None


@dataclass(kw_only=True)
class Merging(Upcycling):
    """A planned merge.

    Attributes:
        asked: what was asked for; `options` is what the upcycling makes of it.
        merged: the models as one source.
        models: all of them, the base under the name `BASE`.
        main: the one whose config, vocabulary and files the result has.
        agreement: in what their configs differ.
        notes: what else differs, what was carried and dropped, in words.
        experts: names of the models that give experts, in the order of the experts.
        statistics: MoE layer -> what its router was made of, to be kept beside the model.
    """

    relation = "merge"
    method = "MoE merging"

    asked: MergingOptions
    merged: MergeSource
    models: Mapping[str, DenseModel]
    main: str
    agreement: Agreement = field(default_factory=Agreement)
    notes: Sequence[str] = ()
    experts: Sequence[str]
    statistics: Mapping[int, Moments] | None = None

    @property
    def claims_exact(self) -> bool:
        """False: a merge computes no one model's function."""
        return False

    @property
    def said(self) -> list[str]:
        """In what the models differ, and what of that the result has, a line each."""
        rows = {name: vocabulary_of(model.config) for name, model in self.models.items()}
        lines = self.agreement.in_words()
        if len({*rows.values()}) > 1:
            counts = ", ".join(f"{name} {count:,}" for name, count in rows.items())
            lines.append(f"vocabularies differ ({counts}): the rows are those of {self.main}")
        return [*lines, *self.notes]

    def as_dense(self, model: str) -> DenseView:
        """The dense model that is left if only the experts of `model` are ever chosen."""
        return self.merged.as_dense(model)

    def first_expert(self, model: str) -> int:
        """Index of the first of the experts that `model` gives to each layer."""
        return self.experts.index(model) * self.asked.experts_per_model

    def with_router(self, rows: Mapping[int, Tensor], details: Mapping[str, Any]) -> Self:
        """The same merge with these router rows [models, D] for each MoE layer.

        The experts of one model share its row.

        Args:
            details: what the record says of them.
        """
        repeated = {
            layer: row.repeat_interleave(self.asked.experts_per_model, dim=0)
            for layer, row in rows.items()
        }
        return replace(self, router_rows=repeated, details=details, _last_expert=None)

    @property
    def calibrated(self) -> Sequence[str]:
        """Names of the models that are run on their own texts, for the router."""
        return self.experts

    def with_statistics(self, statistics: Mapping[int, Moments]) -> Self:
        """The same merge, which keeps these beside the model."""
        said = {"sha256": digest(statistics), "bytes": statistics_bytes(self)}
        details = {**self.details, "statistics": said}
        return replace(self, statistics=statistics, details=details, _last_expert=None)

    @property
    def bytes_beside(self) -> int:
        """Of the router statistics."""
        return 0 if self.statistics is None else statistics_bytes(self)

    def put_beside(self, folder: Path) -> None:
        """Write the router statistics, if there are any, into the folder of the model."""
        if self.statistics is not None:
            write_statistics(self.statistics, self.source_config, folder)

    def about(self, sources: Mapping[str, Any]) -> dict[str, Any]:
        """All source models, and who gave which experts."""
        copies = self.asked.experts_per_model
        return {
            "options": self.asked.to_json(len(self.experts)),
            "experts": {
                model: list(range(first := self.first_expert(model), first + copies))
                for model in self.experts
            },
            "sources": dict(sources),
            "differences": {"config": self.agreement.fields, "notes": self.said},
        }

    def in_words(self, record: Mapping[str, Any]) -> CardWords:
        """What the model card says."""
        options, version = record["options"], record["versions"]["fusion_upcycle"]
        models = "\n".join(
            f"- {name}: `{public_name(source)}`"
            + (f", experts {places}" if (places := record["experts"].get(name)) else "")
            for name, source in record["sources"].items()
        )
        said = record.get("differences", {}).get("notes", [])
        differences = "These models differ:\n\n" + "\n".join(f"- {line}" for line in said) + "\n\n"
        differences = differences if said else ""
        rest = "the base model's" if options["shared"] == "base" else "the mean over these models"
        return self._card(
            f"""A sparse Mixture-of-Experts model merged from several dense models of one shape with
fusion_upcycle {version}:

{models}

{differences}The experts of each layer are these models' FFNs; all else is {rest}. The router picks
{options["experts_per_token"]} experts for each token. It has not been trained since.""",
            record,
        )

    def _card(self, text: str, record: Mapping[str, Any]) -> CardWords:
        """What a card says of experts that come from several models."""
        return CardWords(
            text,
            {"parameters of each dense source": record["parameters"]["dense"]},
            "proof",
            "A merge computes no one model's function: the distances are those of one sample.",
        )

    def _prove_function(
        self, result: TensorSource, *, mode: str, sample: Sample, models: Models, progress: bool
    ) -> Findings:
        return prove_merging(
            self, result, mode=mode, sample=sample, models=models, progress=progress
        )
