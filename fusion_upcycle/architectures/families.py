"""The dense families that our own class takes, and the norm before their FFNs. Light: no torch.

`fusion_upcycle.models.modeling_sparse` has the forms of their FFNs.
"""

_AFTER = ("post_attention_layernorm",)
_FINAL = ("final_layer_norm", "self_attn_layer_norm")

#: Dense `model_type` -> norms whose output the FFN is given, relative to the layer; the first that
#: has a weight counts. None: a norm without a weight, or the residual stream itself.
NORMS: dict[str, tuple[str, ...]] = {
    "apertus": ("feedforward_layernorm",),
    "arcee": _AFTER,
    "bert": ("attention.output.LayerNorm",),
    "biogpt": _FINAL[:1],
    "clip_vision_model": ("layer_norm2",),
    "codegen": ("ln_1",),
    "cohere": ("input_layernorm",),
    "cohere2": ("input_layernorm",),
    "cwm": _AFTER,
    "dinov2": ("norm2",),
    "exaone4": (),
    "falcon": ("ln_mlp", "post_attention_layernorm", "input_layernorm"),
    "gemma": _AFTER,
    "gemma2": ("pre_feedforward_layernorm",),
    "gemma3_text": ("pre_feedforward_layernorm",),
    "glm": _AFTER,
    "glm4": _AFTER,
    "gpt2": ("ln_2",),
    "gpt_neo": ("ln_2",),
    "gpt_neox": _AFTER,
    "gptj": ("ln_1",),
    "granite": _AFTER,
    "helium": _AFTER,
    "hunyuan_v1_dense": _AFTER,
    "jais2": _AFTER,
    "lfm2": ("ffn_norm",),
    "llama": _AFTER,
    "ministral": _AFTER,
    "ministral3": _AFTER,
    "mistral": _AFTER,
    "modernbert": ("mlp_norm",),
    "nanochat": (),
    "nemotron": _AFTER,
    "olmo": (),
    "olmo2": (),
    "olmo3": (),
    "opt": _FINAL,
    "persimmon": _AFTER,
    "phi": ("input_layernorm",),
    "phi3": _AFTER,
    "qwen2": _AFTER,
    "qwen3": _AFTER,
    "roberta": ("attention.output.LayerNorm",),
    "seed_oss": _AFTER,
    "siglip_vision_model": ("layer_norm2",),
    "smollm3": _AFTER,
    "stablelm": ("post_attention_layernorm", "input_layernorm"),
    "starcoder2": _AFTER,
    "t5": ("layer_norm",),
    "vaultgemma": ("pre_feedforward_layernorm",),
    "vit": ("layernorm_after",),
    "xglm": _FINAL[:1],
}

#: Families whose norms multiply by 1 + weight.
ZERO_CENTRED = frozenset({"gemma", "gemma2", "gemma3_text", "nemotron", "vaultgemma"})

#: What published files hold beside the class that their config.json names: other heads, and
#: buffers that every model computes. Regular expressions for the source's own names.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "bert": (r"^cls\.seq_relationship\.", r"^(bert\.)?pooler\.", r"embeddings\.position_ids$"),
    "clip_vision_model": (r"embeddings\.position_ids$",),
    "codegen": (r"\.attn\.(bias|masked_bias|causal_mask)$",),
    "gpt2": (r"\.attn\.(bias|masked_bias)$",),
    "gpt_neo": (r"\.attention\.(bias|masked_bias)$",),
    "gpt_neox": (r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
    "gptj": (r"\.attn\.(bias|masked_bias)$",),
    "roberta": (r"^(roberta\.)?pooler\.", r"embeddings\.position_ids$"),
}
