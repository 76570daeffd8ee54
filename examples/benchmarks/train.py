"""How fast does an upcycled model train, against what its active FLOPs predict?

Question: tokens per second and memory of continued pre-training: a dense model, its upcycled MoE (8
          experts, top-2) with each experts implementation of transformers, and a dense model of the
          MoE's active size. The prediction is the dense model's throughput, times its FLOPs per
          token over the other model's.
Command:  python examples/benchmarks/train.py --processes 2 \\
              --record examples/benchmarks/results/train.json
          python examples/benchmarks/train.py --table examples/benchmarks/results/train.json
Needs:    two cores, 6 GB of memory, 5 minutes. On a GPU, for example: --precision bf16-true
          --hidden-size 2048 --layers 16 --context 2048 --batch 16 --peak-tflops 989
Expected: the MoE reaches at least 0.85 of the prediction with `grouped_mm`, transformers' default.

What runs is `fusion_upcycle.training.run.train`, whole steps of it: our Lightning module with its
losses, clipping, AdamW, router health and logs. Each model has a process of its own; the processes
take turns of a few steps, so that they share the noise of the machine. Medians of all steps. With
`--processes 2` the MoE is also trained by two that share each step, with ddp, fsdp and expert
parallelism: their CPU seconds together count.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from convert import write_record
from rich.console import Console
from train_job import Worker

from fusion_upcycle.live.cost import TRAINING_PASSES
from fusion_upcycle.report.tables import Table

MOE = {"num_experts": 8, "experts_per_token": 2}
DENSE, WIDE = "dense", "dense, same active FLOPs"
#: Of the demo: so small that what does not grow with the model counts.
DEMO = {"hidden_size": 128, "intermediate_size": 384, "layers": 4, "context": 256, "batch": 8}
TINY = {"hidden_size": 64, "intermediate_size": 96, "layers": 1, "context": 32, "batch": 2}
COLUMNS = [
    "training",
    "parameters",
    "MFLOP/token",
    "tokens/s",
    "of predicted",
    "tokens/CPU s",
    "of predicted",
    "GFLOP/s",
    "peak MiB",
]


def main() -> None:
    options = _options()
    if options.table:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    shape = {name: getattr(options, name) for name in DEMO}
    shapes = {"tiny": TINY} if options.tiny else {"main": shape, "demo": DEMO}
    names = options.implementations or all_implementations()
    record: dict[str, Any] = {
        "precision": options.precision,
        "peak_tflops": options.peak_tflops,
        "moe": MOE,
        "shapes": list(shapes),
    }
    for name, shape in shapes.items():
        record[name] = measure(shape, names, options)
        names = [n for n in names if "failed" not in record[name]["models"][moe_name(n)]]
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name in shapes:
        console.print(table(record, name).to_rich(), *failures(record, name), sep="\n")
    if options.record:
        write_record("train", record, options.record)


def all_implementations() -> list[str]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *ALL_EXPERTS_FUNCTIONS.keys()]


def moe_name(implementation: str) -> str:
    return f"MoE, {implementation}"


def measure(
    shape: dict[str, int], implementations: Iterable[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Train all models of one shape in turn."""
    import torch

    with tempfile.TemporaryDirectory(prefix="train-benchmark") as temporary:
        folder = Path(temporary)
        costs = make_models(shape, folder)
        training = {
            "context_length": shape["context"],
            "batch_size": shape["batch"],
            "precision": options.precision,
            "accelerator": options.accelerator,
        }
        kinds = {DENSE: ("dense", {}), WIDE: ("wide", {})}
        for name in implementations:
            kinds[moe_name(name)] = ("moe", {"experts_implementation": name})
        kinds |= {name: ("moe", way) for name, way in shared_by(options.processes).items()}
        models: dict[str, dict[str, Any]] = {n: dict(costs[k]) for n, (k, _) in kinds.items()}
        workers = {
            name: Worker(folder / kind, training | choice, options.steps, options.memory)
            for name, (kind, choice) in kinds.items()
        }
        try:
            for name, worker in workers.items():  # one after the other: each warms up alone
                models[name] |= worker.start()
                print(f"{name}: {models[name].get('failed', 'warm')}", flush=True)
            for number in range(options.rounds):
                for name, worker in workers.items():
                    if "failed" not in models[name]:
                        told = worker.turn()
                        models[name].setdefault("steps", []).extend(told["steps"])
                        models[name]["peak_bytes"] = told["peak_bytes"]
                print(f"round {number + 1} of {options.rounds} done", flush=True)
        finally:
            for worker in workers.values():
                worker.end()
    cuda = options.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    return {
        "shape": shape,
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "models": models,
    }


def shared_by(processes: int) -> dict[str, dict[str, Any]]:
    """The ways to train the MoE in several processes, which share the batch of a step."""
    if processes == 1:
        return {}
    ways = {"ddp": {}, "fsdp": {}, f"expert_parallel={processes}": {"expert_parallel": processes}}
    return {
        f"MoE, {processes} processes, {name}": {
            "devices": processes,
            "strategy": "ddp" if name == "ddp" else "fsdp",
            **way,
        }
        for name, way in ways.items()
    }


def make_models(shape: dict[str, int], folder: Path) -> dict[str, dict[str, Any]]:
    """The three models in folders `dense`, `wide` and `moe`; parameters and FLOPs of each."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fusion_upcycle import upcycle
    from fusion_upcycle.demo.tokenizer import byte_tokenizer
    from fusion_upcycle.inspection.economics import economics
    from fusion_upcycle.upcycling.options import make_options
    from fusion_upcycle.upcycling.run import plan_folder

    tokenizer = byte_tokenizer(shape["context"])
    for name, width in (("dense", 1), ("wide", MOE["experts_per_token"])):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape["hidden_size"],
            intermediate_size=width * shape["intermediate_size"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["hidden_size"] // 32,
            num_key_value_heads=shape["hidden_size"] // 32,
            max_position_embeddings=shape["context"],
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    upcycle(folder / "dense", folder / "moe", expert_init="noise", progress=False, **MOE)
    found = economics(plan_folder(folder / "dense", make_options(**MOE)), shape["context"])
    costs = {"dense": found.dense, "wide": found.equal_active, "moe": found.upcycled}
    return {
        name: {"parameters": cost.total, "flops_per_token": TRAINING_PASSES * cost.flops}
        for name, cost in costs.items()
    }


def table(record: dict[str, Any], shape: str) -> Table:
    """One row per model of one shape."""
    measured, peak = record[shape], record["peak_tflops"]
    size = measured["shape"]
    tokens = size["context"] * size["batch"]
    dense = measured["models"][DENSE]
    rows = []
    for name, model in measured["models"].items():
        start = [name, f"{model['parameters'] / 1e6:.1f}M", f"{model['flops_per_token'] / 1e6:.1f}"]
        if "failed" in model:
            rows.append([*start, "does not run", *[""] * 5])
            continue
        wall, cpu = rates(model, tokens)
        fewer = dense["flops_per_token"] / model["flops_per_token"]
        wall_predicted, cpu_predicted = (rate * fewer for rate in rates(dense, tokens))
        flops = wall * model["flops_per_token"]
        share = f" (MFU {flops / peak / 1e12:.1%})" if peak else ""
        rows.append(
            [
                *start,
                f"{wall:.0f}",
                f"{wall / wall_predicted:.2f}",
                f"{cpu:.0f}",
                f"{cpu / cpu_predicted:.2f}",
                f"{flops / 1e9:.1f}{share}",
                f"{model['peak_bytes'] / 2**20:.0f}",
            ]
        )
    return Table(f"Training, {words(record, shape)}", COLUMNS, rows)


def rates(model: dict[str, Any], tokens_per_step: int) -> list[float]:
    """Tokens per second and per CPU second, by the median step."""
    return [tokens_per_step / median(s[k] for s in model["steps"]) for k in ("wall", "cpu")]


def words(record: dict[str, Any], shape: str) -> str:
    """What was measured, of one shape."""
    size = record[shape]["shape"]
    return (
        f"hidden {size['hidden_size']}, FFN {size['intermediate_size']}, "
        f"{size['layers']} layer(s), {size['batch']} windows of {size['context']} tokens, "
        f"{record['precision']}, {record[shape]['device']}, {record[shape]['threads']} thread(s)"
    )


def failures(record: dict[str, Any], shape: str) -> list[str]:
    """What does not run here, and why."""
    models = record[shape]["models"]
    return [f"{name}: {model['failed']}" for name, model in models.items() if "failed" in model]


def markdown(record: dict[str, Any]) -> str:
    """The tables of a run record, each with what was measured above it."""
    train = record["train"]
    parts = []
    for name in train["shapes"]:
        parts += [f"Training, {words(train, name)}:", table(train, name).to_markdown()]
        parts += [f"Does not run here: {reason}" for reason in failures(train, name)]
    return "\n\n".join(parts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="JSON", help="write a run record")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a record as Markdown")
    parser.add_argument("--tiny", action="store_true", help="tiny models only, in seconds")
    for name, default in (
        ("hidden-size", 256),
        ("intermediate-size", 1024),
        ("layers", 4),
        ("context", 512),
        ("batch", 8),
        ("rounds", 8),
        ("steps", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--processes", type=int, default=1, help="that share a CPU's MoE too (1)")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--implementations", nargs="+", help="of the experts (all there are)")
    parser.add_argument("--peak-tflops", type=float, help="of the device: gives MFU")
    parser.add_argument("--memory", type=float, default=8, help="GiB of a process on a CPU (8)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
