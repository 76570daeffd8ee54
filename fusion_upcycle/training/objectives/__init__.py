"""Objectives: what a model is trained to do, one class each. To add one: its class, its entry here.

Its name is a choice of the option `objective`.
"""

from typing import TYPE_CHECKING, Any

from fusion_upcycle.checks import AUTO
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.training.objectives.base import Objective
from fusion_upcycle.training.objectives.causal_lm import CausalLM
from fusion_upcycle.training.objectives.clip import Clip, ClipTexts
from fusion_upcycle.training.objectives.images import ImageClassification
from fusion_upcycle.training.objectives.masked_lm import MaskedLM
from fusion_upcycle.training.objectives.seq2seq import Seq2Seq
from fusion_upcycle.training.options import OBJECTIVES, TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALL: dict[str, type[Objective]] = {
    kind.name: kind for kind in (CausalLM, MaskedLM, Seq2Seq, ImageClassification, Clip)
}
assert [AUTO, *_ALL] == [*OBJECTIVES]


def objective_for(
    model: "PreTrainedModel",
    processor: Any,
    options: TrainingOptions,
    clip: ClipTexts | None = None,
) -> Objective:
    """The objective that was asked for, or that of the model's class.

    Args:
        processor: the model's tokenizer or image processor.
        clip: that judges, for vision towers.

    Raises:
        UpcyclingError: none is for this model, another one is, or options or processor that do not
            fit it.
    """
    fitting = next((kind for kind in _ALL.values() if kind.fits(model)), None)
    asked = _ALL.get(options.objective)
    if fitting is None:
        raise UpcyclingError(
            f"A {type(model).__name__} has no head that training knows: give a model with one, as "
            "AutoModelForCausalLM, ForMaskedLM, ForSeq2SeqLM or ForImageClassification load it."
        )
    if asked not in (None, fitting):
        raise UpcyclingError(
            f"objective={options.objective} is not for a {type(model).__name__}, which is trained "
            f"by {fitting.name}. Pass {setting('objective', 'auto')}, or give the model with "
            "another head."
        )
    if options.unit != fitting.unit:
        raise UpcyclingError(
            f"{options.unit}={options.budget}: the budget of {fitting.name} is in {fitting.unit}. "
            f"Give {setting(fitting.unit)} instead."
        )
    if options.attention == "document" and fitting is not CausalLM:
        raise UpcyclingError(
            f"attention=document is for {CausalLM.name}, and not for {fitting.name}. Leave it out."
        )
    if fitting is Clip:
        return Clip(model, processor, options, clip)
    if clip is not None:
        raise UpcyclingError(
            f"clip_model={clip.folder} is for vision towers, and not for a {type(model).__name__}. "
            "Leave it out."
        )
    return fitting(model, processor, options)
