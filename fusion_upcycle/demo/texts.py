"""Text of three domains, the same on every machine and for every version of Python.

``prose`` is Python's documentation, ``source`` its standard library, both shipped with the package
(`examples/embedded_text.py` made them; NOTICE beside them has the licence); ``arithmetic`` is
generated: sums and products with their worked steps. Each has four splits: ``train``, which the
demo models are trained on; ``continued``, new text to train them on with; ``validation`` and
``test``, held out. Splits are whole documents of prose and source, whole problems of arithmetic, so
that held-out text was never seen; ``continued`` has arithmetic problems of ``train`` again.
"""

import hashlib
import json
import lzma
import random
import zlib
from functools import cache
from pathlib import Path

from fusion_upcycle.errors import unknown

DOMAINS = ("prose", "source", "arithmetic")
SPLITS = ("train", "continued", "validation", "test")
DATA = Path(__file__).parent / "data"

ARITHMETIC_DOCUMENTS = {"train": 700, "continued": 500, "validation": 25, "test": 25}
ARITHMETIC_LINES = 40  # per document


def domain_text(domain: str, split: str) -> tuple[str, ...]:
    """Documents of one split of one domain.

    About 3.3 MB of prose and of source to train on, 2.4 MB to go on with, 64 kB for each held-out
    split; half as much arithmetic to train on.

    Raises:
        UpcyclingError: an unknown domain or split.
    """
    if domain not in DOMAINS:
        raise unknown("demo domain", domain, DOMAINS)
    if split not in SPLITS:
        raise unknown("split of the demo text", split, SPLITS)
    if domain == "arithmetic":
        return _arithmetic_documents(split)
    return _shipped(domain)[split]


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
def _shipped(domain: str) -> dict[str, tuple[str, ...]]:
    lines = lzma.decompress((DATA / f"{domain}.jsonl.xz").read_bytes()).decode().split("\n")[:-1]
    documents = [json.loads(line) for line in lines]
    return {s: tuple(d["text"] for d in documents if d["split"] == s) for s in SPLITS}


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
        if _problem_split(f"{a}{operator}{b}") == {"continued": "train"}.get(split, split):
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
