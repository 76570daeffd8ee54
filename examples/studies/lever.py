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

from lab import Run, main, mean, upcycled

from fusion_upcycle.report.tables import Table

TRUNK, WIDE = "trunk", "wide"
RATE = {TRUNK: 4e-3, WIDE: 1e-3}
LOGIT_STDS = (0.3, 1.0, 5.0)


def moe(experts: int, top_k: int, logit_std: float, **options: Any) -> dict[str, Any]:
    router = {"name": "normal", "logit_std": logit_std}
    return upcycled(experts, top_k, router_init=router, **options)


def runs(short: bool) -> list[Run]:
    found = []

    def add(arm: str, make: dict[str, Any], factor: float = 1.0, start: str = TRUNK,
            share: float = 0.1, rate: float | None = None, **options: Any) -> None:  # fmt: skip
        settings = {"learning_rate": rate or RATE[start]} | options
        if make:
            settings["router_learning_rate"] = settings["learning_rate"] * factor
        found.append(Run(arm, start, share, 1, make, settings))

    # Both arms at the same rates.
    for share in (0.1, 0.5):
        for rate in (1e-3, 2e-3, 4e-3, 8e-3):
            add("dense", {}, share=share, rate=rate)
            if rate != 4e-3 or share == 0.5:
                add("8 top-1", moe(8, 1, 1.0), 4e-4 / rate, share=share, rate=rate)
    # How large a router's steps may be.
    for logit_std in LOGIT_STDS:
        for factor in (1.0, 0.1, 0.02):
            add("8 top-1", moe(8, 1, logit_std), factor)
            add("8 top-2", moe(8, 2, logit_std), factor)
        for factor in (1.0, 0.02):
            add("16 top-1", moe(16, 1, logit_std), factor)
    for rate in (5e-4, 1e-3, 2e-3):
        add("dense", {}, start=WIDE, rate=rate)
    for logit_std, factors in ((0.3, (1.0, 0.1)), (1.0, (1.0, 0.3, 0.1, 0.03)), (5.0, (1.0, 0.1))):
        for factor in factors:
            add("8 top-1", moe(8, 1, logit_std), factor, WIDE)
    return found


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Every trial, in the order of what it was made from, arm, budget and settings."""
    lines = [
        [
            row["start"],
            row["arm"],
            f"+{row['share']:.0%}",
            f"{row['learning_rate']:g}",
            f"{row['make']['router_init']['logit_std']:g}" if row["make"] else "",
            f"{row['options']['router_learning_rate']:g}" if row["make"] else "",
            f"{mean(row, 'validation'):.4f}",
            f"{mean(row):.4f}",
        ]
        for row in rows
    ]
    headers = ["base", "arm", "budget", "LR", "logit std", "router LR", "validation", "test"]
    return Table("", headers, lines).to_markdown()


if __name__ == "__main__":
    main("lever", __doc__, runs, show)
