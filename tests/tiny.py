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
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusion_upcycle.demo.random_models import ROPES
from fusion_upcycle.demo.random_models import random_dense as dense_model

__all__ = ["ROPES", "dense_model"]

LENGTH = 40
WINDOW = 12


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


def as_older(output: Path) -> Path:
    """An output as earlier versions made them, without digests: `verify` looks at weights only."""
    (output / "SHA256SUMS").unlink()
    record = json.loads((output / "upcycling.json").read_text())
    del record["files"]
    (output / "upcycling.json").write_text(json.dumps(record))
    return output


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
