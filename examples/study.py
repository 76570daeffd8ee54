"""Is it better to upcycle and train on, than to train the dense model on? The whole story, small.

Question: given a trained dense model and more compute, which continuation ends lowest on held-out
          text: the dense model itself, its upcycled MoE, or something started from nothing?
Command:  make study, or: python examples/study.py [--output FOLDER]   (20 minutes on two cores)
          python examples/study.py --tune examples/results/study/tuning   (the trials behind it)
          python examples/study.py --table examples/results/study         (prints the table again)
Needs:    two cores; no download. A study that was stopped goes on with the next arm.
Expected: the table of bits per byte with tokens, FLOPs and wall time of each arm, curves.png, and a
          page on the experts of the trained MoE.

All arms see the same windows in the same order, with the same schedule. Settings are the best of
recorded trials on validation text, at equal FLOPs; the dense model has most of them.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fusion_upcycle import upcycle
from fusion_upcycle.analysis.report import write_analysis
from fusion_upcycle.analysis.run import analyze_folder, demo_texts
from fusion_upcycle.demo import DOMAINS, demo_model, domain_text
from fusion_upcycle.inspection.economics import Cost, Economics, economics
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.texts.perplexity import perplexity
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, train
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_folder

SECTION = "study"
TUNING = Path(__file__).parent / "results" / "study" / "tuning"
CONTEXT, BATCH = 256, 8
#: Kinds of MoE. The last two cost the FLOPs of the dense model: one expert for each token, or two
#: halves of one.
MOES: dict[str, dict[str, Any]] = {
    "moe": {"num_experts": 8, "experts_per_token": 2},
    "top-1": {"num_experts": 8, "experts_per_token": 1},
    "halves": {"num_experts": 16, "experts_per_token": 2, "granularity": 2},
}
#: Bytes that the base was trained on: what a model from nothing gets on top of `--tokens`.
BASE_TOKENS = 540 * BATCH * CONTEXT
SCHEDULE = {"schedule": "cosine", "warmup_share": 0.05, "final_share": 0.0}


@dataclass(frozen=True)
class Arm:
    """One continuation.

    Attributes:
        kind: what is trained: `dense`, or a key of `MOES`.
        start: `base`, `fresh`, `wide` (fresh, of the MoE's active size), or an expert initialiser.
        budget: `tokens`, `flops` (as many as those tokens cost in the MoE of 8 experts), or `all`
            (with the base's).
    """

    kind: str
    start: str
    budget: str


ARMS = {
    "dense, same tokens": Arm("dense", "base", "tokens"),
    "upcycled 8 top-2, copy": Arm("moe", "copy", "tokens"),
    "upcycled 8 top-2, noise 0.01": Arm("moe", "noise", "tokens"),
    "upcycled 8 top-2, drop 0.5": Arm("moe", "drop", "tokens"),
    "dense, same FLOPs": Arm("dense", "base", "flops"),
    "upcycled 8 top-1, noise 0.01, same FLOPs": Arm("top-1", "noise", "flops"),
    "upcycled 16 halves top-2, noise 0.01, same FLOPs": Arm("halves", "noise", "flops"),
    "MoE 8 top-2 from scratch, all tokens": Arm("moe", "fresh", "all"),
    "dense of the MoE's active size, from scratch, all tokens": Arm("dense", "wide", "all"),
}
#: At equal FLOPs; the dense model gets more trials than any kind of MoE.
TRIALS: dict[Arm, list[dict[str, Any]]] = {
    Arm("dense", "base", "flops"): [{"learning_rate": rate} for rate in (1e-3, 1.5e-3, 2e-3, 3e-3)],
    Arm("halves", "noise", "flops"): [{"learning_rate": rate} for rate in (2e-3, 3e-3)],
    Arm("top-1", "noise", "flops"): [{"learning_rate": rate} for rate in (3e-3, 2e-3)],
    Arm("moe", "drop", "tokens"): [{"learning_rate": 2e-3}],
    Arm("moe", "noise", "tokens"): [{"learning_rate": 2e-3}],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    parser.add_argument("--tokens", type=int, default=1_200_000, help="of a continuation")
    parser.add_argument("--tune", type=Path, metavar="RECORD", help="run the trials, and only them")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table")
    parser.add_argument("--record", type=Path, help="where to leave the run record (OUTPUT)")
    arguments = parser.parse_args()
    if arguments.tune:
        trials = tune(arguments.output, arguments.tokens)
        print(f"Run record: {write_run_record('tuning', trials, arguments.tune)}")
        return
    if arguments.table:
        print(table(read_run_record(arguments.table)).to_markdown())
        return
    folder = arguments.record or arguments.output
    found = study(arguments.output, arguments.tokens)
    print(f"Run record: {write_run_record(SECTION, found, folder)}")
    record = read_run_record(folder)
    print(table(record).to_markdown())
    print(f"Curves:     {draw(arguments.output, record)}")
    print(f"Experts:    {look_at_experts(arguments.output, record)}")
    print(f"The models and their logs are in {arguments.output}")


@cache
def costs(kind: str) -> Economics:
    return economics(plan_folder(demo_model("base"), make_options(**MOES[kind])), CONTEXT)


def study(output: Path, tokens: int) -> dict[str, Any]:
    trials = read_run_record(TUNING)["tuning"]["trials"]
    rows = {}
    for name, arm in ARMS.items():
        settings = chosen(trials, arm)
        rows[name] = {
            "settings": settings,
            **run(arm, output, tokens, settings),
        }
        print(f"{name}: {mean(rows[name]):.4f} bits per byte", flush=True)
    return {"tokens": tokens, "arms": rows}


def tune(output: Path, tokens: int) -> dict[str, Any]:
    """Equally many trials of each kind, to be judged on validation text."""
    trials = []
    for arm, all_settings in TRIALS.items():
        for settings in all_settings:
            row = run(arm, output, tokens, settings)
            trials.append({"arm": vars(arm), "settings": settings, **row})
            print(f"{arm} {settings}: {mean(row, 'validation'):.4f} bits per byte", flush=True)
    return {"tokens": tokens, "trials": trials}


def chosen(trials: list[dict[str, Any]], arm: Arm) -> dict[str, Any]:
    """The settings of the best trial of this kind, on validation text.

    Of those that start like `arm`; where none does, of all of its kind.
    """
    kind = [trial for trial in trials if trial["arm"]["kind"] == arm.kind]
    alike = [trial for trial in kind if trial["arm"]["start"] == arm.start]
    best: dict[str, Any] = min(alike or kind, key=lambda trial: mean(trial, "validation"))
    return dict(best["settings"])


def folder_of(arm: Arm, settings: dict[str, Any]) -> str:
    """Where an arm is trained; a trial and an arm of the study that are the same share it."""
    return "-".join([*vars(arm).values(), *(f"{name}={value}" for name, value in settings.items())])


def run(arm: Arm, output: Path, tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one arm and score it, unless that was done."""
    folder = output / folder_of(arm, settings)
    result = folder / "result.json"
    if result.is_file():
        return dict(json.loads(result.read_text()))
    model, cost = start(arm, folder)
    budget = {
        "tokens": tokens,
        "flops": round(tokens * costs("moe").upcycled.flops / cost.flops),
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
    row = {
        "bits_per_byte": {
            split: bits_per_byte(trained.model, tokenizer, split)
            for split in ("validation", "test")
        },
        "tokens": trained.record["tokens_trained"],
        "training_flops": cost.training_flops(trained.record["tokens_trained"]),
        "cost": trained.record["cost"],
        "parameters": trained.record["parameters"],
        "router_warning": trained.record["router_warning"],
        "options": trained.record["options"],
    }
    result.write_text(json.dumps(row, indent=2))
    return row


def bits_per_byte(model: Any, tokenizer: Any, split: str) -> dict[str, float]:
    """Of each domain's held-out text."""
    texts = {domain: domain_text(domain, split) for domain in DOMAINS}
    return {
        domain: perplexity(model, tokenizer, text, context_length=CONTEXT, stride=CONTEXT // 2)[
            "bits_per_byte"
        ]
        for domain, text in texts.items()
    }


def start(arm: Arm, folder: Path) -> tuple[Any, Cost]:
    """The model of an arm before training, and what it costs."""
    base = demo_model("base")
    if arm.start == "base":
        return AutoModelForCausalLM.from_pretrained(base), costs("moe").dense
    torch.manual_seed(0)
    if arm.start == "wide":
        config = AutoConfig.from_pretrained(base)
        config.intermediate_size *= MOES["moe"]["experts_per_token"]
        return AutoModelForCausalLM.from_config(config), costs("moe").equal_active
    made = folder / "step0"
    expert_init = "copy" if arm.start == "fresh" else arm.start
    upcycle(base, made, expert_init=expert_init, overwrite=True, progress=False, **MOES[arm.kind])
    cost = costs(arm.kind).upcycled
    if arm.start == "fresh":
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made)), cost
    return AutoModelForCausalLM.from_pretrained(made), cost


def mean(row: dict[str, Any], split: str = "test") -> float:
    bits = row["bits_per_byte"][split].values()
    return float(sum(bits) / len(bits))


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{row['tokens'] / 1e6:.2f}M",
            f"{row['training_flops'] / 1e12:.1f}T",
            f"{row['cost']['wall_seconds']:.0f}",
            *(f"{bits:.3f}" for bits in row["bits_per_byte"]["test"].values()),
            f"{mean(row):.3f}",
        ]
        for name, row in record[SECTION]["arms"].items()
    ]
    headers = ["bits per byte after training", "tokens", "FLOPs", "seconds", *DOMAINS, "mean"]
    return Table("Continued, upcycled, or from nothing", headers, rows)


def look_at_experts(output: Path, record: dict[str, Any]) -> Path:
    """The page on the experts of the best upcycled model, before and after training."""
    rows = record[SECTION]["arms"]
    best = min((name for name in rows if "upcycled" in name), key=lambda name: mean(rows[name]))
    folder, texts = output / folder_of(ARMS[best], rows[best]["settings"]), demo_texts()
    before, after = (analyze_folder(folder / part, texts) for part in ("step0", "model"))
    return write_analysis(after, output / "experts", before=before)


def draw(output: Path, record: dict[str, Any]) -> Path:
    """Training loss over compute, of all arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from fusion_upcycle.training.logs import read_metrics

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    styles = ["-", "--", "-", "--", "-.", ":", (0, (5, 1, 1, 1))]
    arms = record[SECTION]["arms"]
    # Okabe and Ito's colours, which colour-blind people can tell apart.
    colours = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7"]
    colours += ["#999999", "#7A4B00"]
    for (name, row), style, colour in zip(arms.items(), cycle(styles), cycle(colours)):
        logged = read_metrics(output / folder_of(ARMS[name], row["settings"]) / "logs")
        losses = [step["lm_nats_per_token"] for step in logged if "lm_nats_per_token" in step]
        smooth = np.convolve(losses, np.ones(25) / 25, mode="valid") / np.log(2)
        flops = np.linspace(0, row["training_flops"] / 1e12, len(smooth))
        axes.plot(flops, smooth, label=name, linestyle=style, color=colour)
    axes.set_xlabel("training compute of the continuation, 10^12 FLOPs")
    axes.set_ylabel("training loss, bits per byte (mean of 125 steps)")
    axes.set_ylim(top=2.6)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    for suffix in ("png", "svg"):
        figure.savefig(output / f"curves.{suffix}", dpi=150)
    return output / "curves.png"


if __name__ == "__main__":
    main()
