"""Tiny CLIP, ViT and T5 models of random weights, and made images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.auto import tokenization_auto  # noqa: F401  # before CLIPTokenizer is made

from fusion_upcycle.demo.tokenizer import byte_tokenizer

LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NAMES = ("_pretrained_", "a", "b")
KINDS = ("cat", "dog", "owl")


def scattered(model: Any) -> Any:
    """Weights that are large enough for answers to differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def clip_processor() -> CLIPProcessor:
    """Byte by byte; images of 16 x 16."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def clip(seed: int) -> CLIPModel:
    torch.manual_seed(seed)
    end = clip_processor().tokenizer.eos_token_id
    text = {"vocab_size": end + 1, "max_position_embeddings": 160, "eos_token_id": end}
    config = CLIPConfig(
        vision_config={**LAYERS, "image_size": 16, "patch_size": 8},
        text_config={**LAYERS, **text, "num_hidden_layers": 1},
        projection_dim=8,
        logit_scale_init_value=1.0,
    )
    return scattered(CLIPModel(config))


def vit(seed: int, **changes: Any) -> ViTForImageClassification:
    torch.manual_seed(seed)
    options = {"image_size": 16, "patch_size": 8, "num_labels": 3, **LAYERS, **changes}
    return scattered(ViTForImageClassification(ViTConfig(**options)))


def vit_processor(channels: int = 3) -> ViTImageProcessor:
    half = [0.5] * channels
    return ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=half, image_std=half)


def t5(seed: int, **changes: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=257,
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=256,
        pad_token_id=256,
        eos_token_id=256,
        **changes,
    )
    return scattered(T5ForConditionalGeneration(config))


def save(models: dict[str, Any], beside: Any, root: Path) -> dict[str, Path]:
    """A folder for each model, with its processor or tokenizer."""
    for name, model in models.items():
        model.save_pretrained(root / name)
        beside.save_pretrained(root / name)
    return {name: root / name for name in models}


def text_tokenizer() -> Any:
    return byte_tokenizer(256)


def images(number: int = 12, seed: int = 0) -> list[Image.Image]:
    """Noise of one colour each, larger than the models take."""
    generator = np.random.default_rng(seed)
    shape = (number, 20, 24, 3)
    noise = generator.integers(0, 128, shape) + generator.integers(0, 128, (number, 1, 1, 3))
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in noise]


def image_folder(root: Path, kinds: tuple[str, ...] = KINDS, number: int = 12) -> Path:
    """Of images, a folder for each kind, in turn."""
    for index, image in enumerate(images(number)):
        folder = root / "test" / kinds[index % len(kinds)]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index:02}.png")
    return root
