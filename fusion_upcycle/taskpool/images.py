"""Labelled images of a task, and what its classes are called.

A task is one of:

- a folder of images (a folder for each class) or of parquet files, or a `.parquet` file;
- `{path, name, split, data_files, data_dir, classnames, templates}`, the first five as
  `datasets.load_dataset` takes them, without a split the test split;
- `{_target_: function, ...}`, as FusionBench's configs have it, which gives a data set.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from fusion_bench.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.taskpool.tables import load_table, readable, specified

#: As of FusionBench's `HFCLIPClassifier`.
DEFAULT_TEMPLATES: list[Callable[[str], str]] = [lambda name: f"a photo of a {name}"]
_SAID = ("classnames", "templates")
_LOADER_KEYS = ("batch_size", "num_workers", "pin_memory")


@dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        where: the option that names them, for errors.
        table: rows, as mappings with the two columns or as pairs.
        columns: of the image and of the label, in a mapping.
        classnames: of the labels 0, 1, ...; None where neither config nor data say them.
        templates: class name -> text, for zero-shot heads.
    """

    where: str
    table: Any
    columns: tuple[str, str]
    classnames: Sequence[str] | None
    templates: Sequence[Callable[[str], str]]

    def __len__(self) -> int:
        return len(self.table)

    def item(self, index: int) -> tuple[Any, int]:
        """An image, and its label as a whole number."""
        row = self.table[index]
        image, label = (row[c] for c in self.columns) if isinstance(row, Mapping) else row
        return image, int(label)


def load_images(name: str, given: Any) -> Images:
    """The images of the task `name`.

    Class names are the config's `classnames`; else, for a `{_target_: ...}` of a task that
    FusionBench knows, its own; else those of the data; else FusionBench's.

    Raises:
        UpcyclingError: what cannot be read as images with labels, and class names that are in
            another order than the labels of the data.
    """
    where = f"taskpool.test_datasets.{name}"
    theirs, templates = _of_fusion_bench(name)
    if isinstance(given, Mapping) and "_target_" in given:
        said = {key: given[key] for key in _SAID if given.get(key) is not None}
        with readable(where, str(given["_target_"])):
            table = instantiate({k: v for k, v in given.items() if k not in _SAID})
        prefer_theirs = True
    elif not isinstance(given, Mapping | str) and hasattr(given, "__getitem__"):  # in memory
        table, said, prefer_theirs = given, {}, True
    else:
        source, said = specified(given, where, _SAID)
        table = load_table(source, where)
        prefer_theirs = False
    columns, table = _columns(table, where)
    own = _names_in(table, columns[1])
    if said.get("classnames") is not None:
        classnames: list[str] | None = [str(each) for each in said["classnames"]]
    else:
        classnames = (theirs or own) if prefer_theirs else (own or theirs)
        if theirs is not None and classnames is theirs:
            _require_order(where, theirs, own)
    if said.get("templates") is not None:
        templates = [_template(where, each) for each in said["templates"]]
    return Images(where, table, columns, classnames, templates)


def batches(
    images: Images, processor: Any, loader: Mapping[str, Any], mode: str = "RGB"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixel values [B, channels, height, width] and labels [B], in the order of the data.

    Args:
        processor: of transformers, or a function of one image, as FusionBench takes it.
        loader: options of `DataLoader`, see `check_loader`.
        mode: that images are converted to, of PIL.
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


def check_labels(images: Images, labels: Tensor, classes: int, first: int) -> None:
    """Refuse labels without a class, as -1 in test data whose answers are kept back.

    Args:
        first: number of the first image of these.

    Raises:
        UpcyclingError: there is one.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        raise UpcyclingError(
            f"{images.where}: image {first + wrong[0]} has the label {int(labels[wrong[0]])}, and "
            f"there are {classes} classes. Give labels from 0 on, or all classnames."
        )


def simplified(name: str) -> str:
    """A class name, so that ways to write it are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


class _Prepared(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Images, processor: Any, mode: str) -> None:
        self.images, self.processor, self.mode = images, processor, mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from transformers import BaseImageProcessor, ProcessorMixin

        image, label = self.images.item(index)
        if not isinstance(self.processor, BaseImageProcessor | ProcessorMixin):
            return self.processor(image), label
        prepared = self.processor(images=[image.convert(self.mode)], return_tensors="pt")
        return torch.as_tensor(prepared["pixel_values"][0]), label


def _of_fusion_bench(name: str) -> tuple[list[str] | None, list[Callable[[str], str]]]:
    if name not in CLIPTemplateFactory.get_available_datasets():
        return None, DEFAULT_TEMPLATES
    classnames, templates = CLIPTemplateFactory.get_classnames_and_templates(name)
    return list(classnames), list(templates)


def _columns(table: Any, where: str) -> tuple[tuple[str, str], Any]:
    """The columns `image` and `label`, or the only ones of their kind."""
    features = getattr(table, "features", None)
    if features is None:
        return ("image", "label"), table
    from datasets import ClassLabel, Image

    found = []
    for column, kind in (("image", Image), ("label", ClassLabel)):
        of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
        if column not in features and len(of_kind) != 1:
            raise UpcyclingError(
                f"{where} has no column {column!r} but {', '.join(features)}. Rename one."
            )
        found.append(column if column in features else of_kind[0])
    image, label = found
    if not isinstance(features[image], Image):  # bytes, as others than `datasets` write them
        with readable(where, f"column {image}"):
            table = table.cast_column(image, Image())
    dtype = getattr(features[label], "dtype", "")
    if not str(dtype).startswith(("int", "uint", "bool")):
        raise UpcyclingError(
            f"{where}: the column {label!r} holds {dtype or features[label]}. Give labels as whole "
            "numbers from 0 on."
        )
    return (image, label), table


def _names_in(table: Any, label: str) -> list[str] | None:
    names = getattr((getattr(table, "features", None) or {}).get(label), "names", None)
    return None if names is None else [str(name) for name in names]


def _require_order(where: str, theirs: Sequence[str], own: Sequence[str] | None) -> None:
    """FusionBench's class names must mean the labels of the data."""
    if own is None:
        return
    ours, known = [[simplified(name) for name in names] for names in (own, theirs)]
    if set(ours) == set(known) and ours != known:
        raise UpcyclingError(
            f"{where}: the labels of the data are {', '.join(own[:3])}, ..., and FusionBench's "
            f"class names are {', '.join(theirs[:3])}, ... Set {where}.classnames in the data's "
            "order."
        )


def _template(where: str, text: Any) -> Callable[[str], str]:
    if not isinstance(text, str) or "{}" not in text:
        raise UpcyclingError(
            f"{where}.templates: {text!r} must be a text with {{}} where the class name goes."
        )
    return lambda name: text.replace("{}", name)
