"""What a model is trained to do: its data, what it is given, what it is to answer.

Shapes: B examples of a batch, T tokens of an example, V classes or words.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.live.sharing import ALONE, Share
from fusion_upcycle.training.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of labels: what is not to be answered. transformers' own number, and that of `cross_entropy`.
IGNORED = -100

#: What is read where a specification of a table says no split: the first that there is.
SPLITS = {"data": ("train",), "validation": ("validation", "test")}

#: Name -> tensor of all examples of a batch, B first.
Batch = dict[str, Tensor]


class Source(Protocol):
    """Examples of one name in `data`.

    Attributes:
        name: of the source.
        digest: changes with the examples.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int:
        """How many examples one pass takes."""
        ...

    def example(self, index: int, number: int) -> dict[str, Any]:
        """Example `index` of the source, as the run's example `number`, which seeds its draws."""
        ...

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        ...


class Objective(ABC):
    """One way to train a model; made for a run.

    Attributes:
        name: of the option `objective`.
        loss: what the logs call its loss, the mean cross-entropy of targets.
        unit: of the budget: `tokens` or `examples`.
        target: what a loss is per, in words.
        pipeline_tag: of the model card.
        scores: metrics of held-out examples that the log has.
    """

    name: ClassVar[str]
    loss: ClassVar[str]
    unit: ClassVar[str] = "examples"
    target: ClassVar[str] = "token"
    pipeline_tag: ClassVar[str | None] = None
    scores: ClassVar[Sequence[str]] = ("loss_nats_per_token",)
    _rights: ClassVar[bool] = False  # whether accuracy is scored

    def __init__(self, model: "PreTrainedModel", processor: Any, options: TrainingOptions):
        self._processor, self._options = processor, options
        self._batch_size = options.micro_batch_size or options.batch_size
        self._held_out: dict[str, Any] = {}

    @classmethod
    @abstractmethod
    def fits(cls, model: "PreTrainedModel") -> bool:
        """Whether the model is of the kind that this objective trains."""

    # --- data -------------------------------------------------------------------------------------

    def read(self, data: Mapping[str, Any], cache: Path) -> Sequence[Source]:
        """The sources of `data`, each checked against the model.

        Args:
            cache: folder for what is made of them once.

        Raises:
            UpcyclingError: what cannot be used, by name.
        """
        if not data:
            raise UpcyclingError("data is empty: name at least one source, {name: file}.")
        return self._read(_named(data, "data"), "data", cache)

    def hold_out(self, validation: Mapping[str, Any] | None, cache: Path) -> None:
        """Read what `score` is to score.

        Raises:
            UpcyclingError: as `read`.
        """
        given = _named(validation or {}, "validation")
        sources = self._read(given, "validation", cache) if given else ()
        self._held_out = {source.name: source for source in sources}

    @abstractmethod
    def _read(self, data: Mapping[str, Any], where: str, cache: Path) -> Sequence[Source]:
        """The sources of a mapping that errors call `where`."""

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Examples as a batch."""
        return default_collate(list(examples))

    # --- one forward pass -------------------------------------------------------------------------

    @abstractmethod
    def inputs(self, model: "PreTrainedModel", batch: Batch) -> dict[str, Any]:
        """What the model is given."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """Classes that the logits are to name, `IGNORED` where there is none."""

    def logits(self, output: Any, batch: Batch) -> Tensor:
        """Of the targets, [..., V]."""
        return output.logits

    def counted(self, batch: Batch) -> int:
        """How many targets count."""
        return self.targets(batch).numel()

    def kept(self, batch: Batch) -> dict[str, Tensor]:
        """Stack of layers -> what of its tokens is no padding, [B, T]; stacks without have none."""
        return {}

    # --- held out ---------------------------------------------------------------------------------

    @property
    def held_out(self) -> Sequence[str]:
        """Names of what is held out."""
        return list(self._held_out)

    @torch.inference_mode()
    def score(self, model: "PreTrainedModel", name: str, share: Share = ALONE) -> dict[str, Any]:
        """Loss, and accuracy of classifiers, over all examples of what is held out.

        Args:
            share: of the batches, among processes that all call this; all get all numbers.

        Returns:
            `loss_nats_per_token`, or `_image`; `accuracy`; `targets` that were counted.
        """
        source, device = self._held_out[name], next(model.parameters()).device
        every, size = range(len(source)), self._batch_size
        found: dict[int, tuple[float, int, int]] = {}
        with evaluating(model):
            for number in share.of(-(-len(source) // size)):
                chosen = every[number * size : (number + 1) * size]
                batch = self.collate([source.example(index, index) for index in chosen])
                batch = {key: tensor.to(device) for key, tensor in batch.items()}
                logits = self.logits(model(**self.inputs(model, batch)), batch)
                logits, targets = logits.flatten(0, -2).float(), self.targets(batch).flatten()
                losses = cross_entropy(logits, targets, reduction="none")
                right = int((logits.argmax(-1) == targets).sum())
                found[number] = (float(losses.double().sum()), right, self.counted(batch))
        nats, right, counted = (sum(part) for part in zip(*share.gathered(found), strict=True))
        accuracy = {"accuracy": right / counted} if self._rights else {}
        loss = {f"loss_nats_per_{self.target}": nats / counted}
        return {**accuracy, **loss, f"{self.target}s": counted}


def is_one_of(model: "PreTrainedModel", mapping: str) -> bool:
    """Whether transformers has the model's class, or that which ours is made of, in a mapping."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for found in getattr(modeling_auto, mapping).values():
        names.update([found] if isinstance(found, str) else found)
    return not names.isdisjoint(kind.__name__ for kind in type(model).__mro__)


def _named(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UpcyclingError(f"{where}={data!r} must be a mapping, {{name: ...}}.")
    return {str(name): given for name, given in data.items()}


def require_tokenizer(processor: Any, objective: str) -> None:
    """Refuse an image processor, or none, where texts are to be read.

    Raises:
        UpcyclingError: it is no tokenizer.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(processor, PreTrainedTokenizerBase):
        raise UpcyclingError(
            f"objective={objective} needs the model's tokenizer, and was given "
            f"{'none' if processor is None else f'a {type(processor).__name__}'}."
        )


def split(batch: Batch, size: int) -> list[Batch]:
    """Parts of a batch of `size` examples each."""
    parts = {name: tensor.split(size) for name, tensor in batch.items()}
    number = len(next(iter(parts.values())))
    return [{name: part[index] for name, part in parts.items()} for index in range(number)]
