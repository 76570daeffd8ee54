"""Lightning's trainer and loader, as a run's options say."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

from fusion_upcycle.training.checkpoints import CheckpointEvery
from fusion_upcycle.training.logs import Metrics, Progress, TensorBoard
from fusion_upcycle.training.objectives.base import Objective
from fusion_upcycle.training.options import TrainingOptions
from fusion_upcycle.training.order import ExampleOrder, StatelessLoader, StepSampler
from fusion_upcycle.training.stopping import Stopping
from fusion_upcycle.training.strategy import PartsStrategy


def make_loader(
    order: ExampleOrder, objective: Objective, options: TrainingOptions, trainer: L.Trainer
) -> StatelessLoader:
    """This device's examples of each step that is left."""
    sampler = StepSampler(
        lambda: trainer.global_step,
        options.steps,
        options.batch_size,
        trainer.global_rank,
        trainer.world_size,
    )
    return StatelessLoader(order, batch_sampler=sampler, collate_fn=objective.collate)


def make_trainer(
    options: TrainingOptions,
    callbacks: list[Callback],
    saving: CheckpointEvery,
    stopping: Stopping,
    metrics: Metrics,
    *,
    work: Path,
    progress: bool,
) -> L.Trainer:
    """Lightning's, with our checkpoints and logs.

    Args:
        stopping: what asks the run to stop.
        metrics: the log, beside which TensorBoard's goes.
        work: folder of the run.
    """
    strategy: str | Strategy = options.strategy
    world = options.devices * options.num_nodes
    if strategy == "fsdp":
        strategy = PartsStrategy(world)
    autocast = options.precision == "bf16-mixed" and options.strategy != "fsdp"
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=strategy,
        # Weights are cast by us or FSDP2: what transformers keeps in float32 stays there.
        precision="bf16-mixed" if autocast else "32-true",
        max_steps=options.steps,
        max_epochs=1,
        logger=[metrics, TensorBoard(metrics.path.parent)],
        callbacks=[
            stopping,
            *callbacks,
            *([Progress()] if progress else []),
            saving,  # Lightning has it go last, wherever it stands
        ],
        plugins=[saving.io],
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        default_root_dir=work,
    )
