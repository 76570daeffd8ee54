"""The Hydra application `python -m fusion_upcycle benchmark experiment=NAME`."""

import signal
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import fusion_upcycle
from fusion_upcycle.benchmark.board import label, short_error
from fusion_upcycle.benchmark.clusters import (
    launcher_of,
    perform_launched,
    perform_one,
    require_launcher,
)
from fusion_upcycle.benchmark.experiment import read_experiment
from fusion_upcycle.benchmark.processes import Processes
from fusion_upcycle.benchmark.request import CONSOLE_NAME
from fusion_upcycle.benchmark.run import Outcome, run_experiment
from fusion_upcycle.checks import require_folder, require_whole
from fusion_upcycle.errors import Stopped, UpcyclingError, unknown

_GROUP = "benchmark"


def config_tree() -> Path:
    """Our configs: in the package of a wheel, beside it in a checkout."""
    package = Path(fusion_upcycle.__file__).resolve().parent
    trees = (package / "config", package.parent / "config")
    return next(tree for tree in trees if (tree / _GROUP).is_dir())


def experiments() -> list[str]:
    """Names of the experiments that are shipped."""
    return sorted(file.stem for file in (config_tree() / _GROUP).glob("*.yaml"))


def main(arguments: Sequence[str]) -> None:
    """Run the application; it ends the process with 1 if a run failed, 2 if something is refused.

    Args:
        arguments: Hydra's overrides, `experiment=NAME` among them.
    """
    sys.argv = ["fusion_upcycle benchmark", *_for_hydra(arguments)]
    signal.signal(signal.SIGTERM, _terminate)
    hydra.main(config_path=str(config_tree()), config_name=_GROUP, version_base="1.3")(_job)()


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _for_hydra(arguments: Sequence[str]) -> list[str]:
    """`experiment=NAME` also chooses the file of that name; a path chooses a file of the user's.

    Raises:
        UpcyclingError: there is no such experiment.
    """
    given = [a.partition("=")[2] for a in arguments if a.startswith("experiment=")]
    if not given:
        raise UpcyclingError(
            f"experiment is not set: experiment=NAME ({', '.join(experiments())}), or "
            "experiment=FILE.yaml for one of yours."
        )
    wanted = given[-1]
    others = [a for a in arguments if not a.startswith("experiment=")]
    path = Path(wanted).expanduser()
    if path.suffix in (".yaml", ".yml"):
        wanted = _store(path)
    elif wanted not in experiments() and not _in_folders(wanted, arguments):
        raise unknown("experiment", wanted, experiments())
    return [f"{_GROUP}@_global_={wanted}", f"experiment={wanted}", *others]


def _store(path: Path) -> str:
    """Give Hydra a file of the user's, under its own name."""
    if not path.is_file():
        raise UpcyclingError(f"experiment={path} is not a file.")
    node = OmegaConf.load(path)
    if not isinstance(node, DictConfig):
        raise UpcyclingError(f"{path} must be a mapping: modelpool, taskpools, methods.")
    ConfigStore.instance().store(name=path.stem, group=_GROUP, node=node)
    return path.stem


def _in_folders(name: str, arguments: Sequence[str]) -> bool:
    """Whether a folder that Hydra was given has it."""
    words = list(arguments)
    folders = [after for before, after in pairwise(words) if _names(before)]
    folders += [w.partition("=")[2] for w in words if w.startswith("--config-dir=")]
    return any((Path(folder) / _GROUP / f"{name}.yaml").is_file() for folder in folders)


def _names(flag: str) -> bool:
    return flag in ("--config-dir", "-cd")


def _job(config: DictConfig) -> None:
    if config.run is not None:  # in a launcher's job
        perform_one(Path(config.run))
        return
    try:
        outcome = _benchmark(config)
    except UpcyclingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Stopped):
        print("Interrupted: the same command goes on with what is not complete.", file=sys.stderr)
        sys.exit(130)
    if outcome.failed:
        sys.exit(1)


def _benchmark(config: DictConfig) -> Outcome:
    require_launcher(config)
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    experiment = read_experiment({str(name): value for name, value in settings.items()})
    require_whole("jobs", config.jobs, at_least=1)
    output = Path(config.output).expanduser().absolute()
    require_folder("output", output)
    launched = launcher_of(config) is not None
    with Processes(config.jobs) as processes:
        outcome = run_experiment(
            experiment,
            output,
            processes,
            jobs=config.jobs,
            isolate=bool(config.isolate),
            launch=partial(perform_launched, config, job=_job) if launched else None,
        )
    for request in outcome.failed:
        if request.facts["purpose"] == "test":
            print(f"failed: {label(request)}: {short_error(request)}", file=sys.stderr)
            print(f"        see {request.folder / CONSOLE_NAME}", file=sys.stderr)
    print(f"{len(outcome.done)} runs complete, {len(outcome.failed)} failed, in {output}")
    if config.report:
        from fusion_upcycle.comparison import write_report

        title = experiment.title or experiment.experiment
        page = write_report([output], output / "report", title=title)
        print(f"Output: {page}")
    return outcome
