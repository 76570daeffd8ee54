"""Run a model without loading it: weights are read when a module runs, and dropped after.

Both models of a proof run in transformers' own classes and forward code; only the weights of the
module at work are in memory, one expert at a time in MoE layers. So the proof of a 100B model
needs the memory of one FFN. Computation is float32 (float64 for float64 checkpoints): rounding of
bfloat16 arithmetic would hide what the proof looks for.
"""

import copy
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import empty_model
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource
from fusion_upcycle.experts import EXPERT_PARTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def streamed_model(
    config: "PreTrainedConfig",
    source: TensorSource,
    architecture: Architecture | None,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> "PreTrainedModel":
    """transformers' own model of `config` whose weights stay in `source`.

    Args:
        config: with `architectures` set.
        source: the weights, in the file layout of `architecture` (None for a dense model).
        dtype: that the weights have, or would be cast to, before use.
        compute_dtype: of the forward pass.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    weights = _Weights(source, dtype, compute_dtype)
    model = empty_model(config).eval()
    single: nn.Module | None = None
    for name, module in list(model.named_modules()):
        names = {p: f"{name}.{p}" if name else p for p, _ in module.named_parameters(recurse=False)}
        if architecture and name.endswith(architecture.experts_module):
            prefix = name.removesuffix(architecture.experts_module)
            single = single or _single_expert(module, config, architecture, compute_dtype)
            experts = _StreamedExperts(single, config, architecture, prefix, weights)
            model.set_submodule(name, experts)
        elif architecture and name.endswith(architecture.router_module):
            prefix = name.removesuffix(architecture.router_module)
            _stream(module, {"weight": prefix + architecture.router_name}, weights, model)
        elif names:
            _stream(module, names, weights, model)
    return model


class _Weights:
    """Weights as the forward pass wants them: cast to the checkpoint's dtype, then to compute."""

    def __init__(self, source: TensorSource, dtype: torch.dtype, compute_dtype: torch.dtype):
        self.source, self.dtype, self.compute_dtype = source, dtype, compute_dtype
        self._place = torch.empty(0, dtype=compute_dtype)

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).to(self.compute_dtype)

    def cast_block(self, block: Tensor) -> Tensor:
        """Cast into the one place that all blocks use in turn: new ones fragment the heap."""
        if self._place.numel() < block.numel():
            self._place = torch.empty(max(CHUNK_ELEMENTS, block.numel()), dtype=self.compute_dtype)
        return self._place[: block.numel()].view(block.shape).copy_(block.to(self.dtype))

    def read_into(self, place: Tensor, name: str) -> None:
        """Read and cast a whole tensor, piece by piece, into contiguous memory."""
        flat, filled = place.view(-1), 0
        for chunk in self.source.chunks(name):
            flat[filled : filled + chunk.numel()] = chunk.to(self.dtype)
            filled += chunk.numel()
        assert filled == flat.numel(), (name, filled, flat.numel())

    @contextmanager
    def borrow(self, name: str) -> Iterator[Tensor]:
        """The raw tensor, a view of the source; its memory is given back at the end."""
        yield self.source.tensor(name)
        self.source.release([name])


def _stream(
    module: nn.Module, names: dict[str, str], weights: _Weights, model: "PreTrainedModel"
) -> None:
    """Make `module` read its parameters (attribute -> tensor name) when it runs."""
    tied = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}
    names = {attribute: tied.get(name, name) for attribute, name in names.items()}
    if isinstance(module, nn.Embedding):
        module.forward = lambda ids: _embed(ids, names["weight"], weights)  # type: ignore[method-assign, assignment]
    elif isinstance(module, nn.Linear):
        module.forward = lambda x: _linear(x, names, weights)  # type: ignore[method-assign, assignment]
    else:  # small: norms and routers

        def load(module: nn.Module, args: Any) -> None:
            for attribute, name in names.items():
                with weights.borrow(name) as tensor:
                    value = weights.cast(tensor).clone()
                setattr(module, attribute, nn.Parameter(value, requires_grad=False))

        def unload(module: nn.Module, args: Any, output: Any) -> None:
            for attribute in names:
                empty = getattr(module, attribute).to("meta")
                setattr(module, attribute, nn.Parameter(empty, requires_grad=False))
            _trim_heap()  # here, because every layer has norms

        module.register_forward_pre_hook(load)
        module.register_forward_hook(unload)


def _embed(ids: Tensor, name: str, weights: _Weights) -> Tensor:
    with weights.borrow(name) as table:  # only the rows of these tokens are read
        return weights.cast(F.embedding(ids, table))


def _linear(x: Tensor, names: dict[str, str], weights: _Weights) -> Tensor:
    """`F.linear`, a block of rows at a time: an output head can be larger than a layer."""
    with weights.borrow(names["weight"]) as weight:
        rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
        output = x.new_empty(*x.shape[:-1], len(weight))
        for block, part in zip(weight.split(rows), output.split(rows, dim=-1), strict=True):
            part.copy_(F.linear(x, weights.cast_block(block)))
    if "bias" in names:
        with weights.borrow(names["bias"]) as bias:
            output = output + weights.cast(bias)
    return output


def _single_expert(
    experts: nn.Module, config: "PreTrainedConfig", architecture: Architecture, dtype: torch.dtype
) -> nn.Module:
    """The family's own experts class with room for one expert, which all layers use in turn."""
    single = copy.deepcopy(config)
    setattr(single, architecture.experts_field, 1)
    return type(experts)(single).to(dtype).requires_grad_(False)


class _StreamedExperts(nn.Module):
    """The experts of one layer, run one at a time through the family's own experts class."""

    def __init__(
        self,
        single: nn.Module,
        config: "PreTrainedConfig",
        architecture: Architecture,
        prefix: str,
        weights: _Weights,
    ):
        super().__init__()
        self.num_experts = getattr(config, architecture.experts_field)
        self.single = single
        self.names = {p: prefix + architecture.expert_names[p] for p in EXPERT_PARTS}
        self.weights = weights

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        # Weights are cast into the memory of the last expert: new memory costs more than the sums.
        gate_up, down = (self.single.get_parameter(n)[0] for n in ("gate_up_proj", "down_proj"))
        places = (*gate_up.chunk(2), down)
        for expert in range(self.num_experts):
            tokens, slots = torch.where(top_k_index == expert)
            if len(tokens) == 0:
                continue
            for part, place in zip(EXPERT_PARTS, places, strict=True):
                self.weights.read_into(place, self.names[part].format(expert=expert))
            index = torch.zeros_like(tokens)[:, None]
            found = self.single(hidden[tokens], index, top_k_weights[tokens, slots][:, None])
            output.index_add_(0, tokens, found)
        return output


def _trim_heap() -> None:
    """Give freed memory back: glibc would keep it between small objects, 2 MB a layer."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # not on macOS
        trim(0)
