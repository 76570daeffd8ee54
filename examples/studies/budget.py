"""Given a trained dense model and more compute: train it on, or its upcycled MoE?

Question: at equal training FLOPs, which ends lower on held-out text, and from which budget on?
Command:  make study    (the short form: top-1, +10 % and +50 %, three seeds; 3 minutes)
          python examples/studies/budget.py [--output FOLDER] [--record FOLDER]    (all rows)
          python examples/studies/budget.py --table examples/studies/results/budget
Needs:    two cores; no download. A study that was stopped goes on with the next run.
Expected: upcycled ahead of dense at every budget from +10 %, more at larger ones; see
          docs/studies/budget.md.

Both arms take the learning rate that was the best of four for each (examples/studies/lever.py).
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean as average
from typing import Any

from lab import LEARNING_RATE, Run, budgets, cells, main, select, upcycled, with_seeds

from fusion_upcycle.report.tables import Table

ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "8 experts, top-1": upcycled(8, 1),
    "8 experts, top-2": upcycled(8, 2),
    "16 experts, top-1": upcycled(16, 1),
    "16 experts, top-2": upcycled(16, 2),
}
BASES = {"trunk": "constant rate", "base": "decayed"}
SHARES = (0.1, 0.25, 0.5, 1.0)
SEEDS = (1, 2, 3)


def run(arm: str, base: str, share: float, seed: int = 1) -> Run:
    make = ARMS[arm]
    return Run(arm, base, share, seed, make, {"learning_rate": LEARNING_RATE})


def runs(short: bool) -> list[Run]:
    main_arms = [run(arm, "trunk", share) for share in (0.1, 0.5) for arm in list(ARMS)[:2]]
    if short:
        return with_seeds(main_arms, SEEDS)
    all_seeds = [
        run(arm, base, share)
        for base in BASES
        for arm in ARMS
        for share in SHARES
        if (base == "trunk" and share < 1 and arm != "16 experts, top-2")
        or (arm in ("dense", "8 experts, top-1") and (base == "trunk" or share in (0.1, 0.25, 0.5)))
    ]
    one_seed = [run(arm, "trunk", share) for arm in ARMS for share in SHARES]
    found = with_seeds(all_seeds, SEEDS)
    return found + [extra for extra in one_seed if extra not in found]


def show(rows: Sequence[dict[str, Any]]) -> str:
    """For each base: an arm per row, a budget per column, mean of the seeds and their spread."""
    tables = []
    for base, what in BASES.items():
        of_base = select(rows, start=base)
        shares = sorted({row["share"] for row in of_base})
        lines = [
            [arm, *cells(of_arm, shares)] for arm in ARMS if (of_arm := select(of_base, arm=arm))
        ]
        if lines:
            headers = [f"from {base} ({what})", *budgets(shares)]
            tables.append(Table("", headers, lines).to_markdown())
    return "\n\n".join(tables)


def costs(rows: Sequence[dict[str, Any]], share: float = 0.5) -> str:
    """What each arm was trained with at one budget, mean of the seeds, and how fast it was."""
    lines = []
    for arm in ARMS:
        found = select(rows, arm=arm, share=share, start="trunk")
        seconds = average(row["cost"]["cpu_seconds"] for row in found)
        parameters, first = found[0]["parameters"], found[0]
        lines.append(
            [
                arm,
                f"{parameters['total']:,}",
                f"{parameters['active']:,}",
                f"{first['tokens'] / 1e6:.2f}M",
                f"{first['flops'] / 1e12:.3f}T",
                f"{seconds:.0f}",
            ]
        )
    headers = [f"+{share:.0%}", "parameters", "active", "tokens", "FLOPs", "CPU seconds"]
    return Table("", headers, lines).to_markdown()


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Loss over budget, of every arm."""
    from figures import lines_over_budget

    return lines_over_budget(select(rows, start="trunk"), list(ARMS), folder, "budget")


if __name__ == "__main__":
    main("budget", __doc__, runs, show, draw)
