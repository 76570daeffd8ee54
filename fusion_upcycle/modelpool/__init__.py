"""FusionBench model pools."""

from fusion_upcycle.errors import REQUIRED, require_versions

require_versions(*REQUIRED)  # before FusionBench is imported, which would fail in other words

from fusion_upcycle.modelpool.demo import DemoCausalLMPool

__all__ = ["DemoCausalLMPool"]
