"""Churn: the share of a fixed example's tokens whose first expert is another than at the last look.

Loads may be even while each token goes somewhere else at every step, and then no expert learns.
The look is a forward pass of its own, in evaluation mode and without gradient: it draws no random
numbers, counts no load, and leaves the run as it would be without it.

Shapes: E experts, T tokens that a layer sees of the example, K experts per token, C tokens per
expert.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from fusion_upcycle.live.inputs import logits_of_last
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.training.objectives.base import Batch
from fusion_upcycle.training.routing import takers

if TYPE_CHECKING:
    from fusion_upcycle.training.module import PretrainingModule


class RouterChurn(L.Callback):
    """Log each layer's churn, and the mean over layers, with the losses.

    The first look is at the model before the first step; the last choices are in the checkpoint, so
    that a resumed run logs the same.

    Args:
        example: the run's first one as a batch, the same on every device.
    """

    def __init__(self, example: Batch):
        self._example = example
        self._last: Sequence[Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"first_experts": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = state["first_experts"]

    def on_train_start(self, trainer: L.Trainer, module: "PretrainingModule") -> None:  # type: ignore[override]
        if module.routers and self._last is None:
            self._last = self._look(trainer, module)

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
        before, self._last = self._last, self._look(trainer, module)
        assert before is not None
        churn_L = torch.stack(
            [(new != old).float().mean() for new, old in zip(self._last, before, strict=True)]
        )
        metrics = {
            f"layer_{layer}/churn": float(churn)
            for layer, churn in zip(module.routers.modules, churn_L, strict=True)
        }
        module.write(metrics | {"churn": float(churn_L.mean())})

    @torch.no_grad()
    def _look(self, trainer: L.Trainer, module: "PretrainingModule") -> Sequence[Tensor]:
        """The first expert of each token in each MoE layer, [T], int32."""
        model, objective = module.model, module.objective
        example = {name: tensor.to(module.device) for name, tensor in self._example.items()}
        arguments = objective.inputs(model, example) | logits_of_last(model, 1)
        with (
            evaluating(model),
            trainer.precision_plugin.forward_context(),
            torch.compiler.set_stance("force_eager"),  # one window is not worth a graph of its own
            module.routers.listening() as routed,
        ):
            model(**arguments)
        firsts = [
            first_taker(*pair) if by_experts else first_expert(*pair)
            for by_experts, *pair in zip(
                module.routers.expert_choice, routed.logits, routed.chosen, strict=True
            )
        ]
        return [first_T.int().cpu() for first_T in firsts]


def first_expert(logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """Of the experts chosen for each token, that with the largest logit; of equal ones the first.

    Families list the chosen ones in different orders, and a selection bias may leave out the
    largest of all.
    """
    kept = torch.full_like(logits_NE, -torch.inf)
    return kept.scatter(1, chosen_NK, logits_NE.gather(1, chosen_NK)).argmax(1)


def first_taker(logits_TE: Tensor, chosen_EC: Tensor) -> Tensor:
    """In expert choice: of the experts that chose a token, that of the largest logit; -1: none."""
    takers_TE = takers(chosen_EC, len(logits_TE))
    first_T = logits_TE.masked_fill(~takers_TE, -torch.inf).argmax(1)
    return first_T.masked_fill(~takers_TE.any(1), -1)
