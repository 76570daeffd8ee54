"""Turn trained models into sparse Mixture-of-Experts models, exactly, in little memory.

    from fusion_upcycle import upcycle
    upcycle("path/to/llama", "path/to/moe", num_experts=8, experts_per_token=2)

Names are imported on first use, so that `import fusion_upcycle` and `--help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_upcycle.addition.run import add_expert
    from fusion_upcycle.expansion.live import expand_model
    from fusion_upcycle.expansion.options import ExpansionOptions
    from fusion_upcycle.expansion.run import expand
    from fusion_upcycle.experts import DuplicationPlan, Expert
    from fusion_upcycle.importance.run import folder_importance
    from fusion_upcycle.merging.run import merge_into_moe
    from fusion_upcycle.method import (
        ContinuedPretrainingAlgorithm,
        ExpertAdditionAlgorithm,
        ExpertUpcyclingAlgorithm,
        MixtralForCausalLMMergingAlgorithm,
        MixtralForCausalLMUpscalingAlgorithm,
        MixtralMoEMergingAlgorithm,
        MixtralUpscalingAlgorithm,
        MoEMergingAlgorithm,
        SparseUpcyclingAlgorithm,
        UpcycleAndTrainAlgorithm,
    )
    from fusion_upcycle.upcycling.options import UpcyclingOptions
    from fusion_upcycle.upcycling.run import upcycle

_HOME = {
    "ContinuedPretrainingAlgorithm": "fusion_upcycle.method",
    "DuplicationPlan": "fusion_upcycle.experts",
    "ExpansionOptions": "fusion_upcycle.expansion.options",
    "Expert": "fusion_upcycle.experts",
    "ExpertAdditionAlgorithm": "fusion_upcycle.method",
    "ExpertUpcyclingAlgorithm": "fusion_upcycle.method",
    "MixtralForCausalLMMergingAlgorithm": "fusion_upcycle.method",
    "MixtralForCausalLMUpscalingAlgorithm": "fusion_upcycle.method",
    "MixtralMoEMergingAlgorithm": "fusion_upcycle.method",
    "MixtralUpscalingAlgorithm": "fusion_upcycle.method",
    "MoEMergingAlgorithm": "fusion_upcycle.method",
    "SparseUpcyclingAlgorithm": "fusion_upcycle.method",
    "UpcycleAndTrainAlgorithm": "fusion_upcycle.method",
    "UpcyclingOptions": "fusion_upcycle.upcycling.options",
    "add_expert": "fusion_upcycle.addition.run",
    "expand": "fusion_upcycle.expansion.run",
    "expand_model": "fusion_upcycle.expansion.live",
    "folder_importance": "fusion_upcycle.importance.run",
    "merge_into_moe": "fusion_upcycle.merging.run",
    "upcycle": "fusion_upcycle.upcycling.run",
}

__all__ = [
    "ContinuedPretrainingAlgorithm",
    "DuplicationPlan",
    "ExpansionOptions",
    "Expert",
    "ExpertAdditionAlgorithm",
    "ExpertUpcyclingAlgorithm",
    "MixtralForCausalLMMergingAlgorithm",
    "MixtralForCausalLMUpscalingAlgorithm",
    "MixtralMoEMergingAlgorithm",
    "MixtralUpscalingAlgorithm",
    "MoEMergingAlgorithm",
    "SparseUpcyclingAlgorithm",
    "UpcycleAndTrainAlgorithm",
    "UpcyclingOptions",
    "add_expert",
    "expand",
    "expand_model",
    "folder_importance",
    "merge_into_moe",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fusion_upcycle' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
