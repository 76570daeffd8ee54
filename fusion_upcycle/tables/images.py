"""Labelled images, and what their classes are called.

They are given as one of:

- a folder of images (a folder for each class) or of parquet files, or a `.parquet` file;
- `{path, name, split, data_files, data_dir, classnames, templates}`, the first five as
  `datasets.load_dataset` takes them;
- `{_target_: function, ...}`, as FusionBench's configs have it, which gives a data set.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.tables.reading import load_table, readable, specified

#: As of FusionBench's `HFCLIPClassifier`.
DEFAULT_TEMPLATES: list[Callable[[str], str]] = [lambda name: f"a photo of a {name}"]
_SAID = ("classnames", "templates")


class Known(NamedTuple):
    """What is known of the images of a name without a look at them.

    Attributes:
        classnames: of the labels 0, 1, ...
        templates: class name -> text.
    """

    classnames: Sequence[str]
    templates: Sequence[Callable[[str], str]]


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
        """An image, and its label as a whole number.

        Raises:
            UpcyclingError: a file that is no image.
        """
        try:
            row = self.table[index]
        except (OSError, SyntaxError) as error:  # of PIL; a broken PNG is a SyntaxError
            raise UpcyclingError(
                f"{self.where}: image {index} cannot be read: {error}. Leave it out or get "
                "it again."
            ) from error
        image, label = (row[c] for c in self.columns) if isinstance(row, Mapping) else row
        return image, int(label)

    def labels(self) -> list[int]:
        """All labels; the images of a table are not read."""
        if getattr(self.table, "features", None) is not None:
            # As a slice: a column alone is read row by row.
            return [int(label) for label in self.table[self.columns[1]][:]]
        return [self.item(index)[1] for index in range(len(self))]


def load_images(
    given: Any, where: str, *, splits: Sequence[str], known: Known | None = None
) -> Images:
    """Images of one specification (see the module).

    Class names are the config's `classnames`; else, for a `{_target_: ...}`, those that are known;
    else those of the data; else those that are known.

    Args:
        where: the option that names them, for errors.
        splits: taken where the config says none, the first that there is; or the only one.
        known: class names and templates, where there are any.

    Raises:
        UpcyclingError: what cannot be read as images with labels, and class names that are in
            another order than the labels of the data.
    """
    theirs = None if known is None else list(known.classnames)
    if isinstance(given, Mapping) and "_target_" in given:
        said = {key: given[key] for key in _SAID if given.get(key) is not None}
        table, prefer_theirs = _called(given, where), True
    elif not isinstance(given, Mapping | str) and hasattr(given, "__getitem__"):  # in memory
        table, said, prefer_theirs = given, {}, True
    else:
        source, said = specified(given, where, _SAID)
        table = load_table(source, where, splits)
        prefer_theirs = False
    columns, table = _columns(table, where)
    own = _names_in(table, columns[1])
    if said.get("classnames") is not None:
        classnames: list[str] | None = [str(each) for each in said["classnames"]]
    else:
        classnames = (theirs or own) if prefer_theirs else (own or theirs)
        if theirs is not None and classnames is theirs:
            _require_order(where, theirs, own)
    templates = DEFAULT_TEMPLATES if known is None else known.templates
    if said.get("templates") is not None:
        templates = [_template(where, each) for each in said["templates"]]
    return Images(where, table, columns, classnames, templates)


def check_labels(images: Images, labels: Sequence[int], classes: int, first: int = 0) -> None:
    """Refuse labels without a class, as -1 in test data whose answers are kept back.

    Args:
        first: number of the first image of these.

    Raises:
        UpcyclingError: there is one.
    """
    for number, label in enumerate(labels):
        if not 0 <= label < classes:
            raise UpcyclingError(
                f"{images.where}: image {first + number} has the label {label}, and there are "
                f"{classes} classes. Give labels from 0 on, or all classnames."
            )


def prepared(image: Any, processor: Any, mode: str) -> Tensor:
    """Pixel values of an image, [channels, height, width].

    Args:
        processor: of transformers, or a function of one image, as FusionBench takes it.
        mode: that it is converted to, of PIL.
    """
    from transformers import BaseImageProcessor, ProcessorMixin

    if not isinstance(processor, BaseImageProcessor | ProcessorMixin):
        return processor(image)
    found = processor(images=[image.convert(mode)], return_tensors="pt")
    return torch.as_tensor(found["pixel_values"][0])


def image_mode(config: Any) -> str:
    """Of PIL: what a model's images are converted to."""
    return "L" if getattr(config, "num_channels", 3) == 1 else "RGB"


def class_order(images: Images, config: Any) -> Sequence[int] | None:
    """Label of the data -> class of the model, by name; None where their numbers are the same.

    They are where the model names its classes `LABEL_0` and so on, or the data have no names.

    Raises:
        UpcyclingError: a class of the data that the model has not, or has twice.
    """
    known = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    unnamed = all(name == f"LABEL_{number}" for number, name in known.items())
    if images.classnames is None or unnamed:
        return None
    theirs = [simplified(name) for name in known.values()]
    wanted = [simplified(name) for name in images.classnames]
    if wanted == theirs:
        return None
    for name, plainly in zip(images.classnames, wanted, strict=True):
        if theirs.count(plainly) != 1:
            many = "several classes" if plainly in theirs else "no class"
            raise UpcyclingError(
                f"{images.where}: the model has {many} {name!r} among "
                f"{', '.join(list(known.values())[:5])}, .... Give the model's names of the data's "
                "labels, {path: ..., classnames: [...]}."
            )
    return [list(known)[theirs.index(plainly)] for plainly in wanted]


def simplified(name: str) -> str:
    """A class name, so that ways to write it are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _called(given: Mapping[str, Any], where: str) -> Any:
    """What a `{_target_: function}` gives."""
    from hydra.utils import instantiate

    with readable(where, str(given["_target_"])):
        return instantiate({k: v for k, v in given.items() if k not in _SAID}, _convert_="all")


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
