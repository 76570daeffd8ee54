"""The demo MoE in the user's cache: the base upcycled and trained on, so that its experts differ.

The test bench of what needs a trained MoE: importance scores, and growing by copies of experts.
"""

import json
import tempfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from fusion_upcycle.checkpoint.durable import move
from fusion_upcycle.demo.models import (
    DEFAULT_RECIPE,
    bits_per_byte,
    demo_model,
    name_tokenizer_class,
)
from fusion_upcycle.demo.recipe import BASE, MoERecipe, Recipe
from fusion_upcycle.demo.texts import DOMAINS

DEFAULT_MOE_RECIPE = MoERecipe()


def demo_moe(
    recipe: MoERecipe = DEFAULT_MOE_RECIPE,
    base_recipe: Recipe = DEFAULT_RECIPE,
    *,
    accelerator: str = "cpu",
) -> Path:
    """Folder of a trained Mixtral of 4 experts, top-2, made of the demo base on first use.

    It lies beside the other demo models and has AdamW's moments. `demo.json` in it has the cost
    and the held-out bits per byte. Processes that ask at the same time wait for the one that
    trains.

    Args:
        accelerator: Lightning's, for a larger recipe; `cpu` gives the same model on every machine.
    """
    from filelock import FileLock

    base = demo_model(BASE, base_recipe)
    root, name = base.parent, f"moe-{_digest(recipe)}"
    if not (root / name).is_dir():
        with FileLock(root / f".{name}.lock"):
            if not (root / name).is_dir():
                print(f"demo: training an MoE once, cached in {root / name}", flush=True)
                _build(base, root / name, recipe, base_recipe, accelerator)
    return root / name


def _digest(recipe: MoERecipe) -> str:
    return sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:8]


def _build(
    base: Path, folder: Path, recipe: MoERecipe, base_recipe: Recipe, accelerator: str
) -> None:
    """Upcycle, train, and move the complete folder to its name."""
    from transformers import AutoModelForCausalLM

    from fusion_upcycle.demo.tokenizer import byte_tokenizer
    from fusion_upcycle.training.options import make_training_options
    from fusion_upcycle.training.run import Origin, Places, train
    from fusion_upcycle.upcycling.run import upcycle

    tokenizer = byte_tokenizer(base_recipe.context_length)
    options = make_training_options(
        tokens=recipe.tokens,
        context_length=base_recipe.context_length,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        schedule="cosine",
        warmup_share=base_recipe.warmup_share,
        final_share=0.0,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        balance_weight=recipe.balance_weight,
        accelerator=accelerator,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        step0, made = Path(temporary) / "step0", Path(temporary) / folder.name
        upcycle(
            base,
            step0,
            num_experts=recipe.num_experts,
            experts_per_token=recipe.experts_per_token,
            expert_init=recipe.expert_init,
            seed=recipe.seed,
            progress=False,
        )
        trained = train(
            AutoModelForCausalLM.from_pretrained(step0),
            tokenizer,
            options,
            data={
                domain: {
                    "_target_": "fusion_upcycle.demo.domain_text",
                    "domain": domain,
                    "split": "train",
                }
                for domain in DOMAINS
            },
            places=Places(Path(temporary) / "work", Path(temporary) / "log", made),
            origin=Origin(BASE),
        )
        facts = {
            "name": "moe",
            "bits_per_byte": bits_per_byte(trained.model, tokenizer, base_recipe.context_length),
            "parameters": trained.model.num_parameters(),
            "training": trained.record["cost"],
            "recipe": asdict(recipe),
        }
        name_tokenizer_class(made)
        (made / "demo.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        move(made, folder)
