"""Text to train on: tokenised once into a memory-mapped stream, and cut into full windows.

A source's stream is `EOS document EOS document ...` (masked models have another separator), seen as
a circle: window i has the inputs `[i*T, (i+1)*T)`, and as targets the token after each. So there is
no padding, no token is dropped, and the last window of a stream ends with its beginning. The
separator begins the document that follows: the first token is predicted from it, and it is what a
document's last token predicts.
"""

import hashlib
import json
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusion_upcycle.checkpoint.digests import differences, seal
from fusion_upcycle.checkpoint.durable import make_folder, move
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.texts.documents import Documents, open_documents
from fusion_upcycle.texts.tokens import encode, packed
from fusion_upcycle.training.processes import (
    can_talk,
    gathered,
    is_first,
    shared_map,
    together,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = npt.NDArray[np.int32]

_STREAM_FILE = "tokens.bin"
_FACTS_FILE = "facts.json"
_PATIENCE = 4 * 3600.0  # seconds that one waits for what another packs
_SEEN = 60.0  # seconds until a folder must be seen that is there
_VERSION = 1  # raised when the same text gives other tokens: part of the cache key


@dataclass(frozen=True)
class PackedText:
    """The token stream of one source.

    Attributes:
        name: of the source.
        stream: all tokens, on disk.
        separator: token id that begins each document.
        documents: how many there are.
        largest: token id.
        digest: sha256 of the stream.
    """

    name: str
    stream: Tokens
    separator: int
    documents: int
    largest: int
    digest: str

    def windows(self, context_length: int) -> int:
        """How many windows one pass over the stream takes."""
        return -(-len(self.stream) // context_length)

    def window(self, index: int, context_length: int) -> Tokens:
        """Tokens [T + 1] of window `index`: T inputs, and targets one further."""
        places = np.arange(index * context_length, (index + 1) * context_length + 1)
        return self.stream.take(places, mode="wrap")

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": len(self.stream),
            "documents": self.documents,
            "largest_token_id": self.largest,
            "sha256": self.digest,
        }


def pack_sources(
    sources: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    cache: Path,
    *,
    where: str = "data",
    separator: int,
) -> list[PackedText]:
    """Tokenise every source, or take it from `cache`, where its digests are checked.

    The first process reads the documents, writes the stream and checks it (at 1.7 GB/s: 2.4 s for
    a billion tokens of 4 bytes); all that have found each other (`strategy=fsdp`) tokenise, a batch
    each. Nothing is locked: see `fusion_upcycle.training.work_folder`.

    Args:
        sources: name -> what `fusion_upcycle.texts.documents` takes; a mapping may say
            `tokens: N` for the first N tokens only, which a data set with `streaming: true` must:
            a stream is written to disk first, so that its order is known and a run can be resumed
            anywhere.
        cache: folder, one for all processes; those that have not found each other yet wait for what
            the first one writes.
        where: the option that names them, for errors.
        separator: token id that begins each document.

    Warns:
        UserWarning: what is in `cache` is damaged, and what; it is packed again.

    Raises:
        UpcyclingError: no source, a source without text, or a disk that is full or fails.
    """
    if not sources:
        raise UpcyclingError("data is empty: name at least one source, {name: file}.")
    packer = _Packer(tokenizer, separator, _tokenizer_identity(tokenizer, separator), cache)
    return [_pack(name, spec, f"{where}.{name}", packer) for name, spec in sources.items()]


@dataclass(frozen=True)
class _Packer:
    """What all sources are packed with."""

    tokenizer: "PreTrainedTokenizerBase"
    separator: int
    identity: str
    cache: Path


def _pack(name: str, spec: Any, where: str, packer: _Packer) -> PackedText:
    limit = None
    if isinstance(spec, Mapping) and "_target_" not in spec:
        limit = spec.get("tokens")
        spec = {key: value for key, value in spec.items() if key != "tokens"}
        if spec.get("streaming") and limit is None:
            raise UpcyclingError(
                f"{where} is streamed: say how many tokens to take, as in tokens: 1000000000."
            )
        if limit is not None and (not isinstance(limit, int) or limit < 2):
            raise UpcyclingError(f"{where}.tokens={limit!r} must be a whole number, 2 or more.")

    def failed(reason: object) -> str:
        return (
            f"Packing {where} in {packer.cache} failed: {reason}. When that is mended, the same "
            "command goes on."
        )

    known: tuple[Path, dict[str, Any] | None] | None = None
    documents: Documents | None = None
    with together(failed):
        if is_first() or not can_talk():
            documents = open_documents(spec, where)
            folder = _folder(documents, packer, limit)
            facts, damage = _look(folder)
            if facts is None and not is_first():
                facts = _awaited(folder, where)
            if damage and is_first():
                warnings.warn(
                    f"Packed text of {where} in {folder} is damaged ({damage}): it is packed "
                    "again.",
                    stacklevel=4,
                )
            known = folder, facts
    agreed = gathered(known)[0]
    assert agreed is not None
    folder, facts = agreed
    if facts is None:
        with together(failed), shared_map(partial(encode, packer.tokenizer)) as encoded:
            if documents is not None:
                make_folder(packer.cache)
                facts = _write(folder, documents, packer, where, limit, encoded)
        facts = gathered(facts)[0]
    return PackedText(name, _opened(folder), **facts)


def _folder(documents: Documents, packer: _Packer, limit: int | None) -> Path:
    content = json.dumps([_VERSION, packer.identity, documents.fingerprint, limit])
    return packer.cache / hashlib.sha256(content.encode()).hexdigest()[:24]


def _awaited(folder: Path, where: str) -> dict[str, Any]:
    """What the first process has packed, which this one cannot talk to yet.

    Raises:
        UpcyclingError: it has not, after some hours.
    """
    until = time.monotonic() + _PATIENCE
    while (facts := _look(folder)[0]) is None:
        if time.monotonic() > until:
            raise UpcyclingError(
                f"The first process has not packed {where} in {folder} for {_PATIENCE / 3600:.3g} "
                f"hours. {setting('work_folder')} must be one folder for all processes; pack it "
                "before, in a short run of one process."
            )
        time.sleep(0.2)
    return facts


def _opened(folder: Path) -> Tokens:
    """The stream, as soon as this process sees what the first one has put there.

    Raises:
        UpcyclingError: it does not, after a minute.
    """
    until = time.monotonic() + _SEEN  # network file systems remember what was not there
    while True:
        try:
            return np.memmap(folder / _STREAM_FILE, dtype=np.int32, mode="r")
        except FileNotFoundError:
            if time.monotonic() > until:
                raise UpcyclingError(
                    f"{folder}, which the first process has packed, is not there for this one "
                    f"({socket.gethostname()}). {setting('work_folder')} must be one folder for "
                    "all processes, on a disk that they share."
                ) from None
            time.sleep(0.2)


def _look(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What is known of a stream, where it is there and as it was written; else what is not."""
    if not folder.exists():
        return None, ""
    try:
        facts = json.loads((folder / _FACTS_FILE).read_bytes())
        files = {str(name): str(found) for name, found in facts.pop("files").items()}
        damage = "; ".join(differences(folder, files, _FACTS_FILE))
    except OSError as error:
        damage = str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        damage = f"{_FACTS_FILE} cannot be read, or has no digests, as of earlier versions"
    return (None, damage) if damage else (facts, "")


def _write(
    folder: Path,
    documents: Documents,
    packer: _Packer,
    where: str,
    limit: int | None,
    encoded: Callable[[Iterable[list[str]]], Iterable[list[list[int]]]],
) -> dict[str, Any]:
    """Make `folder`, with the stream and what is known of it, in one step; returns that.

    Only the first process of a run writes, and one run at a time has the folder.
    """
    temporary = folder.with_name(f".{folder.name}.incomplete")
    for left in (temporary, folder):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    digest, count, largest, written = hashlib.sha256(), 0, 0, 0
    start = packer.separator
    try:
        with open(temporary / _STREAM_FILE, "wb") as file:
            texts = packed(
                packer.tokenizer, documents.texts, start=start, separator=start, encoded=encoded
            )
            for before, tokens in texts:
                ids = np.array(before + tokens, dtype=np.int32)
                ids = ids[: None if limit is None else limit - written]
                file.write(ids.tobytes())
                digest.update(ids.tobytes())
                count, written = count + 1, written + len(ids)
                largest = max(largest, int(ids.max()))
                if written == limit:
                    break
        if not count:
            raise UpcyclingError(f"{where}: there is no text to train on; all documents are empty.")
        facts = {
            "separator": start,
            "documents": count,
            "largest": largest,
            "digest": digest.hexdigest(),
        }

        def write_facts(files: dict[str, str]) -> None:
            text = json.dumps(facts | {"files": files})
            (temporary / _FACTS_FILE).write_text(text, encoding="utf-8")

        seal(temporary, _FACTS_FILE, write_facts, {_STREAM_FILE: digest.hexdigest()})
        move(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts


def _tokenizer_identity(tokenizer: "PreTrainedTokenizerBase", separator: int) -> str:
    """Changes whenever the same text could give other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    content = f"{type(tokenizer).__name__}/{separator}/{known}"
    return hashlib.sha256(content.encode()).hexdigest()
