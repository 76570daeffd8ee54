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
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaModel),
    "mistral": (MistralConfig, MistralForCausalLM, MistralModel),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, Qwen2Model),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, Qwen3Model),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, Olmo2Model),
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
    config_class, causal_lm, backbone_class = _CLASSES[family]
    # Mistral always has the field; its default window of 4096 would never be reached.
    window = {"sliding_window": WINDOW} if family == "mistral" else {}
    config = config_class(
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
        | window
        | fields
    )
    model = (backbone_class if backbone else causal_lm)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                scale = 1.5 * parameter.shape[1] ** -0.5
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
