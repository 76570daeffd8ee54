"""``python -m fusion_upcycle.demo``: train all demo models and show how good they are."""

import json

from rich.console import Console
from rich.table import Table

from fusion_upcycle.demo import DOMAINS, MODELS, demo_model, demo_reference


def main() -> None:
    """Print held-out bits per byte of every demo model beside what compressors reach."""
    table = Table(title="bits per byte on held-out text (lower is better)")
    table.add_column("model")
    for column in (*DOMAINS, "training s"):
        table.add_column(column, justify="right")
    for name in MODELS:
        facts = json.loads((demo_model(name) / "demo.json").read_text(encoding="utf-8"))
        bits = [f"{facts['bits_per_byte'][domain]:.3f}" for domain in DOMAINS]
        table.add_row(name, *bits, f"{facts['training']['wall_seconds']:.0f}")
    table.add_section()
    reference = demo_reference()
    for name in ("unigram", "gzip", "lzma"):
        table.add_row(name, *(f"{reference[domain][name]:.3f}" for domain in DOMAINS), "")
    Console().print(table)


if __name__ == "__main__":
    main()
