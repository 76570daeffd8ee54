"""The line that merges an adapter with PEFT, for errors about those that are not taken here."""

import re
from pathlib import Path

from fusion_upcycle.untrusted import read_json

CONFIG_FILE = "adapter_config.json"


def merge_command(adapter: Path, base: str | Path | None = None) -> str:
    """A line to paste that merges an adapter with PEFT, and what to do with the result.

    Args:
        base: what it is put on; None is what the adapter names.
    """
    base = base if base is not None else _base_of(adapter)
    merged = f"{str(adapter).rstrip('/')}-merged"
    return (
        f'python -c "from transformers import {_class_of(base)} as M; '
        f"from peft import PeftModel as P; P.from_pretrained(M.from_pretrained('{base}', "
        f"dtype='auto'), '{adapter}').merge_and_unload().save_pretrained('{merged}')\" and take "
        f"{merged} in its place, with the tokenizer files of {base}"
    )


def _base_of(adapter: Path) -> str:
    try:
        said = read_json(adapter / CONFIG_FILE)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = None
    return said if said and isinstance(said, str) else "BASE"


def _class_of(base: str | Path) -> str:
    try:
        (name,) = read_json(Path(base) / "config.json")["architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "AutoModelForCausalLM"
    return name if re.fullmatch(r"\w+", str(name)) else "AutoModelForCausalLM"
