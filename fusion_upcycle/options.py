"""The options of sparse upcycling: one home for names, defaults and checks."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.expert_init import EXPERT_INITS, FUNCTION_PRESERVING, ExpertInit
from fusion_upcycle.experts import Expert, generator_for
from fusion_upcycle.router_init import ROUTER_INITS, RouterInit, zeros

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

#: The value of an option that leaves the choice to the source and its family.
AUTO = "auto"

SHARED_EXPERTS = (AUTO, "copy", "zero", "none")

#: name, {"name": ..., option: value}, or a function (functools.partial for options)
InitSpec = str | Mapping[str, Any] | Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class UpcyclingOptions:
    """What decides the result of a sparse upcycling, bit for bit.

    Attributes:
        target: MoE family (`mixtral`, `qwen2_moe`, `qwen3_moe`, `flex_olmo`); `auto` goes by the
            source.
        num_experts: experts per MoE layer, N >= 2.
        experts_per_token: top-k, 1 <= k <= N.
        shared_expert: for families that have one: `copy` of the FFN, which takes half of the
            function; `zero`, with a zero `down_proj`; `none`, of width 0. `auto` is `copy` there
            and `none` elsewhere.
        expert_init: `copy`, `noise`, `drop`, `permute`, with options as in
            `{"name": "noise", "noise_std": 0.05}`, or a function of your own.
        router_init: `normal` or `zeros`, likewise.
        dtype: of the result; None keeps the source's (its config's `dtype`).
        seed: of every random draw.
        ignore_config_fields: unknown fields of the source's config.json that you know to be
            without effect; others are refused.
    """

    target: str = AUTO
    num_experts: int = 4
    experts_per_token: int = 2
    shared_expert: str = AUTO
    expert_init: InitSpec = "copy"
    router_init: InitSpec = "normal"
    dtype: str | torch.dtype | None = None
    seed: int = 0
    ignore_config_fields: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UpcyclingError(f"{name}={value!r} must be a whole number.")
        if not 2 <= self.num_experts <= 65536:
            raise UpcyclingError(
                f"num_experts={self.num_experts} must be 2 to 65536: a model with one expert is "
                "the dense model itself."
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UpcyclingError(
                f"experts_per_token={self.experts_per_token} must be 1 to "
                f"num_experts={self.num_experts}."
            )
        if self.shared_expert not in SHARED_EXPERTS:
            raise unknown("shared_expert", str(self.shared_expert), SHARED_EXPERTS)
        if isinstance(self.ignore_config_fields, str):
            raise UpcyclingError(
                f"ignore_config_fields={self.ignore_config_fields!r} must be a list: "
                f"[{self.ignore_config_fields}]."
            )
        set_field = partial(object.__setattr__, self)
        set_field("ignore_config_fields", tuple(self.ignore_config_fields))
        set_field("dtype", parse_dtype(self.dtype))
        set_field("expert_init", _initialiser(self.expert_init, EXPERT_INITS, "expert_init"))
        set_field("router_init", _initialiser(self.router_init, ROUTER_INITS, "router_init"))
        self._rehearse()

    @property
    def initialise_expert(self) -> ExpertInit:
        assert callable(self.expert_init)
        return self.expert_init

    @property
    def initialise_router_row(self) -> RouterInit:
        assert callable(self.router_init)
        return self.router_init

    @property
    def preserves_function(self) -> bool:
        """Whether each new expert computes its source expert's function."""
        return _function(self.initialise_expert) in FUNCTION_PRESERVING

    @property
    def zero_router(self) -> bool:
        return _function(self.initialise_router_row) is zeros

    def to_json(self) -> dict[str, Any]:
        """Everything needed to repeat the run, as plain data."""
        return {
            "target": self.target,
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "shared_expert": self.shared_expert,
            "expert_init": _describe(self.initialise_expert, EXPERT_INITS),
            "router_init": _describe(self.initialise_router_row, ROUTER_INITS),
            "dtype": None if self.dtype is None else dtype_name(self.dtype),
            "seed": self.seed,
            "ignore_config_fields": list(self.ignore_config_fields),
        }

    def _rehearse(self) -> None:
        """Run both initialisers once on toy tensors: bad options fail here, not hours later."""
        generator = generator_for(0, 0, 0, "rehearsal")
        toy = Expert(torch.ones(4, 3), torch.ones(4, 3), torch.ones(3, 4))
        expert = self.initialise_expert(toy, generator)
        if not all(torch.equal(weight, torch.ones_like(weight)) for weight in vars(toy).values()):
            raise UpcyclingError(
                f"expert_init {self.expert_init} writes into the expert that it is given, which is "
                "the source itself. Make new tensors instead."
            )
        if not isinstance(expert, Expert) or any(
            getattr(expert, part).shape != weight.shape for part, weight in vars(toy).items()
        ):
            raise UpcyclingError(
                f"expert_init {self.expert_init} must return an Expert of the source's shapes."
            )
        row = self.initialise_router_row(3, generator)
        if not isinstance(row, torch.Tensor) or row.shape != (3,):
            raise UpcyclingError(
                f"router_init {self.router_init} must return a row of shape [hidden_size]."
            )


def make_options(**options: Any) -> UpcyclingOptions:
    """`UpcyclingOptions`, with an unknown name answered by the nearest known one."""
    names = [field.name for field in fields(UpcyclingOptions)]
    for name in options:
        if name not in names:
            raise unknown("option", name, names)
    return UpcyclingOptions(**options)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A supported floating-point dtype from its name (`bfloat16`, `torch.bfloat16`) or itself."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def dtype_name(dtype: object) -> str:
    """`bfloat16` for `torch.bfloat16`, as in options, records and config.json."""
    return str(dtype).removeprefix("torch.")


def _initialiser(
    spec: InitSpec, registry: Mapping[str, Callable[..., Any]], kind: str
) -> Callable[..., Any]:
    """Resolve a spec to a function with its options bound; unknown names and options are errors."""
    options: dict[str, Any] = {}
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
    function = _function(function)
    known = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise unknown(f"option of {kind} {function.__name__}:", option, known or ["(none)"])
    return partial(function, **options) if options else function


def _function(initialiser: Callable[..., Any]) -> Callable[..., Any]:
    return initialiser.func if isinstance(initialiser, partial) else initialiser


def _describe(
    initialiser: Callable[..., Any], registry: Mapping[str, Callable[..., Any]]
) -> dict[str, Any]:
    """Name and all options, defaults included, so that a record does not depend on our defaults."""
    function = _function(initialiser)
    name = next((name for name, known in registry.items() if known is function), None)
    defaults = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    given = initialiser.keywords if isinstance(initialiser, partial) else {}
    return {"name": name or _dotted_name(function)} | defaults | given


def _dotted_name(function: Callable[..., Any]) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
