"""How fast and how lean is the conversion of a 1.1B Llama to 8 experts (12.9 GB)?

    python examples/benchmarks/convert.py --mergekit ~/mergekit-venv/bin/mergekit-moe

Compared in the same run, in turn, each in a process of its own: a plain sequential write of the
same bytes, our conversion with its proof, mergekit-moe where installed, and the obvious way with
transformers in memory (22 GB; killed on smaller machines, and recorded so). Times include having
the bytes on the disk. Then our peak memory over numbers of experts and layers. About 20 minutes
and 17 GB of disk; `--table results/convert.json` prints a record as Markdown.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from fusion_upcycle.report.record import RECORD_NAME, write_run_record
from fusion_upcycle.report.tables import Table

JOBS = Path(__file__).with_name("jobs.py")
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
#: (layers, experts): more experts in few layers, then more layers of few experts.
SIZES = [(2, 8), (2, 32), (22, 2), (44, 2)]
#: Jobs that print what only they know, and must not fail.
OURS = ("fusion_upcycle", "merge", "expand")
TINY_SIZES = [(1, 2), (1, 8), (4, 2)]
COLUMNS = ["what", "wall s", "all runs", "x write", "CPU s", "x write", "peak RSS MiB", "GB"]
SCALING_COLUMNS = ["layers", "experts", "GB", "peak RSS MiB, conversion", "with the proof"]


def main() -> None:
    options = _options()
    if options.table:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    record = measure(options)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables(record):
        console.print(table.to_rich())
    if options.record:
        write_record("convert", record, options.record)


def write_record(section: str, record: dict[str, Any], file: Path) -> None:
    """A run record under a name of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_run_record(section, record, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(folder) / RECORD_NAME, file)


def tables(record: dict[str, Any]) -> list[Table]:
    return [
        Table("Conversion to 8 experts", COLUMNS, comparison_rows(record)),
        Table("Peak memory of our process", SCALING_COLUMNS, scaling_rows(record)),
    ]


def markdown(record: dict[str, Any]) -> str:
    """Both tables of a run record."""
    return "\n\n".join(table.to_markdown() for table in tables(record["convert"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; competitors take turns, so that they share the noise of the machine."""
    shape, layers, sizes = (TINY, 2, TINY_SIZES) if options.tiny else (SHAPE, 22, SIZES)
    source, output = make_model(options.work, shape, layers), options.work / "output"
    task = {"source": str(source), "output": str(output), "num_experts": 8}
    runs: dict[str, list[dict[str, Any]]] = {}
    nbytes = 0
    for number in range(options.runs):
        ours = run_job("fusion_upcycle", task, source)
        nbytes = ours["bytes"]
        runs.setdefault("fusion_upcycle", []).append(ours)
        for name, give_back in (("plain_write", False), ("plain_write_given_back", True)):
            write = {"output": str(output), "nbytes": nbytes, "give_back": give_back}
            runs.setdefault(name, []).append(run_job("plain_write", write, source))
        if options.mergekit:
            for name, flags in (("mergekit", []), ("mergekit_1B", ["--out-shard-size", "1B"])):
                command = _mergekit(options.mergekit, options.work, source, output, flags)
                runs.setdefault(name, []).append(run_process(name, command, output, source))
        print(f"round {number + 1} of {options.runs} done", flush=True)
    scaling = []
    for layers, experts in sizes:
        other = make_model(options.work, shape, layers)
        arguments = task | {"source": str(other), "num_experts": experts}
        scaling.append(
            {"layers": layers, "experts": experts, **run_job("fusion_upcycle", arguments, other)}
        )
    if not options.skip_in_memory:  # last: it may take the machine to its limit
        runs["in_memory"] = [run_job("in_memory", task, source)]
    return {
        "shape": shape,
        "bytes": nbytes,
        "mergekit_version": _mergekit_version(options.mergekit),
        "runs": runs,
        "scaling": scaling,
    }


def run_job(name: str, arguments: dict[str, Any], source: Path) -> dict[str, Any]:
    return run_process(name, job(name, arguments), Path(arguments["output"]), source)


def job(name: str, arguments: dict[str, Any]) -> list[str]:
    """The command of a job."""
    return [sys.executable, str(JOBS), name, json.dumps(arguments)]


def prepare(name: str, arguments: dict[str, Any]) -> None:
    """Run a job that is not measured."""
    subprocess.run(job(name, arguments), check=True)


def run_process(name: str, command: list[str], output: Path, source: Path) -> dict[str, Any]:
    """Run and measure one process, with a warm source and a clean disk; delete its output.

    Returns:
        wall (until all bytes are on the disk), cpu, peak_rss, bytes, load average before, and
        what a job of ours printed; `failed` where it did not end well.
    """
    for file in filter(Path.is_file, source.rglob("*")):
        with file.open("rb") as handle:
            while handle.read(2**23):
                pass
    os.sync()
    load = os.getloadavg()[0]
    log = output.parent / f"{name}.log"
    started = time.perf_counter()
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stream, preexec_fn=_first_to_be_killed
        ) as process,
    ):
        assert process.stdout
        printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    nbytes = 0
    for file in filter(Path.is_file, output.rglob("*")):
        nbytes += file.stat().st_size
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    result: dict[str, Any] = {
        "wall": time.perf_counter() - started,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "bytes": nbytes,
        "load": load,
    }
    shutil.rmtree(output, ignore_errors=True)
    if process.returncode:
        killed = process.returncode == -signal.SIGKILL
        result["failed"] = "killed" if killed else f"exit code {process.returncode}, see {log}"
        if name in OURS:
            raise SystemExit(f"{name}: {result['failed']}\n{log.read_text()[-2000:]}")
    elif name in OURS:
        result |= json.loads(printed)
    return result


def comparison_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row per part of our conversion and per competitor; medians, ratios to the write."""
    runs = record["runs"]
    floor = {key: median(run[key] for run in runs["plain_write"]) for key in ("wall", "cpu")}

    def row(what: str, measured: list[dict[str, Any]], nbytes: int | None) -> list[str]:
        if failed := [run["failed"] for run in measured if "failed" in run]:
            return [what, failed[0], *[""] * 4, _mib(measured), ""]
        wall, cpu = (median(run[key] for run in measured) for key in ("wall", "cpu"))
        return [
            what,
            f"{wall:.1f}",
            " ".join(f"{run['wall']:.1f}" for run in measured),
            f"{wall / floor['wall']:.2f}",
            f"{cpu:.1f}",
            f"{cpu / floor['cpu']:.2f}",
            _mib(measured) if "peak_rss" in measured[0] else "",
            f"{nbytes / 1e9:.2f}" if nbytes else "",
        ]

    ours, nbytes = runs["fusion_upcycle"], record["bytes"]
    parts = {part: [run[part] for run in ours] for part in ("conversion", "imports", "proof")}
    rows = [
        row("plain write, 8 MiB pieces", runs["plain_write"], nbytes),
        row("the same, page cache given back", runs["plain_write_given_back"], nbytes),
        row("fusion_upcycle: plan to rename", parts["conversion"], nbytes),
        row("fusion_upcycle: imports", parts["imports"], None),
        row("fusion_upcycle: proof, verify=layers", parts["proof"], None),
        row("fusion_upcycle: whole process", ours, nbytes),
    ]
    for name, what in (
        ("mergekit", f"mergekit-moe {record['mergekit_version']}"),
        ("mergekit_1B", "mergekit-moe --out-shard-size 1B"),
        ("in_memory", "transformers, in memory"),
    ):
        if name in runs:
            rows.append(row(what, runs[name], runs[name][0]["bytes"]))
    return rows


def scaling_rows(record: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(run["layers"]),
            str(run["experts"]),
            f"{run['bytes'] / 1e9:.2f}",
            _mib([run["conversion"]]),
            _mib([run]),
        ]
        for run in record["scaling"]
    ]


def _mib(runs: list[dict[str, Any]]) -> str:
    return f"{max(run['peak_rss'] for run in runs) / 2**20:.0f}"


def make_model(work: Path, shape: dict[str, int], layers: int, seed: int = 0) -> Path:
    """The random dense model of this shape, made on first use."""
    folder = work / f"llama-{shape['hidden_size']}x{layers}{f'-{seed}' if seed else ''}"
    if not folder.is_dir():
        print(f"making {folder}", flush=True)
        shutil.rmtree(f"{folder}.partial", ignore_errors=True)
        arguments = {
            "folder": str(folder),
            "config": shape | {"num_hidden_layers": layers},
            "seed": seed,
        }
        prepare("make_source", arguments)
    return folder


def _mergekit(program: str, work: Path, source: Path, output: Path, flags: list[str]) -> list[str]:
    config = work / "mergekit.yaml"
    config.write_text(
        f"base_model: {source}\ngate_mode: random\ndtype: bfloat16\n"
        "experts_per_token: 2\nexperts:\n"
        + f"  - source_model: {source}\n    positive_prompts: ['']\n"
        * 8
    )
    return [program, str(config), str(output), *flags]


def _mergekit_version(program: str | None) -> str | None:
    """Asked of the Python beside the program: it lives in an environment of its own."""
    if program is None:
        return None
    ask = "from importlib.metadata import version as v; print(v('mergekit'), v('transformers'))"
    python = str(Path(program).parent / "python")
    words = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.split()
    return f"{words[0]} (transformers {words[1]})" if words else "of unknown version"


def _first_to_be_killed() -> None:
    """When memory runs out, the kernel takes the job and nothing else on the machine."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def _options() -> argparse.Namespace:
    work = Path("~/.cache/fusion_upcycle/benchmark").expanduser()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-moe"), metavar="PROGRAM")
    parser.add_argument("--skip-in-memory", action="store_true")
    parser.add_argument("--record", type=Path, metavar="JSON", help="write a run record")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a record as Markdown")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
