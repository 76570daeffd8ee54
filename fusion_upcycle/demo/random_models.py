"""Random dense models of every family, which differ from every default: a test bench.

A check on a freshly made model would miss what is silently replaced by a default: norms of 1, the
library's rope theta, its eps.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Families that have fields without a useful default at this size.
_FIELDS: dict[str, dict[str, Any]] = {
    # Mistral always has the field; its default window of 4096 would never be reached.
    "mistral": {"sliding_window": 12},
    "qwen3": {"head_dim": 8},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "cohere": {"layer_norm_eps": 3e-3, "rms_norm_eps": None, "logit_scale": 0.7},
    # One layer of each kind of attention; Cohere 2 has LayerNorm, and scales its logits.
    "cohere2": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 12,
        "layer_norm_eps": 3e-3,
        "rms_norm_eps": None,
        "logit_scale": 0.7,
    },
    "hunyuan_v1_dense": {"head_dim": 12},
    # A convolution and attention; an FFN of width 48, said as that of an ungated one.
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "norm_eps": 3e-3,
        "intermediate_size": 68,
        "block_multiple_of": 8,
    },
    "olmo3": {"layer_types": ["full_attention"] * 2},
    "ministral3": {
        "sliding_window": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 3456.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.3,
        },
    },
    # Seed-OSS's defaults are published dropouts, one of which no target has.
    "seed_oss": {"head_dim": 12, "residual_dropout": 0.0},
    "youtu": {
        "kv_lora_rank": 12,
        "q_lora_rank": 10,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "num_key_value_heads": 4,
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 3456.0},
    "linear": {"rope_type": "linear", "rope_theta": 3456.0, "factor": 3.0},
    # Positions beyond the original 16 are reached by LENGTH tokens.
    "dynamic": {"rope_type": "dynamic", "rope_theta": 3456.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 3456.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 3456.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    # Phi-3's: factors for half the size of a head
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 3456.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 2.5, 3.0],
    },
    # Qwen3.5's: a quarter of the head is rotated
    "mrope": {
        "rope_type": "default",
        "rope_theta": 3456.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}


def random_dense(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    rope: str = "default",
    backbone: bool = False,
    seed: int = 0,
    **fields: Any,
) -> "PreTrainedModel":
    """A random dense model, about 25,000 parameters unless `fields` says more.

    Args:
        family: `model_type` of the dense model.
        rope: a key of `ROPES`.
        backbone: without the language model's head.
        fields: of the config, over the defaults here.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    parameters = dict(ROPES[rope])
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 67,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16 if rope == "dynamic" else 64,
            "rms_norm_eps": 3e-3,
            "rope_parameters": {"full_attention": parameters} if family == "olmo3" else parameters,
            "tie_word_embeddings": False,
            "bos_token_id": 3,
            "eos_token_id": 5,
            "pad_token_id": 7,
            "initializer_range": 0.037,
        }
        | _FIELDS.get(family, {})
        | fields,
    )
    model = (AutoModel if backbone else AutoModelForCausalLM).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                scale = 1.5 * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if family == "youtu":  # as transformers makes it when it loads one
            model.get_input_embeddings().weight[7] = 0.0
    return model.to(dtype).eval()
