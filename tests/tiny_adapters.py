"""Tiny LoRA adapters, made on the spot by PEFT itself, with every trained value random."""

import json
import logging
import re
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
PREFIX = "base_model.model."


def live_base(base: Path) -> PreTrainedModel:
    """The base as its own class loads it."""
    kind = getattr(transformers, AutoConfig.from_pretrained(base).architectures[0])
    return kind.from_pretrained(base, dtype="auto").eval()


def lora(
    base: Path,
    folder: Path,
    *targets: str,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    config: Any = None,
    **options: Any,
) -> Path:
    """An adapter of `base`, saved by PEFT; of LoRA unless another config is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {"r": 4, "target_modules": list(targets) or ["up_proj"]} | options
        model = get_peft_model(live_base(base), config or LoraConfig(**wanted))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (0.3 * noise).to(parameter.dtype)
        if dtype is not None:
            model.to(dtype)
        model.save_pretrained(folder)
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
        save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def paste(error: object) -> None:
    """Run the line of Python that an error says to paste."""
    (code,) = re.findall(r'python -c "(.*?)"(?: |$)', str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})
    logging.getLogger("transformers").setLevel(logging.WARNING)
