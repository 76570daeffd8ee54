"""What training takes of each GPU's memory, from a config: to plan before renting.

Weights, gradients and AdamW's moments are in float32, arithmetic is in bfloat16
(`precision=bf16-mixed`), and all parameters are trained: 16 bytes for each, which is exact. What
comes and goes is counted as FSDP2 does it, see `Memory`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fusion_upcycle.architectures import known_family
from fusion_upcycle.architectures.layout import built
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.activations import Activations, trace_activations
from fusion_upcycle.training.part_layout import packed_experts, plan_layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FLOAT32, _BFLOAT16 = 4, 2
#: Of a GPU's memory: the rest is CUDA's, NCCL's, and lost in fragments.
USABLE = 0.9
NODE = 8
_MOST = 4096


@dataclass(frozen=True)
class Way:
    """How a model is spread over GPUs: options of `train`.

    Attributes:
        strategy: `ddp` or `fsdp`.
        expert_parallel: 1 but for `fsdp`.
    """

    strategy: str
    expert_parallel: int = 1

    def __str__(self) -> str:
        among = f" expert_parallel={self.expert_parallel}" if self.expert_parallel > 1 else ""
        return f"strategy={self.strategy}{among}"


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that has most.

    Attributes:
        parameters: that are its own, a number.
        transient: of `ddp` autocast's copies of the weights, in bfloat16, and the buckets in which
            gradients are summed, in float32. Of `fsdp` what is gathered, in bfloat16: what is
            outside of the layers all the time; the largest layer and the next one; and in the
            backward pass the layer's gradients, and those that two layers send, in float32 [a layer
            waits for the one before it].
        activations: of a micro-batch.
        checkpointed: likewise, with `activation_checkpointing`.
    """

    parameters: int
    transient: int
    activations: int
    checkpointed: int

    @property
    def weights(self) -> int:
        """As much are the gradients, and each of AdamW's two moments."""
        return _FLOAT32 * self.parameters

    def total(self, *, checkpointing: bool) -> int:
        activations = self.checkpointed if checkpointing else self.activations
        return 4 * self.weights + self.transient + activations

    def fits(self, gpu_bytes: int, *, checkpointing: bool) -> bool:
        return self.total(checkpointing=checkpointing) <= USABLE * gpu_bytes


class Planner:
    """Memory of one model's training on any number of GPUs.

    Args:
        config: of a decoder, dense or MoE, with its class in `architectures`.
        sequences: of a micro-batch, on each GPU.
        context_length: tokens of a sequence.

    Raises:
        UpcyclingError: a class that cannot be built from the config, or run without data.
    """

    def __init__(self, config: "PreTrainedConfig", sequences: int, context_length: int):
        self._config, self._sequences, self._length = config, sequences, context_length
        model = built(config)
        experts = packed_experts(model, known_family(config.get_text_config()))
        self.num_experts = experts[0].shape[0] if experts else 0
        packed = {id(parameter) for parameter in experts}
        kinds = set(model._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        inside = [list(layer.parameters()) for layer in layers]
        #: Of each layer: parameters of its experts, and of the rest.
        self._layers = [
            (
                sum(p.numel() for p in parameters if id(p) in packed),
                sum(p.numel() for p in parameters if id(p) not in packed),
            )
            for parameters in inside
        ]
        self.parameters = sum(p.numel() for p in model.parameters())
        self._outside = self.parameters - sum(map(sum, self._layers))
        self._experts = sum(p.numel() for p in experts)
        #: Of what is cut on its first axis, in parts that may be uneven: rows, and their length.
        self._rows = [
            (p.shape[0] if p.ndim else 1, p.numel() // p.shape[0] if p.ndim else 1)
            for p in model.parameters()
            if id(p) not in packed
        ]

    @cached_property
    def _activations(self) -> Activations:
        return trace_activations(self._config, self._sequences, self._length)

    def ways(self, gpus: int) -> list[Way]:
        """What can be tried: experts are dealt out within a node.

        `ddp` is for dense models: autocast would leave grouped_mm of experts in float32, so that
        training refuses it.
        """
        sizes = range(2, min(NODE, gpus, self.num_experts) + 1)
        dealt = [n for n in sizes if self.num_experts % n == 0 and gpus % n == 0]
        whole = [] if self.num_experts else [Way("ddp")]
        return [*whole, Way("fsdp"), *(Way("fsdp", n) for n in dealt)]

    def memory(self, gpus: int, way: Way) -> Memory:
        """Of each GPU.

        Raises:
            UpcyclingError: experts that cannot be divided among so many GPUs; names numbers that
                can.
        """
        if way.strategy == "fsdp":
            plan_layout(self._config, gpus, way.expert_parallel)
        return self._memory(gpus, way)

    def smallest(self, way: Way, gpu_bytes: int, *, checkpointing: bool) -> int | None:
        """The smallest number of GPUs that fits, whole nodes of 8 above 8; None up to 4096."""
        for gpus in (1, 2, 4, *range(NODE, _MOST + 1, NODE)):
            fits = self._memory(gpus, way).fits(gpu_bytes, checkpointing=checkpointing)
            if fits and gpus % way.expert_parallel == 0:
                try:
                    self.memory(gpus, way)
                except UpcyclingError:  # a number that does not divide the experts
                    continue
                return gpus
        return None

    def _memory(self, gpus: int, way: Way) -> Memory:
        kept = self._activations
        activations = [kept.peak(checkpointing=again) for again in (False, True)]
        if way.strategy == "ddp":
            each = _BFLOAT16 + (_FLOAT32 if gpus > 1 else 0)
            return Memory(self.parameters, each * self.parameters, *activations)
        rest = sum(-(-rows // gpus) * length for rows, length in self._rows)
        layer = max(experts // way.expert_parallel + other for experts, other in self._layers)
        gathered = (self._outside + 2 * layer) * _BFLOAT16
        gradients = layer * (_BFLOAT16 + 2 * _FLOAT32)
        return Memory(self._experts // gpus + rest, gathered + gradients, *activations)
