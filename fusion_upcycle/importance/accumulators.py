"""What is kept of the gradients: a few sums for each expert, in float32.

Shapes: E experts, F intermediate, D hidden size. Parameters hold all experts of a layer on their
first axis: `gate_up_proj` [E, 2F, D], or `up_proj` [E, F, D] without a gate, and `down_proj`
[E, D, F]; and biases, where there are any, [E, 2F], [E, F] and [E, D].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.tensors import whole

#: Elements that are looked at together: what is computed of a large layer must not be as large.
_ELEMENTS = 2**24


@dataclass
class ExpertSums:
    """Sums over sequences of what the scores are made of.

    Attributes:
        parameters: MoE layer -> name -> parameter, experts on the first axis.
        squared: name -> sum of squared gradients of each matrix [matrices, E]; gate and up are
            two, though packed in one parameter.
        products: name -> sum of |weight * gradient| [E].
    """

    parameters: Mapping[int, Mapping[str, nn.Parameter]]
    squared: dict[str, Tensor] = field(default_factory=dict, init=False)
    products: dict[str, Tensor] = field(default_factory=dict, init=False)
    _seen: set[str] = field(default_factory=set, init=False)

    def attach(self) -> Iterator[Any]:
        """Hook every parameter: its gradient is added to the sums and freed; gives the handles."""
        for parameters in self.parameters.values():
            for name, parameter in parameters.items():
                yield parameter.register_post_accumulate_grad_hook(self._adding(name))

    def _adding(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def add(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            if gradient is None:  # FSDP2 calls hooks of a parameter that it reduced nothing for
                return
            weight = parameter.detach()
            squared = torch.stack(
                [_per_expert(_squares, part) for part in matrices(name, gradient)]
            )
            product = _per_expert(_products, weight, gradient)
            self.squared[name] = self.squared[name] + squared if name in self.squared else squared
            self.products[name] = (
                self.products[name] + product if name in self.products else product
            )
            self._seen.add(name)

        return add

    def require_gradients(self, layer: int, sequence: int) -> None:
        """After a backward pass, in which some token surely was routed to the layer.

        Raises:
            UpcyclingError: a parameter of the layer that got no gradient, by name.
        """
        for name in self.parameters[layer]:
            if name not in self._seen:
                raise UpcyclingError(
                    f"{name} got no gradient from calibration sequence {sequence}, although tokens "
                    f"were routed to experts of layer {layer}. Its forward pass is not "
                    "differentiable (detached, or a kernel for inference): load the model without "
                    "it, for example with experts_implementation=eager."
                )

    def next_sequence(self) -> None:
        self._seen.clear()

    def metrics(self, load: Mapping[int, list[float]]) -> dict[str, dict[int, list[float]]]:
        """All metrics, layer -> E scores; of sharded parameters the same on every process.

        Args:
            load: layer -> tokens routed to each expert, per token.

        Raises:
            UpcyclingError: scores that are not finite, by layer.
        """
        found: dict[str, dict[int, list[float]]] = {
            "grad_squared": {},
            "saliency": {},
            "weight_norm": {},
            "load": {layer: list(values) for layer, values in load.items()},
        }
        for layer, parameters in self.parameters.items():
            total: dict[str, list[Tensor]] = {
                "grad_squared": [whole(self.squared[name]).sum(0) for name in parameters],
                "saliency": [whole(self.products[name]) for name in parameters],
                "weight_norm": [weight_norms(n, p).sum(0) for n, p in parameters.items()],
            }
            for metric, parts in total.items():
                score_E = torch.stack(parts).sum(0)
                if not score_E.isfinite().all():
                    raise UpcyclingError(
                        f"{metric} of layer {layer} is not finite: {score_E.tolist()}. The weights "
                        "or gradients overflow: load the model in bfloat16 or float32."
                    )
                found[metric][layer] = score_E.tolist()
        return found


def matrices(name: str, packed: Tensor) -> list[Tensor]:
    """The matrices, or biases, of all experts in one parameter: gate and up, or one alone."""
    fused = name.endswith(("gate_up_proj", "gate_up_proj_bias"))
    return list(packed.chunk(2, dim=1)) if fused else [packed]


@torch.no_grad()
def weight_norms(name: str, parameter: Tensor) -> Tensor:
    """Norm of each matrix [matrices, E]."""
    return torch.stack(
        [whole(_per_expert(_squares, part)).sqrt() for part in matrices(name, parameter.detach())]
    )


def _per_expert(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of [E, ...] that gives [E], on a few experts at a time."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensors[0], DTensor):  # each process has its part only
        return function(*tensors)
    step = max(1, _ELEMENTS // max(1, tensors[0][0].numel()))
    parts = zip(*(tensor.split(step) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def _squares(tensor: Tensor) -> Tensor:
    return tensor.float().square().sum(tuple(range(1, tensor.ndim)))


def _products(weight: Tensor, gradient: Tensor) -> Tensor:
    product = (weight.float() * gradient.float()).abs()
    return product.sum(tuple(range(1, product.ndim)))
