"""Does a training run that is killed end as one that is not, to the bit, its log included?

Question: `kill -9` at random moments of `python -m fusion_upcycle train`, each followed by the same
          command, as on spot instances: is the model the same, and the log?
Command:  python examples/faults/training.py --record examples/results/faults  (1 minute of CPU)
Expected: all runs equal in every file but `training.json`, which has the time that was taken, and
          in every column of `metrics.csv` but speed and memory; nothing left in the work folder.

The moments are drawn evenly from the CPU time that a whole run takes, so that they fall into the
packing, the steps, the checkpoints, the export and the clean-up alike, however busy the machine.
"""

import argparse
import csv
import os
import random
import resource
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTION = "training_faults"
STEPS = 60
COMMAND = ["--tokens", str(STEPS * 512), "--context-length", "64", "--batch-size", "8"]
COMMAND += ["--log-every", "1", "--checkpoint-every", "5", "--learning-rate", "1e-3", "--quiet"]
COMMAND += ["--accelerator", "cpu"]


@dataclass
class Run:
    """One training run, however many processes it took.

    Attributes:
        moments: CPU seconds that a process had taken when it was killed, and how far the run had
            come: its last checkpoint, and what was half.
        ended: exit code of the last process.
    """

    folder: Path
    moments: list[tuple[float, str]] = field(default_factory=list)
    ended: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="write run_record.json here")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from fusion_upcycle.report.record import write_run_record

    with tempfile.TemporaryDirectory() as folder:
        record = kill_at_random(arguments.kills, arguments.seed, Path(folder))
    for name, value in record.items():
        print(f"{name}: {value}")
    if arguments.record is not None:
        print(f"Run record: {write_run_record(SECTION, record, arguments.record)}")
    raise SystemExit(0 if record["differing_runs"] == [] else 1)


def kill_at_random(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill runs so many times, let each end, and compare them with one that was left alone.

    Args:
        kills: processes that are killed, over as many runs as that takes.
        seed: of the moments.
        folder: for all that is made.

    Returns:
        What was found, JSON.
    """
    _warm()
    text = " ".join(f"{n} and {n * n} make {n + n * n}." for n in range(2000))
    (folder / "notes.txt").write_text(text)
    moments, runs = random.Random(seed), [Run(folder / "whole")]
    before = _cpu_seconds_of_children()
    _process(runs[0], None)
    seconds = _cpu_seconds_of_children() - before
    assert runs[0].ended == 0, "the run that is left alone failed"
    left = kills
    while left:
        run = Run(folder / f"run_{len(runs)}")
        runs.append(run)
        while run.ended is None:
            left -= _process(run, moments.uniform(0, seconds) if left else None)
    differing = {run.folder.name: found for run in runs[1:] if (found := differences(runs[0], run))}
    return {
        "kills": kills,
        "seed": seed,
        "runs": len(runs) - 1,
        "steps_of_a_run": STEPS,
        "whole_run_cpu_seconds": seconds,
        "killed_at": [[run.folder.name, *each] for run in runs for each in run.moments],
        "differing_runs": [f"{name}: {found}" for name, found in differing.items()],
    }


def differences(whole: Run, run: Run) -> str:
    """What of a run is not as of the one that was left alone; empty where nothing is."""
    found = [] if run.ended == 0 else [f"exit code {run.ended}"]
    files = {path.name for path in (whole.folder / "out").iterdir()}
    if {path.name for path in (run.folder / "out").iterdir()} != files:
        found.append("other files")
    for name in sorted(files - {"training.json", "SHA256SUMS"}):
        one, other = (each.folder / "out" / name for each in (whole, run))
        if not other.is_file() or one.read_bytes() != other.read_bytes():
            found.append(name)
    if _log(whole) != _log(run):
        found.append("metrics.csv")
    work = run.folder / "out.training"
    left = [*(work / "checkpoints").iterdir(), *work.glob(".*"), *(work / "data").glob(".*")]
    return ", ".join([*found, *(f"{path.name} is left" for path in left)])


def _log(run: Run) -> list[list[str]]:
    """The table as it is written, but for the columns that depend on clock and machine."""
    from fusion_upcycle.training.seen import MEASURED

    table = run.folder / "out.training" / "logs" / "metrics.csv"
    with open(table, encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    places = [place for place, name in enumerate(rows[0]) if name not in MEASURED]
    return [[row[place] for place in places] for row in rows]


def _warm() -> None:
    """Import what a command imports, and compute nothing, so that a fork of this is safe."""
    import torch

    torch.set_num_threads(1)
    import torch.utils.tensorboard
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    import fusion_upcycle.cli
    import fusion_upcycle.report.drawing
    import fusion_upcycle.training.run  # noqa: F401


def _process(run: Run, kill_after: float | None) -> int:
    """Give the command in a process; returns whether it was killed."""
    run.folder.mkdir(exist_ok=True)
    child = os.fork()
    if not child:
        _command(run.folder)
    if kill_after is not None:
        clock = (~child << 3) | 2  # of the CPU time of a process, as clock_getcpuclockid has it
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.clock_gettime(clock) >= kill_after:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        assert kill_after is not None
        run.moments.append((kill_after, _stand(run.folder)))
        if (run.folder / "out").exists() and not _checkpoints(run.folder):
            run.ended = 0  # all was done, but for the last words
        return 1
    run.ended = code
    return 0


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _command(folder: Path) -> None:
    """Never returns."""
    from fusion_upcycle.cli import main as command
    from fusion_upcycle.demo.models import demo_model

    data = ["--data", f"notes={folder.parent / 'notes.txt'}"]
    code = 70
    try:
        with open(folder / "said", "ab", buffering=0) as said:
            for descriptor in (1, 2):
                os.dup2(said.fileno(), descriptor)
        command(["train", str(demo_model("moe")), str(folder / "out"), *data, *COMMAND])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def _stand(folder: Path) -> str:
    checkpoints = _checkpoints(folder)
    stand = checkpoints[-1] if checkpoints else "no checkpoint"
    if (folder / "out").exists():
        stand += ", output there"
    half = [path.name for path in (folder / "out.training" / "checkpoints").glob(".*")]
    if (folder / ".out.incomplete").exists():
        half.append("output")
    return stand + "".join(f", half {name}" for name in half)


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out.training" / "checkpoints").glob("step-*"))


if __name__ == "__main__":
    main()
