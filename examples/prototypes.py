"""A router from texts: does a bias, rows of one length or another temperature make it better?

Question: `router_init=prototype` is the ridge regression from router inputs to "these are texts of
          model n", without a bias, as DUME (arXiv 2603.29765) found it too. Theirs has a bias, rows
          of unit length, softmax at a temperature of 0.1, and one expert for each token. Does any
          of these help?
Command:  python examples/prototypes.py --record examples/results/prototypes    (3 minutes)
          python examples/prototypes.py --table examples/results/prototypes
Needs:    the demo models, which are shipped.
Expected: no: at each number of experts per token, all are level within 0.0005.

The demo's three fine-tunes are merged with shared=base. Each row has the `logit_std` that is best
for it on validation text; the numbers are bits per byte, means over the three domains. `logit_std`
is the inverse of a temperature: at 1/T of it the logits are divided by T. Variants that the package
does not have are made here: a bias by another forward pass of the router.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from merging import MERGES, Way, evaluate, ways
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel

from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.demo import DOMAINS, demo_model, domain_text
from fusion_upcycle.demo.recipe import CONTEXT_LENGTH
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.merging.calibration import calibration_windows, router_moments
from fusion_upcycle.merging.merging import BASE, DenseModel
from fusion_upcycle.merging.options import MergingOptions
from fusion_upcycle.merging.plan import plan_merging
from fusion_upcycle.merging.prototypes import Moments
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record

SECTION = "prototypes"
LOGIT_STDS = (0.5, 1.0, 2.0, 4.0, 8.0)
RIDGE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, default=Path("outputs/prototypes"))
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table")
    arguments = parser.parse_args()
    if not arguments.table:
        path = write_run_record(SECTION, {"rows": measure()}, arguments.record)
        print(f"Run record: {path}")
    print(table(read_run_record(arguments.table or arguments.record)).to_markdown())


def measure() -> list[dict[str, Any]]:
    """Every variant of the router at every size of its logits."""
    moments, moe = gather(), merged()
    rows = []
    for chosen, bias, unit in product((1, 2), (False, True), (False, True)):
        put = partial(set_routers, moe, moments, chosen=chosen, bias=bias, unit=unit)
        tried = {}
        for logit_std in LOGIT_STDS:
            put(logit_std=logit_std)
            tried[logit_std] = evaluate(moe, "validation", stride=CONTEXT_LENGTH)["mean"]
        best = min(tried, key=lambda size: tried[size])
        put(logit_std=best)
        rows.append(
            {
                "experts_per_token": chosen,
                "bias": bias,
                "unit_rows": unit,
                "validation": {str(size): bits for size, bits in tried.items()},
                "logit_std": best,
                "test": evaluate(moe, "test", stride=CONTEXT_LENGTH // 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def gather() -> dict[int, Moments]:
    """What the routers see, each fine-tune on its own texts."""
    folders = {BASE: demo_model("base")} | {name: demo_model(name) for name in DOMAINS}
    models = {
        name: DenseModel(AutoConfig.from_pretrained(folder), CheckpointReader(folder))
        for name, folder in folders.items()
    }
    merging = plan_merging(models, MergingOptions(shared="base", router_init="prototype"))
    texts = {name: domain_text(name, "continued") for name in DOMAINS}
    windows = calibration_windows(texts, merging, folders[BASE] / "tokenizer.json")
    return router_moments(merging, windows)


def merged() -> PreTrainedModel:
    """The demo fine-tunes in one MoE; its routers are set later."""
    normal: Way = next(way for way in ways(MERGES) if way.name == "MoE, normal router")
    with loading_bars(False):
        return normal.merged()


def set_routers(
    moe: PreTrainedModel,
    moments: dict[int, Moments],
    *,
    chosen: int,
    bias: bool,
    unit: bool,
    logit_std: float,
) -> None:
    """Give every router rows, and a bias or none."""
    routers = find_routers(moe)
    routers.close()
    for layer, seen in moments.items():
        rows_ND, bias_N = discriminant(seen, bias=bias, unit=unit, logit_std=logit_std)
        routers.modules[layer].forward = partial(route, rows_ND, bias_N, chosen)


def discriminant(
    seen: Moments, *, bias: bool, unit: bool, logit_std: float
) -> tuple[Tensor, Tensor]:
    """Rows [N, D] and bias [N] of the ridge regression.

    With a bias, regression is that of centred inputs.
    """
    second_DD = seen.second_DD
    mean_D = seen.means_ND.mean(0) if bias else torch.zeros(len(second_DD), dtype=torch.float64)
    spread_DD = second_DD - mean_D.outer(mean_D)
    loading = RIDGE * second_DD.diagonal().mean() * torch.eye(len(second_DD))
    rows_ND = seen.means_ND - seen.means_ND.mean(0)
    rows_ND = torch.linalg.solve(spread_DD + loading, rows_ND.T).T
    if unit:
        rows_ND = rows_ND / rows_ND.norm(dim=1, keepdim=True)
    size = (rows_ND @ spread_DD * rows_ND).sum(1).mean().sqrt()
    rows_ND = rows_ND * (logit_std / size)
    return rows_ND.float(), -(rows_ND @ mean_D).float()


def route(
    rows_ND: Tensor, bias_N: Tensor, chosen: int, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass of a Mixtral's router, with a bias: logits, weights, experts."""
    logits = F.linear(hidden.flatten(0, -2), rows_ND, bias_N)
    weights, experts = logits.softmax(-1).topk(chosen, -1)
    return logits, weights / weights.sum(-1, keepdim=True), experts


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            str(row["experts_per_token"]),
            "yes" if row["bias"] else "no",
            "unit length" if row["unit_rows"] else "as they are",
            *(f"{bits:.4f}" for bits in row["validation"].values()),
            f"{row['test']['mean']:.4f}",
        ]
        for row in record[SECTION]["rows"]
    ]
    sizes = [f"logit_std={size:g}" for size in LOGIT_STDS]
    headers = ["experts per token", "bias", "rows", *sizes, "test, at the best"]
    return Table("Prototype routers, bits per byte of validation text", headers, rows)


if __name__ == "__main__":
    main()
