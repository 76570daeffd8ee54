"""Muon for matrices and Adam for the rest, in one optimizer.

In the little time that the demo models have, Muon gets far lower than AdamW (prose, same cost: 1.97
against 2.52 bits per byte). ``torch.optim.Muon`` is not used because it leaves the other parameters
to a second optimizer, needs torch 2.9, and iterates in bfloat16, which many CPUs only emulate.
Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95
_ADAM_BETAS = (0.9, 0.95)
_EPSILON = 1e-8


class Muon(torch.optim.Optimizer):
    """``matrices`` move by their orthogonalised momentum, ``others`` by Adam; no weight decay."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        matrix_learning_rate: float,
        other_learning_rate: float,
    ) -> None:
        groups = [
            {"params": list(matrices), "lr": matrix_learning_rate, "matrices": True},
            {"params": list(others), "lr": other_learning_rate, "matrices": False},
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        """One update; ``closure``, which Lightning gives, computes the loss and gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._step_matrices if group["matrices"] else self._step_adam
            update(group["params"], group["lr"])
        return loss

    def _step_matrices(self, parameters: list[nn.Parameter], learning_rate: float) -> None:
        updates: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            assert parameter.grad is not None
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
            update = parameter.grad.lerp(momentum, _MOMENTUM)  # Nesterov
            updates[parameter.shape].append((parameter, update))
        for shape, pairs in updates.items():  # matrices of one shape in one batched product
            orthogonal = orthogonalise(torch.stack([update for _, update in pairs]))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (parameter, _), direction in zip(pairs, orthogonal, strict=True):
                parameter.add_(direction, alpha=-learning_rate * scale)

    def _step_adam(self, parameters: list[nn.Parameter], learning_rate: float) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            state["step"] = step = state.get("step", 0) + 1
            mean = state.setdefault("mean", torch.zeros_like(parameter))
            square = state.setdefault("square", torch.zeros_like(parameter))
            mean.lerp_(parameter.grad, 1 - _ADAM_BETAS[0])
            square.lerp_(parameter.grad.square(), 1 - _ADAM_BETAS[1])
            scale = (square / (1 - _ADAM_BETAS[1] ** step)).sqrt_().add_(_EPSILON)
            parameter.addcdiv_(mean, scale, value=-learning_rate / (1 - _ADAM_BETAS[0] ** step))


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Each matrix U S V' becomes about U V': its singular values end between about 0.7 and 1.2."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
