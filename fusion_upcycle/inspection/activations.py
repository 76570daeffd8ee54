"""What a training step keeps for its backward pass: by running the model's own class on nothing.

PyTorch's fake tensors have shapes and no data, so that a model of 146B parameters runs in seconds
on any machine, from its config alone.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from fusion_upcycle.architectures.layout import class_name, model_class
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_BFLOAT16, _FLOAT32 = 2, 4
_FUSED = "fusion_upcycle_fused"


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps on a device, in bfloat16 arithmetic.

    Attributes:
        layers: of each decoder layer, between its input and its output.
        inputs: of each layer: the hidden state that it is given.
        ends: of what is before and behind the layers, logits and their float32 copy among it.
        logits: of the logits alone.
    """

    layers: tuple[int, ...]
    inputs: int
    ends: int
    logits: int

    def peak(self, *, checkpointing: bool) -> int:
        """The most at one time, with the gradients that are on their way.

        That is when the loss is known, with the gradients of the logits in float32 and bfloat16;
        with checkpointing that, or a layer that has been computed again, with gradients as large
        as what it kept.
        """
        kept = self.inputs * len(self.layers) if checkpointing else sum(self.layers)
        loss = self.ends + self.logits * (_FLOAT32 + _BFLOAT16) // _BFLOAT16
        layer = max(self.layers) * (2 if checkpointing else 1)
        return kept + max(loss, layer)


def trace_activations(
    config: "PreTrainedConfig", sequences: int, context_length: int
) -> Activations:
    """Run the forward pass and the loss of a micro-batch in bfloat16, without data.

    Attention is PyTorch's fused one, which keeps no scores, and experts are `grouped_mm`.

    Args:
        config: of a decoder, with its class in `architectures`.
        sequences: of the micro-batch.

    Raises:
        UpcyclingError: a class that cannot run so.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    name = class_name(config)
    ids = (sequences, context_length)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _register()
            model: PreTrainedModel = model_class(name)._from_config(
                config, dtype=torch.bfloat16, attn_implementation=_FUSED
            )
            return _traced(model.train(), torch.zeros(ids, dtype=torch.long))
    except UpcyclingError:
        raise
    except Exception as error:  # whatever the class does that needs data
        raise UpcyclingError(
            f"What {name} keeps for the backward pass cannot be told without running it: "
            f"{error!r}. Memory is planned for decoders of transformers."
        ) from error


def _traced(model: "PreTrainedModel", ids_BT: Tensor) -> Activations:
    kept: dict[int, Any] = {}
    weights = {_storage(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    marks: list[int] = []
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if (key := _storage(tensor)) not in weights:
            kept[key] = tensor.untyped_storage()  # held, so that no other takes its place
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    def before(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = given[0] if given else named["hidden_states"]
        sizes.append(hidden.numel() * hidden.element_size())
        marks.append(total())

    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    for layer in layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=ids_BT, use_cache=False).logits
        marks.append(total())
        cross_entropy(logits.flatten(0, -2).float(), ids_BT.flatten())
    each = tuple(end - start for start, end in pairwise(marks))
    ends = total() - sum(each)
    return Activations(each, max(sizes), ends, logits.numel() * logits.element_size())


def _register() -> None:
    """Name `_attention` to transformers, and that it needs no mask."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_FUSED, _attention)
    AttentionMaskInterface.register(_FUSED, lambda *_, **__: None)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> Any:
    """`sdpa` as it runs where there is data: causal by a flag, which it only takes without a mask.

    Values that are narrower than keys (DeepSeek's) are made as wide: the kernel for the CPU, which
    stands for those of GPUs, would keep the scores.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wider = pad(value, (0, query.shape[-1] - value.shape[-1]))
    output, _ = sdpa_attention_forward(module, query, key, wider, None, **options)
    return output[..., : value.shape[-1]], None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
