"""Texts of several domains as windows of tokens, each from one document of one domain."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.texts.tokens import CHARACTERS_PER_TOKEN, encode, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Units of one domain: more documents or windows than this are dealt out to so many groups.
UNITS = 256
#: With fewer documents in a domain, their labels have too few permutations to test anything.
FEWEST_DOCUMENTS = 5


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document.

    Attributes:
        document: its index in the domain.
        ids: tokens.
        context: how many of the first ones are context only: the separator that begins a document.
    """

    document: int
    ids: list[int]
    context: int

    @property
    def counted(self) -> int:
        """Number of its tokens that are counted: all but the context."""
        return len(self.ids) - self.context


@dataclass(frozen=True)
class Batch:
    """Windows of one domain, padded on the right to the same length.

    With causal attention padding changes nothing before it, so that no mask is needed there.

    Attributes:
        domain: its index.
        ids_BT: tokens.
        kept_BT: whether a token is no padding.
        counted_BT: whether a token is counted: neither padding nor separator.
        units_BT: the unit of each token.
    """

    domain: int
    ids_BT: Tensor
    kept_BT: Tensor
    counted_BT: Tensor
    units_BT: Tensor

    def part(self, starts_B: Tensor, lengths_B: Tensor) -> "Batch":
        """The tokens of each window from a start on, so many as given."""
        places_T = torch.arange(int(lengths_B.max()))
        kept = places_T < lengths_B[:, None]
        places = (starts_B[:, None] + places_T).clamp(max=self.ids_BT.shape[1] - 1)

        def take(tensor_BT: Tensor) -> Tensor:
            return tensor_BT.gather(1, places) * kept

        return Batch(
            self.domain, take(self.ids_BT), kept, take(self.counted_BT), take(self.units_BT)
        )


@dataclass(frozen=True)
class DomainWindows:
    """The windows of every domain.

    A unit is what a domain label belongs to when labels are permuted. Tokens of a document depend
    on each other, so it is a document; where a domain has fewer than `FEWEST_DOCUMENTS` it is a
    window, and the test then speaks of these texts only, not of texts like them.

    Attributes:
        windows: domain -> windows.
        unit: `document` or `window`.
    """

    windows: Mapping[str, Sequence[Window]]
    unit: Literal["document", "window"]

    def documents(self, domain: str) -> int:
        """How many documents of the domain are used."""
        return len({window.document for window in self.windows[domain]})

    def tokens(self, domain: str) -> int:
        """How many tokens of the domain are counted."""
        return sum(window.counted for window in self.windows[domain])

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(max(window.ids) for found in self.windows.values() for window in found)

    def batches(self, size: int) -> Iterator[Batch]:
        """All windows, domain by domain, `size` at a time."""
        for domain, windows in enumerate(self.windows.values()):
            # Windows of like length together, so that little is padded.
            numbered = sorted(enumerate(windows), key=lambda pair: -len(pair[1].ids))
            for start in range(0, len(numbered), size):
                yield self._batch(domain, numbered[start : start + size])

    def _batch(self, domain: int, numbered: Sequence[tuple[int, Window]]) -> Batch:
        shape = (len(numbered), len(numbered[0][1].ids))
        ids, counted = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        kept, units = torch.zeros_like(counted), torch.zeros(shape, dtype=torch.int64)
        for row, (number, window) in enumerate(numbered):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            kept[row, : len(window.ids)] = True
            counted[row, window.context : len(window.ids)] = True
            units[row] = (window.document if self.unit == "document" else number) % UNITS
        return Batch(domain, ids, kept, counted, units)


def domain_windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Mapping[str, Sequence[str]],
    *,
    tokens: int,
    length: int,
    started: bool = True,
) -> DomainWindows:
    """Cut the texts: the first window of each document, then the second of each, and so on.

    Args:
        texts: domain -> documents.
        tokens: of each domain at most; a shorter text gives all it has.
        length: tokens of a window; the last one of a document is shorter.
        started: whether a document begins with the tokenizer's start token, if it has one.

    Raises:
        UpcyclingError: no domain, a domain without tokens, or fewer than one token asked for.
    """
    if tokens < 1:
        raise UpcyclingError(f"tokens={tokens} of each domain must be 1 or more.")
    if not texts:
        raise UpcyclingError("There is no text: name at least one domain, as NAME=FILE.")
    windows = {}
    for domain, documents in texts.items():
        if isinstance(documents, str):
            raise UpcyclingError(f"The text of {domain} is one string: give a list of documents.")
        windows[domain] = list(_spread(tokenizer, documents, tokens, length, started))
        if not windows[domain]:
            raise UpcyclingError(
                f"The text of {domain} has no tokens: its documents are empty. Give more text, or "
                "leave the domain out."
            )
    many = all(len({w.document for w in found}) >= FEWEST_DOCUMENTS for found in windows.values())
    return DomainWindows(windows, "document" if many else "window")


def _spread(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str],
    tokens: int,
    length: int,
    started: bool,
) -> Iterator[Window]:
    start = start_token(tokenizer) if started else None
    before = [] if start is None else [start]
    # Each document in turn; those that have more come round again.
    waiting: list[tuple[int, list[int] | None, int]] = [
        (index, None, 0) for index, document in enumerate(documents) if document
    ]
    while waiting:
        again: list[tuple[int, list[int] | None, int]] = []
        for index, ids, offset in waiting:
            if ids is None:
                beginning = documents[index][: tokens * CHARACTERS_PER_TOKEN]
                ids = before + encode(tokenizer, [beginning])[0]
            context = len(before) if offset == 0 else 0
            part = ids[offset : offset + min(length, context + tokens)]
            if len(part) > context:
                window = Window(index, part, context)
                yield window
                tokens -= window.counted
            if tokens <= 0:
                return
            if offset + length < len(ids):
                again.append((index, ids, offset + length))
        waiting = again
