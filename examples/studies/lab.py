"""What all studies share: a run is one training from one start, kept when it is done.

A study is a list of runs and what it makes of their results. Runs go two at a time, one thread
each, and a study that was stopped goes on with the next one: the result of each lies in the output
folder under a hash of its settings, below one of the demo models and their text; after a change of
the trainer itself give another output folder.

Budgets are shares of the base's own training compute, so that a model which costs more per token
gets fewer tokens. Text is `continued`, which no base has seen; every seed has another order of it
(and other noise and router rows), the same for all arms.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import mean as average
from typing import Any

from fusion_upcycle.demo import MODELS, demo_model

RESULTS = Path(__file__).resolve().parent / "results"
WARMUP_STEPS = 50
#: The best of four for dense and for MoE, at +10 and at +50 %, on validation text (lever.py).
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: name of what is compared.
        start: a demo model, or a name that `start_folder` knows.
        make: what is done to it before training: {"do": "upcycle" | "expand" | "merge" | ...}, with
            the options; empty for nothing.
        share: budget, of the base's training compute.
        seed: of windows, noise, and router rows.
        options: of the training.
        base: demo model, or name as `start`, whose compute is the unit of `share`; `start` by
            default.
        split: of the text.
    """

    arm: str
    start: str
    share: float
    seed: int
    make: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    split: str = "continued"

    @property
    def key(self) -> str:
        decides = {k: v for k, v in asdict(self).items() if k != "arm"}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Work:
    """What the runs of a study are.

    Attributes:
        module: beside this one; its `train_run` makes a run's row.
        identity: of the models and data that results depend on.
        in_words: what a row says, for the screen.
    """

    module: str
    identity: Callable[[], str]
    in_words: Callable[[Mapping[str, Any]], str]


def of_row(row: Mapping[str, Any]) -> Run:
    """The run that a row of a record is of."""
    base = None if row["base"] == row["start"] else row["base"]
    names = ("arm", "start", "share", "seed", "make", "options", "split")
    return Run(base=base, **{name: row[name] for name in names})


def main(
    name: str,
    document: str,
    runs: Callable[[bool], Sequence[Run]],
    show: Callable[[list[dict[str, Any]]], str],
    draw: Callable[[list[dict[str, Any]], Path], Path] | None = None,
    work: Work | None = None,
) -> None:
    """The command line of a study: run what is missing, write the record, print the table.

    Args:
        work: what its runs are; None is that of texts.
    """
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--record", type=Path, help="where to leave the run record (OUTPUT/NAME)")
    parser.add_argument("--figures", type=Path, help="where to leave the figure (RECORD)")
    parser.add_argument("--short", action="store_true", help="the rows of `make study` only")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table")
    arguments = parser.parse_args()
    from fusion_upcycle.report.record import write_run_record
    from fusion_upcycle.report.tables import read_run_record

    if arguments.table:
        print(show(read_run_record(arguments.table)[name]["runs"]))
        return
    rows = run_all(runs(arguments.short), arguments.output, arguments.jobs, work or OF_TEXTS)
    folder = arguments.record or arguments.output / name
    record = {"runs": rows, "cpu_seconds": sum(row["cost"]["cpu_seconds"] for row in rows)}
    print(f"Run record: {write_run_record(name, record, folder)}")
    print(show(rows))
    if draw is not None:
        print(f"Figure:     {draw(rows, arguments.figures or folder)}")


def run_all(
    runs: Sequence[Run], output: Path, jobs: int, work: Work | None = None
) -> list[dict[str, Any]]:
    """The rows of all runs, in their order; those that are missing are trained first.

    Results lie in a folder of the models and the data that they are of: others have another.
    """
    work = work or OF_TEXTS
    output = output / work.identity()
    output.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not _result(output, run).is_file()]
    if missing:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes: two threads each are slower
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.module])
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            futures = {pool.submit(_execute, run, output, work.module): run for run in missing}
            try:
                for number, done in enumerate(as_completed(futures), 1):
                    row = done.result()
                    said = f"{_in_words(futures[done])}: {work.in_words(row)}"
                    seconds = f"{row['cost']['cpu_seconds']:.0f} s"
                    print(f"[{number}/{len(missing)}] {said} ({seconds})", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # or all others would be run first
                raise
    return [asdict(run) | json.loads(_result(output, run).read_text()) for run in runs]


def shipped_identity() -> str:
    """Of the demo models and their text, from the models' own records."""
    facts = [json.loads((demo_model(name) / "demo.json").read_text()) for name in MODELS]
    content = [[one["weights_sha256"], one["text_sha256"]] for one in facts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _result(output: Path, run: Run) -> Path:
    return output / f"{run.key}.json"


def _in_words(run: Run) -> str:
    return f"{run.arm}, +{run.share:.0%}, seed {run.seed}"


def _execute(run: Run, output: Path, module: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{run.key}.") as temporary:
        row: dict[str, Any] = import_module(module).train_run(run, output, Path(temporary))
    part = _result(output, run).with_suffix(".part")
    part.write_text(json.dumps(row))
    part.replace(_result(output, run))
    return row


# --- what tables and figures are made of ----------------------------------------------------------


def mean(row: Mapping[str, Any], split: str = "test") -> float:
    """Bits per byte, mean of the domains."""
    return average(row["bits_per_byte"][split].values())


def step0(row: Mapping[str, Any]) -> float:
    """`mean` of the test text before training."""
    return average(row["before"].values())


OF_TEXTS = Work("work", shipped_identity, lambda row: f"{mean(row):.4f} bits per byte")


def cell(values: Sequence[float]) -> str:
    """Of a table: the mean of the seeds and their spread."""
    if not values:
        return ""
    text = f"{average(values):.4f}"
    return text if len(values) == 1 else f"{text} (spread {spread(values):.4f})"


def cells(rows: Iterable[Mapping[str, Any]], shares: Iterable[float]) -> list[str]:
    """Of one arm: a cell for each budget."""
    rows = list(rows)
    return [cell([mean(row) for row in select(rows, share=share)]) for share in shares]


def budgets(shares: Iterable[float]) -> list[str]:
    """Headers of `cells`."""
    return [f"+{share:.0%}" for share in shares]


def select(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def upcycled(experts: int, top_k: int, **options: Any) -> dict[str, Any]:
    """`Run.make` of an upcycling with the defaults of the studies."""
    return {
        "do": "upcycle",
        "num_experts": experts,
        "experts_per_token": top_k,
        "expert_init": {"name": "noise", "noise_std": 0.01},
    } | options


def with_seeds(runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
    seeds = list(seeds)
    return [replace(run, seed=seed) for run in runs for seed in seeds]


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest."""
    return max(values) - min(values)


if __name__ == "__main__":
    sys.exit("This is what the studies share; run one of the others.")
