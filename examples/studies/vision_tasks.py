"""Models and images of the experiment `vision_three_tasks`: a ViT, fine-tuned on three tasks.

Command:  python examples/studies/vision_tasks.py
          python -m fusion_upcycle benchmark experiment=vision_three_tasks
Needs:    what examples/studies/fashion.py needs; one core, 2 minutes after it.
Expected: HOME/tasks/NAME, parquet files, and HOME/models/NAME, for rotated, inverted and noisy.

Each task is Fashion-MNIST with its images changed: turned by 90 degrees, white for black, or with
noise. No image is in two tasks; classes and heads are the same, so that models can be merged.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fashion import BATCH_SIZE, HOME, Arrays, base, fit, images, write

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def noisy(pixels: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0.0, 80.0, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


#: Task -> what is done to its images [N, 28, 28].
TASKS: dict[str, Callable[[Pixels], Pixels]] = {
    "rotated": lambda pixels: np.ascontiguousarray(np.rot90(pixels, axes=(1, 2))),
    "inverted": lambda pixels: 255 - pixels,
    "noisy": noisy,
}
#: Images of each task.
SIZES = {"train": 18_000, "validation": 1_000, "test": 3_000}
#: Of a fine-tune: two passes.
RECIPE: dict[str, Any] = {
    "examples": 36_000,
    "batch_size": BATCH_SIZE,
    "learning_rate": 5e-4,
    "schedule": "wsd",
    "decay_share": 0.5,
    "final_share": 0.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of the idx files, .gz or not")
    parser.add_argument("--home", type=Path, default=HOME)
    arguments = parser.parse_args()
    images(arguments.home, arguments.images)
    for name in TASKS:
        print(f"{name}: {task(arguments.home, name)}, {fine_tune(arguments.home, name)}")


def task(home: Path, name: str) -> Path:
    """The folder of a task's images, made once."""
    folder = home / "tasks" / name
    if not folder.is_dir():
        place, change = list(TASKS).index(name), TASKS[name]
        splits = {}
        for split, size in SIZES.items():
            pixels, labels = read(home / "images", split, place * size, size)
            splits[split] = (change(pixels), labels)
        write(splits, folder)
    return folder


def read(folder: Path, split: str, first: int, size: int) -> Arrays:
    """Some images of a parquet file."""
    from datasets import load_dataset

    rows = load_dataset(str(folder), split=split)[first : first + size]
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    return pixels, np.asarray(rows["label"], dtype=np.uint8)


def fine_tune(home: Path, name: str) -> Path:
    """The folder of the base, trained on one task; made once."""
    from fusion_upcycle.live.loading import load_by_config, load_processor

    folder = home / "models" / name
    if not folder.is_dir():
        model = load_by_config(base(home))
        processor = load_processor(base(home), model)
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as work:
            fit(model, processor, task(home, name), Path(work), output=folder, **RECIPE)
    return folder


if __name__ == "__main__":
    main()
