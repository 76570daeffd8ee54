"""Calibration text as sequences of equal length: what a model is run on to learn about its parts.

Shapes: W sequences, T tokens of each.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_upcycle.checkpoint.tokenizer_file import tokenizing
from fusion_upcycle.checks import require_whole
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.texts.tokens import CHARACTERS_PER_TOKEN, read_tokenizer
from fusion_upcycle.untrusted import LARGE, read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LENGTH = 1024


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


def sequence_length(asked: int | None, positions: int | None) -> int:
    """Tokens of a calibration sequence.

    Args:
        asked: None takes the default: 1024, or what positions the model has.
        positions: the longest input of the model; None where it has no limit.

    Raises:
        UpcyclingError: no whole number, below 2, or more than the model takes.
    """
    if asked is None:
        return min(_LENGTH, positions or _LENGTH)
    require_whole("context_length", asked, at_least=2)
    if positions is not None and asked > positions:
        raise UpcyclingError(
            f"context_length={asked} of the calibration must be from 2 to the model's {positions} "
            "positions."
        )
    return asked


def side_by_side(characters: int, span: int, count: int) -> list[int]:
    """Starts of stretches without a gap between them; of a longer text, `count` of these."""
    stretches = -(-characters // span)
    number = min(stretches, count)
    return [i * stretches // number * span for i in range(number)]


def calibration_sequences(
    texts: Mapping[str, Sequence[str]],
    tokenizer_file: Path | None,
    *,
    tokens: int,
    context_length: int,
    starts: Callable[[int, int, int], Sequence[int]] = side_by_side,
) -> Sequences:
    """Cut texts into sequences, spread evenly over each text, the same for the same arguments.

    Only stretches of a text are tokenised, each surely long enough for a sequence.

    Args:
        texts: name -> documents.
        tokenizer_file: the model's `tokenizer.json`.
        tokens: budget, divided evenly among the texts and rounded up to whole sequences; a shorter
            text gives all it has.
        context_length: T, tokens of a sequence.
        starts: (characters of a text, characters of a stretch, number of sequences) -> where in the
            text stretches begin, at most one for each sequence.

    Raises:
        UpcyclingError: no text, a text shorter than one sequence, no tokenizer that can be read, or
            numbers below 1.
    """
    for name, value in (("tokens", tokens), ("context_length", context_length)):
        if value < 1:
            raise UpcyclingError(f"{name}={value} of the calibration must be 1 or more.")
    if not texts:
        raise UpcyclingError("There is no calibration text: name at least one.")
    if tokenizer_file is None:
        raise UpcyclingError(
            "Calibration text needs the model's tokenizer.json, and there is none: name the folder "
            "that has it (tokenizer)."
        )
    if not tokenizer_file.is_file():
        folder = str(tokenizer_file.parent)
        code = (
            "from transformers import AutoTokenizer as T; "
            f"T.from_pretrained({folder!r}).save_pretrained({folder!r})"
        )
        raise UpcyclingError(
            "Calibration text needs the model's tokenizer.json, and there is none at "
            f"{tokenizer_file}: put it there, or have transformers make it of the one there is "
            f"(pip install sentencepiece): python -c {shlex.quote(code)}"
        )
    tokenizer = read_tokenizer(tokenizer_file)
    count = -(-tokens // (context_length * len(texts)))
    ids = {}
    for name, documents in texts.items():
        if isinstance(documents, str):
            raise UpcyclingError(f"The calibration text {name} is one string: give a list of them.")
        text = "\n\n".join(documents)
        span = context_length * CHARACTERS_PER_TOKEN
        stretches = [text[at : at + span] for at in starts(len(text), span, count)]
        with tokenizing(tokenizer_file):
            found = _cut(tokenizer, stretches, context_length)
        if not found:
            raise UpcyclingError(
                f"The calibration text {name} does not fill one sequence of {context_length} "
                "tokens. Give more text, or a shorter context_length where there is one."
            )
        ids[name] = torch.tensor(found[:count])
    return Sequences(ids, sha256(read_bytes(tokenizer_file, LARGE)).hexdigest())


def _cut(tokenizer: "Tokenizer", stretches: Sequence[str], length: int) -> list[list[int]]:
    """The first sequence of each stretch of text, then the second of each, ..."""
    cut = []
    for stretch in stretches:
        ids = tokenizer.encode(stretch, add_special_tokens=False).ids
        cut.append([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])
    deepest = max((len(sequences) for sequences in cut), default=0)
    return [s[depth] for depth in range(deepest) for s in cut if depth < len(s)]
