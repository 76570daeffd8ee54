"""Expert upcycling in memory: from a live MoE to a larger live MoE."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import class_name, empty_model, file_layout
from fusion_upcycle.architectures.moe_config import checked_config
from fusion_upcycle.checkpoint.tensors import StateDictSource
from fusion_upcycle.conversion.live import live_config
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.calibration import CALIBRATION_TOKENS
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.moments import check_state
from fusion_upcycle.expansion.options import ExpansionOptions, make_expansion_options
from fusion_upcycle.expansion.plan import plan_expansion
from fusion_upcycle.expansion.preparation import Inputs, Source, prepare
from fusion_upcycle.expansion.scoring import scores_for
from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.identity import live_identity
from fusion_upcycle.live.tensors import LiveTensorsOnCPU
from fusion_upcycle.verification.proof import Proof, resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Expanded:
    """A finished expansion in memory.

    Attributes:
        model: the larger MoE, on the source's device and in its mode.
        expansion: what it was made by.
        proof: what was proven.
        measured: scores that were measured for it.
    """

    model: "PreTrainedModel"
    expansion: Expansion
    proof: Proof
    measured: Importance | None

    @property
    def about(self) -> dict[str, Any]:
        """What a record says beside the plan and the options."""
        expansion = self.expansion
        return {"method": expansion.method, **expansion.about({}), **expansion.details}


def expand_model(
    moe: "PreTrainedModel",
    *,
    scores: str | Path | Importance | None = None,
    calibration: Mapping[str, Any] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    context_length: int | None = None,
    optimizer_state: str | Path | None = None,
    tokenizer: str | Path | None = None,
    verify: str = "auto",
    progress: bool = False,
    **options: Any,
) -> Expanded:
    """Grow a live MoE from E to M experts, top-k fixed; the same bits as `expand` of its folder.

    Args:
        moe: causal LM or backbone of a family that can be expanded; it is left as it is.
        scores, calibration, calibration_tokens, context_length: as `expand` takes them.
        optimizer_state: folder of the same model with AdamW's moments, which are checked here;
            `write_expanded_state` expands them.
        tokenizer: folder of the model's `tokenizer.json`, for calibration and the proof's tokens.
        verify: `layers` computes in float32; `logits` runs both models too; `none` leaves the
            result unproven; `auto` goes by the size.
        progress: show progress bars.
        options: fields of `ExpansionOptions`.

    Raises:
        UpcyclingError: model, option, scores or text that cannot be used.
        ProofError: the result is not what it claims to be.
    """
    chosen = make_expansion_options(**options)
    resolve_mode(verify, streaming=False)
    _, config = _check_live(moe)
    file = None if tokenizer is None else Path(tokenizer).expanduser() / "tokenizer.json"
    if optimizer_state is not None:
        check_state(Path(optimizer_state).expanduser(), config, live_identity(moe))
    prepared = prepare(
        Source(
            config,
            file,
            partial(plan_model, moe),
            lambda text: measure_importance(
                moe,
                text.texts,
                text.tokenizer_file,
                tokens=text.tokens,
                context_length=text.context_length,
                progress=progress,
            ),
        ),
        chosen,
        Inputs(scores, calibration, calibration_tokens, context_length),
        progress=progress,
    )
    expansion = prepared.expansion
    larger, proof = to_model(expansion, moe, verify=verify, tokenizer_file=file, progress=progress)
    return Expanded(larger, expansion, proof, prepared.measured)


def plan_model(
    moe: "PreTrainedModel", options: ExpansionOptions, importance: Importance | None = None
) -> Expansion:
    """Plan the expansion of a live model; its tensors' dtypes count, not that of its config.

    Args:
        importance: scores of this model, for selections that go by them.

    Raises:
        UpcyclingError: as `plan_expansion`; a model that is not in memory; scores of another model.
    """
    architecture, config = _check_live(moe)
    wanted = importance is not None and options.needs_scores
    scores, details = scores_for(options, importance, live_identity(moe) if wanted else None)
    source = LiveTensorsOnCPU(moe, architecture, file_layout(config).specs)
    return replace(plan_expansion(source, config, options, scores=scores), details=details)


def _check_live(moe: "PreTrainedModel") -> tuple[Architecture, "PreTrainedConfig"]:
    """Family and config of a model that is in memory and has the tensors of its class."""
    if getattr(moe, "config", None) is None:
        raise UpcyclingError(
            f"A {type(moe).__name__} is no model of transformers. Give the model that it wraps."
        )
    architecture = moe_family(moe.config)
    state = StateDictSource(moe.state_dict())  # refuses what is not in memory, not floating point
    config = checked_config(live_config(moe))
    expected = {name: tuple(t.shape) for name, t in empty_model(config).state_dict().items()}
    for name in sorted(expected.keys() | state.specs.keys()):
        shape = state.specs[name].shape if name in state.specs else None
        if shape == expected.get(name):
            continue
        if name not in expected:
            raise UpcyclingError(
                f"The model has {name}, for which {class_name(config)} has no place: it would be "
                "lost. Merge adapters into the weights (merge_and_unload), or remove it."
            )
        raise UpcyclingError(
            f"By its config the model has {name} {list(expected[name])}, but it "
            f"{f'is {list(shape)}' if shape else 'is not there'}: the config is of another model."
        )
    return architecture, config
