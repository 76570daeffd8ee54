"""An added expert as a conversion: the merged model, and one more dense model of its shape.

`fusion_upcycle.addition.plan` makes it. It is planned as the merge of all experts would be, with
those that the model has read from the model itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion_upcycle.addition.proof import prove_addition
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.conversion.card import CardWords, public_name
from fusion_upcycle.conversion.rules import RouterRows
from fusion_upcycle.merging.merging import Merging
from fusion_upcycle.verification.function import Models, Sample
from fusion_upcycle.verification.proof import Findings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: The merged model, among the sources.
MODEL = "model"


@dataclass(kw_only=True)
class Addition(Merging):
    """A planned expert more.

    Attributes:
        moe: tensors of the merged model.
        moe_config: its config.
        added: name of the new expert's model, the last of `experts`.
    """

    method = "adding an expert"

    moe: TensorSource
    moe_config: "PreTrainedConfig"
    added: str

    @property
    def calibrated(self) -> Sequence[str]:
        """The new model alone: of the others there are statistics."""
        return [self.added]

    @property
    def shared_in_words(self) -> str:
        """Whose the weights outside of the experts are."""
        if self.asked.shared == "base":
            return "All that is shared is the base model's, as in a merge of all models at once."
        return (
            "All that is shared stays the mean over the models that were merged first: the new "
            "model does not count in it, as it would in a merge of all models at once."
        )

    def origin_kind(self, name: str) -> str:
        """What a proof compares this tensor with."""
        if isinstance(self.rules[name], RouterRows):
            return "router_rows_as_given"
        return super().origin_kind(name)

    def about(self, sources: Mapping[str, Any]) -> dict[str, Any]:
        """As of a merge, and which expert is new."""
        return super().about(sources) | {
            "added": self.added,
            "shared_weights": self.shared_in_words,
        }

    def in_words(self, record: Mapping[str, Any]) -> CardWords:
        """What the model card says."""
        options, version = record["options"], record["versions"]["fusion_upcycle"]
        model, new = (public_name(record["sources"][name]) for name in (MODEL, self.added))
        experts = "\n".join(f"- {name}: {places}" for name, places in record["experts"].items())
        return self._card(
            f"""The merged Mixture-of-Experts model `{model}` with one more expert, the FFNs of
`{new}`, added with fusion_upcycle {version}. The experts of each layer:

{experts}

{self.shared_in_words} The router is made anew for all of them, and picks
{options["experts_per_token"]} experts for each token. It has not been trained since.""",
            record,
        )

    def _prove_function(
        self, result: TensorSource, *, mode: str, sample: Sample, models: Models, progress: bool
    ) -> Findings:
        return prove_addition(
            self, result, mode=mode, sample=sample, models=models, progress=progress
        )
