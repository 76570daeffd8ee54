"""FusionBench model pools."""

from fusion_upcycle.modelpool.demo import DemoCausalLMPool

__all__ = ["DemoCausalLMPool"]
