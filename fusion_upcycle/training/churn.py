"""Churn: the share of a fixed window's tokens whose first expert is another than at the last look.

Loads may be even while each token goes somewhere else at every step, and then no expert learns.
The look is a forward pass of its own, in evaluation mode and without gradient: it draws no random
numbers, counts no load, and leaves the run as it would be without it.

Shapes: L MoE layers, E experts, T tokens of the window, K experts per token.
"""

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from fusion_upcycle.live.inputs import logits_of_last
from fusion_upcycle.live.modes import evaluating

if TYPE_CHECKING:
    from fusion_upcycle.training.module import PretrainingModule


class RouterChurn(L.Callback):
    """Log each layer's churn, and the mean over layers, with the losses.

    The first look is at the model before the first step; the last choices are in the checkpoint, so
    that a resumed run logs the same.

    Args:
        window_T1: tokens [T + 1] of the run's first window, the same on every device.
    """

    def __init__(self, window_T1: Tensor):
        self._window_T = window_T1[:-1]
        self._last_LT: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"first_experts": self._last_LT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_LT = state["first_experts"]

    def on_train_start(self, trainer: L.Trainer, module: "PretrainingModule") -> None:  # type: ignore[override]
        if module.routers and self._last_LT is None:
            self._last_LT = self._look(trainer, module)

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
        before_LT, self._last_LT = self._last_LT, self._look(trainer, module)
        assert before_LT is not None
        churn_L = (self._last_LT != before_LT).float().mean(1)
        metrics = {
            f"layer_{layer}/churn": float(churn)
            for layer, churn in zip(module.routers.modules, churn_L, strict=True)
        }
        module.write(metrics | {"churn": float(churn_L.mean())})

    @torch.no_grad()
    def _look(self, trainer: L.Trainer, module: "PretrainingModule") -> Tensor:
        """The first expert of each token in each MoE layer, [L, T], int32."""
        model, inputs_BT = module.model, self._window_T[None].to(module.device)
        arguments = module.arguments(inputs_BT) | logits_of_last(model, 1)
        with (
            evaluating(model),
            trainer.precision_plugin.forward_context(),
            torch.compiler.set_stance("force_eager"),  # one window is not worth a graph of its own
            module.routers.listening() as routed,
        ):
            model(input_ids=inputs_BT, use_cache=False, **arguments)
        pairs = zip(routed.logits, routed.chosen, strict=True)
        return torch.stack([first_expert(*pair) for pair in pairs]).int().cpu()


def first_expert(logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """Of the experts chosen for each token, that with the largest logit; of equal ones the first.

    Families list the chosen ones in different orders, and a selection bias may leave out the
    largest of all.
    """
    kept = torch.full_like(logits_NE, -torch.inf)
    return kept.scatter(1, chosen_NK, logits_NE.gather(1, chosen_NK)).argmax(1)
