"""A trained model as a plain Hugging Face folder, which appears only when complete."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torch import Tensor

from fusion_upcycle import models
from fusion_upcycle.checkpoint.digests import seal
from fusion_upcycle.checkpoint.moments import save_moments
from fusion_upcycle.checkpoint.staging import TRAINING_RECORD_FILE, staging_folder
from fusion_upcycle.report.card import card_text
from fusion_upcycle.training.objectives.base import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export(
    model: "PreTrainedModel",
    processor: Any,
    output: Path,
    *,
    objective: Objective,
    record: dict[str, Any],
    moments: dict[str, dict[str, Tensor]] | None,
    overwrite: bool,
) -> None:
    """Write weights, config, tokenizer or image processor, record and model card, and moments.

    Args:
        model: trained, on one device, in the dtypes it is to be saved in.
        record: for `training.json`.
        moments: optimizer state of the last checkpoint, by name; None writes none.
        overwrite: replace an earlier output of ours.

    Raises:
        UpcyclingError: the output exists, or the disk is too small.
    """
    kept = (tensor for values in (moments or {}).values() for tensor in values.values())
    tensors = [*model.state_dict().values(), *kept]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with staging_folder(
        output, {"run": uuid4().hex}, total_bytes=total, overwrite=overwrite
    ) as staging:
        models.save(model, staging)
        processor.save_pretrained(staging)
        if moments is not None:
            save_moments(moments, staging)
        card = _model_card(output.name, objective, record)
        (staging / "README.md").write_text(card, encoding="utf-8")

        def write_record(files: dict[str, str]) -> None:
            text = json.dumps(record | {"files": files}, indent=2, default=str)
            (staging / TRAINING_RECORD_FILE).write_text(text + "\n", encoding="utf-8")

        seal(staging, TRAINING_RECORD_FILE, write_record)


def _model_card(name: str, objective: Objective, record: dict[str, Any]) -> str:
    options, data = record["options"], record["data"]
    columns, examples = ["examples"], "examples"
    if objective.unit == "tokens":
        columns, examples = (
            ["documents", "tokens"],
            f"windows of {options['context_length']} tokens",
        )
    trained = f"{record[f'{objective.unit}_trained']:,} {objective.unit}"
    version = record["versions"]["fusion_upcycle"]
    rows = "\n".join(
        f"| {source} | {' | '.join(f'{facts[column]:,}' for column in columns)} |"
        for source, facts in data.items()
    )
    body = f"""# {name}

A {record["class"]} ({record["dtype"]}) after {trained} of
continued training (`{objective.name}`) with fusion_upcycle {version}: schedule
`{options["schedule"]}`, learning rate {options["learning_rate"]:g}, {record["steps"]:,} steps of
{options["batch_size"]} {examples}. Loss of the last step:
{record["final"][objective.loss]:.4f} nats per {objective.target}.

| data | {" | ".join(columns)} |
|---{"|---:" * len(columns)}|
{rows}

`{TRAINING_RECORD_FILE}` holds all options and what the model was before."""
    return card_text(body, pipeline_tag=objective.pipeline_tag, tags=["fusion_upcycle"])
