"""Importance scores of a model's folder: measured, and written with their figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.layout import class_name, model_class
from fusion_upcycle.architectures.moe_config import checked_config
from fusion_upcycle.checkpoint.source import locate, read_config
from fusion_upcycle.checks import require_folder
from fusion_upcycle.importance.figure import save_importance_map
from fusion_upcycle.importance.measure import measure_importance, no_head, require_text
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.loading import load_folder
from fusion_upcycle.report.drawing import require_matplotlib
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.texts.documents import named_documents

#: Endings of the names of classes that predict tokens.
_WITH_HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "LMHeadModel")


def folder_importance(
    model: str | Path,
    calibration: Mapping[str, Any],
    output: str | Path | None = None,
    *,
    tokens: int = 65_536,
    context_length: int | None = None,
    progress: bool = True,
) -> Importance:
    """Score the experts of an MoE checkpoint by all metrics; the model is loaded for it.

    Args:
        model: local folder or Hugging Face Hub id of a language model, loaded in its own dtype on
            a GPU if there is one.
        calibration: name -> documents, as `fusion_upcycle.texts.documents` takes them.
        output: folder for `importance.json` and the figure (PNG, SVG); None writes nothing.
        tokens: of calibration, divided evenly among the texts.
        context_length: tokens of a sequence; None is 1024, or what positions the model has.
        progress: show progress bars.

    Raises:
        UpcyclingError: a model or text that cannot be used, as `measure_importance`; an output that
            is a file.
    """
    if output is not None:
        require_matplotlib()
        require_folder("output", Path(output).expanduser())
    importance = score_folder(
        locate(model),
        named_documents(calibration),
        tokens=tokens,
        context_length=context_length,
        progress=progress,
    )
    if output is not None:
        write_importance(importance, Path(output).expanduser())
    return importance


def score_folder(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    *,
    tokens: int,
    context_length: int | None,
    progress: bool,
) -> Importance:
    """`folder_importance` of a local folder and documents that were read.

    Raises:
        UpcyclingError: a dense or unknown model, or a backbone; as `measure_importance`.
    """
    config = read_config(folder)
    moe_family(config)
    name = class_name(checked_config(config))
    kind = model_class(name)
    require_text(kind.main_input_name, name)
    if not name.endswith(_WITH_HEADS):
        raise no_head(name)
    with loading_bars(progress):
        model = load_folder(kind, folder, dtype="auto")
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return measure_importance(
        model,
        texts,
        folder / "tokenizer.json",
        tokens=tokens,
        context_length=context_length,
        progress=progress,
    )


def write_importance(importance: Importance, folder: Path) -> list[Path]:
    """Write `importance.json` and the figure; returns their paths."""
    return [importance.save(folder), *save_importance_map(importance, folder)]
