"""Does it matter what the experts of an upcycled model are made of?

Question: at equal training FLOPs, do experts that are copies, noisy copies, partly drawn anew,
          permuted, cut by singular values or into halves end lower?
Command:  python examples/studies/initialisers.py [--output FOLDER] [--record FOLDER]
          python examples/studies/initialisers.py --table examples/studies/results/initialisers
Needs:    two cores, 20 minutes; no download. A study that was stopped goes on.
Expected: noise and copies lead; what breaks the function at step 0 does not pay it back at these
          budgets; see docs/studies/initialisers.md.
"""

from collections.abc import Sequence
from typing import Any

from lab import LEARNING_RATE, Run, budgets, cells, main, select, step0, upcycled, with_seeds

from fusion_upcycle.report.tables import Table

ARMS: dict[str, dict[str, Any]] = {
    "copy": upcycled(8, 1, expert_init="copy"),
    "noise 0.01": upcycled(8, 1),
    "noise 0.1": upcycled(8, 1, expert_init={"name": "noise", "noise_std": 0.1}),
    "permute": upcycled(8, 1, expert_init="permute"),
    "drop 0.25": upcycled(8, 1, expert_init={"name": "drop", "drop_ratio": 0.25}),
    "drop 0.5": upcycled(8, 1, expert_init={"name": "drop", "drop_ratio": 0.5}),
    "svd": upcycled(8, 1, expert_init="svd"),
    "subset": upcycled(8, 1, expert_init="subset"),
    "16 halves, top-2": upcycled(16, 2, granularity=2),
    "16 halves, top-2, rows tied": upcycled(16, 2, granularity=2),
}
TIED = {"tie_groups": 2}
SHARES = (0.1, 0.5)


def runs(short: bool) -> list[Run]:
    def all_of(share: float) -> list[Run]:
        found = [Run("dense", "trunk", share, 1, {}, {"learning_rate": LEARNING_RATE})]
        for arm, make in ARMS.items():
            tied = TIED if arm.endswith("tied") else {}
            options = {"learning_rate": LEARNING_RATE} | tied
            found.append(Run(arm, "trunk", share, 1, make, options))
        return found

    return with_seeds(all_of(0.1), (1, 2, 3)) + all_of(0.5)


def show(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for arm in ("dense", *ARMS):
        of_arm = select(rows, arm=arm)
        (first,) = select(of_arm, share=0.1, seed=1)
        lines.append([arm, f"{step0(first):.4f}", *cells(of_arm, SHARES)])
    return Table("", ["8 experts, top-1", "step 0", *budgets(SHARES)], lines).to_markdown()


if __name__ == "__main__":
    main("initialisers", __doc__, runs, show)
