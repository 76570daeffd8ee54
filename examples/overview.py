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
GROWING = EXAMPLES / "expert_upcycling" / "results" / "router"
STUDIES = EXAMPLES / "studies" / "results"
BITS = "bits per byte, mean of three domains"


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
        BITS,
        lowest(ours),
        lowest({name: bits[name] for name in bits.keys() - ours.keys() - {*MODELS}}),
    ]


def growing() -> list[list[str]]:
    """Twice the experts: the jump without training, and the loss after some of it."""
    record = read_run_record(GROWING)["router"]["jumps"]
    before = mean(record["before"]["losses"].values())
    plans = [row["plan"] for row in record["rows"]]
    jumps = {
        row["extension"]: mean(row["losses"].values()) - before
        for row in record["rows"]
        if row["plan"] == plans[0] and row["extension"] in {*ROUTER_EXTENSIONS, *CALIBRATED}
    }
    share = 0.15
    fixed = "32 experts from the start"
    ends = losses("growing", share=share)
    judged = repeated(ends)
    grown = {arm: bits for arm, bits in judged.items() if not arm.startswith("not grown")}
    plan = plans[0].removeprefix("uniform ").replace("->", "to")
    what = f"[grown](docs/growing.md), {plan} experts, "
    return [
        [
            what + "no training",
            "jump of the loss, nats per byte",
            lowest(jumps),
            f"{jumps['copy']:.4f}: copy",
        ],
        [
            what + f"[+{share:.0%}](docs/studies/growing.md)",
            BITS,
            lowest(grown),
            f"{lowest({arm: judged[arm] for arm in judged.keys() - grown.keys()})}; "
            f"{mean(ends[fixed]):.4f}: {fixed} (one seed)",
        ],
    ]


def training() -> list[list[str]]:
    """Upcycled against dense, at the same compute, of the base's share."""
    rows = []
    for share in (0.1, 0.5):
        ends = repeated(losses("budget", share=share, start="trunk"))
        dense = ends.pop("dense")
        what = f"[trained on](docs/studies/budget.md), same compute, +{share:.0%}"
        rows.append([what, BITS, lowest(ends), f"{dense:.4f}: dense"])
    return rows


def losses(study: str, **wanted: Any) -> dict[str, list[float]]:
    """Arm of a study -> bits per byte of each seed, mean of the domains."""
    found: dict[str, list[float]] = {}
    for row in read_run_record(STUDIES / study)[study]["runs"]:
        if all(row[name] == value for name, value in wanted.items()) and not narrow(row):
            bits = mean(row["bits_per_byte"]["test"].values())
            found.setdefault(row["arm"], []).append(bits)
    return found


def narrow(row: dict[str, Any]) -> bool:
    """Whether a run was trained on one domain only."""
    return "domain" in row["options"]


def repeated(found: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each arm that has all seeds."""
    most = max(map(len, found.values()))
    return {arm: mean(seeds) for arm, seeds in found.items() if len(seeds) == most}


def lowest(found: dict[str, float]) -> str:
    name = min(found, key=lambda name: found[name])
    return f"{found[name]:.4f}: {name}"


if __name__ == "__main__":
    main()
