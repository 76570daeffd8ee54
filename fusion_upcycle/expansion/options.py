"""The options of expert upcycling: one home for names, defaults, meanings and checks."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checks import InitSpec, bare_function, describe, make_initialiser
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.options import choice, config_group, make, registry, same_as
from fusion_upcycle.registry import Registry
from fusion_upcycle.upcycling.options import UpcyclingOptions, check_expert_init

if TYPE_CHECKING:
    from fusion_upcycle.expansion.router.extension import Calibrated
    from fusion_upcycle.expert_init import ExpertInit
    from fusion_upcycle.router_extension import RouterExtension

#: Expert initialisers that cut an FFN into parts, and make no copy of an expert.
CUTTING = ("subset", "qwen2")


@dataclass(frozen=True, kw_only=True)
class ExpansionOptions:
    """What decides the result of an expansion, beside the scores and any calibration text.

    Initialisers and router extensions are given as in `UpcyclingOptions`.

    Attributes:
        num_experts: M, experts per MoE layer of the result; by default `multiplier` decides. At
            least as many as there are.
        multiplier: m, M = m * E where `num_experts` is not given; by default 2.
        selection: which experts are duplicated, and how often. `uniform`: all, as equally as M
            allows; `greedy`: the best by `metric`, up to `max_copies`; `control`: the copy counts
            of `greedy` on random experts, what it is to be compared with; `random`: each copy drawn
            with equal probability.
        metric: importance score that `greedy` goes by: `grad_squared`, `saliency`, `weight_norm` or
            `load`.
        max_copies: most places of one expert, its original among them; not of `uniform`.
        expert_init: initialiser of the new copies; the originals stay bit for bit.
        router_extension: how the router gets its new rows. `copy`: those of the source expert;
            `noise`: with noise; `bias`: noise on the selection bias, for families that have one;
            `split` and `fit`: such that the function is nearly kept, from calibration text.
        experts_per_token: top-k of the result; by default the source's, and so the cost of a token.
        seed: as in `UpcyclingOptions`.

    Raises:
        UpcyclingError: an option out of range, an unknown name, or two that say the same.
    """

    num_experts: int | None = None
    multiplier: int | None = None
    selection: str = choice("uniform", registry("selection.py", "SELECTIONS"))
    metric: str = choice("grad_squared", registry("importance/scores.py", "METRICS"))
    max_copies: int = 3
    expert_init: InitSpec = choice("copy", config_group("expert_init", CUTTING))
    router_extension: "InitSpec | Calibrated" = choice("noise", config_group("router_extension"))
    experts_per_token: int | None = None
    seed: int = same_as(UpcyclingOptions, "seed")

    def __post_init__(self) -> None:
        from fusion_upcycle.expansion.router.extension import find_router_extension
        from fusion_upcycle.importance.scores import METRICS
        from fusion_upcycle.selection import check_selection

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
        if self.metric not in [*METRICS]:  # also what cannot be a key
            raise unknown("metric", str(self.metric), METRICS)
        set_field = partial(object.__setattr__, self)
        set_field("expert_init", make_initialiser(self.expert_init, copy_inits(), "expert_init"))
        check_expert_init(self.initialise_copy)
        set_field("router_extension", find_router_extension(self.router_extension))

    def total_experts(self, num_experts: int) -> int:
        """M for a source of `num_experts` = E experts."""
        return self.num_experts or num_experts * (self.multiplier or 2)

    @property
    def needs_scores(self) -> bool:
        from fusion_upcycle.selection import NEEDS_SCORES

        return self.selection in NEEDS_SCORES

    @property
    def advice(self) -> str | None:
        """What a user of this selection is told with the result."""
        from fusion_upcycle.selection import CONTROL_ADVICE

        return CONTROL_ADVICE if self.needs_scores else None

    @property
    def initialise_copy(self) -> "ExpertInit":
        assert callable(self.expert_init)
        return self.expert_init

    @property
    def copies_compute_the_same(self) -> bool:
        """Whether each copy computes the function of its source expert."""
        from fusion_upcycle.expert_init import FUNCTION_PRESERVING

        return bare_function(self.initialise_copy) in FUNCTION_PRESERVING

    @property
    def gentler(self) -> tuple[str, ...]:
        """What would keep more of the source's function, in words."""
        from fusion_upcycle.expert_init import gentler_choices

        split = () if self.calibrated else ("{router_extension=split}",)
        return (*gentler_choices(bare_function(self.initialise_copy)), *split)

    @property
    def calibrated(self) -> "Calibrated | None":
        """How the router's rows are made of calibration text; None where they are not."""
        from fusion_upcycle.expansion.router.extension import Calibrated

        return self.router_extension if isinstance(self.router_extension, Calibrated) else None

    @property
    def extend_router(self) -> "RouterExtension":
        assert callable(self.router_extension)
        return self.router_extension

    @property
    def extends_by_bias(self) -> bool:
        """Whether the noise of the new experts is on the selection bias."""
        from fusion_upcycle.router_extension import bias

        return self.calibrated is None and bare_function(self.extend_router) is bias

    def to_json(self) -> dict[str, Any]:
        """Everything needed to repeat the run, as plain data."""
        from fusion_upcycle.router_extension import ROUTER_EXTENSIONS

        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {
            "expert_init": describe(self.initialise_copy, copy_inits()),
            "router_extension": {"name": self.calibrated.name} | self.calibrated.options
            if self.calibrated
            else describe(self.extend_router, ROUTER_EXTENSIONS),
        }


def copy_inits() -> Registry[Callable[..., Any]]:
    """Expert initialisers that make a copy of one expert."""
    from fusion_upcycle.expert_init import EXPERT_INITS

    return EXPERT_INITS.without(*CUTTING)


def make_expansion_options(**options: Any) -> ExpansionOptions:
    """`ExpansionOptions`, with an unknown name answered by the nearest known one."""
    return make(ExpansionOptions, options)
