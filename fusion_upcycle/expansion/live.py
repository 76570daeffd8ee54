"""Expert upcycling in memory: from a live MoE to a larger live MoE."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.base import Architecture
from fusion_upcycle.architectures.layout import class_name, empty_model, file_layout
from fusion_upcycle.architectures.moe_config import checked_config
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, StateDictSource
from fusion_upcycle.conversion.live import fill_live
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.moments import check_state
from fusion_upcycle.expansion.options import ExpansionOptions, make_expansion_options
from fusion_upcycle.expansion.plan import plan_expansion
from fusion_upcycle.expansion.proof import prove_expansion
from fusion_upcycle.expansion.router.calibrate import (
    CALIBRATION_TOKENS,
    calibrate_router,
    check_calibrated,
    read_calibration,
)
from fusion_upcycle.expansion.run import describe_expansion
from fusion_upcycle.expansion.scoring import load_scores, measured_scores, scores_for
from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.identity import live_identity
from fusion_upcycle.live.tensors import LiveTensors
from fusion_upcycle.verification import Proof, resolve_mode, sample_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Expanded:
    """A finished expansion in memory.

    Attributes:
        model: the larger MoE, on the source's device and in its mode.
        expansion: what it was made by.
        proof: what was proven.
        about: what a record says beside the plan and the options.
        measured: scores that were measured for it.
    """

    model: "PreTrainedModel"
    expansion: Expansion
    proof: Proof
    about: dict[str, Any]
    measured: Importance | None


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
    resolve_mode(verify, streaming=False, total_bytes=0)
    _, config = _check_live(moe)
    file = None if tokenizer is None else Path(tokenizer).expanduser() / "tokenizer.json"
    given = load_scores(scores)
    state = None if optimizer_state is None else Path(optimizer_state).expanduser()
    if state is not None:
        check_state(state, config, live_identity(moe))
    text = read_calibration(
        calibration,
        chosen,
        tokenizer_file=file,
        config=moe.config,
        tokens=calibration_tokens,
        context_length=context_length,
        scored=given is not None,
    )
    measured = measured_scores(
        chosen,
        given,
        text,
        plan=lambda options: _plan_live(moe, options, None)[0],
        measure=lambda text: measure_importance(
            moe,
            text.texts,
            text.tokenizer_file,
            tokens=text.tokens,
            context_length=text.context_length,
            progress=progress,
        ),
    )
    expansion, about = _plan_live(moe, chosen, given or measured)
    if text is None:
        expansion.check_router()
    check_calibrated(expansion)
    expansion, calibrated = calibrate_router(expansion, text, progress=progress)
    mode = resolve_mode(verify, streaming=False, total_bytes=expansion.total_bytes)
    larger, proof = build_live_expansion(expansion, moe, mode=mode, tokenizer_file=file)
    about = describe_expansion(expansion) | about | calibrated
    return Expanded(larger, expansion, proof, about, measured)


def _plan_live(
    moe: "PreTrainedModel", options: ExpansionOptions, importance: Importance | None
) -> tuple[Expansion, dict[str, Any]]:
    """Plan the expansion of a live model; its tensors' dtypes count, not that of its config."""
    architecture, config = _check_live(moe)
    wanted = importance is not None and options.needs_scores
    scores, about = scores_for(options, importance, live_identity(moe) if wanted else None)
    source = _OnCPU(moe, architecture, file_layout(config).specs)
    return plan_expansion(source, config, options, scores=scores), about


def _check_live(moe: "PreTrainedModel") -> tuple[Architecture, "PreTrainedConfig"]:
    """Family and config of a model that is in memory and has the tensors of its class."""
    if getattr(moe, "config", None) is None:
        raise UpcyclingError(
            f"A {type(moe).__name__} is no model of transformers. Give the model that it wraps."
        )
    architecture = moe_family(moe.config.model_type)
    state = StateDictSource(moe.state_dict())  # refuses what is not in memory, not floating point
    config = copy.deepcopy(moe.config)
    config.architectures = [type(moe).__name__]
    config.dtype = None
    config = checked_config(config)
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


def build_live_expansion(
    expansion: Expansion,
    moe: "PreTrainedModel",
    *,
    mode: str,
    tokenizer_file: Path | None = None,
) -> tuple["PreTrainedModel", Proof]:
    """Fill transformers' own class with the planned tensors, and prove the result.

    Args:
        expansion: planned for this model.
        moe: the source; the result gets its device, mode and generation config.
        mode: of the proof.
        tokenizer_file: `tokenizer.json` for the proof's tokens.
    """
    expansion.check_router()
    tokens = sample_tokens(tokenizer_file, expansion.config)
    larger, _ = fill_live(expansion, moe)
    result = _OnCPU(larger, expansion.architecture, expansion.specs)
    proof = prove_expansion(
        expansion, result, mode=mode, tokens=tokens, models=lambda: (moe, larger)
    )
    return larger, proof


class _OnCPU(LiveTensors):
    """A live model to be read, wherever it is; what is read is on the CPU."""

    def tensor(self, name: str) -> Tensor:
        return super().tensor(name).cpu()

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        for piece in super().tensor(name).reshape(-1)[start:stop].split(CHUNK_ELEMENTS):
            yield piece.cpu()
