"""The options of MoE merging: one home for names, defaults, meanings and checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checks import (
    InitSpec,
    bare_function,
    describe,
    make_initialiser,
    require_flag,
    require_whole,
)
from fusion_upcycle.errors import UpcyclingError, setting, unknown
from fusion_upcycle.options import choice, config_group, make, same_as
from fusion_upcycle.registry import Registry
from fusion_upcycle.upcycling.options import PRESET_ROUTERS, UpcyclingOptions

if TYPE_CHECKING:
    import torch

SHARED = ("average", "base")
VOCABULARY = ("base", "largest")
#: Options that a conversion does not know.
_OWN = (
    "shared",
    "vocabulary",
    "base_expert",
    "experts_per_model",
    "calibration_tokens",
    "statistics",
)


@dataclass(frozen=True, kw_only=True)
class MergingOptions:
    """What decides the result of a merge, beside the models and their calibration texts.

    Initialisers are given as in `UpcyclingOptions`.

    Attributes:
        shared: where all that is not an FFN of an MoE layer comes from: `average` over the models
            that give experts, or `base`.
        vocabulary: rows, tokenizer and chat template where numbers of token ids differ: of the
            `base` (or first) model, or of the `largest`.
        base_expert: the base model gives experts too, and so counts in the average.
        experts_per_model: copies of each model's FFN, 1 or more. More than one is for training;
            with `router_init=prototype` the copies share a row.
        router_init: initialiser of the router's rows. `prototype` looks at each model's own texts,
            and works at once; the others are there to be trained.
        calibration_tokens: of each model's own texts that `prototype` looks at, 256 or more.
        statistics: keep what the prototype router was made of, a D x D matrix per MoE layer, beside
            the model, for `add-expert`.
        experts_per_token, target, moe_layers, normalize_topk_prob, expert_init, dtype, seed,
        ignore_config_fields, part: as in `UpcyclingOptions`.

    Raises:
        UpcyclingError: an option out of range, or an unknown name.
    """

    shared: str = choice("average", SHARED)
    vocabulary: str = choice("base", VOCABULARY)
    base_expert: bool = False
    experts_per_model: int = 1
    experts_per_token: int = same_as(UpcyclingOptions, "experts_per_token")
    router_init: InitSpec = choice("normal", config_group("router_init", PRESET_ROUTERS))
    calibration_tokens: int = 4096
    statistics: bool = False
    target: str = same_as(UpcyclingOptions, "target")
    moe_layers: str | Sequence[int] = same_as(UpcyclingOptions, "moe_layers")
    normalize_topk_prob: bool = same_as(UpcyclingOptions, "normalize_topk_prob")
    expert_init: InitSpec = same_as(UpcyclingOptions, "expert_init")
    dtype: "str | torch.dtype | None" = same_as(UpcyclingOptions, "dtype")
    seed: int = same_as(UpcyclingOptions, "seed")
    ignore_config_fields: Sequence[str] = same_as(UpcyclingOptions, "ignore_config_fields")
    part: str = same_as(UpcyclingOptions, "part")

    def __post_init__(self) -> None:
        from fusion_upcycle.router_init import with_default

        if self.shared not in SHARED:
            raise unknown("shared", str(self.shared), SHARED)
        if self.vocabulary not in VOCABULARY:
            raise unknown("vocabulary", str(self.vocabulary), VOCABULARY)
        require_flag("base_expert", self.base_expert)
        require_flag("statistics", self.statistics)
        require_whole("experts_per_model", self.experts_per_model, at_least=1)
        require_whole("calibration_tokens", self.calibration_tokens, at_least=256)
        require_whole("experts_per_token", self.experts_per_token, at_least=1)
        set_field = partial(object.__setattr__, self)
        router = make_initialiser(self.router_init, _routers(), "router_init")
        set_field("router_init", with_default(router))
        if self.prototype_router:  # bad options fail here, not after calibration
            import torch

            from fusion_upcycle.merging.prototypes import Moments

            toy = Moments(torch.eye(2, dtype=torch.float64), torch.eye(2))
            self.router_init(toy)  # type: ignore[operator]
        self.for_models(max(2, self.experts_per_token))  # the others, before any model is loaded
        if self.statistics:
            self._check_statistics()

    @property
    def prototype_router(self) -> bool:
        """Whether the router comes from calibration texts."""
        from fusion_upcycle.merging.prototypes import prototype

        return bare_function(self.router_init) is prototype  # type: ignore[arg-type]

    def _check_statistics(self) -> None:
        """An expert can be added where the model's experts are its source models' FFNs."""
        from fusion_upcycle.expert_init import copy

        conversion = self.for_models(max(2, self.experts_per_token))
        needed = [
            ("router_init", "prototype", self.prototype_router),
            ("experts_per_model", 1, self.experts_per_model == 1),
            ("expert_init", "copy", conversion.expert_init is copy),
            ("normalize_topk_prob", True, self.normalize_topk_prob),
        ]
        if lacking := [setting(name, value) for name, value, there in needed if not there]:
            raise UpcyclingError(
                f"{setting('statistics', True)} keeps what an expert can be added with later, "
                f"which takes {' '.join(lacking)}. Give that, or leave statistics out."
            )

    def for_models(self, count: int) -> UpcyclingOptions:
        """The options of the conversion that merges `count` models that give experts."""
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OWN}
        if self.prototype_router:  # its rows are not drawn one by one
            del same["router_init"]
        # A shared expert beside experts of different models would be no model's own.
        return UpcyclingOptions(
            **same, num_experts=count * self.experts_per_model, shared_expert="none"
        )

    def to_json(self, count: int) -> dict[str, Any]:
        """Everything needed to repeat the merge of `count` models, as plain data."""
        assert callable(self.router_init)
        return (
            self.for_models(count).to_json()
            | {name: getattr(self, name) for name in _OWN}
            | {"router_init": describe(self.router_init, _routers())}
        )


def make_merging_options(**options: Any) -> MergingOptions:
    """`MergingOptions`, with an unknown name answered by the nearest known one."""
    return make(MergingOptions, options)


def _routers() -> Registry[Callable[..., Any]]:
    from fusion_upcycle.merging.prototypes import prototype
    from fusion_upcycle.router_init import ROUTER_INITS

    return ROUTER_INITS.plus(prototype=prototype)
