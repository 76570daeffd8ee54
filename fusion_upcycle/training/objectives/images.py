"""The objective of image classifiers with heads of their own.

Shapes: B images.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.tables.images import (
    Images,
    check_labels,
    class_order,
    image_mode,
    load_images,
    prepared,
)
from fusion_upcycle.training.objectives.base import SPLITS, Batch, Objective, is_one_of
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOOKED_AT = 64  # images of a source: enough to tell sources apart


@dataclass(frozen=True)
class LabelledImages:
    """Images with the model's classes.

    Attributes:
        classes: of the images, in order.
        processor, mode: see `fusion_upcycle.tables.images.prepared`.
    """

    name: str
    images: Images
    classes: Sequence[int]
    processor: Any
    mode: str

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(repr(list(self.classes)).encode())
        for index in range(0, len(self), max(1, len(self) // _LOOKED_AT)):
            digest.update(self._pixels(index).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def example(self, index: int, number: int) -> dict[str, Any]:
        return {
            "pixel_values": self._pixels(index),
            "labels": torch.tensor(self.classes[index]),
        }

    def _pixels(self, index: int) -> Tensor:
        return prepared(self.images.item(index)[0], self.processor, self.mode)

    def to_json(self) -> dict[str, Any]:
        return {
            "examples": len(self),
            "classes": len(set(self.classes)),
            "sha256": self.digest,
        }


class ImageClassification(Objective):
    """The class of an image."""

    name = "image_classification"
    loss = "classification_nats_per_image"
    target = "image"
    pipeline_tag = "image-classification"
    scores = ("loss_nats_per_image", "accuracy")
    _rights = True

    def __init__(self, model: "PreTrainedModel", processor: Any, options: TrainingOptions):
        super().__init__(model, processor, options)
        require_processor(processor, self.name)
        self._config = model.config

    @classmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        return is_one_of(model, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")

    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[LabelledImages]:
        return [
            self._labelled(name, load_images(given, f"{where}.{name}", splits=SPLITS[where]))
            for name, given in data.items()
        ]

    def _labelled(self, name: str, images: Images) -> LabelledImages:
        order = class_order(images, self._config)
        labels = images.labels()
        classes = self._config.num_labels if order is None else len(order)
        check_labels(images, labels, int(classes or 0))
        own = labels if order is None else [order[label] for label in labels]
        return LabelledImages(name, images, own, self._processor, image_mode(self._config))

    def inputs(self, model: "PreTrainedModel", batch: Batch) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"].to(model.dtype)}

    def targets(self, batch: Batch) -> Tensor:
        return batch["labels"]


def require_processor(processor: Any, objective: str) -> None:
    """Refuse a tokenizer, or none, where images are to be read.

    Raises:
        UpcyclingError: it is no image processor.
    """
    from transformers import PreTrainedTokenizerBase

    if processor is None or isinstance(processor, PreTrainedTokenizerBase):
        raise UpcyclingError(
            f"objective={objective} needs the model's image processor, and was given "
            f"{'none' if processor is None else f'a {type(processor).__name__}'}."
        )
