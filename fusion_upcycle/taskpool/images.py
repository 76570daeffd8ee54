"""Images of a task pool: what FusionBench knows of them, and batches.

A task is given as `fusion_upcycle.tables.images` takes it; without a split, the test split.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_bench import BaseTaskPool
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from fusion_bench.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.tables import images as tables
from fusion_upcycle.tables.images import Images, Known, prepared

_LOADER_KEYS = ("batch_size", "num_workers", "pin_memory")


def load_images(name: str, given: Any, option: str = "test_datasets") -> Images:
    """The images of the task `name`, of whose classes FusionBench may know the names.

    Args:
        option: of the task pool, which names them.

    Raises:
        UpcyclingError: as `fusion_upcycle.tables.images.load_images`.
    """
    known = None
    if name in CLIPTemplateFactory.get_available_datasets():
        known = Known(*CLIPTemplateFactory.get_classnames_and_templates(name))
    where = f"taskpool.{option}.{name}"
    return tables.load_images(given, where, splits=["test"], known=known)


@dataclass(frozen=True)
class Unlabelled(Sequence[Any]):
    """Images without their labels."""

    images: Images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images.item(index)[0]


def load_processor(pool: BaseTaskPool, given: Any) -> Any:
    """The image processor that was named, else that of the program's model pool.

    Args:
        given: folder or Hub id, a config that makes one, one, or None.

    Raises:
        UpcyclingError: there is neither.
    """
    if isinstance(given, str):
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(given)
    if given is not None:
        return instantiate(given) if isinstance(given, Mapping) else given
    models: Any = getattr(pool._program, "modelpool", None)
    if getattr(models, "_processor", None) is None:
        raise UpcyclingError(
            "There is no image processor: set taskpool.processor (folder or Hub id), or run "
            "with a model pool that has one (modelpool.processor)."
        )
    return models.load_processor()


def batches(
    images: Images, processor: Any, loader: Mapping[str, Any], mode: str = "RGB"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixel values [B, channels, height, width] and labels [B], in the order of the data.

    Args:
        processor, mode: see `fusion_upcycle.tables.images.prepared`.
        loader: options of `DataLoader`, see `check_loader`.
    """
    yield from DataLoader(_Prepared(images, processor, mode), **loader)


def check_loader(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of `DataLoader`, those that change no result.

    Raises:
        UpcyclingError: an unknown one, or one that leaves images out.
    """
    options = {"batch_size": 128, **(given or {})}
    if options.pop("drop_last", False):
        raise UpcyclingError("taskpool.dataloader_kwargs.drop_last would leave images out.")
    options.pop("shuffle", None)  # of FusionBench's configs; the order does not matter
    for name in options:
        if name not in _LOADER_KEYS:
            raise unknown("option in taskpool.dataloader_kwargs:", str(name), _LOADER_KEYS)
    return {str(name): value for name, value in options.items()}


class _Prepared(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Images, processor: Any, mode: str) -> None:
        self.images, self.processor, self.mode = images, processor, mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images.item(index)
        return prepared(image, self.processor, self.mode), label
