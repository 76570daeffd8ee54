"""FusionBench task pool: image classification by a model with a head of its own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.taskpool.dummy import get_model_summary
from torch import Tensor

from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.report import Measured
from fusion_upcycle.tables.images import class_order, image_mode
from fusion_upcycle.taskpool.image_scores import METRICS, score_images
from fusion_upcycle.taskpool.images import check_loader, load_images, load_processor
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
    from transformers import PreTrainedModel


@auto_register_config
class ImageClassificationTaskPool(BaseTaskPool):
    """Accuracy and loss of image classifiers, dense or MoE, on local data.

    FusionBench's own knows its own data sets only, and gives no standard errors.

    Args:
        test_datasets: task -> images, see ``fusion_upcycle.tables.images``; FusionBench's own
            configs too.
        processor: of images, a folder or Hub id, or a config that makes one; None for the model
            pool's own.
        dataloader_kwargs: ``batch_size``, ``num_workers`` and ``pin_memory`` of ``DataLoader``.

    A class of the data is the model's class of the same name; where the model names its classes
    ``LABEL_0`` and so on, or the data have no names, the one of the same number. The model answers
    among all of its classes. ``evaluate`` returns the report of ``CLIPVisionModelTaskPool``.

    Raises:
        UpcyclingError: an unknown option, no task, or a task with a name of the report;
            ``evaluate`` raises it for images that cannot be used.
    """

    def __init__(
        self,
        test_datasets: Mapping[str, Any],
        *,
        processor: Any = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(self, kwargs)
        super().__init__(**kwargs)
        self.test_datasets: dict[str, Any] = named(
            plain(test_datasets), "test_datasets", "task, {name: folder of images}"
        )
        self._processor = plain(processor)
        self._loader = check_loader(plain(dataloader_kwargs))
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Classify all images with ``model``; its modes are restored.

        Raises:
            UpcyclingError: images that cannot be used, or classes that the model does not have.
        """
        to_device(self, model)
        tasks = {name: load_images(name, given) for name, given in self.test_datasets.items()}
        orders = {name: class_order(images, model.config) for name, images in tasks.items()}
        processor = load_processor(self, self._processor)
        weight = next(model.parameters())
        mode = image_mode(model.config)

        def logits_of(pixels: Tensor) -> Tensor:
            return model(pixel_values=pixels.to(weight.device, weight.dtype)).logits

        report: dict[str, Any] = {}
        with Measured() as cost, evaluating(model):
            for name, images in tasks.items():
                order = orders[name]
                report[name] = score_images(
                    images,
                    logits_of,
                    classes=len(order or model.config.id2label or ()),
                    processor=processor,
                    loader=self._loader,
                    mode=mode,
                    order=order,
                )
        report["average"] = average([report[name] for name in tasks])
        report.update(get_model_summary(model))
        self._evaluations.append({"report": report, **cost.as_record()})
        print_scores("image classification", report, METRICS)
        settings = {
            "test_datasets": in_record(self.test_datasets),
            "processor": in_record(self._processor),
            "dataloader_kwargs": self._loader,
        }
        leave_record(self, settings, self._evaluations)
        return report
