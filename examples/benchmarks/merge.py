"""How lean is the merge of four 1.1B Llamas into one Mixture of Experts (6.8 GB)?

    python examples/benchmarks/merge.py --record examples/benchmarks/results/merge.json

Random bfloat16 models, with the proof, with a random and with a prototype router (1024 calibration
tokens of each model; memory does not depend on their number). Expected: a peak of at most 1.5 GiB.
About 20 minutes and 17 GB of disk; `--table RECORD.json` prints a record as Markdown.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from convert import SHAPE, TINY, make_model, run_job, write_record
from rich.console import Console

from fusion_upcycle.report.tables import Table

COLUMNS = ["four 1.1B models, bfloat16", "GB", "peak RSS MiB, writing", "whole process"]
MODELS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merge")
    parser.add_argument("--record", type=Path, metavar="JSON", help="write a run record")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a record as Markdown")
    parser.add_argument("--tiny", action="store_true", help="tiny models, in seconds")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))["merge"]).to_markdown())
        return
    record = measure(options.work, *((TINY, 2) if options.tiny else (SHAPE, 22)))
    Console().print(table(record).to_rich())
    if options.record:
        write_record("merge", record, options.record)


def measure(work: Path, shape: dict[str, int], layers: int) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    models = {f"model{n}": str(make_model(work, shape, layers, n)) for n in range(MODELS)}
    first, output = Path(models["model0"]), work / "output"
    runs = {
        router: run_job(
            "merge", {"models": models, "output": str(output), "router_init": router}, first
        )
        for router in ("normal", "prototype")
    }
    return {"shape": shape, "layers": layers, "runs": runs}


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            f"{router} router",
            f"{run['bytes'] / 1e9:.2f}",
            f"{run['conversion']['peak_rss'] / 2**20:.0f}",
            f"{run['peak_rss'] / 2**20:.0f}",
        ]
        for router, run in record["runs"].items()
    ]
    return Table("Merging four models", COLUMNS, rows)


if __name__ == "__main__":
    main()
