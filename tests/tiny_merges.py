"""A base and fine-tunes of one shape with texts of their own, merged with router statistics."""

from functools import partial
from pathlib import Path
from typing import Any

from helpers import QUICK, merge
from tiny import dense_folder, files_of

from fusion_upcycle import add_expert
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.merging.merging import BASE

TEXTS = {
    "one": "abcab cabca " * 300,
    "two": "0123 4567 89 " * 300,
    "three": "XYZ; ZYX: " * 300,
    "four": "(()) )( " * 400,
}
STATISTICS: dict[str, Any] = {
    "router_init": "prototype",
    "calibration_tokens": 256,
    "statistics": True,
}
add = partial(add_expert, **QUICK)


def speakers(tmp_path: Path, family: str = "llama", **fields: Any) -> dict[str, Path]:
    """A base and four fine-tunes of one shape, each with a text of its own in the same folder."""
    made = {}
    for seed, name in enumerate([BASE, *TEXTS]):
        made[name] = dense_folder(
            tmp_path / name, family, seed=seed, **{"vocab_size": 257} | fields
        )
        byte_tokenizer(64).save_pretrained(made[name])
        (made[name] / "text.txt").write_text(TEXTS.get(name, ""))
    return made


def text_of(models: dict[str, Path], name: str) -> str:
    return str(models[name] / "text.txt")


def merged(models: dict[str, Path], output: Path, *names: str, **options: Any) -> Converted:
    """Some of them, and the base, with statistics."""
    return merge(
        {BASE: models[BASE]} | {name: models[name] for name in names},
        output,
        **{
            "shared": "base",
            "calibration": {name: text_of(models, name) for name in names},
            **STATISTICS,
            **options,
        },
    )


def statistics_of(folder: Path) -> dict[str, bytes]:
    return files_of(folder / "router_statistics")


def with_merge(folder: Path) -> dict[str, Path]:
    """The fine-tunes, and a merge of the first two as `moe`."""
    models = speakers(folder)
    merged(models, folder / "moe", "one", "two")
    return models | {"moe": folder / "moe"}
