"""Watching the experts: load, dead ones, router entropy, and one warning when it goes wrong.

In expert choice load is even by construction, and what is watched is the share of tokens that no
expert chose.

Shapes: L MoE layers, E experts, N tokens.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from fusion_upcycle.live.layer_health import LayerHealth
from fusion_upcycle.training.routing import StackRouting

if TYPE_CHECKING:
    from fusion_upcycle.training.module import PretrainingModule

#: Of the budget: a fresh router is never healthy, and the warm-up is there to change that.
_JUDGED_FROM = 0.1


_ADVICE = (
    "Raise balance_weight, lower router_learning_rate, or, where the family has a selection bias, "
    "set bias_update_rate=0.001. This is said once; the log has load_cv and dead_experts by layer."
)


class RoutingTotals:
    """Sums over steps, since the last reset.

    Attributes:
        counts: how often each expert was chosen, on all devices, [L, E].
    """

    def __init__(self, num_layers: int, num_experts: int):
        self._start(num_layers, num_experts)

    def _start(self, num_layers: int, num_experts: int) -> None:
        self.counts = torch.zeros(num_layers, num_experts)
        self._entropy_L = torch.zeros(num_layers)
        self._left_out_L = torch.zeros(num_layers)
        self._tokens_L = torch.zeros(num_layers, dtype=torch.int64)

    def add_counts(self, counts_LE: Tensor) -> None:
        self.counts = self.counts.to(counts_LE.device) + counts_LE

    def add(self, stack: StackRouting, probabilities_LNE: Tensor) -> None:
        """Count the router entropies of this device's tokens, and those that no expert chose."""
        entropy_LN = torch.special.entr(probabilities_LNE).sum(-1) / math.log(2)
        device, places = entropy_LN.device, list(stack.places)
        self._entropy_L = self._entropy_L.to(device)
        self._entropy_L[places] += entropy_LN.sum(1)
        self._tokens_L = self._tokens_L.to(device)
        self._tokens_L[places] += entropy_LN.shape[1]
        if stack.left_out_L is not None:
            self._left_out_L = self._left_out_L.to(device)
            self._left_out_L[places] += stack.left_out_L

    def state(self, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
        """What `restore` goes on from: of all devices together.

        Args:
            reduce: of a strategy: the mean over devices.
        """
        tokens_L = self._tokens_L.double()
        return {
            "counts": self.counts.cpu(),
            "entropy": reduce(self._entropy_L.clone(), reduce_op="mean").cpu(),
            "left_out": reduce(self._left_out_L.clone(), reduce_op="mean").cpu(),
            "tokens": reduce(tokens_L, reduce_op="mean").long().cpu(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.counts, self._entropy_L = state["counts"].clone(), state["entropy"].clone()
        self._left_out_L, self._tokens_L = state["left_out"].clone(), state["tokens"].clone()

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Load [L, E], rows summing to 1; mean entropy in bits [L]; share left out [L].

        Then start again.
        """
        load = self.counts / self.counts.sum(1, keepdim=True)
        entropy = self._entropy_L / self._tokens_L
        left_out = self._left_out_L.to(entropy.device) / self._tokens_L
        self._start(*self.counts.shape)
        return load, entropy, left_out


class RouterHealth(L.Callback):
    """Log each layer's routing with the losses, and warn once when a limit is broken.

    The drop in balance is how far a layer's balance is below its best so far in the run.
    """

    def __init__(self) -> None:
        self._best: dict[int, float] = {}
        self.warning: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self._best), "warning": self.warning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self.warning = dict(state["best"]), state["warning"]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: "PretrainingModule",  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not module.routers or not module.due(module.options.log_every):
            return
        load_LE, *of_tokens = module.routing.take()
        entropy_L, left_out_L = (
            trainer.strategy.reduce(each_L, reduce_op="mean").tolist() for each_L in of_tokens
        )
        metrics: dict[str, float] = {}
        broken = []
        for layer, load_E, entropy, left_out, chosen_by_experts in zip(
            module.routers.modules,
            load_LE.cpu(),
            entropy_L,
            left_out_L,
            module.routers.expert_choice,
            strict=True,
        ):
            health = LayerHealth.of(load_E)
            self._best[layer] = max(self._best.get(layer, 0.0), health.balance)
            metrics |= {
                f"layer_{layer}/load_cv": health.cv,
                f"layer_{layer}/dead_experts": float(health.dead),
                f"layer_{layer}/router_entropy_bits": entropy,
                f"layer_{layer}/balance_drop": self._best[layer] - health.balance,
            }
            metrics |= {f"layer_{layer}/load_{e}": float(share) for e, share in enumerate(load_E)}
            if chosen_by_experts:
                metrics[f"layer_{layer}/left_out"] = left_out
            if reason := health.broken(len(load_E)):
                broken.append(f"layer {layer}: {reason}")
        module.write(metrics)
        if (
            broken
            and self.warning is None
            and trainer.global_step >= _JUDGED_FROM * module.options.steps
        ):
            self.warning = f"Routers out of balance at step {trainer.global_step}: "
            self.warning += "; ".join(broken)
            if trainer.is_global_zero:
                warnings.warn(f"{self.warning}. {_ADVICE}", stacklevel=1)
