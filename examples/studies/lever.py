"""Which router initialisation and which router learning rate let an upcycled model learn?

Question: how large may a router's steps be, relative to its rows, before the gain of upcycling is
          lost; does that depend on the model's width; and which size of its first logits is best?
Command:  python examples/studies/lever.py [--output FOLDER] [--record FOLDER]
          python examples/studies/lever.py --table examples/studies/results/lever
Needs:    two cores, 25 minutes; no download. A study that was stopped goes on.
Expected: what is lost grows with the ratio of router learning rate and row standard deviation, at
          both widths; see docs/studies/lever.md.

Every trial is judged on validation text. Experts are copies with noise 0.01 unless a row says so.
"""

from collections.abc import Sequence
from typing import Any

from lab import Run, main, mean

from fusion_upcycle.report.tables import Table

TRUNK = "trunk"
WIDE = "wide"
LEARNING_RATE = 4e-3


def moe(name: str, experts: int, top_k: int, logit_std: float, **options: Any) -> dict[str, Any]:
    return {
        "do": "upcycle",
        "num_experts": experts,
        "experts_per_token": top_k,
        "expert_init": {"name": "noise", "noise_std": 0.01},
        "router_init": {"name": "normal", "logit_std": logit_std},
    } | options


def runs(short: bool) -> list[Run]:
    found = []

    def add(arm: str, make: dict[str, Any], share: float = 0.1, **options: Any) -> None:
        settings = {"learning_rate": LEARNING_RATE} | options
        start = WIDE if arm.startswith("wide") else TRUNK
        found.append(Run(arm, start, share, 1, make, settings))

    for share in (0.1, 0.5):
        for rate in (2e-3, 4e-3, 8e-3):
            add("dense", {}, share, learning_rate=rate)
    for logit_std in (0.3, 1.0, 5.0):
        for factor in (1.0, 0.1, 0.02):
            rate = {"router_learning_rate": LEARNING_RATE * factor}
            add("8 top-1", moe("", 8, 1, logit_std), **rate)
            add("8 top-2", moe("", 8, 2, logit_std), **rate)
        add("16 top-1", moe("", 16, 1, logit_std), router_learning_rate=LEARNING_RATE)
        add("16 top-1", moe("", 16, 1, logit_std), router_learning_rate=LEARNING_RATE * 0.02)
    return found


def show(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["arm"],
            f"+{row['share']:.0%}",
            f"{row['learning_rate']:g}",
            f"{row['make']['router_init']['logit_std']:g}" if row["make"] else "",
            "" if not row["make"] else f"{row['options'].get('router_learning_rate', 0):g}",
            f"{mean(row, 'validation'):.4f}",
        ]
        for row in rows
    ]
    headers = ["arm", "budget", "LR", "logit std", "router LR", "bits per byte"]
    return Table("Router lever", headers, lines).to_markdown()


if __name__ == "__main__":
    main("lever", __doc__, runs, show)
