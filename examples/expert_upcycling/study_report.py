"""The tables and the figure of `study.py`, from its run record."""

from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fusion_upcycle.report.tables import Table
from fusion_upcycle.training.logs import read_metrics

NOT_GROWN, FROM_THE_START = "not grown", "from the start"


def loss(run: dict[str, Any], when: str = "losses") -> float:
    return mean(run[when].values())


def tables(record: dict[str, Any]) -> list[Table]:
    """One table for each budget."""
    return [budget_table(record, budget) for budget in record["setting"]["budgets"]]


def budget_table(record: dict[str, Any], budget: int) -> Table:
    runs = [run for run in record["runs"] if run["budget"] == budget]
    by_arm = {run["arm"]: [r for r in runs if r["arm"] == run["arm"]] for run in runs}
    kept, full = ([loss(run) for run in by_arm[arm]] for arm in (NOT_GROWN, FROM_THE_START))
    gap, spread = mean(kept) - mean(full), max(stdev(kept), stdev(full))
    step0 = loss(by_arm[NOT_GROWN][0], "start")
    rows = []
    for arm, found in by_arm.items():
        ends = [loss(run) for run in found]
        closed = "-" if arm in (NOT_GROWN, FROM_THE_START) else "undefined"
        if closed != "-" and gap > spread:
            closed = f"{(mean(kept) - mean(ends)) / gap:.0%}"
        jump = mean(loss(run, "start") for run in found) - step0
        rows.append(
            [
                arm,
                str(len(found)),
                f"{jump:+.4f}" if arm != FROM_THE_START else "-",
                f"{mean(ends):.4f}",
                f"{stdev(ends):.4f}" if len(ends) > 1 else "-",
                f"{mean(ends) - mean(kept):+.4f}",
                f"{mean(ends) - mean(full):+.4f}",
                closed,
            ]
        )
    headers = ["experts, router", "seeds", "jump", "loss, nats/byte", "spread"]
    headers += ["against not grown", "against from the start", "gap closed"]
    return Table(f"After {budget / 1e6:.1f}M tokens", headers, rows)


def draw(output: Path, record: dict[str, Any]) -> Path:
    """Training loss of the longest runs of the first seed, beside that of the model not grown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    budget = max(record["setting"]["budgets"])

    runs = [run for run in record["runs"] if run["budget"] == budget]

    def smooth(arm: str) -> Any:
        first = next(run for run in runs if run["arm"] == arm)
        logged = read_metrics(output / first["folder"] / "logs")
        found = [step["lm_nats_per_token"] for step in logged if "lm_nats_per_token" in step]
        return np.convolve(found, np.ones(7) / 7, mode="valid")

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    judged = {run["arm"]: None for run in runs if run["seed"] > 0}  # those with several seeds
    shown = [arm for arm in judged if arm != NOT_GROWN]
    reference = smooth(NOT_GROWN)
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.9, len(shown)))
    for arm, style, colour in zip(shown, cycle(["-", "--", "-.", ":"]), colours, strict=False):
        difference = smooth(arm) - reference
        tokens = np.linspace(0, budget / 1e6, len(difference))
        axes.plot(tokens, difference, label=arm, linestyle=style, color=colour)
    axes.axhline(0, color="black", linewidth=0.8, label=NOT_GROWN)
    axes.set_xlabel("tokens of the continuation, millions")
    axes.set_ylabel("training loss less that of the MoE not grown,\nnats per byte, same windows")
    axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(output / f"curves.{suffix}", dpi=150)
    return output / "curves.png"
