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

    def __init__(self, config: "PreTrainedConfig"):
        self._name = class_name(config)
        self.specs = file_layout(config).specs

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
