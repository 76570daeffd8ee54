"""Expert upcycling without the loss jump: which new router rows keep the function, and which learn?

Question: top-k fixed, a duplicated expert and its copy are chosen together. How far does the loss
          jump with each router extension, are the copies in use, and which one ends lowest after
          training on?
Command:  python examples/expert_upcycling/router.py [--output FOLDER]       (about 30 minutes)
          ... --only jumps --source FOLDER --output FOLDER      (of another trained Mixtral)
          ... --table examples/expert_upcycling/results/router
Needs:    two cores; no download. What was stopped goes on with the next row.
Expected: a table of jumps in nats per byte with the smallest copy share, and one of losses after
          training. Calibration and training read the demo's `continued` text, losses are on
          validation text.
"""

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fusion_upcycle.demo import DOMAINS, demo_model, domain_text
from fusion_upcycle.demo.recipe import BATCH_SIZE, CONTEXT_LENGTH, RECIPES
from fusion_upcycle.demo.texts import demo_documents
from fusion_upcycle.expansion.router.fit import fit_rows
from fusion_upcycle.expansion.router.inputs import RouterInputs, live_router_inputs
from fusion_upcycle.expansion.router.rows import rows_report
from fusion_upcycle.expansion.router.split import split_rows
from fusion_upcycle.expansion.run import expand
from fusion_upcycle.experts import DuplicationPlan, generator_for
from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.router_extension import ROUTER_EXTENSIONS
from fusion_upcycle.selection import select
from fusion_upcycle.texts.perplexity import perplexity
from fusion_upcycle.texts.windows import calibration_sequences
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, train

SECTION = "router"
CALIBRATION_TOKENS = 49_152
#: Selections, and how many times as many experts.
PLANS = (("uniform", 2), ("uniform", 4), ("greedy", 1.5), ("greedy", 1.75))
#: Extension -> options; `split+fit` is `split`, polished.
EXTENSIONS = ("copy", "noise", "split", "fit", "split+fit")
#: What is trained on: name -> extension and options, all of them uniform, twice the experts.
TRIALS: dict[str, tuple[str, dict[str, float]] | None] = {
    "not grown": None,
    "noise": ("noise", {}),
    "split, mixed share 0.03": ("split", {"mixed_share": 0.03}),
    "split, mixed share 0.1": ("split", {"mixed_share": 0.1}),
    "split, mixed share 0.01": ("split", {"mixed_share": 0.01}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/router"))
    parser.add_argument("--tokens", type=int, default=300_000, help="of each training")
    parser.add_argument("--source", type=Path, help="a trained MoE folder (the demo MoE)")
    parser.add_argument("--only", choices=("jumps", "trials"), help="leave the other part out")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's tables")
    parser.add_argument("--record", type=Path, help="where to leave the run record (OUTPUT)")
    arguments = parser.parse_args()
    if not arguments.table:
        source = arguments.source or demo_model("moe")
        parts = {"jumps": lambda: jumps(source, arguments.output)}
        parts["trials"] = lambda: trials(source, arguments.output, arguments.tokens)
        found = {name: part() for name, part in parts.items() if arguments.only in (None, name)}
        folder = arguments.record or arguments.output
        print(f"Run record: {write_run_record(SECTION, found, folder)}")
    for table in tables(read_run_record(arguments.table or folder)[SECTION]):
        print(f"\n{table.title}\n\n{table.to_markdown()}")


def jumps(source: Path, output: Path) -> dict[str, Any]:
    """Loss before and after, without training, of each plan and extension."""
    before = once(output / "before.json", lambda: losses(source))
    rows, experts = [], load(source).config.num_local_experts
    for selection, times in PLANS:
        num_experts = int(times * experts)
        plan_name = f"{selection} {experts} -> {num_experts}"
        for extension in EXTENSIONS:
            if selection != "uniform" and extension.startswith("split"):
                continue
            folder = output / f"{selection}{num_experts}_{extension}"
            row = once(
                folder / "jump.json",
                lambda: one_jump(source, folder, selection, num_experts, extension, {}),  # noqa: B023
            )
            rows.append({"plan": plan_name, "extension": extension} | row)
            print(f"{plan_name}, {extension}: {mean(row) - mean(before):+.4f}", flush=True)
    return {"before": before, "calibration_tokens": CALIBRATION_TOKENS, "rows": rows}


def trials(source: Path, output: Path, tokens: int) -> dict[str, Any]:
    """Loss after training on, of each of `TRIALS`."""
    rows = []
    for name, trial in TRIALS.items():
        folder = output / "trials" / name.replace(" ", "_").replace(",", "")
        row = once(
            folder / "trained.json",
            lambda: one_trial(source, folder, trial, tokens),  # noqa: B023
        )
        rows.append({"name": name} | row)
        print(f"{name}: {mean(row['start']):.4f} -> {mean(row):.4f}", flush=True)
    return {"tokens": tokens, "rows": rows}


def one_jump(
    source: Path, folder: Path, selection: str, num_experts: int, extension: str, options: Any
) -> dict[str, Any]:
    """Expand the folder, measure it, and keep what the routers do on validation text."""
    plan = select(scores(source).scores("grad_squared"), num_experts, selection=selection)
    started = time.perf_counter()
    rows = {
        layer: extended(layer, seen, plan, extension, options)
        for layer, seen in router_inputs(source, "continued").items()
    }
    seconds = time.perf_counter() - started
    expand(
        source,
        folder / "step0",
        num_experts=num_experts,
        selection=selection,
        scores=scores(source),
        router_rows=rows,
        verify="none",
        overwrite=True,
        progress=False,
    )
    reports = {
        layer: rows_report(
            seen.weight_ED, rows[layer], seen.inputs_ND, plan.source_experts[layer], seen.rule
        ).to_json()
        for layer, seen in router_inputs(source, "validation").items()
    }
    return {
        "losses": losses(folder / "step0")["losses"],
        "seconds_per_layer": seconds / len(rows),
        "source_experts": plan.to_json(),
        "layers": reports,
    }


def extended(
    layer: int, seen: RouterInputs, plan: DuplicationPlan, extension: str, options: dict[str, Any]
) -> torch.Tensor:
    """[M, D]: the rows of one layer."""
    experts = plan.source_experts[layer]
    generator = generator_for(0, layer, 0, "router_extension")
    if extension in ROUTER_EXTENSIONS:
        return ROUTER_EXTENSIONS[extension](seen.weight_ED, experts, generator)
    start = None
    if extension.startswith("split"):
        multiplier = len(experts) // len(seen.weight_ED)
        start = split_rows(
            seen.weight_ED, seen.inputs_ND, multiplier, seen.rule, generator, **options
        ).rows_MD
        if extension == "split":
            return start
    return fit_rows(
        seen.weight_ED, seen.inputs_ND, experts, seen.rule, generator, start_MD=start
    ).rows_MD


def one_trial(
    source: Path, folder: Path, trial: tuple[str, dict[str, float]] | None, tokens: int
) -> dict[str, Any]:
    """Expand (or not), train on, measure."""
    start: dict[str, Any] = losses(source)
    step0 = source
    if trial is not None:
        twice = 2 * load(source).config.num_local_experts
        start, step0 = one_jump(source, folder, "uniform", twice, *trial), folder / "step0"
    options = make_training_options(
        tokens=tokens,
        context_length=CONTEXT_LENGTH,
        batch_size=BATCH_SIZE,
        learning_rate=RECIPES["moe"].learning_rate,
        schedule="cosine",
        warmup_share=0.05,
        final_share=0.0,
        log_every=5,
    )
    trained = train(
        load(step0),
        AutoTokenizer.from_pretrained(source),
        options,
        data=demo_documents("continued"),
        places=Places(folder / "work", folder / "logs", folder / "model", overwrite=True),
        origin=Origin(source.name),
        progress=False,
    )
    return {
        "start": start,
        "losses": losses(folder / "model")["losses"],
        "options": trained.record["options"],
        "cost": trained.record["cost"],
        "router_warning": trained.record["router_warning"],
    }


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@cache
def scores(source: Path) -> Importance:
    texts = {domain: domain_text(domain, "continued") for domain in DOMAINS}
    return measure_importance(
        load(source), texts, source / "tokenizer.json", tokens=24_576, context_length=CONTEXT_LENGTH
    )


@cache
def router_inputs(source: Path, split: str) -> dict[int, RouterInputs]:
    sequences = calibration_sequences(
        {domain: domain_text(domain, split) for domain in DOMAINS},
        source / "tokenizer.json",
        tokens=CALIBRATION_TOKENS,
        context_length=CONTEXT_LENGTH,
    )
    return live_router_inputs(load(source), sequences)


def losses(folder: Path) -> dict[str, Any]:
    """Nats per byte (the tokens are bytes) of each domain's validation text."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    return {
        "losses": {
            domain: perplexity(
                model,
                tokenizer,
                domain_text(domain, "validation"),
                context_length=CONTEXT_LENGTH,
                stride=CONTEXT_LENGTH // 2,
            )["loss_nats_per_token"]
            for domain in DOMAINS
        }
    }


def once(path: Path, make: Any) -> dict[str, Any]:
    """What an earlier run left, or what `make` finds."""
    if not path.is_file():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2))
    return json.loads(path.read_text())


def mean(row: dict[str, Any]) -> float:
    return float(sum(row["losses"].values()) / len(row["losses"]))


def tables(record: dict[str, Any]) -> list[Table]:
    made = []
    if "jumps" in record:
        before = mean(record["jumps"]["before"])
        rows = []
        for row in record["jumps"]["rows"]:
            layers = row["layers"].values()
            shares = [layer["smallest_copy_share"] for layer in layers]
            groups = [layer["one_group_share"] for layer in layers]
            rows.append(
                [
                    f"{row['plan']}, {row['extension']}",
                    f"{mean(row) - before:+.4f}",
                    f"{min(shares):.2f}",
                    "-" if None in groups else f"{min(groups):.3f}",
                    f"{max(layer['weight_error'] for layer in layers):.3f}",
                ]
            )
        headers = ["plan, router extension", "jump, nats per byte", "smallest copy share"]
        headers += ["top-k in one group", "weight error"]
        made.append(Table(f"Not grown: {before:.4f} nats per byte", headers, rows))
    if "trials" in record:
        rows = [
            [
                row["name"],
                f"{mean(row['start']):.4f}",
                *(f"{loss:.4f}" for loss in row["losses"].values()),
                f"{mean(row):.4f}",
            ]
            for row in record["trials"]["rows"]
        ]
        headers = ["twice the experts, trained on", "at the start", *DOMAINS, "mean"]
        tokens = record["trials"]["tokens"]
        made.append(Table(f"Nats per byte after {tokens / 1e6:.2f}M tokens", headers, rows))
    return made


if __name__ == "__main__":
    main()
