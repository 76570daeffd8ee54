"""Text as token ids: by a model's own tokenizer, and whether the model has these ids."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.checkpoint.tokenizer_file import check_tokenizer, tokenizing
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

#: Characters that surely hold a token; what is more than is asked for is not tokenised.
CHARACTERS_PER_TOKEN = 16
_DOCUMENTS_AT_ONCE = 500


def read_tokenizer(file: Path) -> "Tokenizer":
    """The tokenizer of a `tokenizer.json`, without what transformers adds to it.

    It neither fills texts up nor cuts them off. Ask it within `tokenizing(file)`.

    Raises:
        UpcyclingError: the file is damaged, or its rules may take for ever (`check_tokenizer`).
    """
    from tokenizers import Tokenizer

    check_tokenizer(file)
    with tokenizing(file):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", documents: list[str]) -> list[list[int]]:
    """Token ids of each document; text that spells a special token out is taken as text."""
    return tokenizer(documents, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]


def start_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """What a first document begins with: BOS, or EOS where there is no BOS; None without both."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def packed(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[str],
    *,
    start: int | None,
    separator: int | None = None,
    encoded: Callable[[Iterable[list[str]]], Iterable[list[list[int]]]] | None = None,
) -> Iterator[tuple[list[int], list[int]]]:
    """Documents that are not empty as one stream, read as it is asked for.

    Args:
        encoded: `encode` of batches of documents, in order; by default one after the other.

    Yields:
        What stands before a document, and its tokens: `start` before the first one, `separator`,
        by default EOS, before the others; nothing where the tokenizer has none.
    """
    before = [] if start is None else [start]
    separator = tokenizer.eos_token_id if separator is None else separator
    between = [] if separator is None else [separator]
    rest = (document for document in documents if document)
    batches = iter(lambda: list(islice(rest, _DOCUMENTS_AT_ONCE)), [])
    for batch in (encoded or partial(map, partial(encode, tokenizer)))(batches):
        for ids in batch:
            yield before, ids
            before = between


def check_vocabulary(largest: int, embeddings: int, whose: str = "The tokenizer") -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        largest: token id of the text.
        embeddings: how many the model has.
        whose: the tokenizer, as the error's first words.

    Raises:
        UpcyclingError: the tokenizer is of another model.
    """
    if largest >= embeddings:
        raise UpcyclingError(
            f"{whose} gives token id {largest}, but the model has {embeddings} embeddings: use the "
            "tokenizer that belongs to the model."
        )
