"""Tiny dense models that differ from every default: random norms, rope theta, eps, dimensions.

A test on a freshly made model would miss what is silently replaced by a default: norms of 1, the
library's rope theta, its eps.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

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
    "youtu": {
        "kv_lora_rank": 12,
        "q_lora_rank": 10,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "num_key_value_heads": 4,
        "pad_token_id": None,  # transformers zeroes that row of the embeddings when it loads Youtu
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
LENGTH = 40
WINDOW = 12
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


def dense_model(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    rope: str = "default",
    backbone: bool = False,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """A random dense model of about 25,000 parameters; biases are random too."""
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
            "rope_parameters": dict(ROPES[rope]),
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
    return model.to(dtype).eval()


def dense_folder(folder: Path, *args: Any, max_shard_size: str = "5GB", **kwargs: Any) -> Path:
    """`dense_model(...)`, saved by transformers itself."""
    dense_model(*args, **kwargs).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of `config.json`; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, read by the safetensors library."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> contents of every file under a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """A causal LM as a user would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def token_ids(length: int = LENGTH, batch: int = 2) -> Tensor:
    """Random tokens, more than the sliding window of the tiny models."""
    return torch.randint(67, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """Logits by transformers' own forward pass."""
    return model(token_ids() if ids is None else ids, use_cache=False).logits


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits, expected_bits = (
            t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)
        )
        assert torch.equal(bits, expected_bits), name
