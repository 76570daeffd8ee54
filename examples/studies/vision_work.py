"""One run of the study of images, in a process of its own: make the model, train it, score it."""

import copy
from pathlib import Path
from typing import Any

import fashion
import torch
from fashion import BATCH_SIZE, RECIPE, fit, pixels, scores
from lab import Run

from fusion_upcycle import upcycle
from fusion_upcycle.live.cost import TRAINING_PASSES
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.parameters import count_parameters

torch.set_num_threads(1)
SCHEDULE: dict[str, Any] = {
    "schedule": "wsd",
    "warmup_share": 0.05,
    "decay_share": 0.5,
    "final_share": 0.0,
}
#: Of the images that are scored before training, or that were trained on.
FEW = 2_000
SCORED = {"validation": "validation", "test": "test", "train": f"train[:{FEW}]"}


def train_run(run: Run, output: Path, temporary: Path) -> dict[str, Any]:
    """Everything that tables and figures need, JSON."""
    home = output.parent / "fashion"
    images = fashion.images(home)
    base = fashion.base(home)
    with loading_bars(False):
        dense, folder = load_by_config(base), base
        options = copy.deepcopy(dict(run.make))
        if options.pop("do", None) == "upcycle":
            folder = temporary / "made"
            upcycle(base, folder, seed=run.seed, verify="none", progress=False, **options)
        model = load_by_config(folder)
    parameters, per_image = facts_of(model)
    unit = facts_of(dense)[1] * RECIPE["examples"]
    steps = round(run.share * unit / per_image / BATCH_SIZE)
    sets = {name: fashion.in_memory(images, split) for name, split in SCORED.items()}
    before = scores(model, pixels, {"test": sets["test"][:FEW]})["test"]
    trained = {"cost": {"cpu_seconds": 0.0}}  # of the base, as it is
    if steps:
        trained = train(run, model, images, temporary, steps * BATCH_SIZE)
    return {
        "base": run.base or run.start,
        "parameters": parameters,
        "flops_per_image": per_image,
        "flops": TRAINING_PASSES * per_image * steps * BATCH_SIZE,
        "before": before,
        "scores": scores(model, pixels, sets),
        "images": steps * BATCH_SIZE,
    } | trained


def train(run: Run, model: Any, images: Path, temporary: Path, examples: int) -> dict[str, Any]:
    """Train the model in place: how, and what it took."""
    record = fit(
        model,
        pixels,
        fashion.in_memory(images, "train"),
        temporary,
        examples=examples,
        batch_size=BATCH_SIZE,
        seed=run.seed,
        **SCHEDULE | dict(run.options),
    ).record
    logged = read_metrics(temporary / "log")[-1]  # of the whole training: its only entry
    kept = ("/left_out", "/load_cv")
    return {
        "router_learning_rate": record["router_learning_rate"],
        "router_warning": record["router_warning"],
        "routing": {name: value for name, value in logged.items() if name.endswith(kept)},
        "cost": record["cost"],
    }


def facts_of(model: Any) -> tuple[dict[str, int], float]:
    """Parameters, and FLOPs per image of the forward pass of a ViT.

    FLOPs are those of its active matrices, but the embeddings of class token and positions, for
    each token; of the head for one; and of attention scores, in which each token sees all.
    """
    routers = find_routers(model)
    routers.close()  # its hooks; nothing is listened to
    parameters = count_parameters(model, routers)
    config = model.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    head = sum(p.numel() for p in model.classifier.parameters())
    looked_up = ("cls_token", "position_embeddings")
    added = sum(p.numel() for name, p in model.named_parameters() if name.endswith(looked_up))
    matrices = parameters["active"] - head - added
    attention = config.num_hidden_layers * 4 * tokens**2 * config.hidden_size
    return parameters, 2 * (tokens * matrices + head) + attention
