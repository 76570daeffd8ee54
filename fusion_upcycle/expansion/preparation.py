"""From options and inputs to a planned expansion, for a folder and for a model in memory alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusion_upcycle.expansion.calibration import (
    CalibrationText,
    calibrate_router,
    check_before_scores,
    check_calibrated,
    read_calibration,
)
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.expansion.scoring import load_scores
from fusion_upcycle.importance.run import write_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.report.drawing import require_matplotlib

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: In the result: scores that were measured for it, and their figure.
IMPORTANCE_FOLDER = "importance"


@dataclass(frozen=True)
class Source:
    """The MoE that is expanded: a folder, or a model in memory.

    Attributes:
        config: of it, checked.
        tokenizer_file: `tokenizer.json`, for calibration text; None where there is none.
        plan: plans its expansion; the scores are for selections that go by them.
        measure: scores its experts on a text.
        scratch: folder for temporary files; None is the system's.
    """

    config: "PreTrainedConfig"
    tokenizer_file: Path | None
    plan: Callable[[ExpansionOptions, Importance | None], Expansion]
    measure: Callable[[CalibrationText], Importance]
    scratch: Path | None = None


@dataclass(frozen=True)
class Inputs:
    """What an expansion looks at beside the model; as `fusion_upcycle.expand` explains them."""

    scores: str | Path | Importance | None
    calibration: Mapping[str, Any] | None
    calibration_tokens: int
    context_length: int | None
    router_rows: Mapping[int, Tensor] | None = None
    selection_biases: Mapping[int, Tensor] | None = None


@dataclass(frozen=True)
class Prepared:
    """An expansion, ready to be made.

    Attributes:
        expansion: with the router that its options call for.
        measured: scores that were measured for it.
    """

    expansion: Expansion
    measured: Importance | None

    def put_scores(self, folder: Path) -> None:
        """Write the scores that were measured, and their figure, into the folder of the result."""
        if self.measured is not None:
            write_importance(self.measured, folder / IMPORTANCE_FOLDER)


def prepare(
    source: Source, options: ExpansionOptions, inputs: Inputs, *, progress: bool = False
) -> Prepared:
    """Score experts where that is needed, plan, and make the router's rows.

    What stands in the way is said before experts are scored, and before any text is run.

    Raises:
        UpcyclingError: scores of another model, text that is too short or that nothing reads, a
            plan or router that the options cannot have.
    """
    given = load_scores(inputs.scores)
    text = read_calibration(
        inputs.calibration,
        options,
        tokenizer_file=source.tokenizer_file,
        config=source.config,
        tokens=inputs.calibration_tokens,
        context_length=inputs.context_length,
        scored=given is not None,
        routed=inputs.router_rows is not None,
    )
    measured = None
    if text is not None and given is None and options.needs_scores:
        require_matplotlib()
        # Needs no scores, and has the same limits.
        check_before_scores(options, source.plan(replace(options, selection="random"), None))
        measured = source.measure(text)
    expansion = source.plan(options, given or measured)
    if inputs.router_rows is not None:
        expansion = expansion.with_router(inputs.router_rows, inputs.selection_biases)
    if text is None:
        expansion.check_router()
    check_calibrated(expansion)
    expansion = calibrate_router(expansion, text, scratch=source.scratch, progress=progress)
    return Prepared(expansion, measured)
