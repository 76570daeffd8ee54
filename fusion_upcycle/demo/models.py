"""The demo models, shipped with the package: complete Hugging Face folders."""

import gzip
import lzma
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.demo.recipe import MODELS
from fusion_upcycle.demo.texts import DATA, DOMAINS, domain_text
from fusion_upcycle.errors import unknown
from fusion_upcycle.report.card import card_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def demo_model(name: str) -> Path:
    """Folder of a demo model, to be read and not to be changed.

    `base` is a Llama of 49,000 parameters that has seen 122 bytes of text for each; `trunk` is the
    same training before the learning rate fell; `prose`, `source` and `arithmetic` are the base
    fine-tuned on one domain; `moe` is a Mixtral of 16 experts. `demo.json` in each has the recipe
    and the held-out bits per byte. `python -m fusion_upcycle.demo train` makes them again.

    Raises:
        UpcyclingError: an unknown name.
    """
    if name not in MODELS:
        raise unknown("demo model", name, MODELS)
    return DATA / "models" / name


@cache
def demo_reference() -> dict[str, dict[str, float]]:
    """Bits per byte of each domain's test split by what no model should lose against.

    ``unigram``: byte frequencies of the training split; ``gzip`` and ``lzma``: the test documents
    joined and compressed by themselves at the highest level.
    """
    reference = {}
    for domain in DOMAINS:
        data = "".join(domain_text(domain, "test")).encode()
        counts = Counter("".join(domain_text(domain, "train")).encode())
        total = counts.total() + 256  # one more of each byte, so that no byte has probability 0
        unigram = -sum(math.log2((counts[byte] + 1) / total) for byte in data)
        reference[domain] = {
            "unigram": unigram / len(data),
            "gzip": 8 * len(gzip.compress(data, compresslevel=9)) / len(data),
            "lzma": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
        }
    return reference


def bits_per_byte(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    context_length: int,
    split: str = "test",
    stride: int | None = None,
) -> dict[str, float]:
    """Loss of a model on a held-out split of each demo domain: domain -> bits per byte.

    Args:
        stride: of the windows; half of `context_length` by default.
    """
    from fusion_upcycle.texts.perplexity import perplexity

    return {
        domain: perplexity(
            model,
            tokenizer,
            domain_text(domain, split),
            context_length=context_length,
            stride=stride or context_length // 2,
            batch_size=64,  # windows of a tiny model
        )["bits_per_byte"]
        for domain in DOMAINS
    }


def model_card(name: str, what: str, bits_per_byte: dict[str, float]) -> str:
    """README.md of a demo model."""
    rows = "\n".join(
        f"| {domain} | {bits:.3f} | "
        + " | ".join(f"{value:.3f}" for value in demo_reference()[domain].values())
        + " |"
        for domain, bits in bits_per_byte.items()
    )
    body = f"""# fusion_upcycle demo model: {name}

A byte-level model for demonstrations and tests: {what}. Its text is Python's documentation and
standard library, and generated arithmetic. `demo.json` has the recipe;
`python -m fusion_upcycle.demo train` makes it again.

Bits per byte on held-out text:

| domain | this model | unigram | gzip | lzma |
|---|---|---|---|---|
{rows}"""
    return card_text(body, pipeline_tag="text-generation")
