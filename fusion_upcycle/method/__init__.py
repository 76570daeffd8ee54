"""The FusionBench algorithms: thin classes around functions that do not know FusionBench."""

from fusion_upcycle.errors import REQUIRED, require_versions

require_versions(*REQUIRED)  # before FusionBench is imported, which would fail in other words

from fusion_upcycle.method.continued_pretraining import (
    ContinuedPretrainingAlgorithm,
    UpcycleAndTrainAlgorithm,
)
from fusion_upcycle.method.expert_addition import ExpertAdditionAlgorithm
from fusion_upcycle.method.expert_upcycling import ExpertUpcyclingAlgorithm
from fusion_upcycle.method.moe_merging import (
    MixtralForCausalLMMergingAlgorithm,
    MixtralMoEMergingAlgorithm,
    MoEMergingAlgorithm,
)
from fusion_upcycle.method.sparse_upcycling import (
    MixtralForCausalLMUpscalingAlgorithm,
    MixtralUpscalingAlgorithm,
    SparseUpcyclingAlgorithm,
)

__all__ = [
    "ContinuedPretrainingAlgorithm",
    "ExpertAdditionAlgorithm",
    "ExpertUpcyclingAlgorithm",
    "MixtralForCausalLMMergingAlgorithm",
    "MixtralForCausalLMUpscalingAlgorithm",
    "MixtralMoEMergingAlgorithm",
    "MixtralUpscalingAlgorithm",
    "MoEMergingAlgorithm",
    "SparseUpcyclingAlgorithm",
    "UpcycleAndTrainAlgorithm",
]
