"""Does a trained MoE gain by growing, and does it matter which experts are copied, and how?

Question: a Mixtral of 16 experts, top-2, is trained on with 5, 15 and 50 % of its compute: as it
          is, or grown first, by copies or by `split`, of all experts or of few chosen ones?
Command:  python examples/studies/growing.py [--output FOLDER] [--record FOLDER]
          python examples/studies/growing.py --table examples/studies/results/growing
Needs:    two cores, 45 minutes; no download. A study that was stopped goes on.
Expected: nothing pays at +5 and +15 %, `split` does at +50 %; which experts are copied matters by
          thousandths; see docs/studies/growing.md.

Moments are carried, routers have the full learning rate where an arm does not say otherwise, and
learning rates fall to zero over the last half. `concentrated` arms put 16 copies on six experts
(max_copies=4): the most important by grad_squared, ones that are drawn (`selection=control`), or
the least important. `+4` arms grow to 20 experts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import Run, budgets, cell, cells, main, select, step0, with_seeds

from fusion_upcycle.report.tables import Table

NOT_GROWN, SPLIT, FIXED = "not grown", "split of all", "32 experts from the start"
#: Its router by the default rule: those of `split` have larger rows, and so smaller steps.
RULED = "not grown, router by the rule"


def grown(**options: Any) -> dict[str, Any]:
    return {"do": "expand", "num_experts": 32} | options


NOISY = {"router_extension": "noise", "expert_init": {"name": "noise", "noise_std": 0.01}}
FEW = {"num_experts": 20, "max_copies": 2, "router_extension": "fit"}
ARMS: dict[str, dict[str, Any]] = {
    NOT_GROWN: {},
    RULED: {},
    "copies of all": grown(**NOISY),
    "copies, concentrated, most important": grown(selection="greedy", max_copies=4, **NOISY),
    "copies, concentrated, drawn": grown(selection="control", max_copies=4, **NOISY),
    "copies, concentrated, least important": grown(
        selection="greedy", scores="least", max_copies=4, **NOISY
    ),
    SPLIT: grown(router_extension="split"),
    "+4, fit, most important": grown(selection="greedy", **FEW),
    "+4, fit, drawn": grown(selection="control", **FEW),
    "+4, fit, least important": grown(selection="greedy", scores="least", **FEW),
    FIXED: {},
}
SHARES = (0.05, 0.15, 0.5)
RATES = {0.05: 4e-3, 0.15: 4e-3, 0.5: 8e-3}


#: A continuation on one domain only, and the arms that are compared there.
NARROW = "source"
NARROW_ARMS = (NOT_GROWN, SPLIT, *(arm for arm in ARMS if arm.startswith("+4")))


def run(arm: str, share: float, domain: str | None = None) -> Run:
    start = "moe32" if arm == FIXED else "moe"
    options = {"domain": domain} if domain else {}
    options |= {
        "learning_rate": RATES[share],
        "router_learning_rate": None if arm == RULED else RATES[share],
        "optimizer_state": "carried",
        "warmup_steps": 0,
    }
    return Run(arm, start, share, 1, ARMS[arm], options, "moe" if start != "moe" else None)


def runs(short: bool) -> list[Run]:
    seeds = (1, 2, 3)
    judged = [arm for arm in ARMS if arm not in (FIXED, RULED) and not arm.startswith("+")]
    others = [arm for arm in ARMS if arm not in (*judged, RULED)]
    return (
        with_seeds([run(arm, 0.05) for arm in (NOT_GROWN, "copies of all", SPLIT)], seeds)
        + with_seeds([run(arm, 0.15) for arm in judged], seeds)
        + [run(arm, 0.05) for arm in ARMS if arm not in (NOT_GROWN, RULED, "copies of all", SPLIT)]
        + [run(arm, 0.15) for arm in others]
        + [run(arm, 0.5) for arm in (NOT_GROWN, SPLIT)]
        + [*with_seeds([run(RULED, 0.15)], seeds), run(RULED, 0.5)]
        + with_seeds([run(arm, 0.15, NARROW) for arm in NARROW_ARMS], seeds)
    )


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Jump at step 0, and the loss after each budget."""
    rows = of_all_domains(rows)
    source = step0(select(rows, arm=NOT_GROWN)[0])
    lines = []
    for arm in ARMS:
        of_arm = select(rows, arm=arm)
        jump = "" if arm == FIXED else f"{step0(of_arm[0]) - source:+.4f}"
        lines.append([arm, jump, *cells(of_arm, SHARES)])
    return Table("", ["", "jump", *budgets(SHARES)], lines).to_markdown()


def narrow(rows: Sequence[dict[str, Any]]) -> str:
    """Trained on one domain, and scored on it."""
    found = [row for row in rows if "domain" in row["options"]]
    lines = []
    for arm in NARROW_ARMS:
        values = [row["bits_per_byte"]["test"][NARROW] for row in select(found, arm=arm)]
        lines.append([arm, cell(values)])
    return Table("", [f"{NARROW} only", "+15%"], lines).to_markdown()


def of_all_domains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the runs that were trained on one domain only."""
    return [row for row in rows if "domain" not in row["options"]]


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    from figures import lines_over_budget

    arms = [arm for arm in ARMS if not arm.startswith("+")]
    return lines_over_budget(of_all_domains(rows), arms, folder, "growing")


if __name__ == "__main__":
    main("growing", __doc__, runs, show, draw)
