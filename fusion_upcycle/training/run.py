"""Continued training from a model in memory to a trained model and its folder."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from fusion_upcycle.architectures.layout import own_class_name
from fusion_upcycle.checkpoint.staging import RECORD_FILE, TRAINING_RECORD_FILE, check_output
from fusion_upcycle.checks import dtype_name
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.live.identity import state_sha256
from fusion_upcycle.report.record import Measured, versions
from fusion_upcycle.training.checkpoint_folders import (
    checkpoints_in,
    keep_only,
    latest_checkpoint,
)
from fusion_upcycle.training.checkpoints import CHECKPOINT_VERSION, CheckpointEvery
from fusion_upcycle.training.churn import RouterChurn
from fusion_upcycle.training.export import describe, export
from fusion_upcycle.training.figure import save_routing
from fusion_upcycle.training.fit import Before, prepare
from fusion_upcycle.training.health import RouterHealth
from fusion_upcycle.training.launching import require_as_started
from fusion_upcycle.training.logs import METRICS_FILE, Metrics, quiet_lightning
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.moments import load_moments
from fusion_upcycle.training.objectives import objective_for
from fusion_upcycle.training.objectives.base import Source
from fusion_upcycle.training.objectives.clip import ClipTexts
from fusion_upcycle.training.options import MAY_CHANGE, TrainingOptions
from fusion_upcycle.training.order import ExampleOrder
from fusion_upcycle.training.pages import kept_pages
from fusion_upcycle.training.parameters import count_parameters
from fusion_upcycle.training.permutation import ORDER_VERSION
from fusion_upcycle.training.router_rate import RouterRate
from fusion_upcycle.training.saved import STATE_FILE
from fusion_upcycle.training.seen import Seen
from fusion_upcycle.training.sharding import Part
from fusion_upcycle.training.stopping import Stopping
from fusion_upcycle.training.summary import moments_in_words
from fusion_upcycle.training.trainer import make_loader, make_trainer
from fusion_upcycle.training.validation import Validation
from fusion_upcycle.training.work_folder import disk_errors, held, lost_processes
from fusion_upcycle.untrusted import read_object
from fusion_upcycle.upcycling.run import recorded_options
from fusion_upcycle.upcycling.upcycling import Upcycling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Origin:
    """What is known of the model before training.

    Attributes:
        name: folder, Hub id or class.
        upcycling: options by which it was made of a dense model, as in `upcycling.json`.
        load_seconds: that it took to load; None of one that was in memory.
    """

    name: str
    upcycling: dict[str, Any] | None = None
    load_seconds: float | None = None


def upcycling_of(folder: str) -> dict[str, Any] | None:
    """How the model of a folder was made of a dense one, where sparse upcycling made it.

    Raises:
        UpcyclingError: its record is damaged.
    """
    path = Path(folder).expanduser() / RECORD_FILE
    record = read_object(path) if path.is_file() else {}
    if record.get("method") != Upcycling.method:
        return None
    options = record.get("options")
    if not isinstance(options, dict):
        raise UpcyclingError(f"{path} is damaged (no options). Copy the folder again.")
    return recorded_options(options)


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes.

    Attributes:
        work: checkpoints and packed data; a run that was killed goes on from here.
        log: TensorBoard and CSV logs.
        output: folder of the trained model; None leaves it in memory.
        overwrite: replace an earlier output of ours.
        resume: go on with the last checkpoint in `work`; False starts over.
    """

    work: Path
    log: Path
    output: Path | None = None
    overwrite: bool = False
    resume: bool = True


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        model: trained, in eval mode, in the dtypes it came in; with `strategy=fsdp` this process's
            part, in the dtype of the training, to be run by all processes together.
        record: what was done, JSON; also in the output's `training.json`.
    """

    model: "PreTrainedModel"
    record: dict[str, Any]


def train(
    model: "PreTrainedModel | Part",
    processor: Any,
    options: TrainingOptions,
    *,
    data: Mapping[str, Any],
    places: Places,
    origin: Origin,
    validation: Mapping[str, Any] | None = None,
    optimizer_state: Path | None = None,
    clip: ClipTexts | None = None,
    progress: bool = True,
) -> Trained:
    """Train a model, dense or MoE, by its objective; a killed run goes on.

    Every process of a distributed run calls this with the same arguments, and `places.work` must be
    one folder for all.

    Args:
        model: changed in place; with `strategy=fsdp` this process's part, as
            `fusion_upcycle.training.sharding.load_part` makes it.
        processor: the model's tokenizer, or its image processor.
        data: name -> documents, as `fusion_upcycle.texts.documents` takes them; for other
            objectives as `fusion_upcycle.tables.pairs` or `.images` takes them, without a split
            the train split.
        validation: the same, held out.
        optimizer_state: folder of an earlier run whose AdamW moments to begin with.
        clip: the CLIP model whose texts judge a vision tower.

    Raises:
        UpcyclingError: options, data or model that do not fit; other processes than `options` say,
            each of which would train by itself; a loss that is not finite; a work
            folder that another run has; a disk that is full or fails; no checkpoint that is good.
        Stopped: SIGTERM or SIGINT came; the run is saved, and goes on when it is called again.
    """
    require_as_started(options.devices, options.num_nodes)
    checkpoints = _checkpoints(places)
    if places.output is not None and not checkpoints_in(checkpoints):
        check_output(places.output, overwrite=places.overwrite)
    lost = lost_processes(places.work)
    with Stopping() as stopping, disk_errors(places.work), lost, held(places.work):
        return _train(
            model,
            processor,
            options,
            data=data,
            places=places,
            origin=origin,
            validation=validation,
            optimizer_state=optimizer_state,
            clip=clip,
            progress=progress,
            stopping=stopping,
        )


def _train(
    given: "PreTrainedModel | Part",
    processor: Any,
    options: TrainingOptions,
    *,
    data: Mapping[str, Any],
    places: Places,
    origin: Origin,
    validation: Mapping[str, Any] | None,
    optimizer_state: Path | None,
    clip: ClipTexts | None,
    progress: bool,
    stopping: Stopping,
) -> Trained:
    part = given if isinstance(given, Part) else None
    model = given.model if isinstance(given, Part) else given
    if (part is None) == (options.strategy == "fsdp"):
        raise UpcyclingError(
            f"strategy={options.strategy} trains "
            + (
                "a model of a folder, of which each process loads its part: give the folder "
                "(modelpool.models._pretrained_=FOLDER, or "
                "fusion_upcycle.training.sharding.load_part)."
                if part is None
                else f"whole models, and this is a part. Pass {setting('strategy', 'fsdp')}."
            )
        )
    objective = objective_for(model, processor, options, clip)
    sources = objective.read(data, places.work / "data")
    order = ExampleOrder(sources, options.mixture, options.seed)
    objective.hold_out(validation, places.work / "data")
    identity = _identity(model, options, sources, optimizer_state)
    checkpoints = _checkpoints(places)
    resumed = latest_checkpoint(checkpoints, identity) if places.resume else None
    run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    exported = resumed is not None and _is_output_of(run, places)
    if places.output is not None and not exported:
        check_output(places.output, overwrite=places.overwrite)
    before = Before.of(model, None if part is None else part.dtypes)
    prepare(model, options, sharded=part is not None)
    moments = None
    if optimizer_state is not None and resumed is None:
        moments = load_moments(optimizer_state, model, origin.upcycling)
    seen = Seen(model, options)
    module = PretrainingModule(model, objective, options, moments=moments)
    begun = {
        "method": "continued pre-training",
        "objective": objective.name,
        "source": vars(origin),
        "class": own_class_name(model),
        "dtype": dtype_name(before.dtype),
        "parameters": count_parameters(model, module.routers),
        "router_learning_rate": module.router_rate and module.router_rate.to_json(),
        "optimizer_state": None if optimizer_state is None else str(optimizer_state),
        "data": {source.name: source.to_json() for source in sources},
        "log": str(places.log),
        "run": run,
        "options": options.to_json(),
        "versions": versions(),
    }
    health, scores = RouterHealth(), Validation()
    churn = RouterChurn(objective.collate([order[0]]))
    metrics = Metrics(places.log)
    saving = CheckpointEvery(
        checkpoints,
        identity,
        partial(
            describe,
            model=model,
            processor=processor,
            dtypes=before.dtypes,
            objective=objective,
            record=begun,
        ),
        resumed,
        metrics,
        every=options.checkpoint_every,
        minutes=options.checkpoint_minutes,
        stopping=stopping,
    )
    with quiet_lightning(), Measured() as cost:
        callbacks: list[Callback] = [health, churn, scores, seen]
        trainer = make_trainer(
            options, callbacks, saving, stopping, metrics, work=places.work, progress=progress
        )
        if trainer.is_global_zero:
            _announce(module.router_rate, progress)
            if progress and places.output is not None:
                print(moments_in_words(model, options, places.output), flush=True)
            if not places.resume:
                keep_only(checkpoints, ())
            metrics.begin(resumed and resumed / METRICS_FILE)
        loader = make_loader(order, objective, options, trainer)
        on_cpu = trainer.strategy.root_device.type == "cpu"
        # Of a part, what is gathered layer by layer would be kept in many sizes.
        with kept_pages() if on_cpu and part is None else nullcontext():
            state = resumed and resumed / STATE_FILE
            trainer.fit(module, loader, ckpt_path=state, weights_only=True)
    module.routers.close()
    stopping.after_fit(_stand(trainer, options, checkpoints, places.resume))
    before.restore(model, sharded=part is not None)
    ended: dict[str, Any] = {
        "steps": options.steps,
        f"{options.unit}_trained": options.steps * options.per_step,
        "resumed_from": None if resumed is None else resumed.name,
        "first": {objective.loss: module.first_loss},
        "final": module.last_metrics,
        "validation": scores.results,
        "router_warning": health.warning,
        "cost": _cost(cost, options, module.first_step)
        | seen.of_run(cost.wall_seconds, module.first_step, trainer),
    }
    if trainer.is_global_zero:
        metrics.sync()
    if places.output is not None and not exported and trainer.is_global_zero:
        with seen.exporting(trainer, ended["cost"]):
            export(
                saving.last,
                places.output,
                ended=ended,
                moments=options.save_moments,
                overwrite=places.overwrite,
            )
    if places.output is not None and trainer.is_global_zero:
        keep_only(checkpoints, ())
    if module.routers and trainer.is_global_zero:
        figure = save_routing(places.log)
        if progress and figure is not None:
            print(f"Routing: {figure}", flush=True)
    trainer.strategy.barrier()
    return Trained(model, begun | ended)


def _checkpoints(places: Places) -> Path:
    return places.work / "checkpoints"


def _is_output_of(run: str, places: Places) -> bool:
    """Whether a kill left only the checkpoints to be removed: the output is of this very run."""
    if places.output is None or places.overwrite:
        return False
    try:
        record = json.loads((places.output / TRAINING_RECORD_FILE).read_bytes())
        return bool(record["run"] == run)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stand(trainer: Trainer, options: TrainingOptions, checkpoints: Path, resume: bool) -> str:
    """Of a run that stops: where it is, said by one process."""
    if not trainer.is_global_zero:
        return ""
    but = "" if resume else f", without {setting('resume', False)}"
    return (
        f"after step {trainer.global_step:,} of {options.steps:,}, saved in {checkpoints}; the "
        f"same command{but} goes on from there"
    )


def _announce(rate: RouterRate | None, progress: bool) -> None:
    """Say what the routers are trained with, and warn where that is too much."""
    if rate is None:
        return
    if progress:
        print(rate.in_words, flush=True)
    if rate.warning is not None:
        warnings.warn(rate.warning, stacklevel=3)


def _cost(cost: Measured, options: TrainingOptions, first_step: int) -> dict[str, Any]:
    """What this process took, validation and saving included."""
    done = (options.steps - first_step) * options.per_step
    speed = done / cost.cpu_seconds if cost.cpu_seconds else 0.0
    return cost.as_record() | {f"{options.unit}_per_cpu_second": speed}


def _identity(
    model: "PreTrainedModel",
    options: TrainingOptions,
    sources: Sequence[Source],
    optimizer_state: Path | None,
) -> dict[str, Any]:
    """What a run must share with the checkpoint that it goes on from."""
    fields = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    return {
        "checkpoint": CHECKPOINT_VERSION,
        "order": ORDER_VERSION,
        # Others save a model whole, and go on from such only.
        "sharded": options.strategy == "fsdp",
        "model": state_sha256(model, json.dumps(fields, sort_keys=True, default=str)),
        "options": {k: v for k, v in options.to_json().items() if k not in MAY_CHANGE},
        "data": {source.name: source.digest for source in sources},
        "optimizer_state": None if optimizer_state is None else str(optimizer_state),
    }
