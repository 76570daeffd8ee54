"""The README's table of results: the best row of each study, beside what it is measured against.

Question: how exact, how lean, and what is it worth, in one table?
Command:  python examples/overview.py      (prints the tables; they are made from committed records)
Expected: whatever the records say; a row in which something else wins stays.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from fusion_upcycle.demo import MODELS
from fusion_upcycle.expansion.router.extension import CALIBRATED
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.router_extension import ROUTER_EXTENSIONS
from fusion_upcycle.verification.function import TOLERANCE

EXAMPLES = Path(__file__).resolve().parent
RESULTS = EXAMPLES / "results"
GROWING = EXAMPLES / "expert_upcycling" / "results"


def main() -> None:
    print(f"{results()}\n\n{families()}")


def results() -> str:
    rows = [exactness(), memory(), merging(), *growing(), *training()]
    return of_words(Table("Results", ["", "measured", "here", "beside"], rows))


def families() -> str:
    """Which dense models become which MoE, so far as they were measured."""
    pairs = read_run_record(RESULTS / "families")["families"]["pairs"]
    sources: dict[str, list[str]] = {}
    for row in pairs:
        sources.setdefault(f"`{row['target']}`", []).append(f"`{row['source']}`")
    rows = [[target, ", ".join(dict.fromkeys(dense))] for target, dense in sources.items()]
    return of_words(Table("Families", ["MoE family", "made from dense"], rows))


def of_words(table: Table) -> str:
    """Markdown, its columns aligned to the left."""
    return table.to_markdown().replace("---:", "---")


def exactness() -> list[str]:
    rows = read_run_record(RESULTS / "families")["families"]["pairs"]
    functions = [row["float32"]["function"] for row in rows]
    pairs = {(row["source"], row["target"]) for row in rows}
    return [
        f"[upcycled](docs/exactness.md), worst of {len(pairs)} pairs of families",
        "largest logit difference / largest logit, float32",
        f"{max(found['max_abs'] / found['scale'] for found in functions):.1e}",
        f"{TOLERANCE:.0e}: what the proof allows",
    ]


def memory() -> list[str]:
    record = json.loads((EXAMPLES / "benchmarks" / "results" / "convert.json").read_text())
    runs = record["convert"]["runs"]

    def peak(found: list[dict[str, Any]]) -> float:
        return max(run["peak_rss"] for run in found) / 2**20

    others = {name: peak(found) for name, found in runs.items() if name.startswith("mergekit")}
    ours = runs["fusion_upcycle"]
    return [
        f"[converted](docs/performance.md), {ours[0]['bytes'] / 1e9:.1f} GB of 8 experts",
        "peak memory, MiB",
        f"{peak(ours):.0f}, of which conversion {peak([run['conversion'] for run in ours]):.0f}",
        f"{min(others.values()):.0f}: mergekit-moe",
    ]


def merging() -> list[str]:
    rows = read_run_record(RESULTS / "merging")["merging"]["rows"]
    bits = {name: row["bits_per_byte"]["mean"] for name, row in rows.items()}
    ours = {name: found for name, found in bits.items() if name.startswith("MoE")}
    return [
        "[merged](docs/merging.md), three fine-tunes, no training",
        "bits per byte, mean of three domains",
        lowest(ours),
        lowest({name: bits[name] for name in bits.keys() - ours.keys() - {*MODELS}}),
    ]


def growing() -> list[list[str]]:
    """From 4 to 8 experts: the jump without training, and the loss after the longest training."""
    record = read_run_record(GROWING / "router")["router"]["jumps"]
    before = mean(record["before"]["losses"].values())
    jumps = {
        row["extension"]: mean(row["losses"].values()) - before
        for row in record["rows"]
        if row["plan"] == "uniform 4 -> 8" and row["extension"] in {*ROUTER_EXTENSIONS, *CALIBRATED}
    }
    runs = read_run_record(GROWING / "study")["expert_upcycling"]["runs"]
    longest = max(run["budget"] for run in runs)
    losses: dict[str, list[float]] = {}
    for run in runs:
        if run["budget"] == longest:
            losses.setdefault(run["arm"], []).append(mean(run["losses"].values()))
    seeds = max(map(len, losses.values()))
    ends = {arm: mean(found) for arm, found in losses.items() if len(found) == seeds}
    kept, full = "not grown", "from the start"
    what = "[grown](docs/growing.md), 4 to 8 experts, "
    return [
        [
            what + "no training",
            "jump of the loss, nats per byte",
            lowest(jumps),
            f"{jumps['copy']:.4f}: copy",
        ],
        [
            what + f"{longest / 1e6:.1f}M tokens, {seeds} seeds",
            "loss, nats per byte",
            lowest({arm: ends[arm] for arm in ends.keys() - {kept, full}}),
            f"{ends[kept]:.4f}: {kept}; {ends[full]:.4f}: 8 {full}",
        ],
    ]


def training() -> list[list[str]]:
    """Upcycled against dense, at the same tokens and at the same compute."""
    arms = read_run_record(RESULTS / "study")["study"]["arms"]
    rows = []
    for same, ending in (("tokens", ""), ("compute", ", same FLOPs")):
        dense = f"dense, same {ending.removeprefix(', same ') or same}"
        ours = {
            name.removesuffix(", same FLOPs"): bits(arm)
            for name, arm in arms.items()
            if name.startswith("upcycled") and name.endswith("same FLOPs") == bool(ending)
        }
        rows.append(
            [
                f"[trained on](docs/training.md), same {same}",
                "bits per byte, mean of three domains",
                lowest(ours),
                f"{bits(arms[dense]):.4f}: dense",
            ]
        )
    return rows


def bits(arm: dict[str, Any]) -> float:
    return mean(arm["bits_per_byte"]["test"].values())


def lowest(found: dict[str, float]) -> str:
    name = min(found, key=lambda name: found[name])
    return f"{found[name]:.4f}: {name}"


if __name__ == "__main__":
    main()
