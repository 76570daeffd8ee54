"""FusionBench model pools."""

from fusion_upcycle.errors import REQUIRED, require_versions

require_versions(*REQUIRED)  # before FusionBench is imported, which would fail in other words

from fusion_upcycle.modelpool.demo import DemoCausalLMPool
from fusion_upcycle.modelpool.folders import (
    CLIPVisionModelPool,
    ImageClassificationModelPool,
    Seq2SeqLMPool,
)

__all__ = [
    "CLIPVisionModelPool",
    "DemoCausalLMPool",
    "ImageClassificationModelPool",
    "Seq2SeqLMPool",
]
