"""What would training 47B and 146B parameters take of each GPU, on 8 to 64 of them?

Question: how much of 80 GB do weights, gradients, AdamW, transients and activations take, with
          strategy=fsdp and with expert_parallel=8, of two published upcyclings.
Command:  python examples/memory.py --record examples/results/memory
Needs:    one core, 3 GB of memory, 1 minute; no weights, no GPU. Nothing is measured: it is what
          `inspect --recipe NAME --gpus N --memory 80GB` calculates.
Expected: 47B fit from 16 GPUs on and 146B from 48 on, with activation checkpointing.
"""

import argparse
from pathlib import Path
from typing import Any

from fusion_upcycle.inspection.memory import Planner, Way
from fusion_upcycle.inspection.recipes import plan_recipe, recipe_options
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table
from fusion_upcycle.upcycling.options import make_options

MODELS = {"mixtral_8x7b": "47B", "skywork_moe": "146B"}
GPUS = (8, 16, 32, 64)
WAYS = {"fsdp": Way("fsdp"), "EP 8": Way("fsdp", 8)}
GPU_BYTES, CONTEXT_LENGTH = 80 * 10**9, 4096
HEADERS = [
    "GB on each GPU, of 80",
    "GPUs",
    "weights",
    "gradients",
    "AdamW",
    "activations, checkpointed",
    "activations",
    "transient, fsdp",
    "total, checkpointed",
    "total",
    "transient, EP 8",
    "total, checkpointed",
    "total",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    record = {"gpu_bytes": GPU_BYTES, "context_length": CONTEXT_LENGTH, "models": calculate()}
    print(markdown({"memory": record}))
    if options.record:
        write_run_record("memory", record, options.record)


def calculate() -> dict[str, Any]:
    models = {}
    for name, size in MODELS.items():
        config = plan_recipe(name, make_options(**recipe_options(name))).config
        planner = Planner(config, 1, CONTEXT_LENGTH)
        models[size] = {
            "recipe": name,
            "parameters": planner.parameters,
            "gpus": {
                gpus: {key: vars(planner.memory(gpus, way)) for key, way in WAYS.items()}
                for gpus in GPUS
            },
            "smallest": {
                key: planner.smallest(way, GPU_BYTES, checkpointing=True)
                for key, way in WAYS.items()
            },
        }
    return models


def table(record: dict[str, Any]) -> Table:
    """A row for each model and number of GPUs."""
    rows = []
    for size, model in record["memory"]["models"].items():
        for gpus, ways in model["gpus"].items():
            weights = 4 * ways["fsdp"]["parameters"]
            kept = [ways["fsdp"][key] for key in ("checkpointed", "activations")]
            sizes = [weights, weights, 2 * weights, *kept]
            for found in ways.values():
                totals = [4 * weights + found["transient"] + each for each in kept]
                sizes += [found["transient"], *totals]
            rows.append([size, f"{gpus}", *(f"{number / 1e9:.1f}" for number in sizes)])
    return Table("Memory", HEADERS, rows)


def markdown(record: dict[str, Any]) -> str:
    """The table, and from how many GPUs on each model fits."""
    least = [
        f"{size} from {' or '.join(f'{n} ({way})' for way, n in model['smallest'].items())}"
        for size, model in record["memory"]["models"].items()
    ]
    fits = f"With activation checkpointing they fit on: {'; '.join(least)}."
    return f"{table(record).to_markdown()}\n\n{fits}"


if __name__ == "__main__":
    main()
