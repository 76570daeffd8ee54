"""Does a fault at any moment of a conversion lose anything, or stand in the way of the next run?

Question: a kill, an errno, a power cut before each call that changes the disk; a flipped bit in any
          file: is the output the old one, the new one or none, is what failed said in one line,
          does the same command end it, is every flip found?
Command:  python examples/faults/conversions.py --record examples/results/faults   (20 minutes)
          python examples/faults/conversions.py --every 20             (1 minute, one point in 20)
          python examples/faults/conversions.py --table examples/results/faults
Needs:    Linux, a C compiler; root and loop devices for the power cuts, which are else left out.
Expected: nothing in the last column; exit status 1 where there is.

Upcycle, expand, merge and add-expert on tiny models, each to a new place, over an earlier output,
and over one on a file system that cannot exchange names. Of the writes of pieces of a shard, which
all leave the same, every third is a point; all other calls are.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "tests")]

from disk import Disk, no_disk
from points import ERRORS, Case, Whole, cases
from shim import NOT_HERE, Warm
from tiny import files_of

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.verify import verify_files

SECTION = "faults"
FLIPS = 500
#: Seconds after a command has said that it is done.
MOMENTS = (0, 0.5, 1, 2, 4, 6, 10, 15, 25, 35)
KINDS = {
    "kills": "kill -9 before a call",
    "clean_up_kills": "kill -9 while a failure is cleaned up",
    "errors": "an errno from one call",
    "lasting_errors": "an errno from a call and all after it",
    "flips": "a flipped bit in any file, for `verify --quick`",
    "power_cuts": "power cut before a call",
    "power_cuts_when_done": "power cut 0 to 35 s after the end",
    "training": "kill -9 of training at a random moment",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="where to leave the run record")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only one point in K")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_run_record(arguments.table)))
        return
    if NOT_HERE:
        sys.exit(f"No faults can be made here: {NOT_HERE}.")
    with tempfile.TemporaryDirectory() as folder:
        record = try_all(Path(folder), arguments.every)
    print(table({SECTION: record}))
    if arguments.record:
        print(f"Run record: {write_run_record(SECTION, record, arguments.record)}")
    sys.exit(1 if any(found["wrong"] for found in record["kinds"].values()) else 0)


def table(record: dict[str, Any]) -> str:
    """What was tried, how often, and what was wrong, in Markdown."""
    rows = []
    kinds = dict(record.get(SECTION, {}).get("kinds", {}))
    if training := record.get("training_faults"):
        wrong = training["differing_runs"]
        kinds["training"] = {"tried": training["kills"], "wrong": wrong}
    for kind, found in kinds.items():
        if found["tried"] or not found.get("left_out"):
            rows.append([KINDS[kind], f"{found['tried']:,}", str(len(found["wrong"]))])
        else:
            rows.append([KINDS[kind], f"not tried: {found['left_out']}", ""])
    markdown = Table("Faults", ["fault", "tried", "wrong"], rows).to_markdown()
    every = record.get(SECTION, {}).get("every", 1)
    return markdown + (f"\n\nOne point in {every} was tried." if every > 1 else "")


class Tally:
    """What was tried of each kind, and what was wrong; said as it goes."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, Any]] = {
            kind: {"tried": 0, "wrong": []} for kind in KINDS if kind != "training"
        }
        self._started = self._said = time.monotonic()

    def add(self, kind: str, where: str, problems: Sequence[str]) -> None:
        self.kinds[kind]["tried"] += 1
        if problems:
            self.kinds[kind]["wrong"].append(f"{where}: {'; '.join(problems)}")
            print(f"WRONG {kind}: {self.kinds[kind]['wrong'][-1]}", flush=True)
        if time.monotonic() > self._said + 10:
            self._said = time.monotonic()
            done = ", ".join(f"{k['tried']} {name}" for name, k in self.kinds.items() if k["tried"])
            print(f"{self._said - self._started:.0f} s, {where}: {done}", flush=True)

    def leave_out(self, kind: str, why: str) -> None:
        self.kinds[kind]["left_out"] = why


def try_all(home: Path, every: int) -> dict[str, Any]:
    """Try one point in `every` of all kinds; returns the record's section."""
    tally, calls = Tally(), {}
    with Warm(home) as warm:
        made = cases(folder_of(home, "models"))
        for case in made:
            whole = case.whole(warm)
            calls[case.name] = len(whole.calls)
            flip(whole, max(1, FLIPS // len(made) // every + 1), tally)
            kill(whole, warm, every, tally)
            fail(whole, warm, 3 * every, tally)
            if case.exchange:
                kill_in_clean_up(whole, warm, every, tally)
        cut_power(home, warm, every, tally)
    return {"every": every, "calls": calls, "kinds": tally.kinds}


def folder_of(home: Path, name: str) -> Path:
    (home / name).mkdir()
    return home / name


def kill(whole: Whole, warm: Warm, every: int, tally: Tally) -> None:
    for point in points(whole)[::every]:
        where = f"{whole.case.name}, call {point} ({whole.calls[point].name})"
        tally.add("kills", where, whole.killed(warm, point))


def points(whole: Whole) -> list[int]:
    """All calls, but of the writes only every third."""
    return [n for n, call in enumerate(whole.calls) if call.name != "write" or n % 3 == 0]


def fail(whole: Whole, warm: Warm, every: int, tally: Tally) -> None:
    errors = list(ERRORS.items())
    for number, point in enumerate(range(0, len(whole.calls), every)):
        (name, error), lasting = errors[number % len(errors)], bool(number % 2)
        where = f"{whole.case.name}, call {point} ({whole.calls[point].name}), {name}"
        problems = whole.refused(warm, point, error, lasting=lasting)
        tally.add("lasting_errors" if lasting else "errors", where, problems)


def kill_in_clean_up(whole: Whole, warm: Warm, every: int, tally: Tally) -> None:
    failing = max(n for n, call in enumerate(whole.calls) if call.name == "open")
    more = 1
    while (problems := whole.killed_in_clean_up(warm, failing, more)) is not None:
        tally.add("clean_up_kills", f"{whole.case.name}, {more} after the error", problems)
        more += every


def flip(whole: Whole, count: int, tally: Tally) -> None:
    """Flip bits of all files in turn: each must be found, and the file named."""
    draw = random.Random(whole.case.name)
    files = sorted(files_of(whole.case.output))
    for number in range(count):
        path = whole.case.output / files[number % len(files)]
        content = path.read_bytes()
        flipped = bytearray(content)
        bit = draw.randrange(8 * len(content))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        problems = []
        try:
            verify_files(whole.case.output, progress=False)
            problems.append("not found")
        except UpcyclingError as error:
            if path.name not in str(error):
                problems.append(f"not named: {error}")
        path.write_bytes(content)
        tally.add("flips", f"{whole.case.name}, {path.name}, bit {bit}", problems)


def cut_power(home: Path, warm: Warm, every: int, tally: Tally) -> None:
    """On a disk of its own: before calls of the last phase, and some seconds after the end."""
    if why := no_disk():
        tally.leave_out("power_cuts", why)
        tally.leave_out("power_cuts_when_done", why)
        return
    disk = Disk(folder_of(home, "disk"), "200M")
    with disk.mounted() as mounted:
        for case in upcycle_cases(home, mounted):
            whole = case.whole(warm)
            first = min(n for n, call in enumerate(whole.calls) if call.name == "fsync")
            for point in range(first, len(whole.calls), 4 * every):
                where = f"{case.name}, call {point} ({whole.calls[point].name})"
                tally.add("power_cuts", where, whole.cut_off(disk, warm, point))
        case.set_up()
        assert case.run(warm).status == 0
        ended = time.monotonic()
        for moment in MOMENTS:
            time.sleep(max(0, ended + moment - time.monotonic()))
            problems = whole.on_the_disk(disk, done=True)
            tally.add("power_cuts_when_done", f"{case.name}, after {moment} s", problems)
        shutil.rmtree(case.watched)


def upcycle_cases(home: Path, mounted: Path) -> Iterator[Case]:
    for case in cases(folder_of(home, "models_for_the_disk"), mounted / "watched"):
        if case.name.startswith("upcycle"):
            yield case


if __name__ == "__main__":
    main()
