"""FusionBench task pools."""

from fusion_upcycle.errors import REQUIRED, require_versions

require_versions(*REQUIRED)  # before FusionBench is imported, which would fail in other words

from fusion_upcycle.taskpool.causal_lm_perplexity import CausalLMPerplexityTaskPool
from fusion_upcycle.taskpool.clip_vision import CLIPVisionModelTaskPool
from fusion_upcycle.taskpool.image_classification import ImageClassificationTaskPool
from fusion_upcycle.taskpool.lm_eval import LMEvalTaskPool
from fusion_upcycle.taskpool.model_cost import ModelCostTaskPool
from fusion_upcycle.taskpool.routing import RoutingTaskPool
from fusion_upcycle.taskpool.seq2seq import Seq2SeqTaskPool
from fusion_upcycle.taskpool.several import SeveralTaskPools

__all__ = [
    "CLIPVisionModelTaskPool",
    "CausalLMPerplexityTaskPool",
    "ImageClassificationTaskPool",
    "LMEvalTaskPool",
    "ModelCostTaskPool",
    "RoutingTaskPool",
    "Seq2SeqTaskPool",
    "SeveralTaskPools",
]
