"""The demo models in the user's cache: trained on first use, complete Hugging Face folders."""

import gzip
import json
import lzma
import math
import os
import platform
import tempfile
from collections import Counter
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.checkpoint.durable import move
from fusion_upcycle.demo.recipe import BASE, MODELS, Recipe
from fusion_upcycle.demo.texts import DOMAINS, domain_text, text_identity
from fusion_upcycle.errors import unknown
from fusion_upcycle.report.card import card_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_RECIPE = Recipe()


def demo_model(name: str, recipe: Recipe = DEFAULT_RECIPE) -> Path:
    """Folder of the model ``base``, ``prose``, ``source`` or ``arithmetic``, trained on first use.

    Folders are below ``$FUSION_UPCYCLE_CACHE`` (default ``~/.cache/fusion_upcycle``), one set per
    Python version, text and recipe. Processes that ask at the same time wait for the one that
    trains. ``demo.json`` in the folder has the cost and the held-out bits per byte.

    Raises:
        UpcyclingError: an unknown name.
    """
    if name not in MODELS:
        raise unknown("demo model", name, MODELS)
    root = _cache_folder() / _key(recipe)
    if not (root / name).is_dir():
        from filelock import FileLock

        root.mkdir(parents=True, exist_ok=True)
        for needed in dict.fromkeys((BASE, name)):  # a fine-tune starts from the base
            with FileLock(root / f".{needed}.lock"):
                if not (root / needed).is_dir():
                    print(f"demo: training {needed!r} once, cached in {root / needed}", flush=True)
                    _build(needed, root, recipe)
    return root / name


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


def _cache_folder() -> Path:
    folder = os.environ.get("FUSION_UPCYCLE_CACHE") or "~/.cache/fusion_upcycle"
    return Path(folder).expanduser().absolute() / "demo"


@cache
def _key(recipe: Recipe) -> str:
    content = json.dumps([asdict(recipe), text_identity()])
    return f"python{platform.python_version()}-{sha256(content.encode()).hexdigest()[:12]}"


def _build(name: str, root: Path, recipe: Recipe) -> None:
    """Train one model and move its complete folder to its name."""
    from transformers import GenerationConfig, LlamaForCausalLM

    from fusion_upcycle.demo.tokenizer import byte_tokenizer
    from fusion_upcycle.demo.train import new_model, train
    from fusion_upcycle.report import Measured

    model = new_model(recipe) if name == BASE else LlamaForCausalLM.from_pretrained(root / BASE)
    with Measured() as cost:
        train(model, name, recipe)
    tokenizer = byte_tokenizer(recipe.context_length)
    bits = bits_per_byte(model, tokenizer, recipe.context_length)
    facts = {
        "name": name,
        "bits_per_byte": bits,
        "reference_bits_per_byte": demo_reference(),
        "parameters": model.num_parameters(),
        "training": cost.as_record(),
        "recipe": asdict(recipe),
    }
    model.generation_config = GenerationConfig.from_model_config(model.config)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as temporary:
        folder = Path(temporary) / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        name_tokenizer_class(folder)
        (folder / "demo.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_model_card(name, bits), encoding="utf-8")
        move(folder, root / name)


def bits_per_byte(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context_length: int
) -> dict[str, float]:
    """Loss of a model on the test split of each demo domain: domain -> bits per byte."""
    from fusion_upcycle.texts.perplexity import perplexity

    return {
        domain: perplexity(
            model,
            tokenizer,
            domain_text(domain, "test"),
            context_length=context_length,
            stride=context_length // 2,
        )["bits_per_byte"]
        for domain in DOMAINS
    }


def name_tokenizer_class(folder: Path) -> None:
    """The name that transformers 4 and 5 both know; 5 writes one of its own."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _model_card(name: str, bits_per_byte: dict[str, float]) -> str:
    training = "a mix of three domains" if name == BASE else f"`{name}`, starting from `{BASE}`"
    rows = "\n".join(
        f"| {domain} | {bits:.3f} | "
        + " | ".join(f"{value:.3f}" for value in demo_reference()[domain].values())
        + " |"
        for domain, bits in bits_per_byte.items()
    )
    body = f"""# fusion_upcycle demo model: {name}

A byte-level Llama for demonstrations and tests, trained on this machine by `fusion_upcycle.demo`
on {training}, from text that every Python installation carries. `demo.json` has the recipe.

Bits per byte on held-out text:

| domain | this model | unigram | gzip | lzma |
|---|---|---|---|---|
{rows}"""
    return card_text(body, pipeline_tag="text-generation")
