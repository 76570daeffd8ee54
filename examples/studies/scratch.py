"""From which budget on is an MoE from random weights better than an upcycled one?

Question: at equal training FLOPs after the base, does an MoE that starts from nothing overtake the
          upcycled one, and where?
Command:  python examples/studies/scratch.py [--output FOLDER] [--record FOLDER]
          python examples/studies/scratch.py --table examples/studies/results/scratch
Needs:    two cores, 20 minutes; no download. A study that was stopped goes on.
Expected: at more than the compute of the base itself; see docs/studies/scratch.md.

The MoEs from nothing: the same architecture (8 experts, top-1), and 8 experts of half the width,
top-2, which cost the same per token and whose router learns from the language loss. They are
trained on the text of the base, at its learning rate; the trunk's compute is the unit.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import budget
from lab import Run, cells, main, select

from fusion_upcycle.report.tables import Table

SHARES = (0.1, 0.25, 0.5, 1.0, 1.5)
SCRATCH = {
    "from scratch, 8 experts, top-1": {"intermediate_size": 128, "num_experts_per_tok": 1},
    "from scratch, 8 half experts, top-2": {"intermediate_size": 64, "num_experts_per_tok": 2},
}
UPCYCLED = "8 experts, top-1"
OPTIONS = {"learning_rate": 8e-3, "router_learning_rate": 8e-3, "warmup_steps": 100}


def runs(short: bool) -> list[Run]:
    found = [
        replace(budget.run(UPCYCLED, "trunk", share), arm=f"upcycled, {UPCYCLED}")
        for share in SHARES[:-1]
    ]
    found += [replace(run, seed=seed) for run in found for seed in (2, 3)]
    found.append(replace(found[0], share=SHARES[-1]))
    for arm, shape in SCRATCH.items():
        make = {"do": "fresh", "num_local_experts": 8} | shape
        for share in SHARES[1:]:
            found.append(Run(arm, "moe", share, 1, make, OPTIONS, "trunk", "train"))
    return found


def show(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [arm, *cells(select(rows, arm=arm), SHARES)]
        for arm in dict.fromkeys(row["arm"] for row in rows)
    ]
    return Table("", ["", *(f"{share:.0%}" for share in SHARES)], lines).to_markdown()


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    from figures import lines_over_budget

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    return lines_over_budget(rows, arms, folder, "scratch")


if __name__ == "__main__":
    main("scratch", __doc__, runs, show, draw)
