"""The FusionBench algorithms: thin classes around functions that do not know FusionBench."""

from fusion_upcycle.method.sparse_upcycling import (
    MixtralForCausalLMUpscalingAlgorithm,
    MixtralUpscalingAlgorithm,
    SparseUpcyclingAlgorithm,
)

__all__ = [
    "MixtralForCausalLMUpscalingAlgorithm",
    "MixtralUpscalingAlgorithm",
    "SparseUpcyclingAlgorithm",
]
