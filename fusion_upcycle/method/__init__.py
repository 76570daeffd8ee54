"""The FusionBench algorithms: thin classes around functions that do not know FusionBench."""

from fusion_upcycle.method.mixtral_upscaling import (
    MixtralForCausalLMUpscalingAlgorithm,
    MixtralUpscalingAlgorithm,
)

__all__ = ["MixtralForCausalLMUpscalingAlgorithm", "MixtralUpscalingAlgorithm"]
