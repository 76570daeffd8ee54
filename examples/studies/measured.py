"""What `inspect --source-tokens` knows of our studies: made from their records.

Command:  python examples/tables.py    (writes fusion_upcycle/inspection/measured.json)
Expected: the file changes only where a record did; tests/test_studies.py holds it to that.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean as average
from statistics import stdev
from typing import Any

import budget
import lever
import scratch
import tokens
from lab import RESULTS, mean, select

from fusion_upcycle.demo.recipe import RECIPES, TRUNK
from fusion_upcycle.report.tables import read_run_record

FILE = Path(__file__).resolve().parents[2] / "fusion_upcycle" / "inspection" / "measured.json"
EXPERTS = {
    "8 experts, top-1": (8, 1),
    "8 experts, top-2": (8, 2),
    "16 experts, top-1": (16, 1),
    "16 experts, top-2": (16, 2),
}
#: Parameters without embeddings and output head of the trunk and of the wide base.
PARAMETERS = {"trunk": tokens.PARAMETERS, "wide": 918_784}
WIDE_TOKENS = 2_048_000


def write() -> None:
    FILE.write_text(text(), encoding="utf-8")


def text() -> str:
    """The file's content, a row per line."""
    head = json.dumps(HEAD, indent=1)[:-2]
    parts = {"rows": [*of_budgets(), *of_tokens(), of_width()], "from_scratch": [*of_scratch()]}
    lists = (
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for name, rows in parts.items()
    )
    return head + ",\n" + ",\n".join(lists) + "\n}\n"


HEAD = {
    "source": "examples/studies (lever, budget, tokens, scratch), from their run records",
    "setting": "Llama and Mixtral-like models on bytes, context 128, rate tuned for both arms",
    "unit": "bits per byte",
    "columns": {
        "tokens_per_parameter": "bytes the dense source has seen, per parameter",
        "parameters": "of the dense source, without embeddings",
        "share": "budget, of the source's training FLOPs; the same for both arms",
        "difference": "rows: upcycled minus dense; from_scratch: that minus upcycled",
        "spread": "standard deviation over seeds of the paired difference; null with one seed",
    },
    "settings": {
        "learning_rate_share": 0.25,
        "router_ratio": 0.005,
        "logit_std": 1.0,
        "balance_weight": 0.01,
        "warmup_share": 0.05,
        "decay_share": 0.5,
        "final_share": 0.0,
    },
}


def runs_of(name: str) -> list[dict[str, Any]]:
    return list(read_run_record(RESULTS / name)[name]["runs"])


def of_budgets() -> Iterable[dict[str, Any]]:
    rows = runs_of("budget")
    seen = RECIPES[TRUNK].tokens
    for arm, experts in EXPERTS.items():
        for share in budget.SHARES:
            better = select(rows, arm=arm, share=share, start=TRUNK)
            yield row(experts, "trunk", seen, share, better, dense_beside(rows, better))


def of_tokens() -> Iterable[dict[str, Any]]:
    rows = runs_of("tokens")
    for seen, base in tokens.BASES.items():
        if base != TRUNK:  # which is among the budgets
            dense, moe = (tokens.best(rows, base, arm) for arm in tokens.ARMS)
            yield row((8, 1), "trunk", seen, tokens.SHARE, moe, dense)


def of_width() -> dict[str, Any]:
    """Both at the learning rate that was best for dense, the router within the default rule."""
    rows = [row for row in select(runs_of("lever"), start="wide") if row["learning_rate"] == 1e-3]
    dense = select(rows, arm="dense")
    moe = [
        row
        for row in rows
        if row["make"]
        and row["make"]["router_init"]["logit_std"] == 1.0
        and row["options"]["router_learning_rate"] == lever.RATE["wide"] * 0.1
    ]
    return row((8, 1), "wide", WIDE_TOKENS, 0.1, moe, dense)


def of_scratch() -> Iterable[dict[str, Any]]:
    """The better of the two MoEs from nothing, by its mean."""
    rows = runs_of("scratch")
    for share in scratch.SHARES[1:]:
        upcycled = select(rows, arm=f"upcycled, {scratch.UPCYCLED}", share=share)
        fresh = min(
            (select(rows, arm=arm, share=share) for arm in scratch.SCRATCH),
            key=lambda seeds: average(map(mean, seeds)),
        )
        seeds = [found for found in upcycled if found["seed"] in {f["seed"] for f in fresh}]
        yield row((8, 1), "trunk", RECIPES[TRUNK].tokens, share, fresh, seeds)


def dense_beside(rows: Sequence[dict[str, Any]], moe: Sequence[Any]) -> list[Any]:
    """The dense runs of the same seeds."""
    dense = select(rows, arm="dense", share=moe[0]["share"], start=moe[0]["start"])
    return [next(found for found in dense if found["seed"] == one["seed"]) for one in moe]


def row(
    experts: tuple[int, int],
    base: str,
    seen: int,
    share: float,
    arm: Sequence[Any],
    beside: Sequence[Any],
) -> dict[str, Any]:
    differences = [mean(a) - mean(b) for a, b in zip(arm, beside, strict=True)]
    return {
        "num_experts": experts[0],
        "experts_per_token": experts[1],
        "tokens_per_parameter": round(seen / PARAMETERS[base], 1),
        "parameters": PARAMETERS[base],
        "share": share,
        "difference": round(average(differences), 4),
        "spread": round(stdev(differences), 4) if len(differences) > 1 else None,
        "seeds": len(differences),
    }
