"""Do several models read texts alike? Tokenizers by what they mean, in whatever format.

Ids that models share must be of the same token, and texts must be cut alike. A model may have added
tokens that `main` lacks (for chats, padding, ...): its FFNs do not depend on them, they are said,
and gone from the result.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_upcycle.checkpoint.tokenizer_file import tokenizing
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.merging.vocabularies import (
    FORMATS,
    Reading,
    read_formats,
    tokenizer_settings,
)
from fusion_upcycle.verification.function import SAMPLE_TEXT

#: Texts in which tokenizers differ that are not the same.
PROBES = (
    SAMPLE_TEXT,
    "don't I'LL we've  two spaces   three\ttab\t\ttabs\n\nlines\r\nof Windows \n trailing  ",
    " leading space",
    "  ",
    "\n",
    "",
    "a",
    "A",
    "ALL CAPS and CamelCaseWords mIxEd",
    "1 12 123 1234 12345 1234567890 3.14 1,000,000 0x1F 1e-9 ½ ² ٣ 四",
    "caf\u00e9 cafe\u0301 na\u00efve \u1e9b\u0323 \u212b \ufb01n \u2460 \uff21\uff22",
    "\u00a0nbsp\u200bzero\ufeff \u2018single\u2019 \x07\x1b control \ud7ff \u3000wide",
    "Grüße, Straße; ÀÉÎ; çå; Ελλάδα; Привет, мир; שלום; مرحبا; हिन्दी; ไทย",
    "日本語テスト; 中文分词; 한국어; 👍🏽 👨‍👩‍👧 🇨🇭 🧪 ∑∫≈ → “quotes” — dash…",
    "def f(x):\n    return [x**2 for _ in range(10)]  # comment\n\t<a href='#'>&amp;</a>",
    "foo_bar-baz@example.com https://example.com/a?b=c&d=%20#e !!! ??? ... ---- ==== ((()))",
    "▁metaspace ▁▁ Ġ Ċ ## ##ing <s> </s> <unk> [UNK] [CLS] <|endoftext|> <0x0A>",
)
#: Tokens of the vocabulary that are spelt out as probes.
_SPELT, _TOGETHER = 2048, 16
#: Tokens that stand for nothing until somebody renames them.
_SPARE = re.compile(r"reserved|unused|place.?holder|special_\d", re.IGNORECASE)
_SHOWN = 5
#: Fields of tokenizer_config.json that say nothing, or are compared elsewhere.
_ELSEWHERE = frozenset(
    {
        "added_tokens_decoder", "backend", "chat_template", "is_local", "local_files_only",
        "name_or_path", "processor_class", "special_tokens_map_file", "tokenizer_class",
        "tokenizer_file", "transformers_version", "vocab_file", "merges_file", "auto_map",
        "additional_special_tokens", "extra_special_tokens",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Reads:
    """What was found of tokenizers that read alike.

    Attributes:
        dropped: model -> its tokens that the result has not.
        notes: what else differs, in words.
    """

    dropped: Mapping[str, Sequence[str]]
    notes: Sequence[str]

    def in_words(self, main: str) -> list[str]:
        """For people, a line each."""
        gone = [f"{_some(tokens)} of {model}" for model, tokens in self.dropped.items()]
        said = [f"tokens dropped, as {main}'s tokenizer lacks them: " + "; ".join(gone)]
        return [*(said if gone else []), *self.notes]


def compare_tokenizers(folders: Mapping[str, Path], main: str) -> Reads:
    """Compare the tokenizers of all models with that of `main`, whose files the result gets.

    Raises:
        UpcyclingError: another tokenizer, naming the model, the file and what differs; formats that
            cannot be compared.
    """
    formats = {name: read_formats(folder) for name, folder in folders.items()}
    if not any(formats.values()):
        return Reads({}, [])
    if lacking := [name for name, found in formats.items() if not found]:
        having = [name for name, found in formats.items() if found]
        usual = next(iter(formats[having[0]]))
        raise UpcyclingError(
            f"Models {lacking} have no {usual}, others have ({', '.join(having)}); nor is there a "
            "tokenizer in another format. Put it there if the tokenizer is the same: only such "
            "models can be merged."
        )
    comparison = _Comparison(folders, main)
    order = [main, *(name for name in formats if name != main)]
    with_main = {main}
    for kind in _names():
        having = [name for name in order if kind in formats[name]]
        for name in having[1:]:
            comparison.compare(having[0], name, kind, kind)
        if having and having[0] == main:
            with_main |= {*having}
    for name in order:
        if name not in with_main:
            comparison.compare(main, name, next(iter(formats[main])), next(iter(formats[name])))
    comparison.compare_settings()
    return Reads(comparison.dropped, comparison.notes)


def _names() -> list[str]:
    return [" and ".join(names) for names in FORMATS]


class _Comparison:
    """Pairs of models, file by file; what was read of a model is kept for the next pair."""

    def __init__(self, folders: Mapping[str, Path], main: str):
        self._folders, self._main = folders, main
        self._read: dict[tuple[str, str], Reading] = {}
        self.dropped: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def compare(self, first: str, second: str, kind: str, other: str) -> None:
        """Two models; `kind` is the format of the first, `other` that of the second."""
        if kind == other and self._same_bytes(first, second, kind):
            return
        reference, found = self._reading(first, kind), self._reading(second, other)
        named = other if kind == other else f"{other} beside {kind} of {first}"
        try:
            lacking = _compare_ids(reference, found)
            if kind == other:
                self._note(second, _compare_rules(reference, found, first, lacking))
            else:
                self._note(second, [_compare_across(reference, found, first)])
        except _Differs as differs:
            raise UpcyclingError(
                f"Model {second} has another tokenizer than model {first}: {differs} ({named}). "
                f"Only models of one tokenizer can be merged. If {second} was trained with that of "
                f"{first}, put {first}'s tokenizer files in the place of its own."
            ) from None
        if first == self._main:
            known = self.dropped.setdefault(second, [])
            known += [token for token in lacking if token in found.added and token not in known]
            if not known:
                del self.dropped[second]

    def compare_settings(self) -> None:
        """Say in which settings the models differ; the result has those of main."""
        ours = tokenizer_settings(self._folders[self._main])
        for name, folder in self._folders.items():
            theirs = tokenizer_settings(folder)
            fields = [
                field
                for field in sorted(ours.keys() | theirs.keys())
                if field not in _ELSEWHERE and _plain(ours, field) != _plain(theirs, field)
            ]
            if fields and theirs:
                self._note(name, [f"differs in {', '.join(fields)} (tokenizer_config.json)"])

    def _note(self, model: str, found: Sequence[str]) -> None:
        self.notes += [f"tokenizer of {model}: {what}; {self._main}'s is kept" for what in found]

    def _reading(self, model: str, kind: str) -> Reading:
        if (model, kind) not in self._read:
            self._read[model, kind] = read_formats(self._folders[model])[kind]()
        return self._read[model, kind]

    def _same_bytes(self, first: str, second: str, kind: str) -> bool:
        names = kind.split(" and ")
        if kind != "tokenizer.json":  # which alone holds its added tokens and settings
            names += ["added_tokens.json", "tokenizer_config.json"]
        contents = [
            [p.read_bytes() if (p := self._folders[model] / name).is_file() else None]
            for name in names
            for model in (first, second)
        ]
        return contents[::2] == contents[1::2]


class _Differs(Exception):
    """Two tokenizers are not the same; says what differs."""


def _compare_ids(reference: Reading, found: Reading) -> list[str]:
    """Tokens that only one of two tokenizers has, all of them added ones.

    Raises:
        _Differs: an id of two tokens, a token of two ids, or more than added tokens.
    """
    ours, theirs = reference.all_ids, found.all_ids
    for token, number in ours.items():
        if theirs.get(token, number) != number:
            raise _Differs(f"{token!r} has id {theirs[token]}, not {number}")
    names = {number: token for token, number in ours.items()}
    lacking = [token for token in theirs if token not in ours]
    for token in lacking:
        there = names.get(theirs[token])
        if there is not None and not (
            token in found.added
            and there in reference.added
            and (_SPARE.search(token) or _SPARE.search(there))
        ):
            raise _Differs(f"id {theirs[token]} is {token!r}, not {there!r}")
    missing = [token for token in ours if token not in theirs]
    for tokens, who in ((lacking, found), (missing, reference)):
        if more := [token for token in tokens if token not in who.added]:
            raise _Differs(
                f"the vocabulary has {len(theirs)} tokens, not {len(ours)}: "
                f"{_some(more)} {'more' if who is found else 'less'}"
            )
    return lacking + missing


def _compare_rules(
    reference: Reading, found: Reading, first: str, lacking: Collection[str]
) -> list[str]:
    """What two files of one format say of how texts are cut.

    Returns:
        What is written otherwise, and means the same.

    Raises:
        _Differs: names what differs.
    """
    for rule in reference.rules.keys() | found.rules.keys():
        ours, theirs = reference.rules.get(rule), found.rules.get(rule)
        if isinstance(ours, dict) and isinstance(theirs, dict):  # of what is added in neither
            both = ours.keys() & theirs.keys()
            token = next((token for token in both if ours[token] != theirs[token]), None)
            if token is not None:
                raise _Differs(_difference(f"{rule} of {token!r}", ours[token], theirs[token]))
        elif ours != theirs:
            raise _Differs(_difference(rule, ours, theirs))
    otherwise = [
        part
        for part in reference.written
        if _simple(reference.written[part], lacking) != _simple(found.written[part], lacking)
    ]
    notes = []
    if otherwise or lacking:
        count = _compare_texts(reference, found, lacking, otherwise)
        if otherwise:
            said = ", ".join(otherwise)
            notes.append(f"writes {said} otherwise than {first}, {count} texts give the same ids")
    if _simple(reference.framed, ()) != _simple(found.framed, ()):
        notes.append("puts other tokens around a text (post_processor)")
    return notes


def _compare_texts(
    reference: Reading, found: Reading, lacking: Collection[str], suspects: Sequence[str]
) -> int:
    """Ask both tokenizers for the ids of many texts, without tokens that only one of them has."""
    if reference.tokenizer is None or found.tokenizer is None:
        return 0
    every = [*reference.ids.values()]
    numbers = every[:: max(1, len(every) // _SPELT)]
    with tokenizing(reference.files):
        spelt = [reference.tokenizer.decode([number]) for number in numbers]
    texts = [*PROBES]
    texts += ["".join(spelt[i : i + _TOGETHER]) for i in range(0, len(spelt), _TOGETHER)]
    for token in reference.added:
        texts += [f"a {token} b", f"a{token}b", f" {token}{token} "] if token not in lacking else []
    folded = [token.casefold().strip() for token in lacking]
    texts = [text for text in texts if not any(token in text.casefold() for token in folded)]
    with tokenizing(f"{reference.files} or {found.files}"):
        ours, theirs = (
            [e.ids for e in reading.tokenizer.encode_batch(texts, add_special_tokens=False)]
            for reading in (reference, found)
            if reading.tokenizer is not None
        )
    for text, expected, ids in zip(texts, ours, theirs, strict=True):
        if expected != ids:
            which = f"{', '.join(suspects)} differs: " if suspects else ""
            raise _Differs(f"{which}the text {text[:40]!r} becomes {ids[:8]}, not {expected[:8]}")
    return len(texts)


def _compare_across(reference: Reading, found: Reading, first: str) -> str:
    """Two formats of what may be one tokenizer, whose ids are known to be equal."""
    if "merges" in reference.rules and "merges" in found.rules:
        if reference.rules["merges"] != found.rules["merges"]:
            ours, theirs = reference.rules["merges"], found.rules["merges"]
            raise _Differs(_difference("merges", ours, theirs))
        return f"{found.files} has the vocabulary and the merges of {reference.files} of {first}"
    return (
        f"{found.files} has the vocabulary of {reference.files} of {first}, by which alone the two "
        "formats were compared"
    )


def _difference(rule: str, ours: Any, theirs: Any) -> str:
    if isinstance(ours, list) and isinstance(theirs, list):
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None
        )
        if place is None:
            return f"{rule} differ: there are {len(theirs)}, not {len(ours)}"
        return f"{rule} differ: at place {place} is {theirs[place]!r}, not {ours[place]!r}"
    return f"{rule} differs: {str(theirs)[:60]}, not {str(ours)[:60]}"


def _simple(said: Any, left_out: Collection[str]) -> Any:
    """A part of tokenizer.json without what says nothing: sequences of one, absent fields."""
    if not isinstance(said, dict):
        return said
    if said.get("type") == "Sequence":
        inner = next(v for k, v in said.items() if k != "type")
        parts = [p for part in inner if (p := _simple(part, left_out)) is not None]
        return parts[0] if len(parts) == 1 else {"type": "Sequence", "of": parts} if parts else None
    return {k: v for k, v in said.items() if v is not None and k not in left_out}


def _plain(settings: Mapping[str, Any], field: str) -> Any:
    """A setting's value; of a special token, its text."""
    value = settings.get(field)
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(repr(token) for token in tokens[:_SHOWN])
    return shown + (f" and {len(tokens) - _SHOWN} others" if len(tokens) > _SHOWN else "")
