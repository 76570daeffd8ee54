"""Options against the model: what does not fit is refused; what must change for training, changes.

Shapes: B windows, T tokens of a window.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_upcycle.architectures.layout import with_kept_dtypes
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.live.experts import find_experts
from fusion_upcycle.live.routers import Routers, find_routers
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Attention implementations that tell documents apart by their positions.
_BY_POSITION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


def check_fit(model: "PreTrainedModel", options: TrainingOptions, routers: Routers) -> None:
    """Refuse options that this model cannot honour, after freezing."""
    if options.bias_update_rate and not routers.selection_biases():
        raise UpcyclingError(
            f"bias_update_rate={options.bias_update_rate}: {model.config.model_type} has no "
            "selection bias that loss-free balancing could move. Pass "
            f"{setting('bias_update_rate', 0)}; {setting('balance_weight')} works for every family."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UpcyclingError(
            f"freeze={list(options.freeze)} leaves no parameter of this "
            f"{model.config.model_type} model to train. Leave one group out."
        )
    implementation = getattr(model.config, "_experts_implementation", None)
    autocast = options.precision == "bf16-mixed" and options.strategy != "fsdp"
    if autocast and implementation == "grouped_mm" and find_experts(model, routers):
        raise UpcyclingError(
            f"precision=bf16-mixed with strategy={options.strategy}: autocast leaves experts of "
            f"{implementation} in float32. Pass {setting('strategy', 'fsdp')}, which casts them, "
            f"on one device too; or {setting('experts_implementation', 'eager')}, or "
            f"{setting('precision', '32-true')}."
        )
    if options.attention == "document":
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        used = model.config._attn_implementation
        if kinds - {"full_attention", "sliding_attention"} or used not in _BY_POSITION:
            raise UpcyclingError(
                f"attention=document: {model.config.model_type} with {used} attention"
                f"{' and layers of ' + ', '.join(sorted(kinds)) if kinds else ''} cannot keep "
                f"documents of a window apart. Use {setting('attention', 'causal')}, or a model "
                f"with full attention and one of {', '.join(_BY_POSITION)}."
            )


def document_positions(ids_BT: Tensor, separator: int) -> Tensor:
    """Positions that start again at each separator, by which transformers tells documents apart."""
    places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    starts_BT = torch.where(ids_BT == separator, places_BT, 0).cummax(1).values
    return places_BT - starts_BT


@dataclass(frozen=True)
class Before:
    """What training changes of a model besides its values.

    Attributes:
        dtypes: live name -> dtype of a tensor; of a part of a model those of its files.
        trained: name -> whether a parameter requires gradients.
    """

    dtypes: dict[str, torch.dtype]
    trained: dict[str, bool]

    @classmethod
    def of(
        cls, model: "PreTrainedModel", in_files: dict[str, torch.dtype] | None = None
    ) -> "Before":
        dtypes = in_files or {name: t.dtype for name, t in model.state_dict().items()}
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        return cls(dtypes, trained)

    @property
    def dtype(self) -> torch.dtype:
        """That of the model."""
        return self.dtypes[next(iter(self.trained))]

    def restore(self, model: "PreTrainedModel", *, sharded: bool) -> None:
        """Make the trained model as it came, in evaluation mode; a part of one stays float32."""
        if not sharded:
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.data = tensor.data.to(self.dtypes[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trained[name])
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        model.eval()


def prepare(model: "PreTrainedModel", options: TrainingOptions, *, sharded: bool = False) -> None:
    """Weights to float32, or for `bf16-true` to bfloat16 where transformers does not keep float32.

    Also sets activation checkpointing and the implementation of the experts.

    Args:
        sharded: a process's part, which was loaded in the right dtypes.

    Raises:
        UpcyclingError: an `experts_implementation` that the model does not have.
    """
    if not sharded:
        _cast(model, options)
    if options.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if options.experts_implementation is not None:
        try:
            model.set_experts_implementation(options.experts_implementation)
        except ValueError as error:
            raise UpcyclingError(
                f"experts_implementation={options.experts_implementation}: {error}"
            ) from error


def _cast(model: "PreTrainedModel", options: TrainingOptions) -> None:
    model.float()
    if options.precision == "bf16-true":
        routers = find_routers(model)
        routers.close()
        biases = [bias.data for bias in routers.selection_biases()]
        whole = {name: tensor.data for name, tensor in model.state_dict().items()}
        model.bfloat16()
        state = model.state_dict(keep_vars=True)  # whose buffers are others now
        for name, tensor in with_kept_dtypes(model).items():
            if tensor.dtype == torch.float32:
                state[name].data = whole[name]
        # In bfloat16 the steps that move them would be lost.
        for bias, exact in zip(routers.selection_biases(), biases, strict=True):
            bias.data = exact
