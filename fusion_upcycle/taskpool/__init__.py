"""FusionBench task pools."""

from fusion_upcycle.taskpool.causal_lm_perplexity import CausalLMPerplexityTaskPool

__all__ = ["CausalLMPerplexityTaskPool"]
