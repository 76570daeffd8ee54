"""Options as users give them: numbers, names, dtypes and initialisers, checked and put into words.

Light: nothing here imports torch before it is needed, so that `--help` is quick.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.registry import Registry

if TYPE_CHECKING:
    import torch

#: name, {"name": ..., option: value}, or a function (functools.partial for options)
InitSpec = str | Mapping[str, Any] | Callable[..., Any]


#: Keyword parameters that the conversion gives to an initialiser that has them: which of how many
#: experts it makes, and how large the router's inputs are.
TOLD = ("index", "num_experts", "input_rms")


def make_initialiser(
    spec: InitSpec, registry: Registry[Callable[..., Any]], kind: str
) -> Callable[..., Any]:
    """Resolve a spec to a function with its options bound.

    Raises:
        UpcyclingError: no name, mapping or function; an unknown name or option.
    """
    options: dict[str, Any] = {}
    if not isinstance(spec, str | Mapping) and not callable(spec):
        raise UpcyclingError(
            f"{kind}={spec!r} must be a name ({', '.join(registry)}), a mapping "
            "{name: ..., option: value}, or a function."
        )
    if callable(spec):
        function = spec
    else:
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UpcyclingError(f"{kind}={spec!r} needs a 'name': one of {', '.join(registry)}.")
        if name not in registry:
            raise unknown(kind, name, registry)
        function = registry[name]
    options |= function.keywords if isinstance(function, partial) else {}
    function = bare_function(function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise UpcyclingError(
            f"{kind}={spec!r} tells nothing of its parameters. Wrap it in a Python function."
        ) from error
    known = [
        p.name
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in TOLD
    ]
    for option in map(str, options):
        if option not in known:
            raise unknown(f"option of {kind} {function.__name__}:", option, known or ["(none)"])
    return partial(function, **options) if options else function


def bare_function(initialiser: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the options that are bound to it."""
    return initialiser.func if isinstance(initialiser, partial) else initialiser


def told(initialiser: Callable[..., Any], **facts: float) -> Callable[..., Any]:
    """`initialiser` told those of `facts`, by the names in `TOLD`, that it wants to know."""
    known = inspect.signature(bare_function(initialiser)).parameters
    wanted = {name: value for name, value in facts.items() if name in known}
    return partial(initialiser, **wanted) if wanted else initialiser


def describe(
    initialiser: Callable[..., Any], registry: Registry[Callable[..., Any]]
) -> dict[str, Any]:
    """Name and all options, defaults included, so that a record does not depend on our defaults."""
    function = bare_function(initialiser)
    name = registry.name_of(function)
    defaults = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in TOLD
    }
    given = initialiser.keywords if isinstance(initialiser, partial) else {}
    return {"name": name or _dotted_name(function)} | defaults | given


def _dotted_name(function: Callable[..., Any]) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def is_number(value: object) -> bool:
    """Whether an option, which may come from a command line as text, is a finite number.

    A whole one from 2^63 on is none: nothing here counts so far, and no float or tensor takes it.
    """
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


DTYPES = ("float64", "float32", "float16", "bfloat16")


#: The value of an option that leaves the choice to the source and its family.
AUTO = "auto"


def parse_dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | None":
    """A supported floating-point dtype from its name (`bfloat16`, `torch.bfloat16`) or itself.

    Raises:
        UpcyclingError: an unknown name, or no floating-point dtype.
    """
    if dtype is None:
        return None
    import torch

    name = dtype_name(dtype)
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def dtype_name(dtype: object) -> str:
    """`bfloat16` for `torch.bfloat16`, as in options, records and config.json."""
    return str(dtype).removeprefix("torch.")


def require_whole(name: str, value: object, *, at_least: int | None = None) -> None:
    """Refuse all but whole numbers; true and false are none.

    Raises:
        UpcyclingError: no whole number, or one below `at_least`.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (at_least is not None and value < at_least):  # type: ignore[operator]
        bound = "" if at_least is None else f", {at_least} or more"
        raise UpcyclingError(f"{name}={value!r} must be a whole number{bound}.")


def require_flag(name: str, value: object) -> None:
    """Refuse all but true and false: the text "false" would count as true.

    Raises:
        UpcyclingError: something else.
    """
    if not isinstance(value, bool):
        raise UpcyclingError(f"{name}={value!r} must be true or false.")


def require_list(name: str, value: object, kind: type, example: str) -> None:
    """Refuse all but lists of items of one type.

    Args:
        example: what it must be, for the error.

    Raises:
        UpcyclingError: something else.
    """
    if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
        raise UpcyclingError(f"{name}={value!r} must be {example}.")


def require_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Refuse all but numbers within bounds; of 0 or more where `above` is None.

    Raises:
        UpcyclingError: no number, or one out of bounds.
    """
    fits = is_number(value) and (value > above if above is not None else value >= 0)
    fits = fits and (below is None or value < below) and (at_most is None or value <= at_most)
    if not fits:
        bounds = f"above {above:g}" if above is not None else "0 or more"
        bounds += f", below {below:g}" if below is not None else ""
        bounds += f", at most {at_most:g}" if at_most is not None else ""
        raise UpcyclingError(f"{name}={value!r} must be a number, {bounds}.")


def require_folder(name: str, path: Path) -> None:
    """Refuse, before hours of work, a place where no folder can be made.

    Raises:
        UpcyclingError: a file is in the way.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UpcyclingError(
            f"{name}={path} must be a folder, and {nearest} is a file. Choose another one."
        )
