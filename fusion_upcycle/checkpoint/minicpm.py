"""MiniCPM's config in Granite's words: the two compute the same, with other names for it.

transformers has no MiniCPM class; its repositories bring code of their own, which is never run
here. That code (arXiv 2404.06395, section 3; `modeling_minicpm.py` of openbmb/MiniCPM-2B) is Llama
with three constants, and Granite has a multiplier for each:

    embeddings   x scale_emb                               embedding_multiplier
    each branch  x scale_depth / sqrt(num_hidden_layers)   residual_multiplier
    logits       / (hidden_size / dim_model_base)          logits_scaling
    attention    / sqrt(head_dim), as in Llama             attention_multiplier
"""

from typing import Any

from fusion_upcycle.errors import UpcyclingError

#: MiniCPM's own fields, which `granite_fields` translates.
_CONSTANTS = ("scale_emb", "scale_depth", "dim_model_base")


def granite_fields(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `GraniteConfig` from those of a MiniCPM `config.json`.

    Fields that are not translated stay, so that unknown ones are refused later, by name.

    Raises:
        UpcyclingError: a constant is missing, or the model is one of MiniCPM's own MoEs.
    """
    if data.get("num_experts", 0):
        raise UpcyclingError("config.json: this MiniCPM is an MoE already (num_experts).")
    for name in _CONSTANTS:
        if not isinstance(data.get(name), int | float):
            raise UpcyclingError(f"config.json of the minicpm source: {name} is missing.")
    fields = {
        name: value
        for name, value in data.items()
        if name not in (*_CONSTANTS, "auto_map", "model_type", "architectures", "num_experts")
    }
    heads, hidden_size = data["num_attention_heads"], data["hidden_size"]
    # The class of MiniCPM ties unless it is told not to, and its code rotates with theta 10000.
    return (
        {"tie_word_embeddings": True, "rope_theta": 10000.0}
        | fields
        | {
            "architectures": [
                name.replace("MiniCPM", "Granite") for name in data.get("architectures") or ()
            ],
            "_read_from": "minicpm",  # `architectures.known_fields.READ_FROM`
            "embedding_multiplier": float(data["scale_emb"]),
            "residual_multiplier": data["scale_depth"] / data["num_hidden_layers"] ** 0.5,
            "logits_scaling": hidden_size / data["dim_model_base"],
            "attention_multiplier": (hidden_size // heads) ** -0.5,
        }
    )
