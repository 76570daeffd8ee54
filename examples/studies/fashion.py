"""Fashion-MNIST as files that training and task pools read, and a small ViT trained on it.

Command:  python examples/studies/fashion.py [--images FOLDER] [--home FOLDER]
Needs:    apt-get and dpkg-deb for Debian's package `dataset-fashion-mnist` (30.9 MB, MIT licence;
          it is unpacked, not installed), or a FOLDER of its four idx files; one core, 4 minutes.
Expected: HOME/images/{train,validation,test}.parquet and HOME/base, a ViT of 205,066 parameters.

The last 5,000 of the 60,000 training images are validation images.
"""

import argparse
import gzip
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

HOME = Path("outputs/studies/fashion")
PACKAGE = "dataset-fashion-mnist"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
           "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")  # fmt: skip
HELD_OUT = 5_000
SIZE = 28
#: Images [N, 28, 28] and their labels [N].
Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]

#: 16 patches and a class token. Weights are drawn large enough for a width of 64: with the 0.02 of
#: ViT's larger models one pass over the images ends 2 points of accuracy lower.
SHAPE: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "id2label": dict(enumerate(CLASSES)),
}
BATCH_SIZE = 64
#: Of the base: five passes, the learning rate decayed to zero, as published models are.
RECIPE: dict[str, Any] = {
    "examples": 275_000,
    "batch_size": BATCH_SIZE,
    "learning_rate": 1.5e-3,
    "schedule": "wsd",
    "decay_share": 0.4,
    "final_share": 0.0,
}
#: Of every training here.
QUIETLY: dict[str, Any] = {"accelerator": "cpu", "log_every": 0, "checkpoint_every": 0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of the idx files, .gz or not")
    parser.add_argument("--home", type=Path, default=HOME)
    arguments = parser.parse_args()
    print(f"Images: {images(arguments.home, arguments.images)}")
    print(f"Base:   {base(arguments.home)}")


def images(home: Path, source: Path | None = None) -> Path:
    """The folder of the parquet files, made once.

    Args:
        source: folder of the idx files; None takes them from Debian's package.
    """
    folder = home / "images"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=home) as temporary:
                found = source or unpacked(Path(temporary))
                train, test = read_idx(found, "train"), read_idx(found, "t10k")
            write(
                {
                    "train": (train[0][:-HELD_OUT], train[1][:-HELD_OUT]),
                    "validation": (train[0][-HELD_OUT:], train[1][-HELD_OUT:]),
                    "test": test,
                },
                folder,
            )
    return folder


def unpacked(folder: Path) -> Path:
    """Debian's package, fetched by apt and unpacked: the folder of its idx files."""
    subprocess.run(["apt-get", "-q", "download", PACKAGE], cwd=folder, check=True)
    (package,) = folder.glob(f"{PACKAGE}_*.deb")
    subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    return folder / "usr/share/datasets/fashion-mnist"


def read_idx(folder: Path, part: str) -> Arrays:
    """Images and labels of `train` or `t10k`."""

    def read(name: str) -> npt.NDArray[np.uint8]:
        (file,) = folder.glob(f"{part}-{name}-ubyte*")
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        dimensions = content[3]  # after two zeros and the code of unsigned bytes
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)

    return read("images-idx3"), read("labels-idx1")


def write(splits: Mapping[str, Arrays], folder: Path) -> None:
    """A parquet file for each split; the folder appears when it is complete."""
    from datasets import ClassLabel, Dataset, Features, Image
    from datasets.utils.logging import disable_progress_bar
    from PIL import Image as Picture

    disable_progress_bar()
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        for split, (pixels, labels) in splits.items():
            rows = {"image": [Picture.fromarray(each) for each in pixels], "label": labels.tolist()}
            Dataset.from_dict(rows, features).to_parquet(made / f"{split}.parquet")
        made.rename(folder)


def base(home: Path) -> Path:
    """The folder of the base ViT, trained once."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = home / "base"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            torch.manual_seed(0)
            model = ViTForImageClassification(ViTConfig(**SHAPE))
            half = [0.5]  # pixels from -1 to 1; images have their size already
            size = {"height": SIZE, "width": SIZE}
            processor = ViTImageProcessor(
                size=size, do_resize=False, image_mean=half, image_std=half
            )
            with tempfile.TemporaryDirectory(dir=home) as work:
                fit(model, processor, home / "images", Path(work), output=folder, **RECIPE)
    return folder


def in_memory(folder: Path, split: str) -> list[tuple[Any, int]]:
    """Images and labels, decoded once: reading and preparing them costs a third of a training."""
    from datasets import load_dataset

    rows = load_dataset(str(folder), split=split)[:]
    return list(zip(rows["image"], rows["label"], strict=True))


def pixels(image: Any) -> Any:
    """What the base's processor makes of an image, [1, 28, 28], without its checks."""
    import torch

    return torch.from_numpy(np.array(image, dtype=np.float32)[None] / 127.5 - 1.0)


def fit(
    model: Any,
    processor: Any,
    data: Any,
    work: Path,
    *,
    output: Path | None = None,
    **options: Any,
) -> Any:
    """`fusion_upcycle.training.run.train`, quietly.

    Args:
        data: folder of parquet files, or images in memory.
    """
    from fusion_upcycle.training.options import make_training_options
    from fusion_upcycle.training.run import Origin, Places, train

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Routers out of balance")  # the record says so
        return train(
            model,
            processor,
            make_training_options(**QUIETLY | options),
            data={"images": str(data) if isinstance(data, Path) else data},
            places=Places(work / "work", work / "log", output),
            origin=Origin(model.config.name_or_path or "fashion.py"),
            progress=False,
        )


def scores(
    model: Any, processor: Any, sets: Mapping[str, Any], batch_size: int = BATCH_SIZE
) -> dict[str, dict[str, float]]:
    """Accuracy and loss (nats per image) of each set, as training scores what it holds out.

    Where experts choose tokens they choose among those of a batch, here as large as in training.
    """
    from fusion_upcycle.training.objectives import objective_for
    from fusion_upcycle.training.options import make_training_options

    options = make_training_options(examples=batch_size, batch_size=batch_size)
    objective = objective_for(model, processor, options)
    objective.hold_out(sets, HOME)
    return {name: objective.score(model, name) for name in sets}


if __name__ == "__main__":
    main()
