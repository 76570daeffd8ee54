"""Run a model without loading it: weights are read when a module runs, and dropped after.

Both models of a proof run in transformers' own classes and forward code; only the weights of the
module at work are in memory, one expert at a time in MoE layers. So the proof of a 100B model
needs the memory of one FFN. Computation is float32 (float64 for float64 checkpoints): rounding of
bfloat16 arithmetic would hide what the proof looks for.
"""

import copy
import ctypes
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_upcycle.architectures.base import Architecture, LiveSlot
from fusion_upcycle.architectures.layout import (
    class_name,
    empty_model,
    model_class,
    tied_names,
)
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, TensorSource
from fusion_upcycle.models.modeling_sparse import SparseExperts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Name in the files and first element -> what was proven to stand there; see `Conversion.origin`.
Origin = Callable[[str, int], Hashable]


def streamed_model(
    config: "PreTrainedConfig",
    source: TensorSource,
    architecture: Architecture | None,
    dtype: torch.dtype | None,
    compute_dtype: torch.dtype,
    *,
    expert: int | None = None,
    origin: Origin | None = None,
) -> "PreTrainedModel":
    """transformers' own model of `config` whose weights stay in `source`.

    Args:
        config: with `architectures` set.
        source: the weights, in the file layout of `architecture` (None for a dense model).
        dtype: that the weights would be cast to before use; None as they are.
        compute_dtype: of the forward pass.
        expert: let this expert of each layer do what every chosen one should: the router's weights
            stay, its choice does not count.
    """
    config = copy.deepcopy(config)
    sdpa = model_class(class_name(config))._supports_sdpa
    config._attn_implementation = "sdpa" if sdpa else "eager"
    config._experts_implementation = "eager"
    weights = _Weights(source, dtype, compute_dtype)
    model = empty_model(config).eval()
    tied = tied_names(model)

    def file_name(live: str) -> str:
        own = architecture.file_name(live) if architecture else live
        if own in source.specs or live not in tied:  # a T5 may have a head of its own, tied or not
            return own
        return file_name(tied[live])

    router = architecture and architecture.live_router_name.removesuffix(".weight")
    single: nn.Module | None = None
    read: set[int] = set()
    for name, module in list(model.named_modules()):
        if architecture and name.endswith("." + architecture.experts_module):
            prefix = architecture.file_prefix(name.removesuffix(architecture.experts_module))
            single = _single_expert(module, single, config, architecture, compute_dtype)
            streamed = _StreamedExperts(
                single, config, architecture, prefix, weights, expert=expert, origin=origin
            )
            model.set_submodule(name, streamed)
        elif router and name.endswith("." + router):  # its weight is looked at from outside
            read.add(id(module))
        elif isinstance(module, nn.MultiheadAttention):  # looks into its output projection itself
            read |= {id(inner) for inner in module.modules()}
        elif id(module) not in read and type(module).forward is nn.Embedding.forward:
            table = file_name(f"{name}.weight")
            module.forward = _reading(_embed, table, weights)
            module.streamed = True
        elif id(module) not in read and type(module).forward is nn.Linear.forward:
            names = {p: file_name(f"{name}.{p}") for p, _ in module.named_parameters()}
            module.forward = _reading(_linear, (names, module.weight.shape), weights)
            module.streamed = True

    def pieces(live: str) -> Sequence[LiveSlot]:
        inside = architecture.pieces(live) if architecture else []
        return inside or [(file_name(live), ())]

    layers = _blocks(model)
    outside = {*model.modules()}.difference(*(layer.modules() for layer in layers))
    for owner, modules in [(model, outside), *((layer, {*layer.modules()}) for layer in layers)]:
        small = _Small(model, modules, pieces, weights)
        owner.register_forward_pre_hook(lambda *_, small=small: small.load())
        owner.register_forward_hook(lambda *_, small=small: small.drop())
    model.streamed_dtype = compute_dtype
    model.small_ones = lambda modules: _Small(model, modules, pieces, weights)
    return model


@contextmanager
def holding(model: "PreTrainedModel", module: nn.Module) -> Iterator[None]:
    """Within the block, a part of a streamed model can be run by itself."""
    small: _Small = cast("Any", model).small_ones({*module.modules()})
    small.load()
    try:
        yield
    finally:
        small.drop()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, of each of its stacks: elements of the outermost module lists."""
    found: list[nn.Module] = []
    for child in model.children():
        found += child if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


class _Weights:
    """Weights as the forward pass wants them: cast to the checkpoint's dtype, then to compute."""

    def __init__(self, source: TensorSource, dtype: torch.dtype | None, compute_dtype: torch.dtype):
        self.source, self.dtype, self.compute_dtype = source, dtype, compute_dtype
        self._place = torch.empty(0, dtype=compute_dtype)

    def cast(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():  # the table of hash routing
            return tensor
        return tensor.to(self.dtype or tensor.dtype).to(self.compute_dtype)

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """Flat cast pieces of this size, but for the last; each takes the place of the one before.

        One place for all tensors: new ones fragment the heap.
        """
        if self._place.numel() < elements:
            self._place = torch.empty(max(CHUNK_ELEMENTS, elements), dtype=self.compute_dtype)
        filled = 0
        for chunk in self.source.chunks(name):
            cuts = list(range(elements - filled, chunk.numel(), elements))
            for piece in chunk.tensor_split(cuts):
                self._place[filled : filled + piece.numel()] = piece.to(self.dtype or piece.dtype)
                filled += piece.numel()
                if filled == elements:
                    yield self._place[:elements]
                    filled = 0
        if filled:
            yield self._place[:filled]

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Some rows of a matrix, cast: only these are read."""
        width = self.source.specs[name].shape[1]
        wanted, places = ids.unique(return_inverse=True)
        chunks = (self.source.chunks(name, n * width, (n + 1) * width) for n in wanted.tolist())
        table = torch.cat([piece for row in chunks for piece in row]).view(-1, width)
        return self.cast(table)[places]

    def read_into(self, place: Tensor, name: str, start: int) -> None:
        """Read and cast a range of a tensor, piece by piece, into contiguous memory."""
        flat, filled = place.view(-1), 0
        for chunk in self.source.chunks(name, start, start + flat.numel()):
            flat[filled : filled + chunk.numel()] = chunk.to(self.dtype or chunk.dtype)
            filled += chunk.numel()
        assert filled == flat.numel(), (name, filled, flat.numel())

    @contextmanager
    def borrow(self, name: str) -> Iterator[Tensor]:
        """The raw tensor, a view of the source; its memory is given back at the end."""
        yield self.source.tensor(name)
        self.source.release([name])


def _reading(
    function: Callable[[Tensor, Any, "_Weights"], Tensor], names: Any, weights: "_Weights"
) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, names, weights)


class _Small:
    """The norms, routers, biases, ... of some modules: all that is not read when it is used.

    Held together, not module by module: some look into the parameters of their children.

    Args:
        pieces: live name -> names in the files, and where in the tensor each goes.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        modules: Collection[nn.Module],
        pieces: Callable[[str], Sequence[LiveSlot]],
        weights: "_Weights",
    ):
        self._weights = weights
        self._places: list[tuple[nn.Module, str, Sequence[LiveSlot]]] = []
        saved = model.state_dict()  # parameters and those buffers that are in files
        for name, module in model.named_modules():
            if module in modules and not hasattr(module, "streamed"):
                own = (*module._parameters, *module._buffers)
                full = {a: f"{name}.{a}" if name else a for a in own}
                self._places += [(module, a, pieces(n)) for a, n in full.items() if n in saved]

    def load(self) -> None:
        for module, attribute, pieces in self._places:
            _replace(module, attribute, self._read(getattr(module, attribute), pieces))

    def drop(self) -> None:
        for module, attribute, _ in self._places:
            _replace(module, attribute, getattr(module, attribute).to("meta"))
        _trim_heap()

    def _read(self, like: Tensor, pieces: Sequence[LiveSlot]) -> Tensor:
        (name, index), *more = pieces
        if not more and not index:
            with self._weights.borrow(name) as tensor:
                return self._weights.cast(tensor).clone()
        whole = torch.empty(like.shape, dtype=self._weights.compute_dtype)
        for name, index in pieces:
            with self._weights.borrow(name) as tensor:
                whole[index] = self._weights.cast(tensor)
        return whole


def _replace(module: nn.Module, attribute: str, value: Tensor) -> None:
    if attribute in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, attribute, value)


def _embed(ids: Tensor, name: str, weights: _Weights) -> Tensor:
    return weights.rows(name, ids)


def _linear(x: Tensor, named: tuple[Mapping[str, str], torch.Size], weights: _Weights) -> Tensor:
    """`F.linear`, a block of rows at a time: an output head can be larger than a layer."""
    names, (length, width) = named  # a source that is seen split knows no shape of the whole
    output = x.new_zeros(*x.shape[:-1], length)
    if length and width:  # shared experts may have none
        rows = max(1, CHUNK_ELEMENTS // width)
        blocks = weights.blocks(names["weight"], rows * width)
        for block, part in zip(blocks, output.split(rows, dim=-1), strict=True):
            part.copy_(F.linear(x, block.view(-1, width)))
    if "bias" in names:
        with weights.borrow(names["bias"]) as bias:
            output = output + weights.cast(bias)
    return output


def _single_expert(
    experts: nn.Module,
    last: nn.Module | None,
    config: "PreTrainedConfig",
    architecture: Architecture,
    dtype: torch.dtype,
) -> nn.Module:
    """A layer's experts with room for one, in memory that all layers use in turn.

    Args:
        last: that of another layer.
    """
    if isinstance(experts, SparseExperts):  # activations may have parameters of their layer
        for name, parameter in list(experts.named_parameters()):
            one = torch.empty(1, *parameter.shape[1:], dtype=dtype)
            memory = last.get_parameter(name) if last else nn.Parameter(one, requires_grad=False)
            setattr(experts, name, memory)
        return experts
    if last is not None:
        return last
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
        *,
        expert: int | None,
        origin: Origin | None,
    ):
        super().__init__()
        self._only = expert
        self.num_experts = getattr(config, architecture.experts_field)
        self._shared = (single,)  # a tuple, so that it is not one of this layer's modules
        self.weights = weights
        # Weights are cast into the memory of the last expert: new memory costs more than the sums.
        self._memory: dict[str, Tensor] = {}
        for part in architecture.parts:
            name, half = architecture.live_half(part)
            memory = single.get_parameter(name)[0]
            self._memory[part] = memory if half is None else memory.chunk(2)[half]
        #: For each expert, part -> name in the files and first element there.
        self._places = [
            {
                part: (prefix + place.name, place.start)
                for part, memory in self._memory.items()
                for place in [architecture.place(expert, part, memory.numel())]
            }
            for expert in range(self.num_experts)
        ]
        same: dict[Hashable, list[int]] = {}
        for number, places in enumerate(self._places):
            key = tuple(starmap(origin, places.values())) if origin else number
            same.setdefault(key, []).append(number)
        self._groups = [torch.tensor(numbers) for numbers in same.values()]

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        if self._only is not None:
            top_k_index = torch.full_like(top_k_index, self._only)
        (single,) = self._shared
        for group in self._groups:
            tokens, slots = torch.where(torch.isin(top_k_index, group))
            if len(tokens) == 0:
                continue
            for part, (name, start) in self._places[group[0]].items():
                self.weights.read_into(self._memory[part], name, start)
            index = torch.zeros_like(tokens)[:, None]
            found = single(hidden[tokens], index, top_k_weights[tokens, slots][:, None])
            output.index_add_(0, tokens, found)
        return output


def _trim_heap() -> None:
    """Give freed memory back: glibc would keep it between small objects, 2 MB a layer."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # not on macOS
        trim(0)
