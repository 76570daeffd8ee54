"""What a stranger's config.json may say: no code, and no number that nothing has.

transformers makes lists, buffers and modules by these numbers before any weight is read, so that
they are looked at first: in the config and in what it consists of (`text_config`, ...).
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError

#: Fields that say how to run a model: a stranger's file does not decide which code is loaded here.
_NOT_THE_MODEL = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "experts_implementation",
)

#: What a classifier's labels are, which other models' files say as well: by a number, which would
#: be made a list of names, or by the names.
_LABELS = ("num_labels", "id2label", "label2id")
#: ImageNet-21k has 21,843; 100,000 take 1 CPU second and 65 MB.
_MOST_LABELS = 10**5

#: Names of numbers by which a model is built -> the least and the most: several times what the
#: largest has that there is. The first that fits counts.
_BOUNDS: tuple[tuple[re.Pattern[str], int, int], ...] = tuple(
    (re.compile(names), least, most)
    for names, least, most in (
        # Each of them is a module, and takes 8 ms; the deepest model has 200.
        (r"(num_)?hidden_layers|num_layers|n_layers?|(encoder|decoder)_layers", 1, 512),
        (r".*(layers|blocks|depth|stages)", 0, 512),
        (r"hidden_size|d_model|n_embd|embed_dim", 1, 10**6),
        (r"intermediate_size|d_ff|n_inner|.*ffn_dim", 1, 10**8),
        (r"num_(attention|key_value)_heads|n_heads?", 1, 10**5),
        (r"head_dim", 1, 10**5),
        (r"vocab_size", 1, 10**9),
        (r"max_position_embeddings", 1, 2**24),
        (r"n_positions|n_ctx", 1, 2**17),  # of old families, which make tables of them
        (r"(num|n)_(local_|routed_|shared_)?experts", 0, 2**12),
        (r"image_size", 1, 4096),
        (r"num_channels", 1, 64),
        (r"rotary_dim", 0, 2**16),
    )
)
#: Families whose class makes a table of numbers when it is built -> its two sizes, where they are
#: said; else the second is at most the number.
_TABLES = {
    "xglm": ("max_position_embeddings", "d_model", 4096),
    "gptj": ("n_positions", "rotary_dim", 256),
    "codegen": ("n_positions", "rotary_dim", 256),
}
_LARGEST_TABLE = 2**25
#: Any other whole number: 2**31 stands in real files for "no limit" (and 1e30 as a float).
_MOST = 2**63 - 1
#: Experts of all layers together; the largest model has 30,000.
_MOST_EXPERTS = 10**5


def without_orders(data: Any) -> Any:
    """A config without `_NOT_THE_MODEL`, in itself and in what it consists of."""
    if isinstance(data, dict):
        return {k: without_orders(v) for k, v in data.items() if k not in _NOT_THE_MODEL}
    return [without_orders(inner) for inner in data] if isinstance(data, list) else data


def check_labels(path: Path, data: dict[str, Any]) -> None:
    """Leave out labels of what is no classifier, and refuse those of none that there is.

    Raises:
        UpcyclingError: names the field.
    """
    for part in _parts(data):
        heads = ("Classification", "QuestionAnswering")
        if not any(head in str(part.get("architectures")) for head in heads):
            for name in _LABELS:
                part.pop(name, None)
            continue
        for name in _LABELS:
            value = part.get(name)
            count = value if type(value) is int else len(value) if isinstance(value, dict) else 0
            if value is not None and not 1 <= count <= _MOST_LABELS:
                raise UpcyclingError(
                    f"{path}: {name}={str(value)[:60]} is not of a classifier: it must be of 1 to "
                    f"{_MOST_LABELS:,} labels."
                )


def check_values(path: Path, data: dict[str, Any]) -> None:
    """Refuse numbers that no model has, before anything is built by them.

    Raises:
        UpcyclingError: names the field.
    """
    for name, value in _leaves("", data):
        if isinstance(value, float) and not math.isfinite(value):
            raise UpcyclingError(f"{path}: {name}={value} is not a number. Download it again.")
        if type(value) is int:
            last = name.rpartition(".")[2]
            bounds = (b for pattern, *b in _BOUNDS if pattern.fullmatch(last))
            least, most = next(bounds, (-_MOST, _MOST))
            if not least <= value <= most:
                raise UpcyclingError(
                    f"{path}: {name}={str(value)[:60]} is not of a model; it must be from {least} "
                    f"to {most:,}."
                )
    for part in _parts(data):
        _check_table(path, part)
        layers = _largest(part, r".*layers|n_layer")
        experts = _largest(part, r".*experts")
        if layers * experts > _MOST_EXPERTS:
            raise UpcyclingError(
                f"{path}: {experts} experts in {layers} layers are not of a model; there may be "
                f"{_MOST_EXPERTS:,} together."
            )


def _check_table(path: Path, part: dict[str, Any]) -> None:
    rows, columns, usual = _TABLES.get(str(part.get("model_type")), ("", "", 0))
    height, width = part.get(rows, 2048), part.get(columns, usual)
    if type(height) is int and type(width) is int and height * width > _LARGEST_TABLE:
        raise UpcyclingError(
            f"{path}: {rows}={height} and {columns}={width} are not of a model; their product may "
            f"be {_LARGEST_TABLE:,}."
        )


def _parts(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and the configs in it."""
    yield data
    for name, value in data.items():
        if isinstance(value, dict) and name.endswith("config"):
            yield from _parts(value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Each value that is no list or object, and where it stands."""
    waiting = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}" if name else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        else:
            yield name, value


def _largest(part: dict[str, Any], names: str) -> int:
    found = [v for k, v in part.items() if type(v) is int and re.fullmatch(names, k)]
    return max(found, default=0)
