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

from lab import Run, main, mean, select, upcycled

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
    return f"{of_rates(rows)}\n\n{of_routers(rows)}"


def of_rates(rows: Sequence[dict[str, Any]]) -> str:
    """Both arms at each learning rate."""
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    lines = []
    for share in (0.1, 0.5):
        for arm in ("dense", "8 top-1"):
            found = {
                row["learning_rate"]: mean(row, "validation")
                for row in select(rows, start=TRUNK, arm=arm, share=share)
                if arm == "dense" or is_main(row)
            }
            lines.append([f"{arm}, +{share:.0%}", *(f"{found[rate]:.4f}" for rate in rates)])
    return Table("", ["learning rate", *(f"{rate:g}" for rate in rates)], lines).to_markdown()


def is_main(row: dict[str, Any]) -> bool:
    """Whether a trial has the router that the learning rates were compared with."""
    return bool(
        row["make"]["router_init"]["logit_std"] == 1.0
        and abs(row["options"]["router_learning_rate"] - 4e-4) < 1e-9
    )


def of_routers(rows: Sequence[dict[str, Any]]) -> str:
    """Each first router at each router learning rate, at +10 %."""
    lines = []
    for row in rows:
        rate = row["options"].get("router_learning_rate")
        if row["make"] and row["share"] == 0.1 and row["learning_rate"] == RATE[row["start"]]:
            lines.append(
                [
                    f"{row['start']}, {row['arm']}",
                    f"{row['make']['router_init']['logit_std']:g}",
                    f"{rate:.0e}",
                    f"{rate / row['router_row_std']:.4f}",
                    f"{mean(row, 'validation'):.4f}",
                ]
            )
    lines.sort(key=lambda line: (line[0], float(line[1]), -float(line[2])))
    headers = ["+10 %", "logit std", "router LR", "router LR / row std", "bits per byte"]
    return Table("", headers, lines).to_markdown()


if __name__ == "__main__":
    main("lever", __doc__, runs, show)
