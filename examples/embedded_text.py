"""Make the text that the package ships, from Python's documentation and its standard library.

Question: what are the demo models trained and scored on?
Command:  python examples/embedded_text.py --documentation FOLDER --library FOLDER
Needs:    the reStructuredText sources of Python's documentation (Debian's package python3.11-doc
          3.11.2-6+deb12u9: usr/share/doc/python3.11/html/_sources), and the standard library of
          CPython 3.11.7. Another version gives other text, and so other models.
Expected: fusion_upcycle/demo/data/{prose,source}.jsonl.xz, to the bit as they are shipped.

Held-out splits are whole documents, and a paragraph of 80 characters or more stays in one document
only: what is quoted, or copied from module to module, is never both trained on and scored.
"""

import argparse
import json
import lzma
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from fusion_upcycle.demo.texts import DATA

#: Of each held-out split, and of what models are trained on: the base's part, then the other.
HELD_OUT_BYTES = 64_000
TRAIN_BYTES = {"train": 3_300_000, "continued": 2_400_000}
REPEATABLE_CHARACTERS = 80  # shorter paragraphs, such as `import re`, are common language
DOCUMENT_BYTES = (1_000, 220_000)  # stubs and huge tables are outside
#: Tests and data tables are not typical code; `site-packages` is not the library.
SKIPPED_FOLDERS = {"test", "tests", "encodings", "pydoc_data", "site-packages", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documentation", type=Path, required=True)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=DATA)
    arguments = parser.parse_args()
    roots = {"prose": (arguments.documentation, ".rst.txt"), "source": (arguments.library, ".py")}
    for domain, (root, suffix) in roots.items():
        splits = split(without_repetition(read(root, suffix)))
        lines = [
            json.dumps({"split": name, "name": document, "text": text}, ensure_ascii=False) + "\n"
            for name, documents in splits.items()
            for document, text in documents.items()
        ]
        path = arguments.output / f"{domain}.jsonl.xz"
        path.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
        sizes = {
            name: sum(len(text.encode()) for text in documents.values())
            for name, documents in splits.items()
        }
        print(f"{path}: {path.stat().st_size:,} bytes for {sizes}")


def read(root: Path, suffix: str) -> dict[str, str]:
    """Documents by their path below `root`, in an order that mixes subjects and is always same."""
    documents = {}
    for path in files(root, suffix):
        data = path.read_bytes()
        if DOCUMENT_BYTES[0] <= len(data) <= DOCUMENT_BYTES[1]:
            documents[path.relative_to(root).as_posix()] = data.decode("utf-8")
    return dict(sorted(documents.items(), key=lambda item: sha256(item[0].encode()).digest()))


def files(root: Path, suffix: str) -> Iterable[Path]:
    for folder, children, names in os.walk(root):
        children[:] = [child for child in children if not skipped(child)]
        yield from (Path(folder, n) for n in names if n.endswith(suffix) and not skipped(n))


def skipped(name: str) -> bool:
    return name in SKIPPED_FOLDERS or name.startswith(SKIPPED_PREFIXES)


def without_repetition(documents: dict[str, str]) -> dict[str, str]:
    """Each longer paragraph stays in one document only, the first that has it."""
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


def split(documents: dict[str, str]) -> dict[str, dict[str, str]]:
    """Test, then validation, take shorter documents until full; then the training splits."""
    left = dict(documents)
    wanted = {"test": HELD_OUT_BYTES, "validation": HELD_OUT_BYTES} | TRAIN_BYTES
    splits: dict[str, dict[str, str]] = {}
    for name, size in wanted.items():
        longest = HELD_OUT_BYTES // 4 if name in ("test", "validation") else size
        splits[name] = {}
        for document, text in list(left.items()):
            length = len(text.encode())
            if size > 0 and length <= longest:
                splits[name][document] = left.pop(document)
                size -= length
    return splits


if __name__ == "__main__":
    main()
