"""The Lightning module: one training step is one optimizer step.

The balance loss takes each expert's load over all devices, and over the micro-batches of the step
so far, so that it is the load of the whole batch where nothing is accumulated, and in the last
micro-batch; probabilities are those of the micro-batch. [arXiv 2501.11873] Where experts choose
tokens there is none, as load is even by construction; and they choose among those of the
micro-batch, unless they choose within each example.

Shapes: L MoE layers, E experts.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion_upcycle.checkpoint.moments import Moments
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.training.checkpoints import named_state, numbered_state
from fusion_upcycle.training.fit import check_fit
from fusion_upcycle.training.health import RoutingTotals
from fusion_upcycle.training.losses import balanced_bias
from fusion_upcycle.training.moments import place_moments
from fusion_upcycle.training.objectives.base import Batch, Objective, split
from fusion_upcycle.training.options import TrainingOptions
from fusion_upcycle.training.parameters import freeze, group_of_parameters, optimizer_groups
from fusion_upcycle.training.router_rate import RouterRate
from fusion_upcycle.training.routing import by_stack, routing_losses
from fusion_upcycle.training.schedule import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OTHER_LOSSES = ("balance", "z", "total")


class PretrainingModule(L.LightningModule):
    """Training of a model, dense or MoE, by an objective.

    Args:
        model: as at step 0, also where a run is resumed; trained in place, in train mode.
        objective: of the model.
        options: of the run.
        moments: parameter name -> AdamW state to begin with, see `training.moments`.

    Raises:
        UpcyclingError: options that this model cannot honour.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        objective: Objective,
        options: TrainingOptions,
        *,
        moments: Moments | None = None,
    ):
        super().__init__()
        self.model = model.train()
        self.objective, self.options = objective, options
        self.routers = find_routers(model)
        self.automatic_optimization = False
        self._moments = moments or {}
        self._groups = group_of_parameters(model, self.routers)
        freeze(model, self._groups, options)
        check_fit(model, options, self.routers)
        self.router_rate = RouterRate.of(self.routers, options)
        self.routing = RoutingTotals(len(self.routers.modules), self.routers.num_experts)
        self._last_log = (time.perf_counter(), 0)
        self._step_number = 0
        self.first_step = options.steps  # of this process, which may find the run finished
        self._unwritten: dict[str, float] = {}
        self.last_metrics: dict[str, float] = {}
        self.first_loss: float | None = None  # of the objective, in the first step of the run

    # --- what Lightning asks for ------------------------------------------------------------------

    def configure_model(self) -> None:
        """Compile; a model that is sharded has been loaded so."""
        if self.options.compile:
            self.model.compile()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self._optimizer_groups()
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.options.learning_rate,
            betas=tuple(self.options.betas),  # type: ignore[arg-type]
            fused=True,
        )
        place_moments(optimizer, self._moments)
        self._moments = {}
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Optimizer state goes by parameter name, the same for every strategy and device count."""
        checkpoint["last_metrics"], checkpoint["first_loss"] = self.last_metrics, self.first_loss
        checkpoint["routing"] = self.routing.state(self.trainer.strategy.reduce)
        names, states = self._optimizer_names(), checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [named_state(state, names) for state in states]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.last_metrics, self.first_loss = checkpoint["last_metrics"], checkpoint["first_loss"]
        self.routing.restore(checkpoint["routing"])
        names, states = self._optimizer_names(), checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [numbered_state(s, names) for s in states if s]

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        return optimizer_groups(self.model, self._groups, self.options, self.router_rate)

    def _optimizer_names(self) -> list[list[str]]:
        groups = self._optimizer_groups()
        return [[f"model.{name}" for name in group["names"]] for group in groups]

    # --- one step ---------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step on this device's examples."""
        step, options, objective = self.global_step, self.options, self.objective
        self._step_number = step + 1
        done = (step + 1) * options.per_step
        factors = options.curve.factors(done, options.steps * options.per_step)
        # Dropout's draws are a function of seed, step and device, so that a resume repeats them.
        torch.manual_seed(hash((options.seed, step, self.global_rank)) % 2**63)
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["learning_rate"] * factors.learning_rate

        parts = split(batch, options.micro_batch_size or options.batch_size)
        weights = self._weights(parts)
        counts = torch.zeros_like(self.routing.counts, device=self.device)
        losses = torch.zeros(1 + len(_OTHER_LOSSES), device=self.device)
        for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            with _block_parallel_sync_behavior(self.trainer.strategy, index + 1 < len(parts)):
                terms = self._losses(part, weight, counts, factors)
                self.manual_backward(terms[-1] / len(parts))
            losses += terms.detach() / len(parts)
        losses = self.trainer.strategy.reduce(losses, reduce_op="mean")
        norm = self._clip(optimizer)
        self._require_finite(losses, norm, step)
        if self.first_loss is None:
            self.first_loss = float(losses[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if done > options.bias_update_after * options.steps * options.per_step:
            self._move_selection_biases(counts)
        self.routing.add_counts(counts)
        if self.due(options.log_every):
            speed = f"{options.unit}_per_second"
            metrics = self._named(losses) | {
                "learning_rate": options.learning_rate * factors.learning_rate,
                "gradient_norm": norm,
                options.unit: float(done),
                speed: self._speed(done),
            }
            self.write(metrics)
            self.last_metrics = metrics
            shown = (objective.loss, speed)
            self.log_dict({n: metrics[n] for n in shown}, prog_bar=True, logger=False)

    def _weights(self, parts: Sequence[Batch]) -> list[float]:
        """Of the mean loss of each part, so that every target of the step counts the same."""
        counted = [self.objective.counted(part) for part in parts]
        mean = torch.tensor(sum(counted) / len(parts), device=self.device)
        mean = self.trainer.strategy.reduce(mean, reduce_op="mean")
        return [count / float(mean) for count in counted]

    def _losses(self, batch: Batch, weight: float, counts_LE: Tensor, factors: Factors) -> Tensor:
        """The objective's, balance, z and total loss of a micro-batch, its choices counted."""
        objective = self.objective
        arguments = objective.inputs(self.model, batch)
        with self.routers.listening() as routed:
            logits = objective.logits(self.model(**arguments), batch)
        targets = objective.targets(batch).flatten()
        answers = cross_entropy(logits.flatten(0, -2).float(), targets)
        answers = answers * weight
        if not self.routers:
            nothing = torch.zeros_like(answers)
            return torch.stack([answers, nothing, nothing, answers])
        stacks = by_stack(self.routers, routed, objective.kept(batch))
        balance, z = routing_losses(
            self.routers, stacks, counts_LE, self.routing, self.trainer.strategy.reduce
        )
        total = answers + self.options.balance_weight * factors.balance * balance
        total = total + self.options.z_weight * factors.z * z
        return torch.stack([answers, balance, z, total])

    def _named(self, losses: Tensor) -> dict[str, float]:
        names = (self.objective.loss, *_OTHER_LOSSES)
        return dict(zip(names, losses.tolist(), strict=True))

    def _clip(self, optimizer: Any) -> float:
        """Clip the gradients where they are too large, and return the norm they had."""
        by_mesh: dict[Any, list[Tensor]] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        total = self._norm({mesh: [p.grad for p in found] for mesh, found in by_mesh.items()})
        norm = float(total)
        limit = self.options.gradient_clip
        # clip_grad_norm_ would multiply by 1 too: all experts' gradients, read and written again.
        if limit and norm + 1e-6 > limit:
            for parameters in by_mesh.values():
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
        return norm

    def _norm(self, gradients: dict[Any, list[Any]]) -> Tensor:
        """Of all gradients together, by the devices that share them; None stands for no sharing."""
        here = torch.nn.utils.get_total_norm(gradients.pop(None, []))
        parts = [gradient for found in gradients.values() for gradient in found]
        if not parts:
            return here
        # Each element is on one device: meshes differ, and need not be asked.
        assert all(place.is_shard() for part in parts for place in part.placements)
        own = torch.nn.utils.get_total_norm([part.to_local() for part in parts]).square()
        return (here.square() + self.trainer.strategy.reduce(own, reduce_op="sum")).sqrt()

    def _require_finite(self, losses: Tensor, norm: float, step: int) -> None:
        if bool(losses.isfinite().all()) and norm < float("inf"):
            return
        first = step * self.options.batch_size
        windows = "windows" if self.options.unit == "tokens" else "examples"
        raise UpcyclingError(
            f"Step {step} ({windows} {first} to {first + self.options.batch_size - 1} of the run) "
            f"gives losses {self._named(losses)} and gradient norm {norm}. The weights are those "
            "before the step, and the last checkpoint is kept. Lower the learning rate, or look at "
            f"the data of these {windows}."
        )

    @torch.no_grad()
    def _move_selection_biases(self, counts_LE: Tensor) -> None:
        if not self.options.bias_update_rate:
            return
        loads = (counts_LE / counts_LE.sum(1, keepdim=True)).unbind()
        for bias, load_E in zip(self.routers.selection_biases(), loads, strict=True):
            moved = balanced_bias(bias.flatten(), load_E, self.options.bias_update_rate)
            bias.copy_(moved.view_as(bias))

    # --- what is seen -----------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether the current step, or the last one, ends an interval of `every`, or the run."""
        step = self._step_number
        return step == self.options.steps or (every > 0 and step % every == 0)

    def write(self, metrics: dict[str, float]) -> None:
        """Log metrics of the current step, or the last one: all of a step in one row."""
        self._unwritten |= metrics

    def take_metrics(self) -> dict[str, float]:
        """The row of the step, to which the callbacks have added theirs; empty where none is due.

        Then start again.
        """
        row, self._unwritten = self._unwritten, {}
        return row

    def _speed(self, done: int) -> float:
        """Units per second since the last log, on all devices together."""
        (then, before), self._last_log = self._last_log, (time.perf_counter(), done)
        return (done - before) / (self._last_log[0] - then)

    def on_train_start(self) -> None:
        self.first_step = self.global_step
        self._last_log = (time.perf_counter(), self.global_step * self.options.per_step)
