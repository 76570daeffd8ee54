"""FusionBench task pool: zero-shot classification by a CLIP whose vision tower is the model."""

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.taskpool.dummy import get_model_summary
from fusion_bench.utils import instantiate
from torch import Tensor, nn

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.loading import as_folder, load_folder
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.report import Measured
from fusion_upcycle.tables.images import Images
from fusion_upcycle.taskpool.image_scores import METRICS, score_images
from fusion_upcycle.taskpool.images import check_loader, load_images
from fusion_upcycle.taskpool.pool import (
    check_options,
    in_record,
    leave_record,
    named,
    plain,
    to_device,
)
from fusion_upcycle.taskpool.scores import average, print_scores

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel


@auto_register_config
class CLIPVisionModelTaskPool(BaseTaskPool):
    """FusionBench's zero-shot classification, for dense vision towers and MoEs, with local data.

    Args:
        test_datasets: task -> images, see ``fusion_upcycle.tables.images``; FusionBench's own
            configs too.
        base_model: folder or Hub id of the whole CLIP model, whose text tower and projections
            judge.
        clip_model: likewise, or as FusionBench's configs have it; None for ``base_model``.
        processor: of texts and images, a folder or Hub id, or as FusionBench's configs have it;
            None for ``base_model``.
        data_processor: of images, where it is another one.
        dataloader_kwargs: ``batch_size``, ``num_workers`` and ``pin_memory`` of ``DataLoader``.
        layer_wise_feature_save_path, layer_wise_feature_first_token_only,
            layer_wise_feature_max_num: of FusionBench's configs; features are not saved here, so
            that the first must be None.

    Heads are made as FusionBench makes them: the mean of the normalised texts of a class, its
    templates filled in. ``evaluate`` returns ``{task: {accuracy, accuracy_stderr, loss,
    loss_stderr, examples}, "average": ..., "model_info": ...}``; the loss is the cross-entropy in
    nats, its mean over images (FusionBench's is over batches). The run record's section
    ``taskpool`` is as that of ``CausalLMPerplexityTaskPool``.

    Raises:
        UpcyclingError: an unknown option, no task, or a task with a name of the report;
            ``evaluate`` raises it for models and images that cannot be used.
    """

    def __init__(
        self,
        test_datasets: Mapping[str, Any],
        *,
        base_model: str | None = None,
        clip_model: Any = None,
        processor: Any = None,
        data_processor: Any = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        layer_wise_feature_save_path: str | None = None,
        layer_wise_feature_first_token_only: bool = True,
        layer_wise_feature_max_num: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(self, kwargs)
        super().__init__(**kwargs)
        if layer_wise_feature_save_path is not None:
            raise UpcyclingError(
                "taskpool.layer_wise_feature_save_path: features are not saved here. Set it to "
                "null, or use fusion_bench.taskpool.CLIPVisionModelTaskPool."
            )
        self.test_datasets: dict[str, Any] = named(
            plain(test_datasets), "test_datasets", "task, {name: folder of images}"
        )
        self._clip = plain(clip_model) or base_model
        self._texts = plain(processor) or base_model
        self._images = plain(data_processor) or self._texts
        for name, value in (("clip_model", self._clip), ("processor", self._texts)):
            if value is None:
                raise UpcyclingError(f"Set taskpool.base_model (folder or Hub id), or {name}.")
        self._loader = check_loader(plain(dataloader_kwargs))
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Classify all images with ``model`` as the vision tower; its modes are restored.

        Raises:
            UpcyclingError: a CLIP model or images that cannot be used, a task without class names,
                or a model that does not fit the CLIP model.
        """
        to_device(self, model)
        tasks = [self._task(name) for name in self.test_datasets]
        clip = self._load_clip()
        _require_fit(model, clip)
        weight = next(model.parameters())
        clip.to(device=weight.device, dtype=weight.dtype).eval()
        clip.vision_model = model
        texts = _processor(self._texts)
        images_processor = texts if self._images == self._texts else _processor(self._images)
        classifier = HFCLIPClassifier(clip, texts)
        report: dict[str, Any] = {}
        with Measured() as cost, evaluating(model):
            for name, images in zip(self.test_datasets, tasks, strict=True):
                assert images.classnames is not None
                classifier.set_classification_task(list(images.classnames), list(images.templates))

                def logits_of(pixels: Tensor, name: str = name) -> Tensor:
                    pixels = pixels.to(weight.device, weight.dtype)
                    found = classifier(pixels, return_dict=True, task_name=name)
                    return found["logits"]

                report[name] = score_images(
                    images,
                    logits_of,
                    classes=len(images.classnames),
                    processor=images_processor,
                    loader=self._loader,
                )
        report["average"] = average([report[name] for name in self.test_datasets])
        report.update(get_model_summary(model))
        self._evaluations.append({"report": report, **cost.as_record()})
        print_scores("zero-shot classification", report, METRICS)
        settings = {
            "test_datasets": in_record(self.test_datasets),
            "clip_model": in_record(self._clip),
            "processor": in_record(self._texts),
            "data_processor": in_record(self._images),
            "dataloader_kwargs": self._loader,
        }
        leave_record(self, settings, self._evaluations)
        return report

    def _task(self, name: str) -> Images:
        images = load_images(name, self.test_datasets[name])
        if images.classnames is None:
            raise UpcyclingError(
                f"{images.where}: neither the data nor FusionBench name the classes. Give their "
                "names, {path: ..., classnames: [cat, dog]}."
            )
        return images

    def _load_clip(self) -> Any:
        """A fresh one each time, since it takes the model in and its dtype on."""
        from transformers import CLIPModel

        if isinstance(self._clip, nn.Module):
            return deepcopy(self._clip)
        found = as_folder(self._clip)
        if found is None:
            return instantiate(self._clip)
        wanted, folder, options = found
        return load_folder(wanted or CLIPModel, folder, **options)


def _processor(given: Any) -> Any:
    if isinstance(given, str):
        from transformers import CLIPProcessor

        return CLIPProcessor.from_pretrained(given)
    return instantiate(given) if isinstance(given, Mapping) else given


def _require_fit(model: nn.Module, clip: "CLIPModel") -> None:
    """The projection takes the tower's output; FusionBench's wrappers may have no config."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    wanted = clip.visual_projection.in_features
    if size not in (None, wanted):
        raise UpcyclingError(
            f"The vision tower gives {size} numbers for an image, and the CLIP model's projection "
            f"takes {wanted}. Give the CLIP model that the tower was fine-tuned from."
        )
