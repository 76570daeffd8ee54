"""Runs through one of Hydra's launchers: joblib, submitit (SLURM), ray, or a user's own."""

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from fusion_upcycle.benchmark.board import Board
from fusion_upcycle.benchmark.overrides import override
from fusion_upcycle.benchmark.processes import Fresh, record_death
from fusion_upcycle.benchmark.request import Request, read_request
from fusion_upcycle.errors import UpcyclingError

_LOOK_SECONDS = 2.0


def launcher_of(config: DictConfig) -> str | None:
    """The class of the launcher that was chosen; None for Hydra's default, which is no cluster."""
    target = str(HydraConfig.get().launcher["_target_"])
    return None if target.endswith("BasicLauncher") else target


def perform_launched(
    config: DictConfig,
    requests: Sequence[Request],
    board: Board,
    job: Callable[[DictConfig], None],
) -> None:
    """Hand all runs to the launcher that the Hydra application was started with.

    Args:
        config: of the application.
        job: its task function, which is called with `run` set to a run's folder.
    """
    if not requests:
        return
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    whole = copy.deepcopy(config)
    with open_dict(whole):
        whole.hydra = HydraConfig.get()  # taken away before the application was called
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context,
        task_function=job,
        config=whole,
    )
    for request in requests:
        board.started(request)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(requests, board, over), daemon=True)
    watcher.start()
    try:
        given = list(HydraConfig.get().overrides.task)
        overrides = [[*given, override("run", str(request.folder))] for request in requests]
        launcher.launch(overrides, initial_job_idx=0)
    finally:
        over.set()
        watcher.join()
    for request in requests:
        record_death(request, None)
    _watch(requests, board, over)


def perform_one(folder: Path) -> None:
    """A launcher's job: the run of a folder, in a process of its own."""
    request = read_request(folder)
    process = Fresh(request)
    process.start()
    record_death(request, process.wait())


def _watch(requests: Sequence[Request], board: Board, over: threading.Event) -> None:
    """Look at the folders, which all machines share, until the launcher returns."""
    while True:
        last = over.is_set()
        for request in requests:
            if board.is_running(request) and request.result() is not None:
                board.ended(request)
        if last:
            return
        over.wait(_LOOK_SECONDS)


def require_launcher(config: DictConfig) -> None:
    """Raises UpcyclingError where runs at once are asked for in two ways."""
    if launcher_of(config) is not None and config.jobs != 1:
        raise UpcyclingError(
            f"jobs={config.jobs} is of this machine; the launcher {launcher_of(config)} has a "
            "setting of its own, as in hydra.launcher.n_jobs=2. Leave jobs at 1."
        )
