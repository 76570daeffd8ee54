"""A checkpoint as a plain Hugging Face folder, which appears only when complete.

One tensor of the model is in memory at a time, so that one process exports what many have trained.
"""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from fusion_upcycle.architectures import known_family
from fusion_upcycle.architectures.config import readable_config
from fusion_upcycle.architectures.layout import file_layout, own_class_name
from fusion_upcycle.checkpoint.digests import digest, seal
from fusion_upcycle.checkpoint.moments import MOMENTS_FILE
from fusion_upcycle.checkpoint.reader import parse_json
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checkpoint.staging import TRAINING_RECORD_FILE, staging_folder
from fusion_upcycle.checkpoint.tensors import CHUNK_ELEMENTS, DTYPES, INTEGERS, TensorSpec
from fusion_upcycle.checkpoint.writer import Shard, plan_shards, write_shards
from fusion_upcycle.checks import dtype_name
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.report.card import card_text
from fusion_upcycle.training.checkpoint_folders import require_undamaged
from fusion_upcycle.training.objectives.base import Objective
from fusion_upcycle.training.part_check import slots
from fusion_upcycle.training.saved import MOMENTS, STATE_FILE, WEIGHTS, load_state, open_saved
from fusion_upcycle.untrusted import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: In a checkpoint: the model's config, tokenizer or image processor, and `_ABOUT_FILE`.
ABOUT_FOLDER = "about"
_ABOUT_FILE = "about.json"
_DTYPES = {dtype_name(dtype): dtype for dtype in (DTYPES | INTEGERS).values()}


def describe(
    folder: Path,
    model: "PreTrainedModel",
    processor: Any,
    *,
    dtypes: Mapping[str, torch.dtype],
    objective: Objective,
    record: dict[str, Any],
) -> None:
    """Write into a checkpoint what its export needs beside the tensors.

    Args:
        dtypes: live name -> dtype in which a tensor is to be exported.
        record: what is known of the run before its end.
    """
    about = folder / ABOUT_FOLDER
    about.mkdir()
    config = copy.deepcopy(model.config)
    config.architectures = [own_class_name(model)]
    config.dtype = _DTYPES[record["dtype"]]
    _write_json(about / "config.json", readable_config(config))
    if model.can_generate():
        model.generation_config.save_pretrained(about)
    if hasattr(processor, "save_pretrained"):  # a function that makes tensors of images has none
        processor.save_pretrained(about)
    names = ("loss", "unit", "target", "pipeline_tag")
    _write_json(
        about / _ABOUT_FILE,
        {
            "dtypes": {name: dtype_name(dtype) for name, dtype in dtypes.items()},
            "objective": {name: getattr(objective, name) for name in names},
            "record": record,
        },
    )


def export(
    checkpoint: Path,
    output: Path,
    *,
    ended: Mapping[str, Any] | None = None,
    moments: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write weights, config, tokenizer or image processor, record and model card, and moments.

    What is on the disk is read back before the folder has its name.

    Args:
        checkpoint: folder that a training has saved, by any number of processes.
        ended: what the record says of the run's end, from the run itself; None is what the
            checkpoint knows, whose digests are checked then.
        moments: AdamW's, too.
        overwrite: replace an earlier output of ours.

    Returns:
        The record.

    Raises:
        UpcyclingError: no such checkpoint, a damaged one, an output that exists, or a disk that is
            too small.
        ProofError: the disk gives back something else than was written.
    """
    about = checkpoint / ABOUT_FOLDER
    if not (about / _ABOUT_FILE).is_file():
        raise UpcyclingError(
            f"{checkpoint} is no checkpoint of a training: it has no {ABOUT_FOLDER}/{_ABOUT_FILE}. "
            "Give one of the folders step-* in checkpoints of a work folder."
        )
    if ended is None:
        require_undamaged(checkpoint)
    known = parse_json(about / _ABOUT_FILE, read_bytes(about / _ABOUT_FILE))
    config = read_config(about)
    saved = open_saved(checkpoint)
    places = dict(sorted(slots(config).items(), key=lambda each: each[1][0]))
    shapes = file_layout(config).specs
    specs = {
        name: TensorSpec(_DTYPES[known["dtypes"][live]], shapes[name].shape)
        for name, (live, _) in places.items()
    }
    state = {n.removeprefix(MOMENTS): s for n, s in saved.specs.items() if n.startswith(MOMENTS)}
    shards = plan_shards(specs, "5GB")
    beside = [Shard(MOMENTS_FILE, dict(sorted(state.items())))] if moments else []
    record = known["record"] | (_from_checkpoint(checkpoint, known) if ended is None else ended)

    @lru_cache(maxsize=1)  # an expert after the other, of one packed tensor
    def tensor(name: str) -> Tensor:
        return saved.tensor(name)

    def weights(name: str) -> Iterator[Tensor]:
        live, index = places[name]
        whole = tensor(WEIGHTS + live)
        for piece in (whole[index] if index else whole).reshape(-1).split(CHUNK_ELEMENTS):
            yield piece.to(specs[name].dtype)

    def of_optimizer(name: str) -> Iterator[Tensor]:
        yield from saved.tensor(MOMENTS + name).reshape(-1).split(CHUNK_ELEMENTS)

    with staging_folder(
        output,
        {"run": uuid4().hex},
        total_bytes=sum(shard.nbytes for shard in [*shards, *beside]),
        overwrite=overwrite,
    ) as staging:
        hashed = write_shards(staging, shards, weights, lambda _: None)
        if moments:
            (staging / MOMENTS_FILE).parent.mkdir(exist_ok=True)
        hashed |= write_shards(staging, beside, of_optimizer, lambda _: None)
        for file, written in hashed.items():
            if digest(staging / file) != written:
                raise ProofError(
                    f"{staging / file} is not what was written: the disk is failing. Choose an "
                    "output on another disk."
                )
        shutil.copytree(about, staging, ignore=lambda *_: [_ABOUT_FILE], dirs_exist_ok=True)
        family = known_family(config.get_text_config())
        if family is not None and family.ships is not None:
            shutil.copyfile(family.ships, staging / family.ships.name)
        card = _model_card(output.name, known["objective"], record)
        (staging / "README.md").write_text(card, encoding="utf-8")

        def write_record(files: dict[str, str]) -> None:
            _write_json(staging / TRAINING_RECORD_FILE, record | {"files": files})

        seal(staging, TRAINING_RECORD_FILE, write_record, hashed)
    return record


def _from_checkpoint(checkpoint: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the record says of a run of which only a checkpoint is left."""
    state, options = load_state(checkpoint / STATE_FILE), known["record"]["options"]
    unit, steps = known["objective"]["unit"], state["global_step"]
    per_step = options["batch_size"] * (options["context_length"] if unit == "tokens" else 1)
    return {
        "first": {known["objective"]["loss"]: state["first_loss"]},
        "final": state["last_metrics"],
        "steps": steps,
        f"{unit}_trained": steps * per_step,
        "checkpoint": checkpoint.name,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def _model_card(name: str, objective: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    options, data, unit = record["options"], record["data"], objective["unit"]
    columns, examples = ["examples"], "examples"
    if unit == "tokens":
        columns, examples = (
            ["documents", "tokens"],
            f"windows of {options['context_length']} tokens",
        )
    trained = f"{record[f'{unit}_trained']:,} {unit}"
    version = record["versions"]["fusion_upcycle"]
    rows = "\n".join(
        f"| {source} | {' | '.join(f'{facts[column]:,}' for column in columns)} |"
        for source, facts in data.items()
    )
    loss = record["final"].get(objective["loss"])
    per = f"{loss:.4f} nats per {objective['target']}" if loss else "unknown"
    body = f"""# {name}

A {record["class"]} ({record["dtype"]}) after {trained} of
continued training (`{record["objective"]}`) with fusion_upcycle {version}: schedule
`{options["schedule"]}`, learning rate {options["learning_rate"]:g}, {record["steps"]:,} steps of
{options["batch_size"]} {examples}. Loss of the last step:
{per}.

| data | {" | ".join(columns)} |
|---{"|---:" * len(columns)}|
{rows}

`{TRAINING_RECORD_FILE}` holds all options and what the model was before."""
    return card_text(body, pipeline_tag=objective["pipeline_tag"], tags=["fusion_upcycle"])
