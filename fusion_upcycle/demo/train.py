"""Training of the demo models, by our own continued pre-training, into complete folders."""

import json
import tempfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from fusion_upcycle.checkpoint.digests import SUMS_FILE
from fusion_upcycle.checkpoint.durable import move
from fusion_upcycle.checkpoint.staging import TRAINING_RECORD_FILE
from fusion_upcycle.demo.models import bits_per_byte, demo_reference, model_card
from fusion_upcycle.demo.recipe import CONTEXT_LENGTH, RECIPES, Recipe
from fusion_upcycle.demo.texts import demo_documents, text_identity
from fusion_upcycle.demo.tokenizer import VOCABULARY_SIZE, byte_tokenizer
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, train

_END_OF_TEXT = VOCABULARY_SIZE - 1


def new_model(recipe: Recipe, start: Path | None) -> PreTrainedModel:
    """What training begins with; the same weights for the same recipe."""
    if recipe.config is None:
        assert start is not None
        return AutoModelForCausalLM.from_pretrained(start)
    fields = {
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": _END_OF_TEXT,
        "eos_token_id": _END_OF_TEXT,
        "pad_token_id": _END_OF_TEXT,
        "dtype": "float32",
        **recipe.config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if "num_local_experts" in recipe.config:
            return MixtralForCausalLM(MixtralConfig(**fields))
        return LlamaForCausalLM(LlamaConfig(**fields))


def train_model(
    name: str, output: Path, *, start: Path | None = None, recipe: Recipe | None = None
) -> Path:
    """Train the demo model `name` and leave its complete folder in `output / name`.

    Args:
        start: folder of the model that the recipe starts from.
        recipe: the shipped one by default.

    Returns:
        The folder. `demo.json` in it has recipe, cost, hashes and held-out bits per byte.
    """
    recipe = recipe or RECIPES[name]
    tokenizer = byte_tokenizer(CONTEXT_LENGTH)
    documents = demo_documents(recipe.split)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}.") as temporary:
        work, folder = Path(temporary, "work"), Path(temporary, name)
        trained = train(
            new_model(recipe, start),
            tokenizer,
            make_training_options(**recipe.options(), save_moments=recipe.moments),
            data={domain: documents[domain] for domain in recipe.domains},
            places=Places(work, Path(temporary, "log"), folder if recipe.moments else None),
            origin=Origin(recipe.start or "random weights"),
        )
        model = trained.model
        model.generation_config = GenerationConfig.from_model_config(model.config)
        if recipe.moments:
            _forget_log(folder / TRAINING_RECORD_FILE)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder)
        bits = bits_per_byte(model, tokenizer, CONTEXT_LENGTH)
        weights = (folder / "model.safetensors").read_bytes()
        facts = {
            "name": name,
            "bits_per_byte": bits,
            "reference_bits_per_byte": demo_reference(),
            "parameters": model.num_parameters(),
            "training": trained.record["cost"],
            "versions": trained.record["versions"],
            "recipe": asdict(recipe),
            "text_sha256": text_identity(),
            "weights_sha256": sha256(weights).hexdigest(),
        }
        (folder / "demo.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(name, recipe.what, bits), encoding="utf-8")
        move(folder, output / name)
    return output / name


def _forget_log(file: Path) -> None:
    """The record without the folder of the logs, which is gone, and digests: files will change."""
    record = json.loads(file.read_text(encoding="utf-8"))
    del record["log"], record["files"]
    file.with_name(SUMS_FILE).unlink()
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _name_tokenizer_class(folder: Path) -> None:
    """The name that transformers 4 and 5 both know; 5 writes one of its own."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
