"""Large numbers as users write them, and as they are shown."""

import re

from fusion_upcycle.errors import UpcyclingError

_UNITS = "KMBT"
_NUMBER = re.compile(rf"(\d[\d_,]*(?:\.\d+)?(?:e\+?\d{{1,2}})?)\s*([{_UNITS}]?)", re.IGNORECASE)


def read_count(text: str, option: str) -> float:
    """`2T`, `1.5b`, `1e12` or `1_000_000` as a number.

    Args:
        text: digits, then K, M, B or T for a thousand to a trillion, if any.
        option: whose value it is, for the error.

    Raises:
        UpcyclingError: anything else, and 0.
    """
    match = _NUMBER.fullmatch(text.strip())
    number = 0.0 if match is None else float(match[1].replace(",", "").replace("_", ""))
    if match is None or not number:
        raise UpcyclingError(
            f"{option} {text} must be a number above 0, as in 5000, 20B, 1.5T or 1e12."
        )
    return number * 1000.0 ** (f" {_UNITS}".index(match[2].upper() or " "))


def short_count(count: float, billion: str = "B") -> str:
    """To four digits: 46703792128 is 46.70B (or 46.70G)."""
    for unit, suffix in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:#.4g}".rstrip(".") + suffix
    return f"{count:.0f}"
