"""Which part of a model each process holds, decided from the config alone.

Experts are packed, [E, 2F, D] and [E, D, F]. transformers shards them on E, so that with more
processes than experts some would hold none: the last axis is taken then. The middle one must never
be: transformers would cut the matrices of gate and up before it joins them, and fill them wrong in
silence.

Shapes: E experts, F neurons of an expert, D hidden size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures import known_family
from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import built, class_name
from fusion_upcycle.errors import UpcyclingError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Which part of a model each process holds.

    Attributes:
        processes: that train, each on examples of its own.
        expert_parallel: processes among which the experts of a layer are dealt out; 1 shards them
            as all other weights.
        axis: on which packed experts are sharded among the processes that have the same ones.
    """

    processes: int
    expert_parallel: int = 1
    axis: int = 0


def plan_layout(config: "PreTrainedConfig", processes: int, expert_parallel: int = 1) -> Layout:
    """Decide it from the config alone.

    Args:
        config: of the model, with its class in `architectures`.

    Raises:
        UpcyclingError: numbers that do not fit the model; names some that do.
    """
    model = built(config)
    packed = packed_experts(model, known_family(config.get_text_config()))
    if not packed:
        if expert_parallel > 1:
            raise UpcyclingError(
                f"expert_parallel={expert_parallel}: {class_name(config)} has no experts. Pass "
                f"{setting('expert_parallel', 1)}."
            )
        return Layout(processes)
    if expert_parallel > 1 and not model.ep_plan:
        raise UpcyclingError(
            f"expert_parallel={expert_parallel}: {class_name(config)} is a class of ours, which "
            f"transformers cannot run so. Pass {setting('expert_parallel', 1)}: "
            f"{setting('strategy', 'fsdp')} shards its experts all the same."
        )
    num_experts = packed[0].shape[0]
    widths = sorted({matrix.shape[-1] for matrix in packed if matrix.ndim == 3})
    if any(bias.ndim < 3 for bias in packed):
        widths = []  # which have no such axis, and are cut like the matrices
    if processes % expert_parallel or num_experts % expert_parallel:
        fit = [n for n in range(1, num_experts + 1) if num_experts % n == 0 and processes % n == 0]
        raise UpcyclingError(
            f"expert_parallel={expert_parallel} must divide both the {processes} processes and the "
            f"{num_experts} experts of a layer: {_either(fit)}."
        )
    axis = _axis(processes, expert_parallel, num_experts, widths)
    if axis is None:
        fit = [
            n
            for n in range(expert_parallel, 2 * processes + 1, expert_parallel)
            if _axis(n, expert_parallel, num_experts, widths) is not None
        ]
        raise UpcyclingError(
            f"The {num_experts} experts of a layer, with "
            + (f"matrices {' and '.join(map(str, widths))} wide" if widths else "biases")
            + f", cannot be divided evenly among {processes} processes"
            + (f" in groups of expert_parallel={expert_parallel}" if expert_parallel > 1 else "")
            + f". Start {_either(fit)} processes."
        )
    return Layout(processes, expert_parallel, axis)


def _axis(processes: int, expert_parallel: int, num_experts: int, widths: list[int]) -> int | None:
    """On which axis a layer's experts can be divided evenly; None where they cannot."""
    sharing = processes // expert_parallel  # that have the same experts
    # With both on the first axis, a process's part would not be one piece of the tensor.
    if expert_parallel == 1 and num_experts % sharing == 0:
        return 0
    return 2 if widths and all(width % sharing == 0 for width in widths) else None


def _either(numbers: list[int]) -> str:
    *first, last = map(str, numbers[-8:])
    return f"{', '.join(first)} or {last}" if first else last


def packed_experts(model: "PreTrainedModel", architecture: Architecture | None) -> list[Any]:
    """The parameters that hold what all experts of a layer have, [E, ...]; none if dense."""
    if architecture is None:
        return []
    modules = architecture.layer_modules(model, architecture.experts_module).values()
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]
