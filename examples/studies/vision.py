"""A ViT that was trained on Fashion-MNIST, and more compute: train it on, or its upcycled MoE?

Question: at equal training FLOPs, which ends lower on test images, dense, expert choice or token
          choice; and how many images a CPU second does each train?
Command:  python examples/studies/vision.py [--output FOLDER] [--record FOLDER]
          python examples/studies/vision.py --table examples/studies/results/vision
Needs:    what examples/studies/fashion.py needs; one core and 35 CPU minutes (`--jobs 1`). A study
          that was stopped goes on with the next run.
Expected: level, as the base has used up its images; see docs/studies/vision.md.

The base has had five passes over 55,000 images. Budgets are shares of its training FLOPs; its
images come again, in another order with each seed. Half of the FFNs, those of the last layers, get
8 experts, as in the vision models of the paper. Each arm is warmed up and cooled down by itself.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean as average
from statistics import stdev
from typing import Any

import fashion
from lab import Run, Work, budgets, main, select, with_seeds

from fusion_upcycle.report.tables import Table

#: Of dense and of MoE: the best of four for each, at +20 %, on validation images (`trials`).
RATES = {"dense": 2.5e-4, "moe": 2.5e-4}
TRIED = (2.5e-4, 5e-4, 1e-3, 2e-3)
SHARES = (0.2, 0.5)
SEEDS = (1, 2, 3)


def sparse(**options: Any) -> dict[str, Any]:
    return {
        "do": "upcycle",
        "num_experts": 8,
        "moe_layers": "last_2",
        "expert_init": {"name": "noise", "noise_std": 0.01},
    } | options


ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "expert choice, C = 1": sparse(routing="expert_choice", capacity_factor=1.0),
    "expert choice, C = 2": sparse(routing="expert_choice", capacity_factor=2.0),
    "token choice, top-1": sparse(routing="token_choice", experts_per_token=1, target="sparse"),
}


def run(arm: str, share: float, rate: float | None = None, seed: int = 1) -> Run:
    rate = rate or RATES["moe" if ARMS[arm] else "dense"]
    return Run(arm, "base", share, seed, ARMS[arm], {"learning_rate": rate}, split="train")


def runs(short: bool) -> list[Run]:
    found = with_seeds([run(arm, share) for share in SHARES for arm in ARMS], SEEDS)
    base = Run("base", "base", 0.0, 0, split="train")
    return [base, *found, *(extra for extra in trials() if extra not in found)]


def trials() -> list[Run]:
    """By which the learning rates were chosen."""
    return [run(arm, SHARES[0], rate) for arm in list(ARMS)[:2] for rate in TRIED]


def identity() -> str:
    """Of the base and its images."""
    content = json.dumps([fashion.SHAPE, fashion.RECIPE, fashion.CLASSES, fashion.HELD_OUT])
    return f"vision-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def in_words(row: Mapping[str, Any]) -> str:
    test = row["scores"]["test"]
    return f"accuracy {test['accuracy']:.4f}, loss {test['loss_nats_per_image']:.4f}"


# --- tables ---------------------------------------------------------------------------------------


def compared(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows of the comparison: at the learning rates that were chosen."""
    return [
        row
        for row in select(rows, **wanted)
        if row["share"]
        and row["options"]["learning_rate"] == RATES["moe" if row["make"] else "dense"]
    ]


def cell(rows: Sequence[dict[str, Any]], score: str, split: str = "test") -> str:
    """Mean of the seeds, and their standard deviation."""
    values = [row["scores"][split][score] for row in rows]
    if score == "accuracy":
        values = [100 * value for value in values]
    return f"{average(values):.{DIGITS[score]}f} ± {stdev(values):.{DIGITS[score]}f}"


DIGITS = {"accuracy": 2, "loss_nats_per_image": 4}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Test images: an arm per row; mean of the seeds ± their standard deviation."""
    (base,) = select(rows, arm="base")
    found = base["scores"]["test"]
    cells = [f"{100 * found['accuracy']:.2f}", f"{found['loss_nats_per_image']:.4f}"]
    lines = [["base, as it is", *cells * len(SHARES)]]
    for arm in ARMS:
        cells = []
        for share in SHARES:
            of_arm = compared(rows, arm=arm, share=share)
            cells += [cell(of_arm, "accuracy"), cell(of_arm, "loss_nats_per_image")]
        lines.append([arm, *cells])
    headers = [
        f"{budget}, {what}" for budget in budgets(SHARES) for what in ("accuracy, %", "loss")
    ]
    return Table("", ["", *headers], lines).to_markdown()


def differences(rows: Sequence[dict[str, Any]]) -> str:
    """To dense with the same seed: mean, its standard error by seeds, and by images."""
    lines = []
    for share in SHARES:
        dense = compared(rows, arm="dense", share=share)
        for arm in list(ARMS)[1:]:
            found = compared(rows, arm=arm, share=share)
            cells = []
            for score in DIGITS:
                scale = 100 if score == "accuracy" else 1
                values = [
                    scale * (a["scores"]["test"][score] - b["scores"]["test"][score])
                    for a, b in zip(found, dense, strict=True)
                ]
                error = stdev(values) / len(values) ** 0.5
                digits = DIGITS[score]
                cells.append(f"{average(values):+.{digits}f} ± {error:.{digits}f}")
            lines.append([arm, f"+{share:.0%}", *cells, f"{100 * binomial(found, dense):.2f}"])
    headers = ["minus dense", "budget", "accuracy, points ± seeds", "loss ± seeds"]
    return Table("", [*headers, "accuracy, ± images"], lines).to_markdown()


def binomial(*arms: Sequence[dict[str, Any]]) -> float:
    """Standard error of a difference of accuracies, as if the arms had test images of their own."""
    shares = [average(row["scores"]["test"]["accuracy"] for row in arm) for arm in arms]
    images = arms[0][0]["scores"]["test"]["images"]
    return sum(share * (1 - share) / images for share in shares) ** 0.5


def costs(rows: Sequence[dict[str, Any]], share: float = 0.5) -> str:
    """What each arm was trained with at one budget, how fast, and the loss of training images."""
    lines = []
    for arm in ARMS:
        found = compared(rows, arm=arm, share=share)
        first = found[0]
        lines.append(
            [
                arm,
                *(f"{first['parameters'][kind]:,}" for kind in ("total", "active")),
                f"{first['images']:,}",
                f"{first['flops'] / 1e12:.2f}T",
                f"{average(row['cost']['examples_per_cpu_second'] for row in found):,.0f}",
                cell(found, "loss_nats_per_image", "train"),
                left_out(found),
            ]
        )
    headers = ["parameters", "active", "images", "FLOPs", "images per CPU second"]
    more = ["loss of training images", "tokens left out, %"]
    return Table("", [f"+{share:.0%}", *headers, *more], lines).to_markdown()


def left_out(rows: Sequence[dict[str, Any]]) -> str:
    """In the whole training, mean of layers and seeds: what no expert took."""
    values = [v for row in rows for name, v in row["routing"].items() if name.endswith("left_out")]
    return f"{100 * average(values):.1f}" if values else "-"


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Test loss over budget, of every arm."""
    from figures import lines_over_budget

    return lines_over_budget(
        compared(rows),
        list(ARMS),
        folder,
        "vision",
        value=lambda row: row["scores"]["test"]["loss_nats_per_image"],
        label="nats per test image",
    )


if __name__ == "__main__":
    main("vision", __doc__, runs, show, draw, Work("vision_work", identity, in_words))
