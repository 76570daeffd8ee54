"""What must hold after a fault at any point of any command, and the commands that are tried."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from disk import Disk
from shim import Call, Ended, Fault, Warm
from tiny import files_of
from tiny_merges import speakers

from fusion_upcycle.cli import main
from fusion_upcycle.merging.merging import BASE

QUIET = ("--quiet", "--verify", "none")  # a proof changes nothing on the disk
#: What disks say, and those who look after them.
ERRORS = {
    name: getattr(errno, name)
    for name in ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EROFS", "EPERM", "ENOMEM")
}
#: Where an error of these calls leaves something, it is what could not be removed.
_REMOVING = ("unlink", "unlinkat", "rmdir")


@dataclass(frozen=True)
class Case:
    """A command that makes a folder.

    Attributes:
        name: of the case.
        arguments: of the command line; the output is `watched / "out"`.
        watched: folder for the output alone.
        before: an output that is there before; None where there is none.
        exchange: whether names can be exchanged in one step.
    """

    name: str
    arguments: Sequence[str | Path]
    watched: Path
    before: Path | None = None
    exchange: bool = True

    @property
    def output(self) -> Path:
        return self.watched / "out"

    @cached_property
    def old(self) -> Mapping[str, bytes]:
        return {} if self.before is None else files_of(self.before)

    def run(self, warm: Warm, fault: Fault | None = None) -> Ended:
        """Run it on what is there."""
        fault = replace(fault or Fault(), exchange=self.exchange)
        return warm.run(self.arguments, self.watched, fault)

    def set_up(self) -> None:
        """What is there before: nothing, or the old output."""
        shutil.rmtree(self.watched, ignore_errors=True)
        self.watched.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, self.output)

    def whole(self, warm: Warm) -> "Whole":
        """Run it without a fault."""
        self.set_up()
        ended = self.run(warm)
        assert ended.status == 0, ended.said
        return Whole(self, files_of(self.output), ended.calls)


@dataclass(frozen=True)
class Whole:
    """A case that ran to its end: what it made, and the calls it made that with."""

    case: Case
    new: Mapping[str, bytes]
    calls: list[Call]

    def killed(self, warm: Warm, point: int) -> list[str]:
        """A kill before call number `point`: what is wrong then, or after the next run."""
        self.case.set_up()
        ended = self.case.run(warm, Fault(point))
        if ended.status != -9:
            return [f"ended with {ended.status} before its call {point}: {ended.said}"]
        return self._state() + self._again(warm)

    def killed_in_clean_up(self, warm: Warm, failing: int, more: int) -> list[str] | None:
        """An error, and a kill `more` calls after it; None where it has ended by then."""
        self.case.set_up()
        ended = self.case.run(warm, Fault(failing, errno=errno.ENOSPC, then_kill=more))
        if ended.status != -9:
            return None
        return self._state() + self._again(warm)

    def refused(self, warm: Warm, point: int, error: int, *, lasting: bool = False) -> list[str]:
        """An errno of call number `point`, or of all from there on: what is wrong then."""
        self.case.set_up()
        ended = self.case.run(warm, Fault(point, errno=error, lasting=lasting))
        problems = []
        found = files_of(self.case.output)
        if ended.status == 0:
            if found != self.new:
                problems.append("called done, but not whole")
        elif ended.status != 2 or not ended.said.startswith("error: "):
            problems.append(f"ended with {ended.status}: {ended.said}")
        else:
            if len(ended.said.splitlines()) != 1:
                problems.append(f"more than one line: {ended.said}")
            if found == self.new:
                problems.append(f"called failed, with the output there: {ended.said}")
            left = [path.name for path in self.case.watched.iterdir() if path.name != "out"]
            removing = len(ended.calls) > point and ended.calls[point].name in _REMOVING
            if left and not lasting and not removing:
                problems.append(f"left: {left}")
        return problems + self._state() + self._again(warm)

    def cut_off(self, disk: Disk, warm: Warm, point: int) -> list[str]:
        """The power is cut before call number `point`: what is wrong with what is on the disk."""
        self.case.set_up()
        os.sync()
        self.case.run(warm, Fault(point))
        return self.on_the_disk(disk)

    def on_the_disk(self, disk: Disk, *, done: bool = False) -> list[str]:
        """What is wrong with the output if the power is cut now.

        Args:
            done: the command has said so: only the new output will do.
        """
        with disk.after_a_power_cut() as folder:
            watched = folder / self.case.watched.name
            if done and files_of(watched / "out") != self.new:
                return [f"lost after it was done: {sorted(files_of(watched / 'out'))}"]
            return self._state(watched)

    def _state(self, watched: Path | None = None) -> list[str]:
        """What is wrong with the output after a fault: it is the old one, the new one, or none."""
        watched = watched or self.case.watched
        found = files_of(watched / "out")
        if found in (self.case.old, self.new):
            return []
        # Two renames: between them the old one waits under another name.
        aside = watched.glob(".out.replaced-*")
        if not self.case.exchange and not found and self.case.old in map(files_of, aside):
            return []
        return [f"half: {sorted(found)}"]

    def _again(self, warm: Warm) -> list[str]:
        """What is wrong after the same command is given again."""
        done = self.case.before is None and files_of(self.case.output) == self.new
        ended = self.case.run(warm)
        problems = []
        if done:
            if ended.status != 2 or "exists" not in ended.said:
                problems.append(f"not known to be done: {ended.status}, {ended.said}")
        elif ended.status != 0:
            problems.append(f"the next run is blocked: {ended.status}, {ended.said}")
        if files_of(self.case.output) != self.new:
            problems.append("the next run made something else")
        left = [path.name for path in self.case.watched.iterdir() if path.name != "out"]
        return problems + ([f"left after the next run: {left}"] if left else [])


def cases(home: Path, watched: Path | None = None) -> list[Case]:
    """Upcycle, expand, merge and add-expert, each to a new place and over an earlier output.

    Args:
        home: for the models.
        watched: for the outputs; None is a folder in `home`.
    """
    models = speakers(home)
    names = ("one", "two")
    for name in (BASE, *names):
        (models[name] / "LICENSE").write_text("all yours")
        (models[name] / "additional_chat_templates").mkdir()
        (models[name] / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    upcycled, merged = home / "upcycled", home / "merged"
    watched = watched or home / "watched"
    base, out = models[BASE], watched / "out"

    def upcycle(output: Path, seed: int = 0) -> list[str | Path]:
        size = ("--max-shard-size", "150KB", "--seed", str(seed), "--expert-init", "noise")
        return ["upcycle", base, output, *size, *QUIET]

    def merge(output: Path, seed: int = 0) -> list[str | Path]:
        command: list[str | Path] = ["merge", output, "--base", base, "--shared", "base"]
        for name in names:
            command += ["--model", f"{name}={models[name]}"]
            command += ["--calibration", f"{name}={models[name] / 'text.txt'}"]
        size = ("--max-shard-size", "150KB", "--seed", str(seed), "--calibration-tokens", "256")
        return [*command, "--router-init", "prototype", "--statistics", *size, *QUIET]

    main([str(a) for a in upcycle(upcycled)])
    main([str(a) for a in merge(merged)])
    expand: list[str | Path] = ["expand", upcycled, out, "--num-experts", "12", *QUIET]
    expand += ["--max-shard-size", "150KB"]
    added: list[str | Path] = ["add-expert", merged, models["three"], out]
    added += ["--data", models["three"] / "text.txt", "--max-shard-size", "150KB", *QUIET]
    commands = {
        "upcycle": upcycle(out),
        "expand": expand,
        "merge": merge(out),
        "add-expert": added,
    }
    old = home / "old"
    main([str(a) for a in upcycle(old, seed=1)])
    found = []
    for name, arguments in commands.items():
        found.append(Case(name, arguments, watched))
        over = [*arguments, "--overwrite"]
        found.append(Case(f"{name} --overwrite", over, watched, old))
        found.append(Case(f"{name} --overwrite, two renames", over, watched, old, exchange=False))
    return found
