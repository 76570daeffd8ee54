"""Held-out examples while training: loss and what else the objective scores, at intervals."""

from typing import TYPE_CHECKING, Any

import lightning as L

from fusion_upcycle.live.sharing import Share

if TYPE_CHECKING:
    from fusion_upcycle.training.module import PretrainingModule


class Validation(L.Callback):
    """Score what the objective holds out.

    The devices share the batches, and each has the numbers of all, which are those of one device.

    Attributes:
        results: step -> name of the examples -> metrics.
    """

    def __init__(self) -> None:
        self.results: dict[int, dict[str, dict[str, float | int]]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"results": self.results}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.results = state["results"]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: "PretrainingModule",  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        objective = module.objective
        if not objective.held_out or not module.due(module.options.validate_every):
            return
        share = Share(trainer.global_rank, trainer.world_size)
        found = {name: objective.score(module.model, name, share) for name in objective.held_out}
        self.results[trainer.global_step] = found
        module.write(
            {
                f"validation/{name}/{metric}": float(found[name][metric])
                for name in found
                for metric in objective.scores
            }
        )
