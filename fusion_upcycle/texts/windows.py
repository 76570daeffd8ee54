"""Calibration text as sequences of equal length: what a model is run on to learn about its parts.

Shapes: W sequences, T tokens of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle.errors import UpcyclingError

#: Characters that surely hold a sequence's tokens.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Sequences:
    """Sequences of calibration text.

    Attributes:
        ids: name of the text -> token ids [W, T].
        tokenizer_sha256: of the tokenizer's file.
    """

    ids: Mapping[str, Tensor]
    tokenizer_sha256: str

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids.values())

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(int(ids.max()) for ids in self.ids.values())

    def to_json(self) -> dict[str, Any]:
        """What identifies them: shapes and digests."""
        return {
            "tokenizer_sha256": self.tokenizer_sha256,
            "texts": {
                name: {
                    "sequences": ids.shape[0],
                    "context_length": ids.shape[1],
                    "sha256": sha256(ids.numpy().tobytes()).hexdigest(),
                }
                for name, ids in self.ids.items()
            },
        }


def calibration_sequences(
    texts: Mapping[str, Sequence[str]],
    tokenizer_file: Path,
    *,
    tokens: int,
    context_length: int,
) -> Sequences:
    """Cut texts into sequences, spread evenly over each text, the same for the same arguments.

    Args:
        texts: name -> documents.
        tokenizer_file: the model's `tokenizer.json`.
        tokens: budget, divided evenly among the texts and rounded up to whole sequences; a shorter
            text gives all it has.
        context_length: T, tokens of a sequence.

    Raises:
        UpcyclingError: no text, a text shorter than one sequence, no tokenizer, or numbers below 1.
    """
    from tokenizers import Tokenizer

    for name, value in (("tokens", tokens), ("context_length", context_length)):
        if value < 1:
            raise UpcyclingError(f"{name}={value} of the calibration must be 1 or more.")
    if not texts:
        raise UpcyclingError("There is no calibration text: name at least one.")
    if not tokenizer_file.is_file():
        raise UpcyclingError(
            f"Calibration needs the model's tokenizer.json, and there is none at {tokenizer_file}. "
            "Put it into the model's folder."
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    count = -(-tokens // (context_length * len(texts)))
    ids = {
        name: _cut(tokenizer, documents, count, context_length, name)
        for name, documents in texts.items()
    }
    return Sequences(ids, sha256(tokenizer_file.read_bytes()).hexdigest())


def _cut(tokenizer: Any, documents: Sequence[str], count: int, length: int, name: str) -> Tensor:
    """[W, T]: the first sequence of each of some stretches of text, then the second of each, ..."""
    if isinstance(documents, str):
        raise UpcyclingError(f"The calibration text {name} is one string: give a list of them.")
    text = "\n\n".join(documents)
    span = length * _CHARACTERS_PER_TOKEN
    stretches = -(-len(text) // span)
    chosen = list(range(stretches))
    if stretches > count:  # no more is tokenised than is needed
        chosen = [i * stretches // count for i in range(count)]
    cut = []
    for index in chosen:
        part = text[index * span : (index + 1) * span]
        ids = tokenizer.encode(part, add_special_tokens=False).ids
        cut.append([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])
    deepest = max((len(sequences) for sequences in cut), default=0)
    found = [s[depth] for depth in range(deepest) for s in cut if depth < len(s)]
    if not found:
        raise UpcyclingError(
            f"The calibration text {name} has fewer than context_length={length} tokens, so that "
            "it does not fill one sequence. Give more text, or a shorter context_length."
        )
    return torch.tensor(found[:count])
