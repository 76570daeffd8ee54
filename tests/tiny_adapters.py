"""Tiny LoRA adapters made on the spot: by PEFT itself, with random values in B."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def live_base(base: Path) -> PreTrainedModel:
    """The base as its own class loads it."""
    kind = getattr(transformers, AutoConfig.from_pretrained(base).architectures[0])
    return kind.from_pretrained(base, dtype="auto").eval()


def lora(
    base: Path,
    folder: Path,
    *targets: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """An adapter of `base` that PEFT makes and saves, every tensor of it random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=list(targets) or ["up_proj"], **{"r": 4} | options)
        model = get_peft_model(live_base(base), config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (0.3 * noise).to(parameter.dtype)
        model.to(dtype).save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged(base: Path, adapter: Path) -> PreTrainedModel:
    """The base with the adapter, as PEFT merges it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(live_base(base), adapter).merge_and_unload()


def edit_adapter(
    folder: Path, edit: Callable[[dict[str, Tensor]], object] | None = None, **fields: Any
) -> None:
    """Change the tensors of an adapter, and fields of its config."""
    if edit is not None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
