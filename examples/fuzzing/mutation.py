"""Inputs made of valid ones: structure changed by values that break things, then bytes.

Who chooses is not said here: hypothesis, atheris' bytes or a generator of random numbers.
"""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

#: What real files never say, and what parsers and what is built by them trip over.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**16, 10**6, 2**31, 2**40, 2**62, 2**63, 2**70, -(2**63)),
    *(10**400, 0.0, -0.5, 1.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "\x1b[31m", "\u202etxt", "\ud800", "\0", "a\nb", "../../x", "/etc/passwd", "~"),
    *("x" * 300, "é" * 200, "9" * 5000, "sdpa", "x/y", "float16", "torch.bfloat16", "auto"),
    *([], [0], [0, 2**70], [-1], [[]], ["x"], [None], {}, {"": 0}, {"x": {}}, {"0": "a"}),
)
#: Names of fields that mean something somewhere.
NAMES = (
    *("__metadata__", "auto_map", "trust_remote_code", "_attn_implementation", "id2label"),
    *("num_labels", "architectures", "quantization_config", "text_config", "rope_scaling"),
    *("layer_types", "num_hidden_layers", "vocab_size", "torch_dtype", "dtype", "return_dict"),
    *(
        "<<",
        "",
        "\x1b]0;x\x07",
        "__class__",
        "_target_",
        "type",
        "0",
        "pattern",
        "tie_word_embeddings",
    ),
)


class Choice(Protocol):
    """Chooses: a whole number from 0 to `most`."""

    def __call__(self, most: int) -> int: ...


def random_choice(seed: int) -> Choice:
    """Choices of a generator of random numbers."""
    generator = random.Random(seed)
    return lambda most: generator.randint(0, most)


def mutated_json(document: Any, choose: Choice) -> Any:
    """A document with one to four places changed."""
    document = copy.deepcopy(document)
    for _ in range(1 + choose(3)):
        box = {"": document}
        _change(box, choose)
        document = box[""]
    return document


def _change(box: dict[str, Any], choose: Choice) -> None:
    """Change one place at or below the only value of `box`."""
    holder: Any = box
    key: Any = ""
    while True:
        value = holder[key]
        inner = list(value) if isinstance(value, dict) else range(len(_as_list(value)))
        # Seldom the whole of a document.
        if not len(inner) or (holder is not box and choose(3) == 0):
            break
        holder, key = value, inner[choose(len(inner) - 1)]
    kind = choose(6)
    if kind == 0 and holder is not box:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict) and holder is not box:
        holder[NAMES[choose(len(NAMES) - 1)]] = _value(choose)
    elif kind == 2 and isinstance(holder, dict) and holder is not box:
        holder[VALUES_AS_NAMES[choose(len(VALUES_AS_NAMES) - 1)]] = holder.pop(key)
    elif kind == 3 and isinstance(holder[key], int | float):
        number = holder[key] if isinstance(holder[key], int) else 1
        holder[key] = (number + 1, number - 1, number * 2, -number, [number])[choose(4)]
    elif kind == 4:
        holder[key] = [holder[key]] * (choose(3) + 1)
    else:
        holder[key] = _value(choose)


def _value(choose: Choice) -> Any:
    return copy.deepcopy(VALUES[choose(len(VALUES) - 1)])  # it may be changed, too


VALUES_AS_NAMES = tuple(value for value in VALUES if isinstance(value, str))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_json(document: Any) -> bytes:
    """The document as the file has it."""
    return json.dumps(document, ensure_ascii=True).encode()


def as_safetensors(document: Any) -> bytes:
    """`[header, number of bytes of data, length that the file says, or None]`; data are zeros."""
    whole = isinstance(document, list) and len(document) == 3
    header, size, said = document if whole else ({}, 0, 0)
    text = as_json(header)
    length = said if type(said) is int and 0 <= said < 2**64 else len(text)
    count = size if type(size) is int and 0 <= size <= 2**20 else 64
    return length.to_bytes(8, "little") + text + bytes(count)


def as_lines(document: Any) -> bytes:
    """A document that is a list, one element in each line."""
    lines = document if isinstance(document, list) else [document]
    return b"\n".join(
        line.encode(errors="surrogatepass") if isinstance(line, str) else as_json(line)
        for line in lines
    )


def mutated_bytes(content: bytes, choose: Choice, others: Sequence[bytes]) -> bytes:
    """The contents of a file with up to eight places changed, cut off, or joined with another's."""
    data = bytearray(content)
    for _ in range(1 + choose(7)):
        kind, at = choose(6), choose(max(0, len(data) - 1))
        if kind == 0 and data:
            data[at] ^= 1 << choose(7)
        elif kind == 1 and data:
            data[at] = choose(255)
        elif kind == 2:
            del data[at : at + 1 + choose(15)]
        elif kind == 3:
            data[at:at] = bytes(choose(255) for _ in range(1 + choose(3)))
        elif kind == 4:
            data[at:at] = _TOKENS[choose(len(_TOKENS) - 1)]
        elif kind == 5:
            data = data[:at]
        else:
            other = others[choose(len(others) - 1)]
            start = choose(max(0, len(other) - 1))
            data[at:at] = other[start : start + 1 + choose(63)]
    return bytes(data)


_TOKENS = tuple(
    token.encode("utf-8", "surrogatepass")
    for token in (
        *('"', "{", "}", "[", "]", ":", ",", "null", "NaN", "1e999", "-1", "99999999999999999999"),
        *(
            "\\ud800",
            "\x1b[31m",
            "\u202e",
            "\0",
            "\n",
            "\r",
            "\t",
            "  ",
            "../",
            "<<: *a",
            "&a",
            "*a",
        ),
        *("[" * 2000, '{"a":' * 2000, "9" * 4400),
    )
)

Encoder = Callable[[Any], bytes]
