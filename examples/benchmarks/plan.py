"""How lean is the planning of a huge checkpoint: 1,000 shards, and 100,000 tensors?

    python examples/benchmarks/plan.py --record examples/benchmarks/results/plan.json

A dense Llama of 1,002 tensors in 1,000 shards is planned to be a Mixtral of 100,680 tensors, and
that Mixtral, in 1,000 shards itself, to be one of twice the experts. Both are hollow: headers,
config and index as they are, and files without data, so that they take no disk. Each plan has a
process of its own, on one thread: from opening the folder to the headers of the shards that would
be written, and the record. Memory is the peak above what there was after the imports. One minute;
`--table RECORD.json` prints a record as Markdown.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from convert import job, prepare, write_record
from rich.console import Console

from fusion_upcycle.report.tables import Table

COLUMNS = ["plan of", "shards", "tensors", "to tensors", "CPU s", "wall s", "MiB above imports"]
#: Layers and experts: 3 x 111 x 300 matrices of experts, and the rest.
LAYERS, EXPERTS, SHARDS = 111, 300, 1000
TINY = (2, 4, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, metavar="JSON", help="write a run record")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a record as Markdown")
    parser.add_argument("--tiny", action="store_true", help="a few tensors")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))["plan"]).to_markdown())
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as work:
        record = measure(Path(work), *(TINY if options.tiny else (LAYERS, EXPERTS, SHARDS)))
    Console().print(table(record).to_rich())
    if options.record:
        write_record("plan", record, options.record)


def measure(work: Path, layers: int, experts: int, shards: int) -> dict[str, Any]:
    """Each plan in a process of its own."""
    size = {"layers": layers, "shards": shards}
    prepare("make_hollow", {"folder": str(work / "dense"), **size, "num_experts": None})
    prepare("make_hollow", {"folder": str(work / "moe"), **size, "num_experts": experts})
    upcycling = {"source": str(work / "dense"), "num_experts": experts, "multiplier": None}
    expansion = {"source": str(work / "moe"), "num_experts": None, "multiplier": 2}
    return {
        "upcycling": printed("plan", upcycling),
        "expansion": printed("plan", expansion),
    }


def printed(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a job says."""
    done = subprocess.run(job(name, arguments), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{run['shards']:,}",
            f"{run['tensors']:,}",
            f"{run['planned']:,}",
            f"{run['cpu']:.1f}",
            f"{run['wall']:.1f}",
            f"{run['peak_bytes'] / 2**20:.0f}",
        ]
        for name, run in record.items()
    ]
    return Table("Planning", COLUMNS, rows)


if __name__ == "__main__":
    main()
