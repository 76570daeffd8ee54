"""What each router of an MoE sees on calibration text, and the rule it routes by.

From a live model by hooks, or from a folder with one expert in memory at a time: transformers' own
forward pass either way.

Shapes: N tokens, D hidden size, E experts, W sequences of T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.calibration import Sequences
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.evaluation import evaluating
from fusion_upcycle.expansion.routing import RoutingRule, routing_rule
from fusion_upcycle.progress import progress_bar
from fusion_upcycle.training.routers import find_routers
from fusion_upcycle.verification.streamed_model import streamed_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Sequences of one forward pass.
_BATCH = 4


@dataclass(frozen=True)
class RouterInputs:
    """One layer.

    Attributes:
        weight_ED: router rows, as they are in the model.
        inputs_ND: what the router sees, float32.
        rule: how it routes.
    """

    weight_ED: Tensor
    inputs_ND: Tensor
    rule: RoutingRule


def live_router_inputs(
    model: "PreTrainedModel", sequences: Sequences, *, progress: bool = False
) -> dict[int, RouterInputs]:
    """MoE layer -> what its router sees, of a model on its own device; the result is on the CPU.

    Raises:
        UpcyclingError: a family that is not known, or token ids outside the vocabulary.
    """
    device = next(model.parameters()).device
    return _inputs(model, sequences, device, progress)


def folder_router_inputs(
    config: "PreTrainedConfig",
    source: TensorSource,
    sequences: Sequences,
    *,
    progress: bool = False,
) -> dict[int, RouterInputs]:
    """The same without loading the model, in float32: in memory are one FFN and the inputs.

    Args:
        config: of the MoE, with `architectures` set.
        source: its weights in the file layout.

    Raises:
        UpcyclingError: a family that is not known, or token ids outside the vocabulary.
    """
    model = streamed_model(config, source, moe_family(config.model_type), None, torch.float32)
    return _inputs(model, sequences, torch.device("cpu"), progress)


@torch.inference_mode()
def _inputs(
    model: "PreTrainedModel", sequences: Sequences, device: torch.device, progress: bool
) -> dict[int, RouterInputs]:
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    largest = max(int(ids.max()) for ids in sequences.ids.values())
    if largest >= vocabulary:
        raise UpcyclingError(
            f"The tokenizer gives token id {largest}, but the model has {vocabulary} embeddings: "
            "use the tokenizer that belongs to the model."
        )
    routers = find_routers(model)
    seen: dict[int, list[Tensor]] = {layer: [] for layer in routers.modules}
    held: dict[int, tuple[Tensor, Tensor | None]] = {}

    def hear(place: int, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(router: nn.Module, args: tuple[Any, ...]) -> None:
            seen[layer].append(args[0].flatten(0, -2).float().cpu())
            if layer not in held:  # here, as weights that are streamed are there only now
                biases = routers.selection_biases()
                bias_E = biases[place].detach().cpu().clone() if biases else None
                held[layer] = router.get_parameter("weight").detach().cpu().clone(), bias_E

        return keep

    # The output head is not looked at: one row of logits is the least it can make.
    causal = type(model).__name__.endswith("ForCausalLM")
    unneeded = {"logits_to_keep": 1} if causal else {}
    total = sum(len(ids) for ids in sequences.ids.values())
    with (
        ExitStack() as hooks,
        evaluating(model),
        progress_bar("Reading router inputs", total, progress, unit="sequence") as bar,
    ):
        hooks.callback(routers.close)
        for place, (layer, router) in enumerate(routers.modules.items()):
            hooks.callback(router.register_forward_pre_hook(hear(place, layer)).remove)
        for ids_BT in _batches(sequences):
            model(input_ids=ids_BT.to(device), use_cache=False, **unneeded)
            bar.update(len(ids_BT))
    return {
        layer: RouterInputs(
            held[layer][0],
            torch.cat(seen.pop(layer)),
            routing_rule(model.config, held[layer][1]),
        )
        for layer in list(seen)
    }


def _batches(sequences: Sequences) -> Iterator[Tensor]:
    for ids_WT in sequences.ids.values():
        yield from ids_WT.split(_BATCH)
