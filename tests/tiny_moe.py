"""Tiny MoE models of every family that differ from every default, made on the spot."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny import dense_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from fusion_upcycle import UpcyclingOptions
from fusion_upcycle.architectures import MOE_FAMILIES
from fusion_upcycle.upcycling.run import plan_model

_LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.7, "norm_topk_prob": True}

#: Fields beside the common ones; the first layer is dense where the family can say so.
_FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"mlp_only_layers": [0], "head_dim": 12, "norm_topk_prob": True},
    "qwen3_5_moe_text": {
        "shared_expert_intermediate_size": 20,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "flex_olmo": {"norm_topk_prob": True},
    "olmoe": {"clip_qkv": 3.0},
    "granitemoe": {"residual_multiplier": 0.7, "logits_scaling": 2.5},
    "ernie4_5_moe": {
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "deepseek_v3": {"first_k_dense_replace": 1} | _GROUPS | _LATENT,
    "cohere2_moe": {
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 12,
        "rope_theta": 3456.0,
        "mlp_layer_types": ["dense", "sparse"],
        "prefix_dense_intermediate_size": 20,
        "num_shared_experts": 1,
        "logit_scale": 0.7,
        "rms_norm_eps": None,
    },
    "lfm2_moe": {
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "routed_scaling_factor": 1.7,
    },
    "hunyuan_v1_moe": {"head_dim": 12},
    "glm4_moe": {"first_k_dense_replace": 1, "head_dim": 12} | _GROUPS,
}

#: Every family that can be scored, trained and expanded.
FAMILIES = list(MOE_FAMILIES)


@cache
def _as_converted(family: str) -> dict[str, Any]:
    """Fields of a family that is not above: those that a conversion to it would write.

    So that a new family is tested without a line here.
    """
    dense = dense_model(next(iter(MOE_FAMILIES[family].dense)))
    config = plan_model(dense, UpcyclingOptions(target=family)).config
    shared = {*dense.config.to_dict(), "num_experts_per_tok", "moe_intermediate_size"}
    return {name: value for name, value in config.to_dict().items() if name not in shared}


def moe_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    backbone: bool = False,
    **fields: Any,
) -> PreTrainedModel:
    """A random MoE of E = 4, k = 2, hidden 32, experts of width 24, in two layers."""
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 67,
            "hidden_size": 32,
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 3e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3456.0},
            "tie_word_embeddings": False,
            "bos_token_id": 3,
            "eos_token_id": 5,
            "pad_token_id": 7,
        }
        | {MOE_FAMILIES[family].experts_field: 4}
        | (_FIELDS[family] if family in _FIELDS else _as_converted(family))
        | fields,
    )
    model = (AutoModel if backbone else AutoModelForCausalLM).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            drawn = torch.randn(tensor.shape, generator=generator)
            if name.endswith("bias"):  # selection biases too: as large as the gaps of the scores
                tensor.copy_(drawn * 0.1)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.3 * drawn)
            else:
                tensor.copy_(drawn * 1.5 * tensor.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def moe_folder(folder: Path, family: str, **kwargs: Any) -> Path:
    """`moe_model(...)`, saved by transformers itself."""
    moe_model(family, **kwargs).save_pretrained(folder)
    return folder
