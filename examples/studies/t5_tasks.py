"""Models and data of the experiment `t5_three_tasks`: a tiny T5, fine-tuned on three tasks.

Command:  python examples/studies/t5_tasks.py
          python -m fusion_upcycle benchmark experiment=t5_three_tasks
Needs:    the text that the package ships, nothing else; one core, 5 minutes.
Expected: HOME/data/NAME/{train,validation,test,texts}.jsonl of three tasks, HOME/base, a gated T5
          of 238,656 parameters that has learnt all three, and HOME/models/NAME.

Tasks are text to text, a byte a token, and each says its name first, as T5's do. `sums` adds two
numbers of two or three digits; `vowels` puts back those that were taken from three words of prose;
`domains` tells prose, source code and worked arithmetic apart by 20 characters. Splits are those of
the text; no example is in two of them. `texts.jsonl` is inputs and targets as running text.
"""

import argparse
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fusion_upcycle.demo.texts import DOMAINS, domain_text

HOME = Path("outputs/studies/t5")
#: Of each task.
EXAMPLES = {"train": 24_000, "validation": 300, "test": 1_000}
SHAPE: dict[str, Any] = {
    "d_model": 64,
    "d_ff": 160,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
WORDS = 3  # that vowels are taken from at once
LINE = 20  # characters of a line whose domain is asked
RECIPE = {
    "batch-size": 32,
    "context-length": 64,
    "schedule": "wsd",
    "warmup-share": 0.05,
    "final-share": 0.0,
    "accelerator": "cpu",
    "log-every": 100,
}
BASE = {"examples": 64_000, "learning-rate": 4e-3, "decay-share": 0.2}
FINE_TUNE = {"examples": 24_000, "learning-rate": 2e-3, "decay-share": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, default=HOME)
    home = parser.parse_args().home
    write_data(home)
    draw(home / "drawn")
    train(home, home / "drawn", home / "base", tuple(TASKS), BASE)
    for name in TASKS:
        train(home, home / "base", home / "models" / name, (name,), FINE_TUNE)


def sums(split: str) -> Iterator[tuple[str, str]]:
    for document in domain_text("arithmetic", split):
        for line in document.splitlines():
            if found := re.match(r"(\d{2,3}) \+ (\d{2,3}):.* = (\d+)$", line):
                yield f"{found[1]} + {found[2]}", found[3]


def vowels(split: str) -> Iterator[tuple[str, str]]:
    for document in domain_text("prose", split):
        words = re.findall(r"\b[a-z]{2,8}\b", document)
        for start in range(0, len(words) - WORDS, WORDS):
            text = " ".join(words[start : start + WORDS])
            yield re.sub("[aeiou]", "", text), text


def domains(split: str) -> Iterator[tuple[str, str]]:
    for domain in DOMAINS:
        for document in domain_text(domain, split):
            for line in document.splitlines():
                if len(line.strip()) >= LINE:
                    yield line.strip()[:LINE], domain


#: Task -> its examples of a split, each an input without the task's name, and a target.
TASKS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "sums": sums,
    "vowels": vowels,
    "domains": domains,
}


def write_data(home: Path) -> None:
    """Examples of all tasks and splits."""
    for name, examples in TASKS.items():
        (home / "data" / name).mkdir(parents=True, exist_ok=True)
        seen: set[tuple[str, str]] = set()
        for split, size in EXAMPLES.items():
            new = sorted(set(examples(split)) - seen)
            found = random.Random(f"{name}/{split}").sample(new, min(size, len(new)))
            seen.update(found)
            rows = [{"input": f"{name}: {given}", "target": target} for given, target in found]
            write(home / "data" / name / f"{split}.jsonl", rows)
            if split == "train":
                texts = [{"text": " ".join(row.values())} for row in rows]
                write(home / "data" / name / "texts.jsonl", texts)


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw(folder: Path) -> None:
    """An untrained T5 and its tokenizer, of bytes."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from fusion_upcycle.demo.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer(RECIPE["context-length"])
    end = tokenizer.eos_token_id
    tokens = {"pad_token_id": end, "eos_token_id": end, "decoder_start_token_id": end}
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), **SHAPE, **tokens)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(home: Path, model: Path, output: Path, tasks: tuple[str, ...], recipe: Any) -> None:
    """What `python -m fusion_upcycle train` does; made once."""
    from fusion_upcycle.cli import main as fusion_upcycle

    if output.is_dir():
        return
    asked = RECIPE | recipe
    flags: list[str] = ["--quiet"]
    flags += [part for flag, value in asked.items() for part in (f"--{flag}", str(value))]
    if len(tasks) > 1:
        flags += ["--mixture", ",".join(f"{name}=1" for name in tasks)]
    for name in tasks:
        flags += ["--data", f"{name}={home / 'data' / name / 'train.jsonl'}"]
        flags += ["--validation", f"{name}={home / 'data' / name / 'validation.jsonl'}"]
    fusion_upcycle(["train", str(model), str(output), *flags])
    shutil.rmtree(output.with_name(f"{output.name}.training"))


if __name__ == "__main__":
    main()
