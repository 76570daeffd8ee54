"""Every k-th point of `make faults`: a kill, an errno and a signal in the real command line.

The call before which it comes is counted by a preloaded shim (`shim.c`); `points.py` says what must
hold then, `examples/faults.py` tries every point.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk import Disk, no_disk
from points import ERRORS, Whole, cases
from shim import NOT_HERE, Call, Fault, Warm
from tiny import files_of

from fusion_upcycle.verify import verify_files

pytestmark = [
    pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE or "runs"),
    pytest.mark.early,
]
CASES = (
    "upcycle --overwrite",
    "upcycle --overwrite, two renames",
    "expand",
    "merge --overwrite",
    "add-expert",
)
EVERY = 45  # of the points where something else than one more piece is written


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with Warm(tmp_path_factory.mktemp("warm")) as found:
        yield found


@pytest.fixture(scope="module")
def wholes(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """Each of the cases, run without a fault."""
    found = {case.name: case for case in cases(tmp_path_factory.mktemp("models"))}
    return {name: found[name].whole(warm) for name in CASES}


def points(whole: Whole, first: int) -> list[int]:
    """Every so many, and another choice for each case."""
    chosen = [n for n, call in enumerate(whole.calls) if call.name != "write"]
    return chosen[first % EVERY :: EVERY]


@pytest.mark.parametrize("name", CASES)
def test_a_kill_loses_nothing_and_the_same_command_ends_it(
    name: str, warm: Warm, wholes: dict[str, Whole]
) -> None:
    for point in points(wholes[name], 11 + 7 * CASES.index(name)):
        assert wholes[name].killed(warm, point) == [], (point, wholes[name].calls[point])


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_said_in_one_line_and_the_same_command_ends_it(
    name: str, warm: Warm, wholes: dict[str, Whole]
) -> None:
    for number, point in enumerate(points(wholes[name], 23 + 7 * CASES.index(name))):
        error = list(ERRORS.values())[(CASES.index(name) + number) % len(ERRORS)]
        found = wholes[name].refused(warm, point, error, lasting=bool(number % 2))
        assert found == [], (point, os.strerror(error), wholes[name].calls[point])


def test_the_steps_that_name_an_output_can_fail(warm: Warm, wholes: dict[str, Whole]) -> None:
    for name in CASES[:2]:
        whole = wholes[name]
        last = max(n for n, c in enumerate(whole.calls) if c.name == "open")
        named = [n for n, c in enumerate(whole.calls) if n > last and "rename" in c.name]
        named += [n for n, c in enumerate(whole.calls) if c.name == "exchange"]
        assert len(named) == 2
        for point in (*named, max(named) + 1):  # and that which makes it last
            assert whole.refused(warm, point, ERRORS["EIO"]) == [], whole.calls[point]


def test_a_kill_while_a_failure_is_cleaned_up_does_not_block_the_next_run(
    warm: Warm, wholes: dict[str, Whole]
) -> None:
    whole = wholes["expand"]
    last = max(n for n, call in enumerate(whole.calls) if call.name == "open")
    for more in (2, 14):
        assert whole.killed_in_clean_up(warm, last, more) == [], more
    assert whole.killed_in_clean_up(warm, last, 1000) is None


def place(whole: Whole, name: str, at: int, *, after: int = 0) -> int:
    """Number of the call that comes `after` the `at`-th one of this name."""
    return [n for n, call in enumerate(whole.calls) if call.name == name][at] + after


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_in_one_line_and_finished_shards_are_kept(
    sent: signal.Signals, warm: Warm, wholes: dict[str, Whole]
) -> None:
    whole = wholes["expand"]
    whole.case.set_up()
    ended = whole.case.run(warm, Fault(place(whole, "rename", 0, after=1), signal=sent))
    assert ended.status == 128 + sent
    (line,) = ended.said.splitlines()
    assert re.match(rf"Stopped by {sent.name}\. Finished shards \([1-9] of [1-9]\) are kept", line)
    assert "the same command goes on with them" in line
    staging = whole.case.watched / ".out.incomplete"
    kept = {path.name: path.stat().st_ino for path in staging.glob("*.safetensors")}
    assert kept and not whole.case.output.exists()
    assert whole.case.run(warm).status == 0
    assert files_of(whole.case.output) == whole.new
    assert {name: (whole.case.output / name).stat().st_ino for name in kept} == kept


def test_a_signal_before_a_shard_is_finished_leaves_nothing(
    warm: Warm, wholes: dict[str, Whole]
) -> None:
    whole = wholes["expand"]
    whole.case.set_up()
    ended = whole.case.run(warm, Fault(3, signal=signal.SIGINT))
    assert (ended.status, ended.said) == (130, "Stopped by SIGINT.\n")
    assert list(whole.case.watched.iterdir()) == []


def test_a_signal_ends_fusion_bench_in_the_same_way(
    warm: Warm, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    source = wholes["upcycle --overwrite"].case.arguments[1]
    watched = tmp_path / "watched"
    watched.mkdir()
    command = [
        *("fusion_bench", "method=sparse_upcycling", "modelpool=CausalLMPool/single_llama_model"),
        *(f"modelpool.models._pretrained_={source}", "taskpool=dummy", "method.num_experts=4"),
        "modelpool.tokenizer=null",
        *(f"method.save_checkpoint={watched / 'out'}", "method.max_shard_size=30KB"),
        *("method.verify=none", "method.return_model=false", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    ended = warm.run(command, watched, Fault(60, signal=signal.SIGTERM))
    assert ended.status == 143, ended.said
    lines = [line for line in ended.said.splitlines() if "Stopped" in line]
    assert len(lines) == 1 and "are kept in" in lines[0] and "Traceback" not in ended.said
    assert warm.run(command, watched).status == 0
    assert verify_files(watched / "out", progress=False) > 5


def test_all_is_on_the_disk_before_the_name_and_the_name_before_the_old_one_goes(
    wholes: dict[str, Whole],
) -> None:
    for whole in wholes.values():
        case, calls = whole.case, whole.calls
        staging = case.watched / ".out.incomplete"
        named = next(n for n, call in enumerate(calls) if names(call, case.output))
        for path in (case.output, *case.output.rglob("*")):
            there = staging / path.relative_to(case.output)
            synced = last(calls[:named], "fsync", there)
            changed = [n for n, call in enumerate(calls[:named]) if changes(call, there)]
            # A shard is on the disk before it has its own name, too.
            assert synced > max(changed, default=-1), (case.name, there)
        lasting = last(calls, "fsync", case.watched)
        gone = [n for n, c in enumerate(calls) if ".out.replaced-" in str(c.path) and removes(c)]
        assert lasting > named and bool(gone) == (case.before is not None)
        assert all(n > lasting for n in gone)


@pytest.mark.skipif(bool(no_disk()), reason=no_disk() or "runs")
def test_a_power_cut_leaves_the_old_output_or_the_new_one(warm: Warm, tmp_path: Path) -> None:
    disk = Disk(tmp_path, "200M")
    with disk.mounted() as mounted:
        case = next(
            case
            for case in cases(tmp_path / "models", mounted / "watched")
            if case.name == "upcycle --overwrite"
        )
        whole = case.whole(warm)
        named = place(whole, "exchange", 0)
        for point in (named, named + 1, named + 3):
            assert whole.cut_off(disk, warm, point) == [], whole.calls[point]
        case.set_up()
        assert case.run(warm).status == 0
        assert whole.on_the_disk(disk, done=True) == []
        (case.output / "README.md").write_text("")
        os.sync()  # what is looked at is what is on the disk
        assert whole.on_the_disk(disk, done=True) != []


@pytest.mark.skipif(bool(no_disk()), reason=no_disk() or "runs")
def test_a_disk_that_is_full_of_bytes_or_of_files_ends_in_one_line(
    warm: Warm, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    arguments = list(wholes["upcycle --overwrite"].case.arguments)
    for said, size, inodes in (("free disk", "30M", None), ("free inodes", "200M", 60)):
        (folder := tmp_path / said).mkdir()
        with Disk(folder, size, inodes).mounted() as mounted:
            arguments[2] = mounted / "out"
            ended = warm.run(arguments)
            assert ended.status == 2 and ended.said.startswith(f"error: Not enough {said}")
            assert len(ended.said.splitlines()) == 1
            assert [path.name for path in mounted.iterdir()] == ["lost+found"]


def names(call: Call, output: Path) -> bool:
    return call.name in ("rename", "exchange") and call.second == output


def removes(call: Call) -> bool:
    return call.name in ("unlink", "unlinkat", "rmdir")


def changes(call: Call, path: Path) -> bool:
    """Whether the contents of a file, or the names in a folder, are others after a call."""
    if call.name in ("fsync", "chmod"):
        return False
    created = call.name in ("open", "mkdir", "rename") or removes(call)
    return call.path == path or (created and path in (call.path.parent, call.second.parent))


def last(calls: list[Call], name: str, path: Path) -> int:
    """Number of the last such call; -1 where there is none."""
    return max((n for n, c in enumerate(calls) if (c.name, c.path) == (name, path)), default=-1)
