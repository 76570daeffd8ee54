"""How lean is the expansion of a Mixture of Experts from 8 to 16 experts (0.8 to 1.5 GB)?

    python examples/benchmarks/expand.py --record examples/benchmarks/results/expand.json

A random bfloat16 Mixtral, from folder to folder with the proof, by each router extension, and with
AdamW's moments. Expected: a peak of at most 1 GiB. Rows of `split` and `fit` are made with the
router inputs of one layer in memory: 4 bytes x tokens x hidden size, two to three times; `--tokens`
says how many. Each job has one thread; what is to be looked at is memory and CPU seconds: other
work on the machine makes wall time longer. About 15 minutes and 12 GB of disk; `--table
RECORD.json` prints a record as Markdown.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from convert import prepare, run_job, write_record
from rich.console import Console

from fusion_upcycle.report.tables import Table

COLUMNS = ["8 -> 16 experts, bfloat16", "GB", "CPU s", "CPU s, writing", "proof", "peak RSS MiB"]
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
#: Name of the row -> arguments of the job.
RUNS: dict[str, dict[str, Any]] = {
    "copy": {"options": {"router_extension": "copy"}},
    "copy, with moments": {"options": {"router_extension": "copy"}, "moments": True},
    "split": {"options": {"router_extension": "split"}},
    "fit": {"options": {"router_extension": "fit"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "expand")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration text")
    parser.add_argument("--record", type=Path, metavar="JSON", help="write a run record")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a record as Markdown")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, in seconds")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))["expand"]).to_markdown())
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    record = measure(options.work, TINY if options.tiny else SHAPE, options.tokens)
    Console().print(table(record).to_rich())
    if options.record:
        write_record("expand", record, options.record)


def measure(work: Path, shape: dict[str, int], tokens: int) -> dict[str, Any]:
    """Each row in a process of its own."""
    work.mkdir(parents=True, exist_ok=True)
    source = work / f"mixtral-{shape['hidden_size']}"
    if not source.is_dir():
        prepare("make_source", {"folder": str(source), "config": shape, "family": "mixtral"})
    if not (source / "training").is_dir():
        prepare("make_moments", {"folder": str(source)})
    task = {"source": str(source), "output": str(work / "output"), "tokens": tokens}
    runs = {name: run_job("expand", task | arguments, source) for name, arguments in RUNS.items()}
    return {"shape": shape, "tokens": tokens, "runs": runs}


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{run['bytes'] / 1e9:.2f}",
            f"{run['cpu']:.0f}",
            f"{run['write']['cpu_seconds']:.0f}",
            f"{run['proof']['cpu_seconds']:.0f}",
            f"{run['peak_rss'] / 2**20:.0f}",
        ]
        for name, run in record["runs"].items()
    ]
    return Table(f"Expansion, {record['tokens']:,} calibration tokens", COLUMNS, rows)


if __name__ == "__main__":
    main()
