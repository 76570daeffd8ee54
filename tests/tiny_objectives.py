"""Tiny models of each objective with made data, and what a step of them is by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_families
import tiny_vision
import torch
from tiny_training import DATA
from transformers import CLIPVisionModel, PreTrainedModel

from fusion_upcycle import SparseUpcyclingAlgorithm
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.training.objectives.clip import ClipTexts
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, Trained, train

OPTIONS: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "accelerator": "cpu",
    "log_every": 1,
    "gradient_clip": 0.0,
}
#: Of different lengths: batches of them are padded.
PAIRS = [
    {"input": f"say {number % 5}" + " please" * (number % 3), "target": str(number % 5) * length}
    for number, length in enumerate([1, 3, 2, 4, 1, 2, 5, 1, 3, 2])
]
WINDOW = 16


def mask_tokenizer() -> Any:
    """Bytes, and the tokens of a masked model."""
    tokenizer = byte_tokenizer(64)
    tokenizer.add_special_tokens(
        {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    )
    return tokenizer


@dataclass
class Case:
    """A dense model, and what it is trained with."""

    dense: PreTrainedModel
    processor: Any
    data: dict[str, Any]
    budget: str = "examples"
    more: dict[str, Any] = field(default_factory=dict)
    clip: ClipTexts | None = None


def case(family: str, folder: Path, **fields: Any) -> Case:
    """That of a family of `tiny_families`; images of three kinds, pairs, or texts."""
    texts = {"context_length": WINDOW}
    folder.mkdir(parents=True, exist_ok=True)
    if family == "vit":
        dense = tiny_families.dense("vit", num_labels=3, **fields).float()
        return Case(dense, tiny_vision.vit_processor(), _images(folder))
    if family == "clip_vision_model":
        tiny_vision.clip(0).save_pretrained(folder / "clip")
        tiny_vision.clip_processor().save_pretrained(folder / "clip")
        tower = CLIPVisionModel.from_pretrained(folder / "clip")
        judge = ClipTexts(str(folder / "clip"))
        return Case(tower, tiny_vision.clip_processor(), _images(folder), clip=judge)
    if family == "t5":
        file = folder / "pairs.jsonl"
        file.write_text("\n".join(map(json.dumps, PAIRS)))
        model = tiny_vision.t5(0, **fields)
        more = {"context_length": 32}
        return Case(model, tiny_vision.text_tokenizer(), {"sums": str(file)}, more=more)
    tokenizer = mask_tokenizer() if family in ("bert", "roberta") else byte_tokenizer(64)
    known = {"vocab_size": 270, **fields}
    if family in ("bert", "roberta"):
        known["pad_token_id"] = tokenizer.pad_token_id
    name = "RobertaForMaskedLM" if family == "roberta" else None
    dense = tiny_families.dense(family, name=name, **known).float()
    return Case(dense, tokenizer, dict(DATA), "tokens", texts)


def _images(folder: Path) -> dict[str, Any]:
    return {"kinds": str(tiny_vision.image_folder(folder / "images"))}


def moe(dense: PreTrainedModel, routing: str = "token_choice", **options: Any) -> PreTrainedModel:
    """Ours of 4 experts, top-2, whose experts and routers differ."""
    chosen = {"target": "sparse", "routing": routing, "expert_init": "noise", "verify": "none"}
    made = SparseUpcyclingAlgorithm(4, 2, **chosen | options).run(dense)
    assert made is not None
    return made


def run(case: Case, model: PreTrainedModel, folder: Path, steps: int, **options: Any) -> Trained:
    """Some steps; options of `Places` and of `train` itself are taken too."""
    given = OPTIONS | case.more | options
    places = {n: given.pop(n) for n in ("output", "resume") if n in given}
    also = {n: given.pop(n) for n in ("validation", "optimizer_state", "data") if n in given}
    origin = given.pop("origin", Origin("tiny"))
    size = given["batch_size"] * (WINDOW if case.budget == "tokens" else 1)
    given.setdefault(case.budget, steps * size)
    with patch("fusion_upcycle.training.run.save_routing", lambda log: None):
        return train(
            model,
            case.processor,
            make_training_options(**given),
            places=Places(folder / "work", folder / "log", **places),
            origin=origin,
            clip=case.clip,
            progress=False,
            **{"data": case.data} | also,
        )


def relative(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over that of what was expected."""
    pairs = list(zip(found, expected, strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return float((difference / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5)
