"""A model that is known by its config alone: names, dtypes and shapes, to plan and count with."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from fusion_upcycle.architectures.layout import class_name, file_layout
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class WeightlessSource:
    """The tensors that a checkpoint of this config holds, as a `TensorSource` that has no data."""

    has_data = False

    def __init__(self, config: "PreTrainedConfig"):
        self._name = class_name(config)
        layout = file_layout(config)
        self.specs = layout.specs
        # T5 1.1 has a head of its own. Its config says so by this alone: it calls all heads tied.
        if not getattr(config, "scale_decoder_outputs", True):
            self.specs |= {name: self.specs[layout.tied[name]] for name in ["lm_head.weight"]}

    def tensor(self, name: str) -> Tensor:
        self._refuse(name)

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        self._refuse(name)

    def release(self, names: Iterable[str]) -> None:
        """Nothing to give back."""

    def _refuse(self, name: str) -> NoReturn:
        raise UpcyclingError(
            f"Tensor {name} of this {self._name} cannot be read: only its config is known. It can "
            "be planned and counted; to convert it, give the folder of a checkpoint."
        )
