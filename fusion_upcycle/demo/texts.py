"""Three text domains that every Python installation carries.

``prose`` is the language reference of ``pydoc_data.topics``, ``source`` the standard library's own
``.py`` files, ``arithmetic`` generated sums and products with their worked steps. Every domain has
disjoint ``train``, ``validation`` and ``test`` splits: whole documents for prose and source, whole
problems for arithmetic, so that held-out text was never seen.
"""

import hashlib
import os
import random
import sysconfig
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from fusion_upcycle.errors import unknown

DOMAINS = ("prose", "source", "arithmetic")
SPLITS = ("train", "validation", "test")

HELD_OUT_BYTES = 32_000  # of each held-out split
SOURCE_BYTES = 3_000_000  # of all splits together
REPEATABLE_CHARACTERS = 80  # shorter paragraphs, such as `import re`, are common language
ARITHMETIC_DOCUMENTS = {"train": 400, "validation": 12, "test": 12}
ARITHMETIC_LINES = 40  # per document

# Tests and data tables are not typical code; the other names are optional packages that
# distributions split off, so that leaving them out gives the same text on more machines.
_SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip",
    "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")
_DOCUMENT_BYTES = (1_000, 100_000)  # stubs and huge tables are outside


def domain_text(domain: str, split: str) -> tuple[str, ...]:
    """Documents of one split of one domain, always the same for the same Python version.

    Held-out splits have about 32 kB each.

    Raises:
        UpcyclingError: an unknown domain or split.
    """
    if domain not in DOMAINS:
        raise unknown("demo domain", domain, DOMAINS)
    if split not in SPLITS:
        raise unknown("split of the demo text", split, SPLITS)
    if domain == "arithmetic":
        return _arithmetic_documents(split)
    return _document_splits(domain)[split]


def demo_documents(split: str) -> dict[str, dict[str, str]]:
    """The text of all domains as `fusion_upcycle.texts.documents` takes it."""
    function = "fusion_upcycle.demo.domain_text"
    return {d: {"_target_": function, "domain": d, "split": split} for d in DOMAINS}


def text_identity() -> str:
    """Hash (sha256, hexadecimal) of all documents of all domains and splits."""
    digest = hashlib.sha256()
    for domain in DOMAINS:
        for split in SPLITS:
            for document in domain_text(domain, split):
                digest.update(hashlib.sha256(document.encode()).digest())
            digest.update(f"{domain}/{split}".encode())
    return digest.hexdigest()


@cache
def _document_splits(domain: str) -> dict[str, tuple[str, ...]]:
    """Test, then validation, take shorter documents until full; the rest is for training."""
    documents = _prose_documents() if domain == "prose" else _source_documents()
    # The order of hashed names mixes subjects and does not depend on the file system.
    names = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    splits: dict[str, tuple[str, ...]] = {}
    for split in ("test", "validation"):
        chosen, size = [], 0
        for name in names:
            length = len(documents[name].encode())
            if size < HELD_OUT_BYTES and length <= HELD_OUT_BYTES // 4:
                chosen.append(name)
                size += length
        names = [name for name in names if name not in chosen]
        splits[split] = tuple(documents[name] for name in chosen)
    splits["train"] = tuple(documents[name] for name in names)
    return splits


def _prose_documents() -> dict[str, str]:
    from pydoc_data.topics import topics

    # Shorter topics first: long ones quote them in full.
    return _without_repetition(dict(sorted(topics.items(), key=lambda t: (len(t[1]), t[0]))))


def _source_documents() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, str] = {}
    size = 0
    for path in sorted(_source_files(root), key=lambda path: _path_key(path, root)):
        if size >= SOURCE_BYTES:
            break
        data = path.read_bytes()
        if _DOCUMENT_BYTES[0] <= len(data) <= _DOCUMENT_BYTES[1]:
            documents[path.relative_to(root).as_posix()] = data.decode("utf-8")
            size += len(data)
    return _without_repetition(documents)


def _without_repetition(documents: dict[str, str]) -> dict[str, str]:
    """Each longer paragraph stays in one document only, or held-out text would be trained on too.

    Topics quote each other, and modules copy methods and licences from each other.
    """
    seen: set[str] = set()
    distinct = {}
    for name, document in documents.items():
        paragraphs = []
        for paragraph in document.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                paragraphs.append(paragraph)
            if len(words) >= REPEATABLE_CHARACTERS:
                seen.add(words)
        if any(paragraph.strip() for paragraph in paragraphs):
            distinct[name] = "\n\n".join(paragraphs).strip() + "\n"
    return distinct


def _source_files(root: Path) -> Iterable[Path]:
    # Not rglob: it would walk through site-packages, which may hold a hundred thousand files.
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if not _skipped(child)]
        yield from (
            Path(folder, file) for file in files if file.endswith(".py") and not _skipped(file)
        )


def _skipped(name: str) -> bool:
    return name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES)


def _path_key(path: Path, root: Path) -> bytes:
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


@cache
def _arithmetic_documents(split: str) -> tuple[str, ...]:
    return tuple(_arithmetic_document(split, i) for i in range(ARITHMETIC_DOCUMENTS[split]))


def _arithmetic_document(split: str, index: int) -> str:
    generator = random.Random(f"{split}/{index}")  # a str seed is hashed by sha512: stable
    lines: list[str] = []
    while len(lines) < ARITHMETIC_LINES:
        operator = generator.choice("+*")
        digits = generator.choice((2, 3, 4)) if operator == "+" else 2
        a, b = (generator.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        if _problem_split(f"{a}{operator}{b}") == split:
            lines.append(_worked_sum(a, b) if operator == "+" else _worked_product(a, b))
    return "\n".join(lines) + "\n"


def _problem_split(problem: str) -> str:
    """The split that owns a problem: 5 % each to test and validation, the rest to train."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(problem.encode()) % 20, "train")


def _worked_sum(a: int, b: int) -> str:
    """E.g. ``47 + 85: 7 + 5 = 12, 4 + 8 + 1 = 13; 47 + 85 = 132``."""
    steps, carry, x, y = [], 0, a, b
    while x or y:
        column = x % 10 + y % 10 + carry
        steps.append(f"{x % 10} + {y % 10}{' + 1' if carry else ''} = {column}")
        x, y, carry = x // 10, y // 10, column // 10
    return f"{a} + {b}: {', '.join(steps)}; {a} + {b} = {a + b}"


def _worked_product(a: int, b: int) -> str:
    """E.g. ``47 * 85: 40 * 85 = 3400, 7 * 85 = 595, 3400 + 595 = 3995; 47 * 85 = 3995``."""
    tens, ones = a // 10 * 10, a % 10
    steps = f"{tens} * {b} = {tens * b}, {ones} * {b} = {ones * b}, "
    return f"{a} * {b}: {steps}{tens * b} + {ones * b} = {a * b}; {a} * {b} = {a * b}"
