"""One run of a study, in a process of its own: make the model, train it, score it."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lab import WARMUP_STEPS, Run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fusion_upcycle import expand, folder_importance, merge_into_moe, upcycle
from fusion_upcycle.demo import DOMAINS, MODELS, demo_model
from fusion_upcycle.demo.models import bits_per_byte
from fusion_upcycle.demo.recipe import (
    BATCH_SIZE,
    CONTEXT_LENGTH,
    MOE,
    MOE_SHAPE,
    RECIPES,
    SHAPE,
    TRUNK,
    Recipe,
)
from fusion_upcycle.demo.texts import demo_documents
from fusion_upcycle.demo.train import train_model
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.cost import TRAINING_PASSES, attention_score_flops
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.parameters import count_parameters
from fusion_upcycle.training.router_rate import row_std
from fusion_upcycle.training.run import Origin, Places, train

torch.set_num_threads(1)
STEP = BATCH_SIZE * CONTEXT_LENGTH
#: Bases of the studies that are not shipped.
OTHERS = {
    # Eight times the trunk's width, which is what routers see.
    "wide": replace(
        RECIPES[TRUNK],
        config=SHAPE | {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4,
                        "num_key_value_heads": 4},
        tokens=2_048_000,
        learning_rate=2e-3,
    ),
    "moe32": replace(RECIPES[MOE], config=MOE_SHAPE | {"num_local_experts": 32}),
}  # fmt: skip
CALIBRATION_TOKENS = 65_536


def train_run(run: Run, output: Path, temporary: Path) -> dict[str, Any]:
    """Everything that tables and figures need, JSON; quietly, as others run beside it."""
    with loading_bars(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Routers out of balance")  # the row says so
        warnings.filterwarnings("ignore", message="router_learning_rate=")  # a study asked for it
        return _train_run(run, output, temporary)


def _train_run(run: Run, output: Path, temporary: Path) -> dict[str, Any]:
    base = run.base or run.start
    dense = AutoModelForCausalLM.from_pretrained(start_folder(base, output))
    folder = make(run, output, temporary)
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters, std, per_token = facts_of(model)
    unit = facts_of(dense)[2] * recipe_of(base).tokens
    steps = max(1, round(run.share * unit / per_token / STEP))
    tokenizer = AutoTokenizer.from_pretrained(demo_model("base"))
    row = {
        "base": base,
        "parameters": parameters,
        "router_row_std": std,
        "flops_per_token": per_token,
        "flops": TRAINING_PASSES * per_token * steps * STEP,
        "before": bits_per_byte(model, tokenizer, CONTEXT_LENGTH, stride=CONTEXT_LENGTH),
    }
    options = {"schedule": "wsd", "decay_share": 0.5, "final_share": 0.0} | dict(run.options)
    moments = options.pop("optimizer_state", None)
    warmup = options.pop("warmup_steps", WARMUP_STEPS)
    documents = demo_documents(run.split)
    if domain := options.pop("domain", None):
        documents = {domain: documents[domain]}
    if group := options.pop("tie_groups", None):
        tie_groups(model, group)
    chosen = make_training_options(
        tokens=steps * STEP,
        context_length=CONTEXT_LENGTH,
        batch_size=BATCH_SIZE,
        warmup_share=min(warmup / steps, 0.5),
        seed=run.seed,
        checkpoint_every=0,
        log_every=0,
        accelerator="cpu",
        **options,
    )
    work = temporary / "work"
    work.mkdir()
    packed = output / "packed"
    packed.mkdir(exist_ok=True)
    (work / "data").symlink_to(packed.absolute(), target_is_directory=True)
    trained = train(
        model,
        tokenizer,
        chosen,
        data=documents,
        places=Places(work, temporary / "log"),
        origin=Origin(run.start),
        optimizer_state=folder if moments == "carried" else None,
        progress=False,
    )
    return row | {
        "bits_per_byte": {
            split: bits_per_byte(trained.model, tokenizer, CONTEXT_LENGTH, split, CONTEXT_LENGTH)
            for split in ("validation", "test")
        },
        "tokens": trained.record["tokens_trained"],
        "learning_rate": chosen.learning_rate,
        "router_learning_rate": trained.record.get("router_learning_rate"),
        "router_warning": trained.record["router_warning"],
        "final": trained.record["final"],
        "cost": trained.record["cost"],
    }


def tie_groups(model: Any, group: int) -> None:
    """Give the router rows of each group of granular experts the mean of their gradients."""

    def tied(gradient_ED: torch.Tensor) -> torch.Tensor:
        groups = gradient_ED.unflatten(0, (-1, group))
        return groups.mean(1, keepdim=True).expand_as(groups).flatten(0, 1)

    routers = find_routers(model)
    for router in routers.modules.values():
        router.weight.register_hook(tied)
    routers.close()


def make(run: Run, output: Path, temporary: Path) -> Path:
    """The folder of the model that is trained."""
    options = copy.deepcopy(dict(run.make))
    what = options.pop("do", None)
    source, made = start_folder(run.start, output), temporary / "made"
    if what is None:
        return source
    if what == "upcycle":
        upcycle(source, made, seed=run.seed, verify="none", progress=False, **options)
    elif what == "expand":
        if options.get("selection") == "greedy":
            options["scores"] = importance(run.start, output, options.pop("scores", "most"))
        carried = run.options.get("optimizer_state") == "carried"
        calibrated = options.get("router_extension") in ("split", "fit")
        expand(
            source,
            made,
            seed=run.seed,
            calibration=demo_documents("train") if calibrated else None,
            calibration_tokens=CALIBRATION_TOKENS,
            optimizer_state=source if carried else None,
            verify="none",
            progress=False,
            **options,
        )
    elif what == "merge":
        merge_into_moe(
            {"_pretrained_": source} | {domain: demo_model(domain) for domain in DOMAINS},
            made,
            seed=run.seed,
            calibration=demo_documents("train") if options["router_init"] == "prototype" else None,
            verify="none",
            progress=False,
            **options,
        )
    elif what == "fresh":
        config = AutoConfig.from_pretrained(source, **options)
        torch.manual_seed(run.seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(made)
    else:
        raise AssertionError(what)
    return made


def importance(start: str, output: Path, which: str) -> Importance:
    """Scores of a model's experts, measured once for all runs; `least` turns them round."""
    file = output / "starts" / f"importance-{start}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            found = folder_importance(
                start_folder(start, output),
                demo_documents("train"),
                tokens=CALIBRATION_TOKENS,
                context_length=CONTEXT_LENGTH,
                progress=False,
            )
            found.save(file.parent).rename(file)
    found = Importance.load(file)
    if which == "most":
        return found
    turned = {
        layer: [max(values) - value for value in values]
        for layer, values in found.metrics["grad_squared"].items()
    }
    return replace(found, metrics={"grad_squared": turned})


def start_folder(name: str, output: Path) -> Path:
    """A demo model, or one that is trained once for the studies: `trunk@2048000`, tokens of it."""
    if name in MODELS:
        return demo_model(name)
    folder = output / "starts" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            train_model(name, folder.parent, recipe=recipe_of(name))
    return folder


def recipe_of(name: str) -> Recipe:
    """Of a demo model, of one of `OTHERS`, or of either with another budget."""
    model, _, tokens = name.partition("@")
    recipe = OTHERS[model] if model in OTHERS else RECIPES[model]
    if not tokens:
        return recipe
    # The smallest base is all warm-up.
    warmup = min(recipe.warmup_steps, int(tokens) // STEP)
    return replace(recipe, tokens=int(tokens), warmup_steps=warmup)


def facts_of(model: Any) -> tuple[dict[str, int], float, float]:
    """Parameters, std of the router's rows, and FLOPs per token of the forward pass.

    FLOPs are of active matrices but the looked-up embeddings, and of attention scores.
    """
    routers = find_routers(model)
    routers.close()  # its hooks; nothing is listened to
    parameters = count_parameters(model, routers)
    matrices = parameters["active"] - model.get_input_embeddings().weight.numel()
    flops = 2 * matrices + attention_score_flops(model.config, CONTEXT_LENGTH)
    return parameters, row_std(routers), flops
