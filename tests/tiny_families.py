"""A tiny dense model of every family of `fusion_upcycle.models`, no value at its default."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

VOCABULARY = 96
LENGTH = 11
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
_CAUSAL = {
    name: f"{stem}ForCausalLM"
    for name, stem in {
        "apertus": "Apertus",
        "arcee": "Arcee",
        "biogpt": "BioGpt",
        "codegen": "CodeGen",
        "cohere": "Cohere",
        "cohere2": "Cohere2",
        "cwm": "Cwm",
        "exaone4": "Exaone4",
        "falcon": "Falcon",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
        "gemma3_text": "Gemma3",
        "glm": "Glm",
        "glm4": "Glm4",
        "gpt_neo": "GPTNeo",
        "gpt_neox": "GPTNeoX",
        "gptj": "GPTJ",
        "granite": "Granite",
        "helium": "Helium",
        "hunyuan_v1_dense": "HunYuanDenseV1",
        "jais2": "Jais2",
        "lfm2": "Lfm2",
        "llama": "Llama",
        "ministral": "Ministral",
        "ministral3": "Ministral3",
        "mistral": "Mistral",
        "nanochat": "NanoChat",
        "nemotron": "Nemotron",
        "olmo": "Olmo",
        "olmo2": "Olmo2",
        "olmo3": "Olmo3",
        "opt": "OPT",
        "persimmon": "Persimmon",
        "phi": "Phi",
        "phi3": "Phi3",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "seed_oss": "SeedOss",
        "smollm3": "SmolLM3",
        "stablelm": "StableLm",
        "starcoder2": "Starcoder2",
        "vaultgemma": "VaultGemma",
        "xglm": "XGLM",
    }.items()
}
#: `model_type` -> class with a head.
CLASSES = _CAUSAL | {
    "bert": "BertForMaskedLM",
    "clip_vision_model": "CLIPVisionModel",
    "dinov2": "Dinov2ForImageClassification",
    "gpt2": "GPT2LMHeadModel",
    "modernbert": "ModernBertForMaskedLM",
    "roberta": "RobertaForSequenceClassification",
    "siglip_vision_model": "SiglipVisionModel",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "apertus": _GROUPED,
    "codegen": _GPT2 | {"rotary_dim": 4},
    "cohere": _GROUPED | {"use_qk_norm": True},
    "cohere2": _GROUPED | _WINDOWS | {"head_dim": 8},
    "cwm": _GROUPED | _WINDOWS | {"head_dim": 8},
    "dinov2": _IMAGE | {"mlp_ratio": 2, "num_labels": 5},
    "exaone4": _GROUPED | _WINDOWS,
    "falcon": {"ffn_hidden_size": 48, "bias": True, "new_decoder_architecture": False},
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | _WINDOWS | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | _WINDOWS | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "glm": _GROUPED | {"head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4": _GROUPED | {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt2": _GPT2,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gptj": _GPT2 | {"rotary_dim": 4},
    "granite": _GROUPED | {"residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "helium": _GROUPED | {"head_dim": 8},
    "hunyuan_v1_dense": _GROUPED | {"head_dim": 8},
    "jais2": _GROUPED | {"head_dim": 8},
    "lfm2": _GROUPED
    | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "ministral": _GROUPED | _WINDOWS | {"head_dim": 8},
    "ministral3": _GROUPED | {"head_dim": 8},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "mlp_bias": True},
    "nanochat": _GROUPED,
    "nemotron": _GROUPED | {"head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": _GROUPED,
    "roberta": {"num_labels": 3},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED | {"use_bias": True},
    "t5": _T5
    | {
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "vaultgemma": _GROUPED | _WINDOWS | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "vit": _IMAGE | {"num_labels": 5},
    "clip_vision_model": _IMAGE,
    "siglip_vision_model": _IMAGE,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
}


#: What a class has, and its vision models have no use for.
_LEFT_OUT = {
    name: {"pad_token_id", "bos_token_id", "eos_token_id"}
    for name in ("clip_vision_model", "siglip_vision_model", "dinov2", "vit")
}


def dense(model_type: str, *, seed: int = 1, name: str | None = None, **fields: Any):
    """A dense model in float64 and evaluation mode.

    Args:
        name: of its class; None is that of `CLASSES`.
        fields: of its config.
    """
    given = _COMMON | _OWN.get(model_type, {}) | fields
    config_class = CONFIG_MAPPING[model_type]
    if "num_key_value_heads" in config_class().to_dict():
        given = _GROUPED | given
    own = {*config_class().to_dict(), *config_class.attribute_map} - _LEFT_OUT.get(
        model_type, set()
    )
    config = config_class(**{k: v for k, v in given.items() if k in own or k not in _COMMON})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, name or CLASSES[model_type])._from_config(config)
        made = made.to(torch.float64).eval()
        shake(made)
    return made


@torch.no_grad()
def shake(model: PreTrainedModel, size: float = 0.15) -> None:
    """Move every parameter off its default: norms off 1, biases off 0."""
    for parameter in model.parameters():
        parameter += size * torch.randn_like(parameter)
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def inputs(model: PreTrainedModel, rows: int = 2, seed: int = 3) -> dict[str, Tensor]:
    """What a forward pass of this model takes."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator, dtype=dtype)}
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    if model.config.is_encoder_decoder:
        decoder = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
        return {"input_ids": ids, "decoder_input_ids": decoder}
    return {"input_ids": ids}


def output(model: PreTrainedModel, **given: Tensor) -> Tensor:
    """Logits, or last hidden states."""
    with torch.no_grad():
        found = model(**given)
    return found.logits if "logits" in found else found.last_hidden_state
