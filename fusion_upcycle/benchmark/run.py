"""An experiment from its config to its report."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion_upcycle.benchmark import preparation
from fusion_upcycle.benchmark.board import Board
from fusion_upcycle.benchmark.experiment import Experiment, Validation
from fusion_upcycle.benchmark.planning import Planned, Run
from fusion_upcycle.benchmark.processes import Processes
from fusion_upcycle.benchmark.request import Request
from fusion_upcycle.benchmark.trials import choose
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.report.record import MANIFEST_NAME

#: Makes runs that are not complete.
Perform = Callable[[Sequence[Request], Board], None]


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment.

    Attributes:
        done: runs that are complete, those of earlier calls too.
        failed: runs that are recorded with an error, trials among them.
    """

    done: Sequence[Request]
    failed: Sequence[Request]


def run_experiment(
    experiment: Experiment,
    output: Path,
    processes: Processes,
    *,
    jobs: int,
    isolate: bool,
    launch: Perform | None = None,
) -> Outcome:
    """Look at all, make all runs that are not complete, choose settings between.

    Args:
        output: folder; what is complete in it stays.
        processes: where runs are made, and looked at before.
        jobs: at once, for the time left.
        isolate: a fresh process for each run, also asked for by a GPU.
        launch: instead of processes of this machine.

    Raises:
        UpcyclingError: something that cannot be used, before the first run.
    """
    plan = processes.call(preparation.prepare, experiment, output)
    _write_manifest(experiment, plan, output)
    fresh = isolate or plan.cuda

    def perform(requests: Sequence[Request], board: Board) -> None:
        todo = [request for request in requests if not request.complete]
        for request in requests:
            if request.complete:
                request.refresh()
            else:
                request.write()
        if launch is not None:
            launch(todo, board)
        else:
            processes.perform(todo, board, isolate=fresh)

    trials = [request for row, requests in plan for request in requests if row.trials]
    tests = [request for row, requests in plan for request in requests if not row.trials]
    with Board([*trials, *tests], jobs) as board:
        perform(trials, board)
        rows = [(row, requests) for row, requests in plan if row.trials]
        picked = [_pick(row, requests, experiment.validation) for row, requests in rows]
        runs = [run for run, _ in picked]
        settled = processes.call(preparation.prepare_runs, runs, output) if runs else []
        board.add(settled)
        for request, (_, error) in zip(settled, picked, strict=True):
            if error is not None:
                _leave_failed(request, error, board)
        hopeless = {request.folder for request, (_, e) in zip(settled, picked, strict=True) if e}
        perform([*tests, *(r for r in settled if r.folder not in hopeless)], board)
    everything = [*trials, *tests, *settled]
    failed = [request for request in everything if not request.complete]
    return Outcome([request for request in everything if request.complete], failed)


def _write_manifest(experiment: Experiment, plan: preparation.Plan, output: Path) -> None:
    """Reports leave out what an earlier form of the experiment left in the folder."""
    folders = [row.run.folder for row, _ in plan]
    folders += [
        str(r.folder.relative_to(output)) for row, found in plan if row.trials for r in found
    ]
    output.mkdir(parents=True, exist_ok=True)
    content = {"experiment": experiment.experiment, "runs": folders}
    temporary = output / f".{MANIFEST_NAME}"
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(output / MANIFEST_NAME)


def _pick(
    row: Planned, trials: Sequence[Request], validation: Validation | None
) -> tuple[Run, str | None]:
    """The run with the settings of the best trial; with the first and an error if there is none."""
    assert validation is not None  # the reader looked
    names = list(row.method.trials)
    try:
        return row.with_settings(choose(trials, names, validation)), None
    except UpcyclingError as error:
        first = {name: trials[0].facts["settings"][name] for name in names}
        return row.with_settings(first), str(error)


def _leave_failed(request: Request, error: str, board: Board) -> None:
    request.write()
    board.started(request)
    request.leave(error, {}, {})
    board.ended(request)
