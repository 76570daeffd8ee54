"""How many tokens per parameter must a base have seen before upcycling it pays?

Question: at +50 % of the base's compute, what does upcycling gain over training the dense model
          on, for bases of 2 to 250 tokens per (non-embedding) parameter?
Command:  python examples/studies/tokens.py [--output FOLDER] [--record FOLDER]
          python examples/studies/tokens.py --table examples/studies/results/tokens
Needs:    two cores, 25 minutes; no download. A study that was stopped goes on.
Expected: a small loss at 2 and 4, a clear gain from 15, a larger one from 31 on; see
          docs/studies/tokens.md.

All bases are points of one training at a constant learning rate, the trunk's (the first is all
warm-up, of 64 steps). For bases of up to 31 both arms are tried at two learning rates, and the
better on validation text counts; the larger ones have the rate that lever.py found.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean as average
from typing import Any

from lab import Run, main, mean, select, spread, upcycled, with_seeds

from fusion_upcycle.report.tables import Table

#: Bytes that a base has seen: 2, 4, 15, 31, 124 and 249 per non-embedding parameter (32,928).
BASES = {
    65_536: "trunk@65536",
    131_072: "trunk@131072",
    491_520: "trunk@491520",
    1_024_000: "trunk@1024000",
    4_096_000: "trunk",
    8_192_000: "trunk@8192000",
}
PARAMETERS = 32_928
RATES = (2e-3, 8e-3)
SHARE = 0.5
SEEDS = (1, 2, 3)
ARMS: dict[str, dict[str, Any]] = {"dense": {}, "8 experts, top-1": upcycled(8, 1)}


def runs(short: bool) -> list[Run]:
    found = []
    for tokens, base in BASES.items():
        # At the larger bases the lower rate is known to be the better one, from lever.py.
        for rate in RATES if tokens < 4_000_000 else RATES[:1]:
            for arm, make in ARMS.items():
                found.append(Run(arm, base, SHARE, 1, make, {"learning_rate": rate}))
    return with_seeds(found, SEEDS)


def best(rows: Sequence[dict[str, Any]], base: str, arm: str) -> list[dict[str, Any]]:
    """The seeds of the learning rate that is better on validation text."""
    found = select(rows, start=base, arm=arm)
    rates = {row["learning_rate"] for row in found}
    choices = [[row for row in found if row["learning_rate"] == rate] for rate in rates]
    return min(choices, key=lambda seeds: sum(mean(row, "validation") for row in seeds))


def gains_of(dense: Sequence[Any], moe: Sequence[Any]) -> list[float]:
    """What upcycling gains, for each seed."""
    return [mean(d) - mean(m) for d, m in zip(dense, moe, strict=True)]


def show(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for tokens, base in BASES.items():
        dense, moe = (best(rows, base, arm) for arm in ARMS)
        gains = gains_of(dense, moe)
        lines.append(
            [
                f"{tokens / PARAMETERS:.0f}",
                *(f"{average(map(mean, seeds)):.4f}" for seeds in (dense, moe)),
                f"{average(gains):+.4f}",
                f"{spread(gains):.4f}",
                *(f"{seeds[0]['learning_rate']:g}" for seeds in (dense, moe)),
            ]
        )
    headers = ["tokens per parameter", *ARMS, "gain", "spread", "LR dense", "LR MoE"]
    return Table("", headers, lines).to_markdown()


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    from figures import gain_over

    points = {
        tokens / PARAMETERS: gains_of(*(best(rows, base, arm) for arm in ARMS))
        for tokens, base in BASES.items()
    }
    label = "tokens per non-embedding parameter that the base has seen"
    return gain_over(points, label, folder, "tokens")


if __name__ == "__main__":
    main("tokens", __doc__, runs, show, draw)
