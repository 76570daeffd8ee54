"""Tiny MoEs of our own class of six unlike families, and what is read with them."""

from functools import cache
from pathlib import Path
from typing import Any

import tiny_families as tiny
from tiny_vision import images
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ViTImageProcessor

import fusion_upcycle.models as models
from fusion_upcycle import upcycle
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_model

VISION = ("vit", "clip_vision_model")
TEXT = ("t5", "bert", "gemma2", "gpt_neox")
SIX = (*VISION, *TEXT)
_SPECIAL = ("<pad>", "<s>", "</s>", "[MASK]", "[UNK]")
PROSE = "the quick brown fox jumps over a lazy dog. "
OTHER = "zzz qqq www xx. vv kk jj. "


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter; padding and what masks among them."""
    pieces = [*_SPECIAL, *"abcdefghijklmnopqrstuvwxyz ."]
    made = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", mask_token="[MASK]"
    )


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 16, "width": 16})


def processor_of(name: str) -> Any:
    return processor() if name in VISION else tokenizer()


def data(name: str) -> dict[str, list[Any]]:
    """Two domains, documents or images of different lengths and looks."""
    if name in VISION:
        return {"a": images(5, 0), "b": images(4, 1)}
    texts = {"a": [PROSE * 2, PROSE[:9], PROSE], "b": [OTHER, OTHER[:13]]}
    return {domain: [*documents] for domain, documents in texts.items()}


def text_files(folder: Path) -> dict[str, str]:
    """Two texts of some hundred tokens."""
    for name, text in (("a", PROSE * 30), ("b", OTHER * 40)):
        (folder / f"{name}.txt").write_text(text)
    return {name: str(folder / f"{name}.txt") for name in ("a", "b")}


def dense_folder(folder: Path, name: str, **more: Any) -> PreTrainedModel:
    """A dense model in float32, saved with its tokenizer or image processor, and loaded again."""
    made = tiny.dense(name, **more).float()
    made.save_pretrained(folder)
    processor_of(name).save_pretrained(folder)
    return type(made).from_pretrained(folder).eval()


def moe_folder(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """An MoE of three experts that are not alike, saved in `folder / "moe"`, and loaded."""
    dense = dense_folder(folder / "dense", name)
    options = {"num_experts": 3, "expert_init": _APART, "verify": "none"} | options
    upcycle(folder / "dense", folder / "moe", target="sparse", progress=False, **options)
    return load(folder / "moe", dense)


def load(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The MoE of a folder.

    Args:
        like: another one, or the dense model.
    """
    sparse = hasattr(like.config, "dense_model_type")
    kind: Any = type(like) if sparse else models.model_class(type(like))
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


def moe_model(name: str, **options: Any) -> PreTrainedModel:
    """The same of four experts in memory alone."""
    dense = tiny.dense(name).float()
    options = {"num_experts": 4, "expert_init": _APART, "target": "sparse"} | options
    made, _ = to_model(plan_model(dense, make_options(**options)), dense, verify="none")
    made.set_experts_implementation("eager")
    return made


_APART = {"name": "noise", "noise_std": 0.5}
