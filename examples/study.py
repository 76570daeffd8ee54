"""Is it better to upcycle and train on, than to train the dense model on? The whole story, small.

Question: given a trained dense model and more compute, which continuation ends lowest on held-out
          text: the dense model itself, its upcycled MoE, or something started from nothing?
Command:  make study, or: python examples/study.py [--output FOLDER]      (12 minutes on two cores)
          python examples/study.py --tune examples/results/study/tuning   (the trials behind it)
          python examples/study.py --table examples/results/study         (prints the table again)
Needs:    two cores; no download. A study that was stopped goes on with the next arm.
Expected: the table of bits per byte with tokens, FLOPs and wall time of each arm, curves.png, and a
          page on the experts of the trained MoE.

All arms see the same windows in the same order, with the same schedule. The settings of the dense
and of the MoE arms are the best of equally many trials each, on validation text, all recorded.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fusion_upcycle import upcycle
from fusion_upcycle.convert import plan_folder
from fusion_upcycle.demo import DOMAINS, demo_model, domain_text
from fusion_upcycle.economics import Economics, economics
from fusion_upcycle.evaluation import perplexity
from fusion_upcycle.options import make_options
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, train

SECTION = "study"
TUNING = Path(__file__).parent / "results" / "study" / "tuning"
CONTEXT, BATCH = 256, 8
MOE = {"num_experts": 8, "experts_per_token": 2}
#: Bytes that the base was trained on: what a model from nothing gets on top of `--tokens`.
BASE_TOKENS = 540 * BATCH * CONTEXT
SCHEDULE = {"schedule": "cosine", "warmup_share": 0.05, "final_share": 0.0}


@dataclass(frozen=True)
class Arm:
    """One continuation.

    Attributes:
        kind: whose settings it takes, `dense` or `moe`.
        start: `base`, `fresh`, `wide` (fresh, of the MoE's active size), or an expert initialiser.
        budget: `tokens`, `flops` (as many as the MoE's tokens cost), or `all` (with the base's).
    """

    kind: str
    start: str
    budget: str = "tokens"


ARMS = {
    "dense, same tokens": Arm("dense", "base"),
    "dense, same FLOPs": Arm("dense", "base", "flops"),
    "upcycled, copy": Arm("moe", "copy"),
    "upcycled, noise 0.01": Arm("moe", "noise"),
    "upcycled, drop 0.5": Arm("moe", "drop"),
    "MoE from scratch, all tokens": Arm("moe", "fresh", "all"),
    "dense of the active size, from scratch, all tokens": Arm("dense", "wide", "all"),
}
#: Trials of each kind: equally many.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "dense": [{"learning_rate": rate} for rate in (3e-4, 6e-4, 1e-3, 1.5e-3, 2e-3, 3e-3)],
    "moe": [
        {"learning_rate": 6e-4, "balance_weight": 0.01, "start": "noise"},
        {"learning_rate": 1e-3, "balance_weight": 0.01, "start": "noise"},
        {"learning_rate": 2e-3, "balance_weight": 0.01, "start": "noise"},
        {"learning_rate": 1e-3, "balance_weight": 0.01, "start": "drop"},
        {"learning_rate": 2e-3, "balance_weight": 0.003, "start": "drop"},
        {
            "learning_rate": 2e-3,
            "balance_weight": 0.01,
            "router_learning_rate": 6e-4,
            "start": "drop",
        },
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    parser.add_argument("--tokens", type=int, default=500_000, help="of a continuation")
    parser.add_argument("--tune", type=Path, metavar="RECORD", help="run the trials, and only them")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table")
    parser.add_argument("--record", type=Path, help="where to leave the run record (OUTPUT)")
    arguments = parser.parse_args()
    if arguments.tune:
        trials = tune(arguments.output / "trials", arguments.tokens)
        print(f"Run record: {write_run_record('tuning', trials, arguments.tune)}")
        return
    if not arguments.table:
        found = study(arguments.output, arguments.tokens)
        folder = arguments.record or arguments.output
        print(f"Run record: {write_run_record(SECTION, found, folder)}")
    record = read_run_record(arguments.table or folder)
    print(table(record).to_markdown())
    if not arguments.table:
        print(f"Curves: {draw(arguments.output, record)}")
        print(f"The models, their logs and the page on the experts are in {arguments.output}")


@cache
def costs() -> Economics:
    return economics(plan_folder(demo_model("base"), make_options(**MOE)), CONTEXT)


def study(output: Path, tokens: int) -> dict[str, Any]:
    settings = chosen(read_run_record(TUNING)["tuning"]["trials"])
    rows = {
        name: run(arm, output / name.replace(" ", "_").replace(",", ""), tokens, settings[arm.kind])
        for name, arm in ARMS.items()
    }
    return {"tokens": tokens, "settings": settings, "arms": rows}


def tune(output: Path, tokens: int) -> dict[str, Any]:
    """Equally many trials of both kinds, judged on validation text."""
    trials = []
    for kind, all_settings in TRIALS.items():
        for number, settings in enumerate(all_settings):
            options = dict(settings)
            arm = Arm(kind, options.pop("start", "base"))
            row = run(arm, output / f"{kind}{number}", tokens, options, split="validation")
            trials.append({"kind": kind, "settings": settings, "mean": mean(row), **row})
            print(f"{kind} {settings}: {trials[-1]['mean']:.4f} bits per byte", flush=True)
    return {"tokens": tokens, "trials": trials}


def chosen(trials: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of the best trial of each kind; the arms say themselves how they start."""
    best = {
        kind: min((t for t in trials if t["kind"] == kind), key=lambda t: t["mean"])
        for kind in TRIALS
    }
    return {
        kind: {name: value for name, value in trial["settings"].items() if name != "start"}
        for kind, trial in best.items()
    }


def run(
    arm: Arm, folder: Path, tokens: int, settings: dict[str, Any], *, split: str = "test"
) -> dict[str, Any]:
    """Train one arm and score it, unless that was done."""
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    model, cost = start(arm.start, folder)
    budget = {
        "tokens": tokens,
        "flops": round(tokens * costs().upcycled.flops / costs().dense.flops),
        "all": tokens + BASE_TOKENS,
    }[arm.budget]
    tokenizer = AutoTokenizer.from_pretrained(demo_model("base"))
    options = make_training_options(
        tokens=budget, context_length=CONTEXT, batch_size=BATCH, log_every=5, **SCHEDULE, **settings
    )
    function = "fusion_upcycle.demo.domain_text"
    data = {d: {"_target_": function, "domain": d, "split": "train"} for d in DOMAINS}
    trained = train(
        model,
        tokenizer,
        options,
        data=data,
        places=Places(folder / "work", folder / "logs", folder / "model", overwrite=True),
        origin=Origin(arm.start),
    )
    bits = {
        domain: perplexity(
            trained.model,
            tokenizer,
            domain_text(domain, split),
            context_length=CONTEXT,
            stride=CONTEXT // 2,
        )["bits_per_byte"]
        for domain in DOMAINS
    }
    row = {
        "bits_per_byte": bits,
        "tokens": trained.record["tokens_trained"],
        "training_flops": cost.training_flops(trained.record["tokens_trained"]),
        "cost": trained.record["cost"],
        "parameters": trained.record["parameters"],
        "router_warning": trained.record["router_warning"],
        "options": trained.record["options"],
    }
    result.write_text(json.dumps(row, indent=2))
    return row


def start(name: str, folder: Path) -> tuple[Any, Any]:
    """The model of an arm before training, and what it costs."""
    base = demo_model("base")
    if name == "base":
        return AutoModelForCausalLM.from_pretrained(base), costs().dense
    if name == "wide":
        config = AutoConfig.from_pretrained(base)
        config.intermediate_size *= MOE["experts_per_token"]
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config), costs().equal_active
    made = folder / "step0"
    expert_init = "copy" if name == "fresh" else name
    upcycle(base, made, expert_init=expert_init, overwrite=True, progress=False, **MOE)
    if name == "fresh":
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(made)
        return AutoModelForCausalLM.from_config(config), costs().upcycled
    return AutoModelForCausalLM.from_pretrained(made), costs().upcycled


def mean(row: dict[str, Any]) -> float:
    return float(sum(row["bits_per_byte"].values()) / len(row["bits_per_byte"]))


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{row['tokens'] / 1e6:.2f}M",
            f"{row['training_flops'] / 1e12:.1f}T",
            f"{row['cost']['wall_seconds']:.0f}",
            *(f"{bits:.3f}" for bits in row["bits_per_byte"].values()),
            f"{mean(row):.3f}",
        ]
        for name, row in record[SECTION]["arms"].items()
    ]
    headers = ["bits per byte after training", "tokens", "FLOPs", "seconds", *DOMAINS, "mean"]
    return Table("Continued, upcycled, or from nothing", headers, rows)


def draw(output: Path, record: dict[str, Any]) -> Path:
    """Training loss over compute, of all arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from fusion_upcycle.training.logs import read_metrics

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    styles = ["-", "--", "-", "--", "-.", ":", (0, (5, 1, 1, 1))]
    for (name, row), style, colour in zip(
        record[SECTION]["arms"].items(), styles, plt.get_cmap("cividis")(np.linspace(0, 0.9, 7)),
        strict=True,
    ):  # fmt: skip
        logged = read_metrics(output / name.replace(" ", "_").replace(",", "") / "logs")
        losses = [step["lm_nats_per_token"] for step in logged if "lm_nats_per_token" in step]
        smooth = np.convolve(losses, np.ones(9) / 9, mode="valid") / np.log(2)
        flops = np.linspace(0, row["training_flops"] / 1e12, len(smooth))
        axes.plot(flops, smooth, label=name, linestyle=style, color=colour)
    axes.set_xlabel("training compute of the continuation, 10^12 FLOPs")
    axes.set_ylabel("training loss, bits per byte (mean of 45 steps)")
    axes.set_ylim(top=3.5)
    axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(output / f"curves.{suffix}", dpi=150)
    return output / "curves.png"


if __name__ == "__main__":
    main()
