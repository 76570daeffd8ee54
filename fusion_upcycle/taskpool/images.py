"""Images of a task pool: what FusionBench knows of them, and batches.

A task is given as `fusion_upcycle.tables.images` takes it; without a split, the test split.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.tables import images as tables
from fusion_upcycle.tables.images import Images, Known, prepared

_LOADER_KEYS = ("batch_size", "num_workers", "pin_memory")


def load_images(name: str, given: Any) -> Images:
    """The images of the task `name`, of whose classes FusionBench may know the names.

    Raises:
        UpcyclingError: as `fusion_upcycle.tables.images.load_images`.
    """
    known = None
    if name in CLIPTemplateFactory.get_available_datasets():
        known = Known(*CLIPTemplateFactory.get_classnames_and_templates(name))
    where = f"taskpool.test_datasets.{name}"
    return tables.load_images(given, where, splits=["test"], known=known)


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
