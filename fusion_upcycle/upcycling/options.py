"""The options of sparse upcycling: one home for names, defaults, meanings and checks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checks import (
    AUTO,
    DTYPES,
    InitSpec,
    bare_function,
    describe,
    dtype_name,
    is_number,
    make_initialiser,
    parse_dtype,
    require_flag,
    require_list,
    require_whole,
    told,
)
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.options import choice, config_group, make, registry

if TYPE_CHECKING:
    import torch

    from fusion_upcycle.expert_init import ExpertInit
    from fusion_upcycle.router_init import RouterInit

SHARED_EXPERTS = (AUTO, "copy", "zero", "none")
#: Router initialisers that do not draw row by row: of merging only.
ROUTINGS = ("token_choice", "expert_choice", "hash")
ROUTER_SCORES = (AUTO, "softmax", "sigmoid")
ROUTING_GROUPS = ("batch", "sequence")
PARTS = ("whole", "text")
CALIBRATED_ROUTERS = ("prototype",)
#: Files of `config/method/router_init/` that are another one's with options, for recipes.
PRESET_ROUTERS = ("normal_0_02",)
_NOT_LISTED = (*CALIBRATED_ROUTERS, *PRESET_ROUTERS)


@dataclass(frozen=True, kw_only=True)
class UpcyclingOptions:
    """What decides the result of a sparse upcycling, bit for bit.

    An initialiser is a name, a mapping as in `{"name": "noise", "noise_std": 0.05}`, or a function
    of your own (see `fusion_upcycle.expert_init`).

    Attributes:
        target: MoE family of the result; `auto` goes by the source.
        num_experts: experts per MoE layer, N >= 2.
        experts_per_token: experts that each token uses (top-k), 1 <= k <= N. With k = 1 and
            `normalize_topk_prob` the one weight is always 1, and the language model's loss teaches
            the router nothing.
        granularity: G, the number of shards that each FFN is cut into (arXiv 2410.07524). Expert e
            is shard `e mod G`, and the G experts of a group share a router row, so that top-k takes
            whole groups. N and k must be multiples of G for the function to be kept.
        expert_intermediate_size: width of an expert; by default the dense FFN's, divided by G.
            Another width than a whole fraction needs `expert_init=qwen2`.
        moe_layers: layers that become MoE layers: `all`, `every_N`, `last_N` or a list of indices.
            `every_N` are layers N-1, 2N-1, ... The family's config must be able to say it. With
            encoder and decoder both, either stack by itself; `{encoder: last_6, decoder: []}`, on
            the command line `encoder=last_6,decoder=none`, says them apart.
        routing: who chooses. `token_choice`: each token goes to its top-k experts. `expert_choice`:
            each expert takes the C * tokens / N tokens that it likes best (arXiv 2202.09368); for
            models in which a token sees those behind it, and of a T5 the encoder. `hash`: the
            token's id says its k experts, by a table that is drawn once (arXiv 2106.04426); there
            is no router. The last two need our own class (`target=sparse`).
        router_scores: of an expert: `softmax` over all, or `sigmoid` of its own; `auto` is the
            family's.
        capacity_factor: C of expert choice, experts per token on average. From C = N on every
            expert takes all; below, some tokens are taken by none, and get nothing.
        routing_group: of expert choice: the tokens among which experts choose, of the whole
            `batch`, or of each `sequence`. With `sequence` a row does not depend on its neighbours.
        normalize_topk_prob: divide the weights of a token's experts by their sum. Without it only a
            zero router is exact: router logits of std 1 make the routed experts' output 1.5 (4
            experts, top-2) to 4.4 times (60, top-4) too large at step 0, larger ones more. It is
            refused where a family always does it.
        shared_expert: an expert that every token uses, for families that have one. `copy` of the
            FFN, which takes half of the function; `zero`, with a zero `down_proj`; `none`, of width
            0. `auto` is the family's choice, `none` where it has none.
        shared_expert_intermediate_size: width of the shared expert; by default the dense FFN's. A
            wider one repeats neurons, their columns of `down_proj` divided by how often they are
            there.
        expert_init: initialiser of the experts. `copy` and `permute` keep the function.
        router_init: initialiser of the router's rows. `normal` is for training, by the size of the
            logits at step 0; `zeros` is a good check of a conversion, and a poor start.
        dtype: of the result; by default the source's.
        seed: of every random draw.
        ignore_config_fields: fields of the source's config.json that you know to be without effect,
            where they are refused. Fields that no class of transformers knows are said and left
            out; refused are those that one knows and the result cannot express, and those that are
            nearly the name of a known one.
        part: of a model of text and images: the `whole`, or its `text` model alone, the rest of
            which is left out. Other models are whole.

    Raises:
        UpcyclingError: an option out of range, or an unknown name.
    """

    target: str = choice(AUTO, registry("architectures/__init__.py", "ARCHITECTURES", AUTO))
    num_experts: int = 4
    experts_per_token: int = 2
    granularity: int = 1
    expert_intermediate_size: int | None = None
    moe_layers: str | Sequence[int] | Mapping[str, Any] = "all"
    routing: str = choice("token_choice", ROUTINGS)
    router_scores: str = choice(AUTO, ROUTER_SCORES)
    capacity_factor: float = 2.0
    routing_group: str = choice("batch", ROUTING_GROUPS)
    normalize_topk_prob: bool = True
    shared_expert: str = choice(AUTO, SHARED_EXPERTS)
    shared_expert_intermediate_size: int | None = None
    expert_init: InitSpec = choice("copy", config_group("expert_init"))
    router_init: InitSpec = choice("normal", config_group("router_init", _NOT_LISTED))
    dtype: "str | torch.dtype | None" = choice(None, DTYPES)
    seed: int = 0
    ignore_config_fields: Sequence[str] = ()
    part: str = choice("whole", PARTS)

    def __post_init__(self) -> None:
        from fusion_upcycle.expert_init import EXPERT_INITS
        from fusion_upcycle.router_init import ROUTER_INITS, with_default

        for name in ("num_experts", "experts_per_token", "seed", "granularity"):
            require_whole(name, getattr(self, name))
        for name in ("expert_intermediate_size", "shared_expert_intermediate_size"):
            if (value := getattr(self, name)) is not None:
                require_whole(name, value, at_least=1)
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
        if self.granularity < 1 or self.num_experts % self.granularity:
            raise UpcyclingError(
                f"granularity={self.granularity} must be at least 1 and divide "
                f"num_experts={self.num_experts}: every group of experts holds one of each shard."
            )
        if self.shared_expert not in SHARED_EXPERTS:
            raise unknown("shared_expert", str(self.shared_expert), SHARED_EXPERTS)
        for name, known in (
            ("routing", ROUTINGS),
            ("router_scores", ROUTER_SCORES),
            ("routing_group", ROUTING_GROUPS),
            ("part", PARTS),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        if not (is_number(self.capacity_factor) and self.capacity_factor > 0):
            raise UpcyclingError(
                f"capacity_factor={self.capacity_factor!r} must be a number above 0 (default 2)."
            )
        require_flag("normalize_topk_prob", self.normalize_topk_prob)
        require_list("ignore_config_fields", self.ignore_config_fields, str, "[FIELD, ...]")
        given = self.moe_layers
        for layers in given.values() if isinstance(given, Mapping) else [given]:
            if not isinstance(layers, str):
                require_list("moe_layers", layers, int, "all, every_N, last_N or [0, 2, ...]")
        set_field = partial(object.__setattr__, self)
        set_field("ignore_config_fields", tuple(self.ignore_config_fields))
        set_field("dtype", parse_dtype(self.dtype))
        set_field("moe_layers", _plain_layers(given, tuple))
        set_field("capacity_factor", float(self.capacity_factor))
        set_field("expert_init", make_initialiser(self.expert_init, EXPERT_INITS, "expert_init"))
        router = make_initialiser(self.router_init, ROUTER_INITS, "router_init")
        set_field("router_init", with_default(router))
        self._rehearse()

    def expert_initialiser(self, index: int) -> "ExpertInit":
        """The initialiser of expert `index` of a layer."""
        assert callable(self.expert_init)
        return told(self.expert_init, index=index, num_experts=self.num_experts)

    def router_initialiser(self, input_rms: float) -> "RouterInit":
        """The initialiser of a router's rows.

        Args:
            input_rms: root mean square of the router's inputs, over tokens and dimensions.
        """
        assert callable(self.router_init)
        return told(self.router_init, input_rms=input_rms)

    @property
    def preserves_function(self) -> bool:
        """Whether each new expert computes the function of what it is made from."""
        from fusion_upcycle.expert_init import FUNCTION_PRESERVING

        return bare_function(self.expert_init) in FUNCTION_PRESERVING  # type: ignore[arg-type]

    @property
    def gentler(self) -> tuple[str, ...]:
        """What would keep more of the source's function, in words."""
        from fusion_upcycle.expert_init import gentler_choices

        found = [*gentler_choices(bare_function(self.expert_init))]  # type: ignore[arg-type]
        if not self.normalize_topk_prob:
            found.append("{normalize_topk_prob=true}")
        if self.routing == "expert_choice" and self.capacity_factor < self.num_experts:
            found.append("a larger capacity_factor")
        if self.experts_per_token % self.granularity:
            found.append(f"{{experts_per_token={self.granularity}}}")
        return tuple(found)

    @property
    def shuffles_shards(self) -> bool:
        """Whether experts are cut from shuffled copies of the FFN."""
        from fusion_upcycle.expert_init import SHUFFLED_SHARDS

        return bare_function(self.expert_init) in SHUFFLED_SHARDS  # type: ignore[arg-type]

    @property
    def zero_router(self) -> bool:
        from fusion_upcycle.router_init import zeros

        return bare_function(self.router_init) is zeros  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Everything needed to repeat the run, as plain data."""
        from fusion_upcycle.expert_init import EXPERT_INITS
        from fusion_upcycle.router_init import ROUTER_INITS

        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        assert callable(self.expert_init) and callable(self.router_init)
        return plain | {
            "moe_layers": _plain_layers(self.moe_layers, list),
            "expert_init": describe(self.expert_init, EXPERT_INITS),
            "router_init": describe(self.router_init, ROUTER_INITS),
            "dtype": None if self.dtype is None else dtype_name(self.dtype),
            "ignore_config_fields": list(self.ignore_config_fields),
        }

    def _rehearse(self) -> None:
        """Run both initialisers once on toy tensors: bad options fail here, not hours later."""
        import torch

        from fusion_upcycle.experts import generator_for

        check_expert_init(self.expert_initialiser(0))
        row = self.router_initialiser(1.0)(3, generator_for(0, 0, 0, "rehearsal"))
        if not isinstance(row, torch.Tensor) or row.shape != (3,):
            raise UpcyclingError(
                f"router_init {self.router_init} must return a row of shape [hidden_size]."
            )


def _plain_layers(layers: Any, kind: type) -> Any:
    """`moe_layers` with its lists as `kind`."""
    if isinstance(layers, Mapping):
        return {stack: _plain_layers(inside, kind) for stack, inside in layers.items()}
    return layers if isinstance(layers, str) else kind(layers)


def check_expert_init(initialiser: "ExpertInit", parts: Collection[str] | None = None) -> None:
    """Run an expert initialiser once on a toy expert.

    Args:
        parts: of `Expert`, that the toy has; by default those of a gated FFN without biases, which
            every initialiser must know. A conversion whose experts have others asks again.

    Raises:
        UpcyclingError: bad options, a function that is no initialiser, or one that does not know
            experts of these parts.
    """
    import torch

    from fusion_upcycle.experts import EXPERT_PARTS, Expert, generator_for, part_shape

    toy = Expert.from_parts(
        {part: torch.ones(part_shape(part, 4, 3)) for part in parts or EXPERT_PARTS}
    )
    try:
        expert = initialiser(toy, generator_for(0, 0, 0, "rehearsal"))
    except UpcyclingError:
        raise
    except Exception as error:
        raise UpcyclingError(
            f"expert_init {initialiser} fails on an expert of {', '.join(toy.parts)}: {error!r}. "
            "Let it go by what is in expert.parts, or choose another expert_init."
        ) from error
    if not all(torch.equal(weight, torch.ones_like(weight)) for weight in toy.parts.values()):
        raise UpcyclingError(
            f"expert_init {initialiser} writes into the expert that it is given, which is "
            "the source itself. Make new tensors instead."
        )
    shapes = {part: weight.shape for part, weight in toy.parts.items()}
    if not isinstance(expert, Expert) or shapes != {
        part: weight.shape for part, weight in expert.parts.items()
    }:
        raise UpcyclingError(
            f"expert_init {initialiser} must return an Expert of the source's shapes, with the "
            f"same parts ({', '.join(shapes)}). Expert.map and dataclasses.replace keep what they "
            "are not told to change."
        )


def make_options(**options: Any) -> UpcyclingOptions:
    """`UpcyclingOptions`, with an unknown name answered by the nearest known one."""
    return make(UpcyclingOptions, options)
