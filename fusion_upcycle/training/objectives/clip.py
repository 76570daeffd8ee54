"""The objective of CLIP's vision towers: zero-shot classification by frozen texts.

As FusionBench's `clip_finetune` and `HFCLIPClassifier`: only the tower is trained.

Shapes: B images, C classes (the most that a source has), S sources, P projected size.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize
from torch.nn.utils.rnn import pad_sequence

from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.live.loading import load_folder
from fusion_upcycle.tables.images import Images, Known, check_labels, load_images
from fusion_upcycle.training.objectives.base import SPLITS, Batch, Objective
from fusion_upcycle.training.objectives.images import (
    ImageClassification,
    LabelledImages,
    require_processor,
)
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ClipTexts:
    """The whole CLIP model that judges a vision tower.

    Attributes:
        folder: or Hub id, with its tokenizer.
        known: name of a source -> class names and templates that are known of it.
    """

    folder: str
    known: Callable[[str], Known | None] = lambda name: None


@dataclass(frozen=True)
class ZeroShotImages(LabelledImages):
    """Images of one source, and what its classes are.

    Attributes:
        head_CP: normalised texts of the classes.
        place: of the head among all.
    """

    head_CP: Tensor
    place: int

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(super().digest.encode())
        digest.update(self.head_CP.numpy().tobytes())
        return digest.hexdigest()

    def example(self, index: int, number: int) -> dict[str, Any]:
        return super().example(index, number) | {"heads": torch.tensor(self.place)}


class Clip(ImageClassification):
    """The class of an image, by the text that is most like it.

    Raises:
        UpcyclingError: no image processor, no CLIP model, or one of another size.
    """

    name = "clip"
    loss = "clip_nats_per_image"
    pipeline_tag = "zero-shot-image-classification"

    def __init__(
        self,
        model: "PreTrainedModel",
        processor: Any,
        options: TrainingOptions,
        clip: ClipTexts | None = None,
    ):
        Objective.__init__(self, model, processor, options)
        require_processor(processor, self.name)
        if clip is None:
            raise UpcyclingError(
                f"A {type(model).__name__} is judged by the texts of the CLIP model that it is of: "
                f"give {setting('clip_model', 'FOLDER')}, folder or Hub id of the whole model."
            )
        from transformers import AutoTokenizer, CLIPModel

        self._texts = clip
        self._clip: CLIPModel = load_folder(CLIPModel, clip.folder).float()
        self._tokenizer = AutoTokenizer.from_pretrained(clip.folder)
        self._projection_PD = self._clip.visual_projection.weight.detach()
        self._scale = self._clip.logit_scale.detach().exp()
        if self._projection_PD.shape[1] != model.config.hidden_size:
            raise UpcyclingError(
                f"The vision tower gives {model.config.hidden_size} numbers for an image, and the "
                f"projection of clip_model={clip.folder} takes {self._projection_PD.shape[1]}. "
                "Give the CLIP model that the tower is of."
            )
        self._heads: list[Tensor] = []

    @classmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        return "CLIPVisionModel" in (kind.__name__ for kind in type(model).__mro__)

    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[ZeroShotImages]:
        found = []
        for name, given in data.items():
            known = self._texts.known(name)
            images = load_images(given, f"{where}.{name}", splits=SPLITS[where], known=known)
            found.append(self._judged(name, images))
        return found

    def _judged(self, name: str, images: Images) -> ZeroShotImages:
        if images.classnames is None:
            raise UpcyclingError(
                f"{images.where}: the data do not name the classes. Give their names, {{path: ..., "
                "classnames: [cat, dog]}."
            )
        labels = images.labels()
        check_labels(images, labels, len(images.classnames))
        self._heads.append(zero_shot_head(self._clip, self._tokenizer, images))
        place = len(self._heads) - 1
        processor = self._processor
        return ZeroShotImages(name, images, labels, processor, "RGB", self._heads[-1], place)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        device = batch["heads"].device
        heads_SCP = pad_sequence(self._heads, batch_first=True).to(device)
        sizes_S = torch.tensor([len(head) for head in self._heads], device=device)
        images_BP = linear(output.pooler_output.float(), self._projection_PD.to(device))
        heads_BCP = heads_SCP[batch["heads"]]
        likeness_BC = (heads_BCP @ normalize(images_BP)[..., None])[..., 0]
        missing_BC = (
            torch.arange(heads_SCP.shape[1], device=device) >= sizes_S[batch["heads"], None]
        )
        return (self._scale.to(device) * likeness_BC).masked_fill(missing_BC, -torch.inf)


@torch.no_grad()
def zero_shot_head(
    clip: "CLIPModel", tokenizer: "PreTrainedTokenizerBase", images: Images
) -> Tensor:
    """Texts of the classes, [C, P]: the mean of the normalised templates, normalised."""
    rows = []
    for name in images.classnames or ():
        texts = [template(name) for template in images.templates]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        pooled = clip.text_model(**inputs).pooler_output
        rows.append(normalize(normalize(clip.text_projection(pooled)).mean(0), dim=0))
    return torch.stack(rows)
