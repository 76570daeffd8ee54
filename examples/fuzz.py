"""Hostile input, by the million: every kind of file of a stranger that we read, broken.

Each input is a valid file that was changed, in its structure by hypothesis and in its bytes by
atheris (both: `fuzzing/engine.py`), read by what reads such files. What may come of it is that it
is read, or refused by an error of ours with a message that a terminal can show. Anything else is
bad: another exception, a change outside of the input's folder, something that is run, more than 2
CPU seconds (6 where a model is built) or 256 MB for one input.

    python examples/fuzz.py                                   # a million, a quarter of an hour
    python examples/fuzz.py --record examples/results/fuzz    # keep what was found
    python examples/fuzz.py --only config --inputs 20000
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

from fuzzing.engine import (
    MOST_CPU_SECONDS,
    MOST_MEGABYTES,
    Outcome,
    atheris,
    fuzz,
    instrumented,
    warm_up,
)

with instrumented():
    from fuzzing.catalogue import surfaces
from fuzzing.surfaces import Surface

from fusion_upcycle.report.progress import progress_bar

MILLION = 1_000_000


def main() -> None:
    """Run all surfaces; the exit status is 1 where anything was bad."""
    options = _options()
    chosen = [s for s in surfaces() if options.only is None or options.only in s.name]
    if not chosen:
        sys.exit(f"No surface is called {options.only}: {', '.join(s.name for s in surfaces())}.")
    started = time.perf_counter()
    outcomes = run(chosen, options.inputs, options.seed, options.jobs, progress=not options.quiet)
    record = summary(outcomes, options.seed, time.perf_counter() - started)
    for name, found in record["surfaces"].items():
        kinds = "; ".join(f"{kind} ({bad['count']})" for kind, bad in found["bad"].items())
        count = sum(found["inputs"].values())
        print(
            f"{name:26} {count:>8,} inputs, {found['refused']:>8,} refused, "
            f"{found['total_cpu_seconds']:.0f} CPU s, of one at most {found['cpu_seconds']:.2f} "
            f"and {found['megabytes']:.0f} MB" + (f"; BAD: {kinds}" if kinds else "")
        )
    print(
        f"{record['inputs']:,} inputs by {', '.join(record['engines'])}: {record['bad']} bad, in "
        f"{record['seconds']:.0f} s"
    )
    if options.record is not None:
        options.record.mkdir(parents=True, exist_ok=True)
        path = options.record / "fuzz.json"
        if options.only is not None and path.is_file():  # the others stay as they were found
            record = _with_others(record, json.loads(path.read_text()))
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"Record: {path}")
    sys.exit(1 if record["bad"] else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=MILLION, help="of all surfaces together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default: 1)")
    parser.add_argument(
        "--only",
        help="surfaces whose name has this in it; of a record that is there, only they change",
    )
    parser.add_argument("--record", type=Path, help="folder of the record, fuzz.json")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def run(
    chosen: list[Surface], inputs: int, seed: int, jobs: int, *, progress: bool
) -> list[dict[str, Any]]:
    """Give each surface its share of the inputs, in a process of its own; their outcomes."""
    whole = sum(surface.share for surface in chosen)
    shares = [max(20, inputs * surface.share // whole) for surface in chosen]
    shares[0] += max(0, inputs - sum(shares))
    memory = Path("/dev/shm")
    scratch = Path(mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    context = multiprocessing.get_context("fork")  # torch and transformers are here already
    waiting, running, outcomes = list(zip(chosen, shares, strict=True)), [], []
    done = context.Value("q", 0, lock=False)
    counters: list[Any] = []
    warm_up(scratch / "hypothesis")
    try:
        with progress_bar("Fuzzing", sum(shares), progress, unit="") as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    surface, share = waiting.pop(0)
                    folder = scratch / str(len(counters)) / "folder"
                    folder.mkdir(parents=True)
                    counters.append(context.Value("q", 0, lock=False))
                    arguments = (surface, share, seed, folder, counters[-1], folder.parent / "out")
                    process = context.Process(target=fuzz, args=arguments)
                    process.start()
                    running.append((process, surface, folder.parent))
                time.sleep(0.05)
                total = sum(counter.value for counter in counters)
                bar.update(total - done.value)
                done.value = total
                for ended in [r for r in running if not r[0].is_alive()]:
                    running.remove(ended)
                    outcomes.append(_outcome(*ended))
    finally:
        for process, *_ in running:
            process.kill()
        shutil.rmtree(scratch, ignore_errors=True)
    order = {surface.name: place for place, surface in enumerate(chosen)}
    return sorted(outcomes, key=lambda outcome: order[outcome["surface"]])


def _outcome(process: Any, surface: Surface, place: Path) -> dict[str, Any]:
    """Of a process that has ended; one that left nothing was ended by its last input."""
    if (out := place / "out").is_file():
        return json.loads(out.read_text())
    log = (place / f"{surface.name}.log").read_bytes()[-3000:].decode(errors="replace")
    ended = {"count": 1, "where": f"exit status {process.exitcode}: {log}", "input": ""}
    return {**asdict(Outcome(surface.name)), "bad": {"the process ended": ended}}


def _with_others(again: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """A record in which some surfaces are those of a later run."""
    outcomes = [
        {"surface": n, **found} for n, found in (old["surfaces"] | again["surfaces"]).items()
    ]
    later = {*old.get("run_again", ()), *again["surfaces"]}
    whole = summary(outcomes, old["seed"], old["seconds"] + again["seconds"])
    return whole | {"run_again": sorted(later)}


def summary(outcomes: list[dict[str, Any]], seed: int, seconds: float) -> dict[str, Any]:
    """The record."""
    engines: dict[str, int] = {}
    for outcome in outcomes:
        for engine, count in outcome["inputs"].items():
            engines[engine] = engines.get(engine, 0) + count
    names = ("transformers", "tokenizers", "safetensors", "torch", "hypothesis", "atheris")
    return {
        "inputs": sum(engines.values()),
        "bad": sum(bad["count"] for o in outcomes for bad in o["bad"].values()),
        "engines": engines,
        "seed": seed,
        "seconds": round(seconds, 1),
        "bounds": {"cpu_seconds": MOST_CPU_SECONDS, "megabytes": MOST_MEGABYTES},
        "largest": {
            "cpu_seconds": max(o["cpu_seconds"] for o in outcomes),
            "megabytes": max(o["megabytes"] for o in outcomes),
        },
        "surfaces": {
            o["surface"]: {k: v for k, v in o.items() if k != "surface"} for o in outcomes
        },
        "versions": {
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in names if n != "atheris" or atheris is not None},
        },
    }


if __name__ == "__main__":
    main()
