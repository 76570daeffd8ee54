"""Texts or images of several domains, from files: whichever a model takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_upcycle.architectures.layout import model_class, takes_images
from fusion_upcycle.checkpoint.source import locate, read_config
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.files import files_below, local_path, specification
from fusion_upcycle.texts.documents import load_documents


def class_of(folder: Path) -> tuple[Any, bool]:
    """The model class of a folder, and whether it takes images."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    if not config.architectures:  # of a causal LM that was saved by other hands
        return AutoModelForCausalLM, False
    return model_class(config.architectures[0]), takes_images(config)


def read_data(folder: str | Path, sources: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Texts or images of each `NAME=PATH`, as the model of a folder or Hub id takes them.

    Raises:
        UpcyclingError: as `read_texts` and `read_images`; no model there.
    """
    _, images = class_of(locate(folder))
    return {**(read_images(sources) if images else read_texts(sources))}


def read_images(sources: Sequence[str]) -> dict[str, "ImageFiles"]:
    """All images below the folder, or the image file, of each `NAME=PATH`.

    Raises:
        UpcyclingError: not of that form, a name that comes twice, or no images.
    """
    return {
        name: ImageFiles.of(local_path(path, f"--data {name}"))
        for name, path in _pairs(sources).items()
    }


@dataclass(frozen=True)
class ImageFiles(Sequence[Any]):
    """Image files, opened when they are asked for."""

    files: Sequence[Path]

    @classmethod
    def of(cls, path: Path) -> "ImageFiles":
        """All below a folder, hidden ones aside; or one file.

        Raises:
            UpcyclingError: there is no image.
        """
        from PIL import Image

        known = {*Image.registered_extensions()}
        inside = files_below(path) if path.is_dir() else [path]
        files = [file for file in inside if file.suffix.lower() in known and file.is_file()]
        if not files:
            raise UpcyclingError(
                f"{path.absolute()} has no images. Give an image file, or a folder of some."
            )
        return cls(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.files[index]) as image:
                return image.copy()
        except (OSError, UnidentifiedImageError) as error:
            raise UpcyclingError(
                f"{self.files[index]} cannot be read as an image: {error}. Leave it out."
            ) from error


def read_texts(sources: Sequence[str]) -> dict[str, list[str]]:
    """Documents of each `NAME=PATH`, as `fusion_upcycle.texts.documents` takes a path or mapping.

    Raises:
        UpcyclingError: not of that form, a name that comes twice, or no text.
    """
    return {
        name: load_documents(specification(path), f"--data {name}")
        for name, path in _pairs(sources).items()
    }


def _pairs(sources: Sequence[str]) -> dict[str, str]:
    """Name -> path of each `NAME=PATH`."""
    found: dict[str, str] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        if not equals or not name or not path:
            raise UpcyclingError(f"--data {source} must be NAME=FILE_OR_FOLDER.")
        if name in found:
            raise UpcyclingError(f"--data {name} is given twice. Use another name for the second.")
        found[name] = path
    return found


def demo_texts() -> dict[str, tuple[str, ...]]:
    """The held-out text of the three demo domains."""
    from fusion_upcycle.demo.texts import DOMAINS, domain_text

    return {domain: domain_text(domain, "test") for domain in DOMAINS}
