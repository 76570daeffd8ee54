"""What a stranger's tokenizer.json may ask for: rules that end, and text that stays of its size.

A tokenizer is a small program: rules that each double a text, or a regular expression that tries
everything, take all memory or time there is with a file of a kilobyte. The library has no limit of
its own, and ends some damaged files by a panic, which is no `Exception`.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.untrusted import LARGE, read_object

#: How many times longer rules may make a text, all together; of published ones at most 160.
_MOST_GROWTH = 1024
#: Of a regular expression; the longest that is known has 1,200.
_MOST_CHARACTERS = 4096
#: Tokens that may be put around a text.
_MOST_AROUND = 1000
#: Characters of a word that is cut (WordPiece takes their square); BERT has 100.
_MOST_IN_WORD = 1000


def check_tokenizer(file: Path) -> None:
    """Refuse a `tokenizer.json` whose rules may take for ever, or all memory, before it is used.

    Text grows at most 1,024 times, no group of a regular expression is repeated that has a choice
    or repeats something itself, 1,000 tokens at most come around a text, and the file has at most
    64 MiB.

    Raises:
        UpcyclingError: says which rule.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise UpcyclingError(f"{file} cannot be read: {error.strerror}.") from error
    _check(file, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=64)  # several parts of a conversion ask
def _check(file: Path, *state: int) -> None:
    check_tokenizer_data(file, read_object(file, LARGE))


def check_tokenizer_data(file: Path, data: dict[str, Any]) -> None:
    """As `check_tokenizer`, of what the file says."""
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    longest = model.get("max_input_chars_per_word")
    if type(longest) is int and longest > _MOST_IN_WORD:
        raise _refused(file, f"max_input_chars_per_word={longest}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name) or "")) > _MOST_AROUND:
            raise _refused(file, f"{name} of {len(str(model[name])):,} characters")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for rule in _rules(data.get(part)):
            growth *= _growth(file, rule)
            if growth > _MOST_GROWTH:
                raise _refused(file, f"{part} makes a text more than {_MOST_GROWTH} times as long")
            if (pattern := _regex(rule)) is not None and not ends(pattern):
                raise _refused(file, f"{part} has {pattern[:60]!r}, which may take for ever")
    around = sum(_around(rule) for rule in _rules(data.get("post_processor")))
    if around > _MOST_AROUND:
        raise _refused(file, f"post_processor puts {around:,} tokens around a text")


def ends(pattern: str) -> bool:
    """Whether a regular expression surely does not try a number of ways that grows like 2^n.

    It may where a group is repeated that has a choice or repeats something itself: `(a+)+`,
    `(a|aa)*`. A group of fixed length, as `(\\d{3})+`, is in published tokenizers.
    """
    if len(pattern) > _MOST_CHARACTERS:
        return False
    bare = re.sub(r"\\.", "x", pattern)
    bare = re.sub(r"\[[^\]]*\]|\{\d+\}", "x", bare)
    depth_repeats = [False]
    for match in re.finditer(r"\(|\)(?=([*+{])?)|[*+{|]", bare):
        sign = match[0][0]
        if sign == "(":
            depth_repeats.append(False)
        elif sign == ")":
            inside = depth_repeats.pop() if len(depth_repeats) > 1 else False
            if inside and match[1]:
                return False
            depth_repeats[-1] |= inside
        else:
            depth_repeats[-1] = True
    return len(re.findall(r"[*+{]", bare)) <= 64


@contextmanager
def tokenizing(file: Path | str) -> Iterator[None]:
    """What the library makes of a damaged file is our error, its panics too.

    Raises:
        UpcyclingError: names the file.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UpcyclingError):
        raise
    except BaseException as error:  # a PanicException is a BaseException
        raise UpcyclingError(
            f"{file} cannot be used: {str(error)[:300] or type(error).__name__}. Get it again from "
            "where the model is from."
        ) from error


def _refused(file: Path, why: str) -> UpcyclingError:
    return UpcyclingError(
        f"{file} is not used: {why}. No tokenizer of a model is like that; get it again from where "
        "the model is from."
    )


def _rules(part: Any) -> Iterator[dict[str, Any]]:
    """Each rule of a part of the file, in sequences too."""
    waiting = [part]
    while waiting:
        rule = waiting.pop()
        if isinstance(rule, list):
            waiting += rule
        elif isinstance(rule, dict):
            yield rule
            waiting += [
                rule.get(inner)
                for inner in ("normalizers", "pretokenizers", "decoders", "processors")
            ]


def _growth(file: Path, rule: dict[str, Any]) -> float:
    """How many times longer a rule may make a text, beside Unicode's own forms."""
    kind = rule.get("type")
    content = rule.get("content")
    size = len(content) if isinstance(content, str) else 0
    if kind == "Prepend":
        return 1.0 + len(str(rule.get("prepend")))
    if kind == "Precompiled":
        return _longest_in_charsmap(file, rule.get("precompiled_charsmap"))
    if kind != "Replace":
        return 1.0
    pattern = rule.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression may match between any two characters.
    return max(1.0, size / len(literal)) if literal and isinstance(literal, str) else 1.0 + size


def _longest_in_charsmap(file: Path, charsmap: Any) -> float:
    """Bytes of the longest text in SentencePiece's table: sizes, a trie, texts that end by NUL."""
    if not charsmap:
        return 1.0
    try:
        data = base64.b64decode(charsmap)
    except (binascii.Error, ValueError, TypeError) as error:
        raise _refused(file, f"precompiled_charsmap is damaged ({error})") from error
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max(map(len, texts.split(b"\0")), default=0) or 1)


def _regex(rule: dict[str, Any]) -> str | None:
    pattern = rule.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    return found if isinstance(found, str) else None


def _around(rule: dict[str, Any]) -> int:
    """Tokens that a template puts around a text."""
    special = rule.get("special_tokens")
    special = special if isinstance(special, dict) else {}
    count = 0
    for piece in [*_list(rule.get("single")), *_list(rule.get("pair"))]:
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        named = special.get(str(token.get("id"))) if isinstance(token, dict) else None
        count += len(_list(named.get("ids"))) if isinstance(named, dict) else 1
    return count


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
