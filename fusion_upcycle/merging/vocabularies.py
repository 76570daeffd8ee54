"""Tokenizers' files, read for what they mean: the ids of tokens, and what cuts a text into them.

All formats speak of tokens as `tokenizer.json` does: bytes as the printable characters that GPT-2
gave them, or SentencePiece's pieces.
"""

import base64
import binascii
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checkpoint.tokenizer_file import tokenizing
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.texts.tokens import read_tokenizer
from fusion_upcycle.untrusted import LARGE, read_bytes, read_json, read_object, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Reading:
    """What one format says of a tokenizer.

    Attributes:
        files: names of the files.
        ids: token -> its id, without added ones.
        added: added token -> its id; texts are cut at these first.
        rules: what else decides how a text is cut, by name; compared as it is.
        written: the same, that may be written in several ways; texts tell whether it is the same.
        framed: what is put around a text.
        tokenizer: that can be asked.
    """

    files: str
    ids: Mapping[str, int]
    added: Mapping[str, int]
    rules: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    framed: Any = None
    tokenizer: "Tokenizer | None" = None

    @property
    def all_ids(self) -> dict[str, int]:
        """Token -> id, added ones too."""
        return {**self.ids, **self.added}


def read_formats(folder: Path) -> dict[str, Callable[[], Reading]]:
    """Name of each format that a folder has -> reads it."""
    found = {}
    for names, read in FORMATS.items():
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            found[" and ".join(names)] = _reader(folder, names, read)
    return found


def _reader(
    folder: Path, names: tuple[str, ...], read: Callable[[Path, str], Reading]
) -> Callable[[], Reading]:
    def reading() -> Reading:
        try:
            return read(folder, names[0])
        except UpcyclingError:
            raise
        except (
            *(ValueError, LookupError, TypeError, AttributeError, struct.error),
            *(OverflowError, RecursionError),  # of what was forged
        ) as error:
            raise UpcyclingError(
                f"{folder / names[0]} cannot be read as a tokenizer ({error!r}). Get it again from "
                "where the model is from."
            ) from error

    return reading


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`; nothing where there is none."""
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.is_file() else {}


def _added(folder: Path) -> dict[str, int]:
    """Added tokens of formats that hold none themselves."""
    path = folder / "added_tokens.json"
    said = read_object(path) if path.is_file() else {}
    found = {token: int(number) for token, number in said.items()}
    decoder = tokenizer_settings(folder).get("added_tokens_decoder") or {}
    return found | {entry["content"]: int(number) for number, entry in decoder.items()}


def _tokenizer_json(folder: Path, name: str) -> Reading:
    """As the `tokenizers` library writes what it read: merges and defaults in one spelling."""
    tokenizer = read_tokenizer(folder / name)
    with tokenizing(folder / name):
        said = json.loads(tokenizer.to_str())
    model = said["model"]
    vocab, merges = model.pop("vocab"), model.pop("merges", None)
    model.pop("dropout", None)  # of training
    rules: dict[str, Any] = {f"model.{key}": value for key, value in model.items()}
    if isinstance(vocab, list):  # Unigram
        rules["scores"] = dict(vocab)
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    if merges is not None:
        rules["merges"] = [tuple(merge) for merge in merges]
    added = {token["content"]: token["id"] for token in said["added_tokens"]}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    written = {key: said[key] for key in ("normalizer", "pre_tokenizer")}
    written["added_tokens"] = {
        token["content"]: [token[flag] for flag in flags] for token in said["added_tokens"]
    }
    ids = {token: number for token, number in vocab.items() if token not in added}
    return Reading(name, ids, added, rules, written, said["post_processor"], tokenizer)


def _vocab_json(folder: Path, name: str) -> Reading:
    lines = read_text(folder / "merges.txt", LARGE).split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    settings = tokenizer_settings(folder)
    prefix = {"add_prefix_space": bool(settings.get("add_prefix_space"))}
    files, added = f"{name} and merges.txt", _added(folder)
    return Reading(
        files, _without(read_json(folder / name, LARGE), added), added, {"merges": merges, **prefix}
    )


def _vocab_txt(folder: Path, name: str) -> Reading:
    tokens = read_text(folder / name, LARGE).rstrip("\n").split("\n")
    settings, added = tokenizer_settings(folder), _added(folder)
    rules = {
        "do_lower_case": settings.get("do_lower_case", True),
        "strip_accents": settings.get("strip_accents"),
        "tokenize_chinese_chars": settings.get("tokenize_chinese_chars", True),
    }
    ids = {token.rstrip("\r"): number for number, token in enumerate(tokens)}
    return Reading(name, _without(ids, added), added, rules)


def _tekken(folder: Path, name: str) -> Reading:
    said = read_json(folder / name, LARGE)
    config = said["config"]
    special = config["default_num_special_tokens"]
    ordinary = config["default_vocab_size"] - special
    ids = {
        _printable(base64.b64decode(entry["token_bytes"])): special + entry["rank"]
        for entry in said["vocab"][:ordinary]
    }
    added = {entry["token_str"]: entry["rank"] for entry in said.get("special_tokens") or ()}
    rules = {"pattern": config["pattern"], "number of special tokens": special}
    return Reading(name, ids, added, rules)


def _tiktoken(folder: Path, name: str) -> Reading:
    ids = {}
    for line in read_bytes(folder / name, LARGE).split(b"\n"):
        if line.strip():
            token, rank = line.split()
            ids[_printable(base64.b64decode(token, validate=True))] = int(rank)
    return Reading(name, ids, _added(folder))


def _sentencepiece(folder: Path, name: str) -> Reading:
    """SentencePiece's `ModelProto`; Llama 3's file of the same name is tiktoken's."""
    try:
        return _tiktoken(folder, name)
    except (ValueError, binascii.Error):
        pass
    data, added = read_bytes(folder / name, LARGE), _added(folder)
    ids: dict[str, int] = {}
    scores: list[float] = []
    kinds: list[int] = []
    specs: dict[int, dict[int, Any]] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            ids[piece[1].decode()] = len(scores)
            scores.append(piece.get(2, 0.0))
            kinds.append(piece.get(3, _NORMAL))
        elif number in (2, 3):
            specs[number] = dict(_fields(value))
    if not ids:
        raise ValueError("no pieces")
    own = [token for token, kind in zip(ids, kinds, strict=True) if kind in _ADDED_KINDS]
    added = {token: ids[token] for token in own} | added
    ordinary = {token: number for token, number in ids.items() if token not in added}
    said = zip(ids, scores, kinds, strict=True)
    rules: dict[str, Any] = {
        "scores": {piece: score for piece, score, kind in said if kind not in _ADDED_KINDS},
        "kinds of pieces": {p: k for p, k in zip(ids, kinds, strict=True) if k not in _ADDED_KINDS},
    }
    for spec, names in ((2, _TRAINER), (3, _NORMALISER)):
        values = specs.get(spec, {})
        rules |= {what: values.get(place, usual) for place, (what, usual) in names.items()}
    return Reading(name, ordinary, added, rules)


_NORMAL = 1
#: Of pieces: what the file's maker added, and control tokens.
_ADDED_KINDS = (3, 4)
#: Fields of SentencePiece's specs that decide how a text is cut -> name, default.
_TRAINER = {3: ("model_type", 1), 24: ("suffix", 0), 35: ("byte_fallback", 0)}
_NORMALISER = {
    2: ("charsmap", b""),
    3: ("add_dummy_prefix", 1),
    4: ("remove_extra_whitespaces", 1),
    5: ("escape_whitespaces", 1),
}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: the format is four kinds of values.

    Raises:
        ValueError: this is none.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number without an end")

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: -1, 5: 4}.get(kind)
        if size is None:
            raise ValueError(f"a field of kind {kind}")
        length = varint() if size < 0 else size
        value, at = data[at : at + length], at + length
        if at > len(data):
            raise ValueError("it is cut off")
        yield number, struct.unpack("<f", value)[0] if kind == 5 else value


@cache
def _characters() -> dict[int, str]:
    """GPT-2's printable character of each byte."""
    same = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in same]
    return {b: chr(b) for b in same} | {b: chr(256 + place) for place, b in enumerate(others)}


def _printable(token: bytes) -> str:
    return "".join(_characters()[byte] for byte in token)


def _without(ids: Mapping[str, int], added: Mapping[str, int]) -> dict[str, int]:
    return {token: number for token, number in ids.items() if token not in added}


#: Files of each format -> how they are read, those first that say most.
FORMATS: dict[tuple[str, ...], Callable[[Path, str], Reading]] = {
    ("tokenizer.json",): _tokenizer_json,
    ("vocab.json", "merges.txt"): _vocab_json,
    ("vocab.txt",): _vocab_txt,
    ("tokenizer.model",): _sentencepiece,
    ("spiece.model",): _sentencepiece,
    ("sentencepiece.bpe.model",): _sentencepiece,
    ("tekken.json",): _tekken,
    ("qwen.tiktoken",): _tiktoken,
    ("tiktoken.model",): _tiktoken,
}
