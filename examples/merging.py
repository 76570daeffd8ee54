"""Three fine-tunes of one model, merged: into one dense model, or into one Mixture of Experts?

Question: without any training, does a merged MoE whose router is made from each model's own texts
          (`router_init=prototype`) beat FusionBench's ways to merge into one dense model?
Command:  python examples/merging.py [--record FOLDER]    (1 minute on two cores; part of make demo)
          python examples/merging.py --tune --record examples/results/merging     (4 minutes)
Needs:    the demo models (2 minutes of training on first use, cached).
Expected: the prototype router has the lowest mean of bits per byte over the three domains, lower
          than the base and every merge into a dense model; a random router is no better than the
          best of these.

With --tune each method's settings are chosen on validation text first, from the same number of
trials, all of which are in the record; CHOSEN below is what came out. The table is of test text.
"""

import argparse
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

from fusion_bench import BaseAlgorithm
from fusion_bench.method import (
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
)
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from fusion_upcycle import MoEMergingAlgorithm
from fusion_upcycle.demo import DOMAINS, MODELS, demo_model, domain_text
from fusion_upcycle.modelpool import DemoCausalLMPool
from fusion_upcycle.progress import loading_bars
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.texts.perplexity import perplexity

CONTEXT = 256
POOL = {"_pretrained_": "base"} | {domain: domain for domain in DOMAINS}
CALIBRATION = {
    domain: {"_target_": "fusion_upcycle.demo.domain_text", "domain": domain, "split": "train"}
    for domain in DOMAINS
}
AVERAGE, ARITHMETIC, TIES = "simple_average", "task_arithmetic", "ties_merging"
NORMAL, PROTOTYPE = "MoE, normal router", "MoE, prototype router"

#: Twelve settings for each method that has any.
TRIALS: dict[str, list[dict[str, Any]]] = {
    ARITHMETIC: [{"scaling_factor": round(0.05 * n, 2)} for n in range(1, 13)],
    TIES: [
        {"scaling_factor": scale, "threshold": threshold}
        for scale, threshold in product((0.05, 0.1, 0.15, 0.2, 0.3, 0.5), (20, 50))
    ],
    PROTOTYPE: [
        {"shared": shared, "whiten": whiten, "logit_std": std}
        for shared, whiten, std in product(("average", "base"), (True, False), (0.5, 1.0, 2.0))
    ],
}
#: The best of each on validation text, by the mean of bits per byte over the domains.
CHOSEN: dict[str, dict[str, Any]] = {
    ARITHMETIC: {"scaling_factor": 0.1},
    TIES: {"scaling_factor": 0.1, "threshold": 50},
    PROTOTYPE: {"shared": "base", "whiten": True, "logit_std": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="choose the settings anew")
    parser.add_argument("--record", type=Path, default=Path("outputs/merging"))
    arguments = parser.parse_args()
    if arguments.tune:
        write_run_record("tuning", tune(), arguments.record)
        tuned = read_run_record(arguments.record)["tuning"]["chosen"]
        if tuned != CHOSEN:
            print(f"CHOSEN in {__file__} should be {tuned}")
    else:
        tuned = CHOSEN
    print(f"Run record: {compare(arguments.record, tuned)}")
    Console().print(table(read_run_record(arguments.record)).to_rich())


def tune() -> dict[str, Any]:
    """Every trial on validation text, and the best setting of each method."""
    trials: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, Any]] = {}
    for method, all_settings in TRIALS.items():
        for settings in all_settings:
            scores = evaluate(merged(method, settings), "validation", stride=CONTEXT)
            trials.append({"method": method, "settings": settings, "bits_per_byte": scores})
            print(f"{method} {settings}: {scores['mean']:.4f}", flush=True)
        mine = [trial for trial in trials if trial["method"] == method]
        chosen[method] = min(mine, key=lambda trial: trial["bits_per_byte"]["mean"])["settings"]
    return {"split": "validation", "stride": CONTEXT, "trials": trials, "chosen": chosen}


def compare(folder: Path, settings: dict[str, dict[str, Any]]) -> Path:
    """Every model and every merge on test text; one run record."""
    pool = DemoCausalLMPool(POOL)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        name: lambda name=name: pool.load_model("_pretrained_" if name == "base" else name)
        for name in MODELS
    }
    shared = {"shared": settings[PROTOTYPE]["shared"]}
    for method, own in {AVERAGE: {}, **settings, NORMAL: shared}.items():
        models[method] = lambda method=method, own=own: merged(method, own)
    rows = {}
    for name in (*MODELS, AVERAGE, ARITHMETIC, TIES, NORMAL, PROTOTYPE):
        with loading_bars(False):
            model = models[name]()
        rows[name] = {
            "settings": settings.get(name, shared if name == NORMAL else {}),
            "bits_per_byte": evaluate(model, "test", stride=CONTEXT // 2),
            "parameters": model.num_parameters(),
            "active": model.num_parameters() - idle_parameters(model),
        }
        print(f"{name}: {rows[name]['bits_per_byte']['mean']:.4f} bits per byte", flush=True)
    comparison = {"split": "test", "stride": CONTEXT // 2, "rows": rows}
    path = write_run_record("merging", comparison, folder)
    assert path is not None  # only without a folder
    return path


def idle_parameters(model: PreTrainedModel) -> int:
    """Of the experts that a token does not use."""
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    return sum(p.numel() // len(p) * (len(p) - model.config.num_experts_per_tok) for p in experts)


def merged(method: str, settings: dict[str, Any]) -> PreTrainedModel:
    """The demo fine-tunes, merged in memory; without FusionBench's words on its steps."""
    algorithm: BaseAlgorithm
    if method == AVERAGE:
        algorithm = SimpleAverageAlgorithm()
    elif method == ARITHMETIC:
        algorithm = TaskArithmeticAlgorithm(**settings)
    elif method == TIES:
        algorithm = TiesMergingAlgorithm(**settings, remove_keys=[], merge_func="sum")
    elif method == NORMAL:
        algorithm = MoEMergingAlgorithm(2, **settings)
    else:
        router = {"name": "prototype"} | {k: v for k, v in settings.items() if k != "shared"}
        algorithm = MoEMergingAlgorithm(
            2, shared=settings["shared"], router_init=router, calibration=CALIBRATION
        )
    with redirect_stdout(io.StringIO()), loading_bars(False):
        return algorithm.run(DemoCausalLMPool(POOL))


def evaluate(model: PreTrainedModel, split: str, stride: int) -> dict[str, float]:
    """Bits per byte of each domain, and their mean."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model("base"))
    scores = {
        domain: perplexity(
            model, tokenizer, domain_text(domain, split), context_length=CONTEXT, stride=stride
        )["bits_per_byte"]
        for domain in DOMAINS
    }
    return scores | {"mean": sum(scores.values()) / len(scores)}


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            *(f"{row['bits_per_byte'][text]:.4f}" for text in (*DOMAINS, "mean")),
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['active'] / 1e6:.2f}M",
        ]
        for name, row in record["merging"]["rows"].items()
    ]
    headers = ["bits per byte", *DOMAINS, "mean", "size", "active"]
    return Table("Three fine-tunes merged, held-out demo text", headers, rows)


def settings_in_words() -> str:
    """What was chosen for each method."""
    return "; ".join(
        f"{method}: " + ", ".join(f"{name}={value}" for name, value in settings.items())
        for method, settings in CHOSEN.items()
    )


if __name__ == "__main__":
    main()
