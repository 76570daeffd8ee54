"""An MoE of three fine-tunes is trained on: does it matter which router it begins with?

Question: at equal training FLOPs, does a router made of each fine-tune's own texts (`prototype`)
          still lead after training, or does a random one catch up; and is the MoE of fine-tunes
          better than the upcycled base?
Command:  python examples/studies/merged.py [--output FOLDER] [--record FOLDER]
          python examples/studies/merged.py --table examples/studies/results/merged
Needs:    two cores, 8 minutes; no download. A study that was stopped goes on.
Expected: prototype leads untrained and at +2 %, a random router from +10 % on; see
          docs/studies/merged.md.

Three experts, top-1: the demo's fine-tunes on prose, source and arithmetic, whose shared weights
are the base's. Budgets are shares of the base's compute; what the fine-tunes were trained with, a
tenth of it each, on the same text, is not counted.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean as average
from typing import Any

from lab import LEARNING_RATE, Run, budgets, cells, main, select, step0, upcycled, with_seeds

from fusion_upcycle.report.tables import Table


def merged(router: str) -> dict[str, Any]:
    return {"do": "merge", "experts_per_token": 1, "shared": "base", "router_init": router}


ARMS: dict[str, dict[str, Any]] = {
    "dense base": {},
    "3 fine-tunes, prototype router": merged("prototype"),
    "3 fine-tunes, random router": merged("normal"),
    "3 copies of the base, random router": upcycled(3, 1),
}
SHARES = (0.02, 0.1, 0.25)


def runs(short: bool) -> list[Run]:
    found = [
        Run(arm, "base", share, 1, make, {"learning_rate": LEARNING_RATE})
        for share in SHARES
        for arm, make in ARMS.items()
    ]
    return with_seeds(found, (1, 2, 3))


def show(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for arm in ARMS:
        of_arm = select(rows, arm=arm)
        lines.append([arm, f"{average(map(step0, of_arm)):.4f}", *cells(of_arm, SHARES)])
    return Table("", ["", "step 0", *budgets(SHARES)], lines).to_markdown()


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    from figures import lines_over_budget

    return lines_over_budget(rows, list(ARMS), folder, "merged")


if __name__ == "__main__":
    main("merged", __doc__, runs, show, draw)
