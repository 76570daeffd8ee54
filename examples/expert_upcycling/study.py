"""Does a trained MoE gain by growing from E to 2E experts, and does it matter how it grows?

Question: at the same tokens and the same top-k, which ends lowest: the MoE trained on as it is, the
          MoE grown (which experts are copied: by chance, all, or by importance; which router rows:
          copies or those that keep the function), or one that had 2E experts from the start?
Command:  python examples/expert_upcycling/study.py        (under 60 minutes on two cores)
          python examples/expert_upcycling/study.py --table examples/expert_upcycling/results/study
          python examples/expert_upcycling/study.py --large    (a setting for a GPU; never run here)
Needs:    two cores; no download. A study that was stopped goes on with the next run.
Expected: a table for each budget with mean and spread over seeds, and curves.png.

All runs see the same windows in the same order for the same seed, with AdamW begun afresh and the
same schedule. Importance is measured and routers are fitted on training text; losses are on
validation text, mean of the three demo domains.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from study_report import FROM_THE_START, NOT_GROWN, draw, tables
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_upcycle.demo import DOMAINS, demo_moe, domain_text
from fusion_upcycle.demo.recipe import MoERecipe, Recipe
from fusion_upcycle.expansion.run import expand
from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import read_run_record
from fusion_upcycle.texts.perplexity import perplexity
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, train

SECTION = "expert_upcycling"
METRICS = ("weight_norm", "grad_squared", "saliency")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """Size and budgets of a study.

    Attributes:
        budgets: tokens of the continuations.
        calibration_tokens: for importance and for the routers.
    """

    base: Recipe
    moe: MoERecipe
    budgets: tuple[int, ...]
    calibration_tokens: int
    learning_rate: float
    precision: str = "32-true"
    accelerator: str = "cpu"

    def base_model(self) -> Path:
        return demo_moe(self.moe, self.base, accelerator=self.accelerator)

    def from_the_start(self) -> Path:
        """The base with twice the experts from the start, by the same recipe."""
        moe = replace(self.moe, num_experts=self.num_experts)
        return demo_moe(moe, self.base, accelerator=self.accelerator)

    @property
    def num_experts(self) -> int:
        return 2 * self.moe.num_experts


SMALL = Setting(Recipe(), MoERecipe(), (100_000, 500_000), 49_152, 1e-3)
#: About 90M parameters in the MoE of 8 experts.
LARGE = Setting(
    Recipe(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8),
    MoERecipe(tokens=20_000_000),
    (2_000_000, 20_000_000),
    262_144,
    5e-4,
    "bf16-mixed",
    "auto",
)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: `not grown`, `from the start`, or `SELECTION, ROUTER`.
        budget: tokens of the continuation.
    """

    arm: str
    budget: int
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.arm.replace(', ', '_').replace(' ', '_')}-{self.budget}-{self.seed}"


def arms() -> dict[str, Sequence[int]]:
    """Arm -> its seeds: all for the references and the two selections that are to be judged."""
    found: dict[str, Sequence[int]] = {NOT_GROWN: SEEDS, FROM_THE_START: SEEDS}
    for copied in (True, False):
        for selection in ("uniform", "grad_squared", "random", "weight_norm", "saliency"):
            router = "copy" if copied else "split" if selection == "uniform" else "fit"
            judged = selection in ("uniform", "grad_squared")
            found[f"{selection}, {router}"] = SEEDS if judged else SEEDS[:1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/expert_upcycling"))
    parser.add_argument("--large", action="store_true", help="the larger setting, for a GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's tables")
    parser.add_argument("--record", type=Path, help="where to leave the run record (OUTPUT)")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in a process of its own
    arguments = parser.parse_args()
    setting = LARGE if arguments.large else SMALL
    if arguments.run:
        run(Run(**json.loads(arguments.run)), setting, arguments.output)
        return
    if not arguments.table:
        found = study(setting, arguments.output, arguments.jobs, arguments.large)
        folder = arguments.record or arguments.output
        print(f"Run record: {write_run_record(SECTION, found, folder)}")
    record = read_run_record(arguments.table or folder)[SECTION]
    for table in tables(record):
        print(f"\n{table.title}\n\n{table.to_markdown()}")
    if not arguments.table:
        print(f"\nCurves: {draw(arguments.output, record)}")


def study(setting: Setting, output: Path, jobs: int, large: bool) -> dict[str, Any]:
    """All runs, `jobs` at a time, each in a process with its share of the cores."""
    output.mkdir(parents=True, exist_ok=True)
    base = setting.base_model()  # once, before all need it
    setting.from_the_start()
    scores_of(base, setting, output)
    # Short and cheap ones last, so that no core waits long.
    runs = [
        Run(arm, budget, seed)
        for budget in sorted(setting.budgets, reverse=True)
        for arm, seeds in arms().items()
        for seed in seeds
    ]
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def start(one: Run) -> None:
        if (output / one.folder / "result.json").is_file():
            return
        command = [sys.executable, __file__, "--output", str(output)]
        command += ["--run", json.dumps(asdict(one)), *(["--large"] if large else [])]
        with (output / f"{one.folder}.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
        print(f"done: {one.folder}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, runs))
    results = [
        {"folder": one.folder, **json.loads((output / one.folder / "result.json").read_text())}
        for one in runs
    ]
    return {"setting": asdict(setting), "base": str(base.name), "runs": results}


def scores_of(base: Path, setting: Setting, output: Path) -> Path:
    """The importance of the base's experts, measured once for all runs."""
    path = output / "importance.json"
    if not path.is_file():
        model = AutoModelForCausalLM.from_pretrained(base)
        texts = {domain: domain_text(domain, "train") for domain in DOMAINS}
        measure_importance(
            model,
            texts,
            base / "tokenizer.json",
            tokens=setting.calibration_tokens,
            context_length=setting.base.context_length,
        ).save(output)
    return path


def run(one: Run, setting: Setting, output: Path) -> None:
    """Grow, train and score one model; a run that was killed goes on."""
    folder, base = output / one.folder, setting.base_model()
    if one.arm == NOT_GROWN:
        start = base
    elif one.arm == FROM_THE_START:
        start = setting.from_the_start()
    else:
        start = grow(one, setting, output, folder / "step0")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(start),
        AutoTokenizer.from_pretrained(base),
    )
    before = losses(model, tokenizer, setting)
    options = make_training_options(
        tokens=one.budget,
        context_length=setting.base.context_length,
        batch_size=setting.moe.batch_size,
        learning_rate=setting.learning_rate,
        balance_weight=setting.moe.balance_weight,
        precision=setting.precision,
        accelerator=setting.accelerator,
        schedule="cosine",
        final_share=0.0,
        seed=one.seed,
        log_every=5,
    )
    trained = train(
        model,
        tokenizer,
        options,
        data=training_text(),
        places=Places(folder / "work", folder / "logs", folder / "model", overwrite=True),
        origin=Origin(start.name),
        progress=False,
    )
    result = asdict(one) | {
        "start": before,
        "losses": losses(trained.model, tokenizer, setting),
        "tokens": trained.record["tokens_trained"],
        "cost": trained.record["cost"],
        "parameters": trained.record["parameters"],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2))


def grow(one: Run, setting: Setting, output: Path, folder: Path) -> Path:
    """The base with twice the experts, as the arm says."""
    selection, router = one.arm.split(", ")
    base = setting.base_model()
    by_score, calibrated = selection in METRICS, router in ("split", "fit")
    expand(
        base,
        folder,
        num_experts=setting.num_experts,
        selection="greedy" if by_score else selection,
        metric=selection if by_score else "grad_squared",
        scores=scores_of(base, setting, output) if by_score else None,
        # Plain copies would stay alike for ever: the same router row, the same gradient.
        router_extension=router if calibrated else "noise",
        calibration=training_text() if calibrated else None,
        calibration_tokens=setting.calibration_tokens,
        context_length=setting.base.context_length,
        seed=one.seed,
        verify="none",
        overwrite=True,
        progress=False,
    )
    return folder


def training_text() -> dict[str, Any]:
    function = "fusion_upcycle.demo.domain_text"
    return {d: {"_target_": function, "domain": d, "split": "train"} for d in DOMAINS}


def losses(model: Any, tokenizer: Any, setting: Setting) -> dict[str, float]:
    """Nats per byte (a token is a byte) on the validation text of each domain."""
    length = setting.base.context_length
    return {
        domain: perplexity(
            model,
            tokenizer,
            domain_text(domain, "validation"),
            context_length=length,
            stride=length // 2,
        )["loss_nats_per_token"]
        for domain in DOMAINS
    }


if __name__ == "__main__":
    main()
