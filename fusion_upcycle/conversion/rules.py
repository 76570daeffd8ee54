"""The rules of a conversion: where each target tensor comes from."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Carried:
    """Rule: the source tensor of this name, bit for bit (cast where a dtype was asked for).

    Attributes:
        scale: the exactness scale of a `down_proj`: see the family's routing.
        start: first element in the source, where that is one tensor of several experts; only as a
            part of `Joined`.
    """

    source: str
    scale: float = 1.0
    start: int = 0


@dataclass(frozen=True)
class Initialised:
    """Rule: one matrix of the expert that the initialiser makes from its source expert."""

    layer: int
    expert: int
    part: str


@dataclass(frozen=True)
class Repeated:
    """Rule: one matrix of the dense FFN with its neurons repeated to `size`."""

    source: str
    part: str
    size: int
    scale: float = 1.0


@dataclass(frozen=True)
class RouterRows:
    """Rule: the router of a layer: fresh rows, or an extension of those of the source."""

    layer: int


@dataclass(frozen=True)
class HashTable:
    """Rule: the experts of each token id in a layer, drawn at random."""

    layer: int


@dataclass(frozen=True)
class SelectionBias:
    """Rule: the selection bias of a layer's router, extended."""

    layer: int


@dataclass(frozen=True)
class Zeros:
    """Rule: nothing from the source; a gate, bias or output that starts at zero."""


@dataclass(frozen=True)
class Joined:
    """Rule: what these rules make, one after the other, in one tensor.

    Attributes:
        rules: of the parts, which have the same number of elements.
    """

    rules: Sequence["Rule"]


Rule = Carried | Initialised | Repeated | RouterRows | HashTable | SelectionBias | Zeros | Joined
