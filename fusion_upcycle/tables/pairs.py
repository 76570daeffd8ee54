"""Inputs and targets of sequence-to-sequence models.

They are given as one of:

- a `.jsonl` or `.parquet` file with the columns ``input`` and ``target``;
- `{path, name, split, data_files, data_dir, input, target, labels}`, the first five as
  `datasets.load_dataset` takes them. ``input`` and ``target`` are texts with columns in braces, as
  in ``"{question} {passage}"``; ``target`` may also be the word of each value of the column
  ``label``, as in ``{0: "no", 1: "yes"}``. ``labels`` are the words that may be answered; those of
  such a mapping are.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.tables.reading import load_table, specified

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID = ("input", "target", "labels")


@dataclass(frozen=True)
class Pairs:
    """Examples.

    Attributes:
        where: the option that names them, for errors.
        inputs, targets: texts.
        labels: words that may be answered, every target one of them; empty where it is free.
    """

    where: str
    inputs: Sequence[str]
    targets: Sequence[str]
    labels: Sequence[str]


def load_pairs(given: Any, where: str, *, splits: Sequence[str]) -> Pairs:
    """Examples of one specification (see the module).

    Args:
        where: the option that names them, for errors.
        splits: taken where the config says none, the first that there is; or the only one.

    Raises:
        UpcyclingError: what cannot be read, a column that is not there, a text that is none, a
            label without a word, or a target that is no label.
    """
    source, said = specified(given, where, _SAID)
    table = load_table(source, where, splits)
    rows = [dict(row) for row in table]
    asked = str(said.get("input") or "{input}")
    inputs = [_filled(asked, row, where, "input") for row in rows]
    words = said.get("target") or "{target}"
    labels = said.get("labels")
    if isinstance(words, Mapping):
        by_value = {str(value): word for value, word in words.items()}
        labels = list(by_value.values()) if labels is None else labels
        _words(list(by_value.values()), f"{where}.target")
        targets = [_word(by_value, row, where) for row in rows]
    else:
        targets = [_filled(str(words), row, where, "target") for row in rows]
    pairs = Pairs(where, inputs, targets, _words(labels, f"{where}.labels"))
    for number, target in enumerate(targets if pairs.labels else ()):
        if target not in pairs.labels:
            raise UpcyclingError(
                f"{where}: the target of example {number} is {target!r}, which is none of the "
                f"labels {', '.join(pairs.labels)}. Add it to labels."
            )
    return pairs


def target_ids(tokenizer: "PreTrainedTokenizerBase", text: str, where: str) -> list[int]:
    """Tokens of a target, with the one that ends it.

    Raises:
        UpcyclingError: the tokenizer has no words for it.
    """
    ids = list(tokenizer(text_target=text)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise UpcyclingError(
            f"{where}: the tokenizer cannot write the target {text!r}: it has an unknown piece. "
            "Give the tokenizer that the model was trained with, or another word."
        )
    return ids


def _filled(text: str, row: Mapping[str, Any], where: str, key: str) -> str:
    try:
        filled = text.format(**row)
    except (KeyError, IndexError, ValueError) as error:
        columns = ", ".join(row)
        raise UpcyclingError(
            f"{where}.{key}={text!r} cannot be filled in ({type(error).__name__}: {error}): the "
            f"columns are {columns}. Name them in braces."
        ) from error
    used = {re.split(r"[.\[]", field)[0] for _, field, _, _ in Formatter().parse(text) if field}
    if any(row[column] is None for column in used):
        raise UpcyclingError(f"{where}.{key}={text!r}: a column is empty in {row!r:.120}.")
    return filled


def _word(words: Mapping[str, str], row: Mapping[str, Any], where: str) -> str:
    value = str(row.get("label"))
    if value not in words:
        raise UpcyclingError(
            f"{where}.target has no word for the label {value}: it has {', '.join(words)}. Add it, "
            "or take a split whose labels are known."
        )
    return words[value]


def _words(words: Any, where: str) -> list[str]:
    if words is None:
        return []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UpcyclingError(
            f"{where}={words!r} must be words: in quotes, as YAML takes yes and no for true and "
            "false."
        )
    if len(set(words)) < max(len(words), 2):
        raise UpcyclingError(f"{where}={words} must be two words or more, each once.")
    return words
