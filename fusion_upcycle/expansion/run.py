"""Expert upcycling from folder to folder, streaming: neither model is ever in memory."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusion_upcycle.architectures.moe_config import checked_config
from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.recorded import without_gone
from fusion_upcycle.conversion.run import SOURCE, open_folders, to_folder
from fusion_upcycle.errors import ProofError
from fusion_upcycle.expansion.calibration import CALIBRATION_TOKENS
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.moments import (
    check_new_moments,
    check_state,
    write_expanded_state,
)
from fusion_upcycle.expansion.options import ExpansionOptions, make_expansion_options
from fusion_upcycle.expansion.plan import plan_expansion
from fusion_upcycle.expansion.preparation import Inputs, Source, prepare
from fusion_upcycle.expansion.scoring import scores_for
from fusion_upcycle.experts import DuplicationPlan
from fusion_upcycle.importance.run import score_folder
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.identity import folder_identity


def expand(
    source: str | Path,
    output: str | Path,
    *,
    scores: str | Path | Importance | None = None,
    calibration: Mapping[str, Any] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    context_length: int | None = None,
    router_rows: Mapping[int, torch.Tensor] | None = None,
    selection_biases: Mapping[int, torch.Tensor] | None = None,
    optimizer_state: str | Path | None = None,
    new_moments: str = "copy",
    verify: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    push_to_hub: str | None = None,
    **options: Any,
) -> Converted:
    """Grow an MoE checkpoint folder from E to M experts, top-k fixed (arXiv 2604.19835).

    Experts are duplicated and the router is extended; the cost of a token does not change. With
    top-k fixed the function is not kept (see `router_extension`): how far the result is from its
    source is measured and reported. Continued training is what the new experts are for.

    Args:
        source: local folder or Hugging Face Hub id of an MoE (safetensors).
        output: folder to make. It appears only when complete and proven.
        scores: importance of each expert, or their `importance.json`, for selections that go by
            it. Scores of another model are refused.
        calibration: name -> documents, as `fusion_upcycle.texts.documents` takes them: router
            rows are made of them (`router_extension` split or fit, the source runs streamed), and
            experts are scored on them where `selection` needs scores and none are given. For that
            the source is loaded, as for training without an optimizer; the scores and their figure
            are put into the result, in `importance/`.
        calibration_tokens: of that, divided evenly among the texts.
        context_length: tokens of a calibration sequence; None is 1024, or the model's positions.
        router_rows: MoE layer -> router [M, D], in place of what `router_extension` makes.
        selection_biases: MoE layer -> selection bias [M], beside `router_rows`.
        optimizer_state: folder of a trained model whose AdamW moments are expanded by the same plan
            and put beside the result's weights: the source, if `continued_pretraining` saved it.
        new_moments: what new experts and router rows begin with there: `copy`, `reset` or `scale`
            (see `fusion_upcycle.expansion.moments`).
        verify: `layers` runs both models streaming, in float32; `logits` loads both models too;
            `none` leaves the result unproven; `auto` is `layers`.
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload the finished folder to; made
            private if it is not there. Name and token are checked before any work.
        options: fields of `ExpansionOptions`: num_experts or multiplier, selection, metric,
            max_copies, expert_init, router_extension, experts_per_token, seed.

    Returns:
        What was made and proven.

    Raises:
        UpcyclingError: source, option, scores or output that cannot be used; nothing is left.
        ProofError: the result is not what it claims to be; nothing is left behind.
    """
    chosen = make_expansion_options(**options)
    state = None if optimizer_state is None else Path(optimizer_state).expanduser()
    check_new_moments(chosen, new_moments, used=state is not None)
    folders = open_folders(
        {SOURCE: source},
        output,
        verify=verify,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
        push_to_hub=push_to_hub,
    )
    folder = folders.source
    config = checked_config(read_config(folder))
    folders.check_tokenizer(config)
    if state is not None:
        check_state(state, config, folder_identity(folder))
    prepared = prepare(
        Source(
            config,
            folders.tokenizer_file,
            partial(_plan_folder, folder),
            lambda text: score_folder(
                folder,
                text.texts,
                tokens=text.tokens,
                context_length=text.context_length,
                progress=progress,
            ),
            scratch=next(parent for parent in folders.output.parents if parent.is_dir()),
        ),
        chosen,
        Inputs(
            scores,
            calibration,
            calibration_tokens,
            context_length,
            router_rows,
            selection_biases,
        ),
        progress=progress,
    )
    expansion = prepared.expansion.with_state(state, new_moments)

    def put(staging: Path) -> dict[str, str]:
        prepared.put_scores(staging)
        if state is None:
            return {}
        return write_expanded_state(state, expansion, staging, new_moments)

    # Rows that were given say nothing of themselves in the record.
    return to_folder(expansion, folders, put=put, resumable=router_rows is None)


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record, also of an older version's.

    Raises:
        UpcyclingError: one that is gone changed the result.
    """
    gone = {"selection": ("proportional", "sampling"), "metric": ("fisher",)}
    kept = without_gone(options, {"temperature": 1.0}, gone)
    extension = kept.get("router_extension")
    if isinstance(extension, Mapping) and extension.get("name") == "fit":
        kept["router_extension"] = without_gone(extension, {"after_split": False})
    return kept


def replan(record: Mapping[str, Any]) -> Callable[[Located, Path], Expansion]:
    """From a record, a function (source, output folder) that plans its expansion again.

    Router rows that were made of calibration text are taken as they stand in the output folder.

    Raises:
        UpcyclingError: an option of the record that cannot be used; likewise the function, for a
            source.
        ProofError: the function, for an output whose router is not the one that was made for it.
    """
    options = make_expansion_options(**record["options"])
    plan = DuplicationPlan.from_json(record["plan"])
    digests = record["router_sha256"]
    biases_given = digests is not None and digests["biases"] is not None

    def planned(source: Located, output: Path) -> Expansion:
        folder = source.adapter or source.folder  # an adapter has no config.json, and is refused
        reader, config = CheckpointReader(folder), read_config(folder)
        expansion = plan_expansion(reader, config, options, plan=plan)
        if digests is None:
            return expansion
        rows, biases = _routers_of(expansion, output)
        expansion = expansion.with_router(rows, biases if biases_given else None)
        if expansion.router_sha256 != digests:
            raise ProofError(f"The router of {output} is not the one that was made for it.")
        return expansion

    return planned


def _plan_folder(
    folder: Path, options: ExpansionOptions, importance: Importance | None
) -> Expansion:
    """Plan the expansion of a local folder, reading its headers and config only."""
    wanted = importance is not None and options.needs_scores
    scores, details = scores_for(options, importance, folder_identity(folder) if wanted else None)
    reader, config = CheckpointReader(folder), read_config(folder)
    return replace(plan_expansion(reader, config, options, scores=scores), details=details)


def _routers_of(
    expansion: Expansion, folder: Path
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor] | None]:
    """Routers, and selection biases where the family has them, as they stand in a folder."""
    reader = CheckpointReader(folder)
    names = {layer: expansion.router_name(layer) for layer in expansion.layers}
    biases = {layer: expansion.bias_name(layer) for layer in expansion.layers}
    for name in (*names.values(), *(n for n in biases.values() if n is not None)):
        if name not in reader.specs:
            raise ProofError(f"{folder} lacks tensor {name}.")
    rows = {layer: reader.tensor(name) for layer, name in names.items()}
    found = {layer: reader.tensor(name) for layer, name in biases.items() if name is not None}
    return rows, found or None
