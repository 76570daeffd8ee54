"""The options of expert upcycling: one home for names, defaults and checks."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle.architectures.routing import RoutingRule
from fusion_upcycle.checks import InitSpec, bare_function, describe, make_initialiser
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.expansion.router.fit import MIN_COPY_SHARE, STEPS, fit_rows
from fusion_upcycle.expansion.router.split import MIXED_SHARE, split_rows
from fusion_upcycle.expert_init import EXPERT_INITS, FUNCTION_PRESERVING, ExpertInit
from fusion_upcycle.experts import generator_for
from fusion_upcycle.importance.scores import METRICS
from fusion_upcycle.router_extension import ROUTER_EXTENSIONS, RouterExtension, bias
from fusion_upcycle.selection import NEEDS_SCORES, check_selection
from fusion_upcycle.upcycling.options import check_expert_init

#: Initialisers that make a copy of one expert; the others cut an FFN into parts.
COPY_INITS = {name: EXPERT_INITS[name] for name in ("copy", "noise", "drop", "permute", "svd")}

#: Router extensions that look at router inputs of calibration text -> their options and defaults.
CALIBRATED: dict[str, dict[str, Any]] = {
    "split": {"mixed_share": MIXED_SHARE},
    "fit": {"steps": STEPS, "min_copy_share": MIN_COPY_SHARE},
}


@dataclass(frozen=True, kw_only=True)
class ExpansionOptions:
    """What decides the result of an expansion, beside the scores and any calibration text.

    Attributes:
        num_experts: M, experts per MoE layer of the result, at least as many as there are; None
            goes by `multiplier`.
        multiplier: m, where `num_experts` is not said: M = m * E; None is 2.
        selection: which experts are duplicated: `uniform`, `greedy` or `random`, as in
            `fusion_upcycle.selection`.
        metric: the importance score that `greedy` goes by: a key of
            `fusion_upcycle.importance.scores.METRICS`.
        max_copies: most places of one expert, its original among them; not of `uniform`.
        expert_init: of the new copies (originals stay bit for bit): `copy`, `noise`, `drop`,
            `permute`, `svd`, with options as in `{"name": "noise", "noise_std": 0.05}`, or a
            function of your own.
        router_extension: how the router gets its new rows: `copy`, `noise`, `bias` (noise on the
            selection bias, for families that have one); or `split`, `fit`, which keep (nearly) the
            function and need calibration text (see `fusion_upcycle.expansion.router`).
            With options likewise: split has `mixed_share`; fit has `steps` and `min_copy_share`.
        experts_per_token: top-k of the result; None keeps the source's, and so the cost of a token.
        seed: of every random draw.
    """

    num_experts: int | None = None
    multiplier: int | None = None
    selection: str = "uniform"
    metric: str = "grad_squared"
    max_copies: int = 3
    expert_init: InitSpec = "copy"
    router_extension: "InitSpec | Calibrated" = "noise"
    experts_per_token: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts is not None and self.multiplier is not None:
            raise UpcyclingError(
                f"num_experts={self.num_experts} and multiplier={self.multiplier} both say how "
                "many experts there will be. Give one of them."
            )
        for name in ("num_experts", "multiplier", "experts_per_token"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UpcyclingError(f"{name}={value!r} must be a whole number, 1 or more.")
        if type(self.seed) is not int:
            raise UpcyclingError(f"seed={self.seed!r} must be a whole number.")
        check_selection(self.selection, self.max_copies)
        if self.metric not in METRICS:
            raise unknown("metric", str(self.metric), METRICS)
        set_field = partial(object.__setattr__, self)
        set_field("expert_init", make_initialiser(self.expert_init, COPY_INITS, "expert_init"))
        check_expert_init(self.initialise_copy)
        set_field("router_extension", _router_extension(self.router_extension))

    def total_experts(self, num_experts: int) -> int:
        """M for a source of `num_experts` = E experts."""
        return self.num_experts or num_experts * (self.multiplier or 2)

    @property
    def needs_scores(self) -> bool:
        return self.selection in NEEDS_SCORES

    @property
    def initialise_copy(self) -> ExpertInit:
        assert callable(self.expert_init)
        return self.expert_init

    @property
    def copies_compute_the_same(self) -> bool:
        """Whether each copy computes the function of its source expert."""
        return bare_function(self.initialise_copy) in FUNCTION_PRESERVING

    @property
    def calibrated(self) -> "Calibrated | None":
        """How the router's rows are made of calibration text; None where they are not."""
        return self.router_extension if isinstance(self.router_extension, Calibrated) else None

    @property
    def extend_router(self) -> RouterExtension:
        assert callable(self.router_extension)
        return self.router_extension

    @property
    def extends_by_bias(self) -> bool:
        """Whether the noise of the new experts is on the selection bias."""
        return self.calibrated is None and bare_function(self.extend_router) is bias

    def to_json(self) -> dict[str, Any]:
        """Everything needed to repeat the run, as plain data."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {
            "expert_init": describe(self.initialise_copy, COPY_INITS),
            "router_extension": {"name": self.calibrated.name} | self.calibrated.options
            if self.calibrated
            else describe(self.extend_router, ROUTER_EXTENSIONS),
        }


@dataclass(frozen=True)
class Calibrated:
    """A router extension that looks at router inputs: its name, and all options of it."""

    name: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        for option in self.options:
            if option not in CALIBRATED[self.name]:
                kind = f"option of router_extension {self.name}:"
                raise unknown(kind, str(option), CALIBRATED[self.name])
        object.__setattr__(self, "options", CALIBRATED[self.name] | self.options)
        steps = self.options.get("steps", 1)
        if type(steps) is not int or steps < 1:
            raise UpcyclingError(f"steps={steps!r} of router_extension=fit must be 1 or more.")
        self._rehearse()

    def _rehearse(self) -> None:
        """Make rows of a toy, so that an option out of range is said before any work."""
        generator = generator_for(0, 0, 0, "rehearsal")
        toy = torch.randn(2, 3, generator=generator), torch.randn(16, 3, generator=generator)
        if self.name == "split":
            split_rows(*toy, 2, RoutingRule(1), generator, **self.options)
        else:
            start = torch.cat([toy[0], -toy[0]])
            options = self.options | {"steps": 1}
            fit_rows(*toy, (0, 1, 0, 1), RoutingRule(1), generator, start_MD=start, **options)


def _router_extension(spec: Any) -> RouterExtension | Calibrated:
    if isinstance(spec, Calibrated):
        return spec
    if isinstance(spec, str) or (isinstance(spec, Mapping) and "name" in spec):
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("name")
        if name in CALIBRATED:
            return Calibrated(name, options)
        if name not in ROUTER_EXTENSIONS:
            raise unknown("router_extension", str(name), [*ROUTER_EXTENSIONS, *CALIBRATED])
    extension: RouterExtension = make_initialiser(spec, ROUTER_EXTENSIONS, "router_extension")
    toy = torch.arange(3.0)
    extended = extension(toy, (0, 1, 2, 0), generator_for(0, 0, 0, "rehearsal"))
    if not isinstance(extended, Tensor) or extended.shape != (4,):
        raise UpcyclingError(f"router_extension {spec!r} must return a row for each new expert.")
    return extension


def make_expansion_options(**options: Any) -> ExpansionOptions:
    """`ExpansionOptions`, with an unknown name answered by the nearest known one."""
    names = [field.name for field in fields(ExpansionOptions)]
    for name in options:
        if name not in names:
            raise unknown("option", name, names)
    return ExpansionOptions(**options)
