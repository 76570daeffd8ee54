"""The options of continued pre-training: one home for names, defaults, meanings and checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fusion_upcycle.checks import AUTO, require_flag, require_list, require_number, require_whole
from fusion_upcycle.errors import UpcyclingError, setting, unknown
from fusion_upcycle.options import choice, make
from fusion_upcycle.training.schedule import SCHEDULES, Schedule

#: Kinds of parameters that can be frozen; see `fusion_upcycle.training.parameters`.
GROUPS = ("routers", "experts", "ffn", "attention", "embeddings", "norms", "others")
OBJECTIVES = (AUTO, "causal_lm", "masked_lm", "seq2seq", "image_classification", "clip")
ATTENTIONS = ("causal", "document")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp", "fsdp")

#: Options that may differ when a run is resumed: they change neither data nor formulas.
MAY_CHANGE = (
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
    "experts_implementation",
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "expert_parallel",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "save_moments",
    "validate_every",
    "peak_tflops",
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What decides a training run.

    Attributes:
        objective: what is learnt; `auto` is what the model's class is made for. `causal_lm`: the
            next token of packed texts. `masked_lm`: 15 % of the tokens of packed texts, masked.
            `seq2seq`: targets of inputs. `image_classification`: classes of images. `clip`: these,
            by a vision tower alone, against the frozen texts of its CLIP model.
        tokens: budget of `causal_lm` and `masked_lm`; by default the budget is `examples`. Rounded
            down to whole steps of `batch_size * context_length` tokens.
        examples: budget of the other objectives, in images or pairs of input and target; by default
            the budget is `tokens`. Rounded down to whole steps of `batch_size`.
        context_length: tokens of a window; of `seq2seq`, the most of an input, which is cut off
            there, and of a target, which must not be longer.
        batch_size: examples per optimizer step, on all devices together: windows of texts, pairs,
            or images.
        micro_batch_size: examples per forward pass of a device; by default all of its share. The
            rest is accumulated. It decides memory, not the result, but for the balance loss and for
            expert choice among all of a batch: see `fusion_upcycle.training.module`.
        attention: what a token sees: `causal`, the window up to it; `document`, its own document
            only, with positions that start again at each separator. Other objectives than
            `causal_lm` take the model's own.
        separator: text of the token that begins each document, for texts; by default the
            tokenizer's own that ends a sequence (`masked_lm`: that separates two).
        mixture: source of data -> weight, its share of the examples to 1/1000; by default every
            example of all sources is taken once before any comes again.
        seed: of the order of examples, of masks, and of dropout where the model has it.
        schedule: of the learning rate and the router losses: `three_phase`, `cosine`, `wsd` or
            `constant`. `three_phase`: 5 % of the budget at 0.1 x rate, 5 x balance, 2 x z; 70 % at
            1; 25 % at 0.1, 0.5, 0.5. `cosine`: linear warm-up, then half a cosine to `final_share`.
            `wsd`: linear warm-up, constant, linear decay to `final_share`. `constant`: 1
            throughout. The last three leave balance and z at 1.
        warmup_share: of the budget, for `cosine` and `wsd`.
        decay_share: of the budget, for `wsd`.
        final_share: of the learning rate, at the end of `cosine` and `wsd`.
        learning_rate: of AdamW.
        router_learning_rate: of the routers; by default `learning_rate`, but at most 0.005 of the
            root mean square of their weights at step 0. A larger one is warned of: rows that are
            moved by their own size in some tens of steps send tokens to other experts all the time.
            All-zero routers have no such bound.
        weight_decay: of matrices; norms and biases have none.
        betas: of AdamW.
        gradient_clip: largest norm of all gradients together; 0 does not clip.
        balance_weight: of the Switch balance loss, per layer then averaged. Without effect on a
            dense model, like all that concerns routers.
        z_weight: of the router z-loss.
        bias_update_rate: of loss-free balancing (0.001 in its paper), for families with a selection
            bias; 0 is off.
        bias_update_after: share of the budget in which loss-free balancing holds the selection bias
            still. Meant for an MoE that was grown; in `docs/growing.md` it brought nothing.
        freeze: groups of parameters that are not trained: `routers`, `experts`, `ffn`, `attention`,
            `embeddings`, `norms`, `others`. Experts only is `[routers, ffn, attention, embeddings,
            norms, others]`.
        precision: `32-true`, `bf16-mixed` or `bf16-true`. `bf16-mixed` is float32 weights and
            bfloat16 arithmetic: FSDP2's mixed precision with `strategy=fsdp`, else autocast, which
            leaves experts of grouped_mm in float32 and is refused for them; in `bf16-true` a
            small learning rate is lost in rounding.
        activation_checkpointing: recompute each layer in the backward pass: less memory, more time.
        compile: torch.compile the model; not with `strategy=fsdp`.
        experts_implementation: `grouped_mm`, `batched_mm` or `eager`; by default transformers'
            choice.
        accelerator: Lightning's: `auto`, `cpu`, `cuda` or another.
        devices: per node; start as many processes with torchrun, or, but for `strategy=fsdp`, let
            Lightning.
        num_nodes: Lightning's.
        strategy: `auto` (one device, else ddp), `ddp` or `fsdp`. With `fsdp` (FSDP2) each process
            loads, trains and saves its part of a folder's model, and nobody holds the whole.
        expert_parallel: with `strategy=fsdp`, processes among which a layer's experts are dealt
            out. Tokens go to them then, where else weights come to the tokens.
        log_every: steps between entries of the log; 0 leaves it at the end of the run, which always
            counts.
        checkpoint_every: steps between checkpoints, of which the last two are kept; 0 leaves it at
            the end.
        checkpoint_minutes: minutes after which one is saved in between; 0 does not look at the
            time. What it takes to write one (weights and moments in float32) is lost each time.
        save_moments: whether the result's folder has AdamW's moments too (`optimizer_state`), 8
            bytes for each trained parameter.
        validate_every: steps between validations; 0 leaves it at the end.
        peak_tflops: of a device in bfloat16, for the share of it that is used (MFU); by default
            what is known of the GPU. Without one, and for images and pairs, no share is shown.

    Raises:
        UpcyclingError: an option out of range, an unknown name, or options that do not fit each
            other.
    """

    objective: str = choice(AUTO, OBJECTIVES)
    tokens: int | None = None
    examples: int | None = None
    context_length: int = 1024
    batch_size: int = 8
    micro_batch_size: int | None = None
    attention: str = choice("causal", ATTENTIONS)
    separator: str | None = None
    mixture: Mapping[str, float] | None = None
    seed: int = 0
    schedule: str = choice("three_phase", SCHEDULES)
    warmup_share: float = 0.05
    decay_share: float = 0.2
    final_share: float = 0.1
    learning_rate: float = 2e-5
    router_learning_rate: float | None = None
    weight_decay: float = 0.1
    betas: Sequence[float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    balance_weight: float = 0.01
    z_weight: float = 0.001
    bias_update_rate: float = 0.0
    bias_update_after: float = 0.0
    freeze: Sequence[str] = choice((), GROUPS)
    precision: str = choice("32-true", PRECISIONS)
    activation_checkpointing: bool = False
    compile: bool = False
    experts_implementation: str | None = None
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = choice("auto", STRATEGIES)
    expert_parallel: int = 1
    log_every: int = 10
    checkpoint_every: int = 500
    checkpoint_minutes: float = 30.0
    save_moments: bool = False
    validate_every: int = 0
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("context_length", "batch_size", "devices", "num_nodes", "expert_parallel"):
            require_whole(name, getattr(self, name), at_least=1)
        for name in ("tokens", "examples", "micro_batch_size"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), at_least=1)
        for name in ("seed", "log_every", "checkpoint_every", "validate_every"):
            require_whole(name, getattr(self, name), at_least=0)
        for name in ("activation_checkpointing", "compile", "save_moments"):
            require_flag(name, getattr(self, name))
        for name, choices in (
            ("objective", OBJECTIVES),
            ("attention", ATTENTIONS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("strategy", STRATEGIES),
        ):
            if getattr(self, name) not in choices:
                raise unknown(name, str(getattr(self, name)), choices)
        self._check_numbers()
        require_list("freeze", self.freeze, str, "a list of groups, as in [embeddings, norms]")
        for group in self.freeze:
            if group not in GROUPS:
                raise unknown("group in freeze:", str(group), GROUPS)
        object.__setattr__(self, "freeze", tuple(self.freeze))
        object.__setattr__(self, "betas", tuple(self.betas))
        require_number("checkpoint_minutes", self.checkpoint_minutes)
        if self.separator is not None and (not isinstance(self.separator, str) or self.examples):
            raise UpcyclingError(
                f"separator={self.separator!r} is the text of a token that begins a text, whose "
                "budget is tokens. Leave it out for examples."
            )
        if (self.tokens is None) == (self.examples is None):
            raise UpcyclingError(
                f"tokens={self.tokens} and examples={self.examples}: one of the two must be given, "
                "tokens for texts, examples for images and pairs of input and target."
            )
        if self.budget < self.per_step:
            of_tokens = self.unit == "tokens"
            windows = f" windows of context_length={self.context_length}" if of_tokens else ""
            raise UpcyclingError(
                f"{self.unit}={self.budget} is less than one step of batch_size={self.batch_size}"
                f"{windows}: give {setting(self.unit, self.per_step)} or more, or a smaller step."
            )
        self._check_strategy()
        world = self.devices * self.num_nodes
        share = self.batch_size // world
        if self.batch_size % world or share % (self.micro_batch_size or share):
            raise UpcyclingError(
                f"batch_size={self.batch_size} cannot be divided evenly among {world} "
                f"device(s) in parts of micro_batch_size={self.micro_batch_size}: choose a "
                "batch_size that is a multiple of devices * num_nodes * micro_batch_size."
            )

    def _check_strategy(self) -> None:
        if self.expert_parallel > 1 and self.strategy != "fsdp":
            raise UpcyclingError(
                f"expert_parallel={self.expert_parallel} deals experts out among processes, which "
                f"strategy={self.strategy} cannot. Pass {setting('strategy', 'fsdp')}, or "
                f"{setting('expert_parallel', 1)}."
            )
        if self.compile and self.strategy == "fsdp":
            raise UpcyclingError(
                "compile with strategy=fsdp is not tried here. Pass "
                f"{setting('compile', False)}, or {setting('strategy', 'ddp')}."
            )

    def _check_numbers(self) -> None:
        require_number("learning_rate", self.learning_rate, above=0.0)
        if self.router_learning_rate is not None:
            require_number("router_learning_rate", self.router_learning_rate, above=0.0)
        if self.peak_tflops is not None:
            require_number("peak_tflops", self.peak_tflops, above=0.0)
        for name in ("weight_decay", "gradient_clip", "balance_weight", "z_weight"):
            require_number(name, getattr(self, name))
        require_number("bias_update_rate", self.bias_update_rate)
        for name in ("warmup_share", "decay_share", "final_share", "bias_update_after"):
            require_number(name, getattr(self, name), at_most=1.0)
        if self.warmup_share + (self.decay_share if self.schedule == "wsd" else 0.0) > 1:
            raise UpcyclingError(
                f"warmup_share={self.warmup_share} and decay_share={self.decay_share} together are "
                "more than the whole budget, 1. Lower one."
            )
        if self.bias_update_after and not self.bias_update_rate:
            raise UpcyclingError(
                f"bias_update_after={self.bias_update_after} holds still what "
                "bias_update_rate=0 never moves. Pass "
                f"{setting('bias_update_rate', 0.001)}, or {setting('bias_update_after', 0)}."
            )
        if not isinstance(self.betas, list | tuple) or len(self.betas) != 2:
            raise UpcyclingError(f"betas={self.betas!r} must be two numbers, as in [0.9, 0.95].")
        for beta in self.betas:
            require_number("betas", beta, below=1.0)
        if not isinstance(self.mixture or {}, Mapping):
            raise UpcyclingError(f"mixture={self.mixture!r} must be a mapping, {{source: weight}}.")
        for source, weight in (self.mixture or {}).items():
            require_number(f"mixture.{source}", weight, above=0.0)

    @property
    def unit(self) -> str:
        """What the budget is counted in: `tokens` or `examples`."""
        return "examples" if self.tokens is None else "tokens"

    @property
    def budget(self) -> int:
        """In units."""
        budget = self.examples if self.tokens is None else self.tokens
        assert budget is not None
        return budget

    @property
    def per_step(self) -> int:
        """Units of a step."""
        return self.batch_size * (1 if self.tokens is None else self.context_length)

    @property
    def steps(self) -> int:
        return self.budget // self.per_step

    @property
    def curve(self) -> Schedule:
        return Schedule(self.schedule, self.warmup_share, self.decay_share, self.final_share)

    def to_json(self) -> dict[str, Any]:
        """Everything needed to repeat the run, as plain data."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {
            "freeze": list(self.freeze),
            "betas": list(self.betas),
            "mixture": None if self.mixture is None else dict(self.mixture),
        }


def make_training_options(**options: Any) -> TrainingOptions:
    """`TrainingOptions`, with an unknown name answered by the nearest known one."""
    return make(TrainingOptions, options)
