"""Expert upcycling from folder to folder, streaming: neither model is ever in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.moe_config import checked_config
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import (
    check_companions,
    copy_companions,
    locate,
    read_config,
)
from fusion_upcycle.conversion.card import EXPERT_UPCYCLING
from fusion_upcycle.conversion.run import Converted, OutputOptions, write_output
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.moments import (
    check_new_moments,
    check_state,
    write_expanded_state,
)
from fusion_upcycle.expansion.options import ExpansionOptions, make_expansion_options
from fusion_upcycle.expansion.plan import plan_expansion
from fusion_upcycle.expansion.proof import prove_expansion
from fusion_upcycle.expansion.router.calibrate import (
    CALIBRATION_TOKENS,
    calibrate_router,
    check_calibrated,
    read_calibration,
)
from fusion_upcycle.expansion.scoring import load_scores, measured_scores, scores_for
from fusion_upcycle.experts import DuplicationPlan
from fusion_upcycle.importance.run import score_folder, write_importance
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.identity import folder_identity
from fusion_upcycle.upcycling.run import describe_source, load_model, open_result, reading_record
from fusion_upcycle.verification import Proof, Tokens, resolve_mode, sample_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: In the result: scores that were measured for it, and their figure.
IMPORTANCE_FOLDER = "importance"


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
            experts
            are scored on them where `selection` needs scores and none are given. For that the
            source is loaded, as for training without an optimizer; the scores and their figure are
            put into the result, in `importance/`.
        calibration_tokens: of that, divided evenly among the texts.
        context_length: tokens of a calibration sequence; None is 1024, or the model's positions.
        router_rows: MoE layer -> router [M, D], in place of what `router_extension` makes.
        selection_biases: MoE layer -> selection bias [M], beside `router_rows`.
        optimizer_state: folder of a trained model whose AdamW moments are expanded by the same plan
            and put beside the result's weights: the source, if `continued_pretraining` saved it.
        new_moments: what new experts and router rows begin with there: `copy`, `reset` or `scale`
            (see `fusion_upcycle.expansion.moments`).
        verify: `layers` runs both models streaming, in float32; `logits` loads both models too;
            `none` leaves the result unproven; `auto` is `logits` below 2 GiB, else `layers`.
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
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
    resolve_mode(verify, streaming=True, total_bytes=0)
    output, folder = Path(output).expanduser().resolve(), locate(source)
    writing = OutputOptions(overwrite, max_shard_size, progress)
    writing.check(output)
    if folder.resolve().is_relative_to(output):
        raise UpcyclingError(
            f"{output} is the source itself, or holds it ({folder}). Choose another output."
        )
    check_companions(folder)
    config, importance = read_config(folder), load_scores(scores)
    moe_family(config.model_type)
    if state is not None:
        check_state(state, checked_config(config), folder_identity(folder))
    text = read_calibration(
        calibration,
        chosen,
        tokenizer_file=folder / "tokenizer.json",
        config=config,
        tokens=calibration_tokens,
        context_length=context_length,
        scored=importance is not None,
        routed=router_rows is not None,
    )
    measured = measured_scores(
        chosen,
        importance,
        text,
        plan=lambda options: _plan_folder(folder, None, options)[0],
        measure=lambda text: score_folder(
            folder,
            text.texts,
            tokens=text.tokens,
            context_length=text.context_length,
            progress=progress,
        ),
    )
    expansion, about = _plan_folder(folder, importance or measured, chosen)
    if router_rows is not None:
        expansion = expansion.with_router(router_rows, selection_biases)
    if text is None:
        expansion.check_router()
    check_calibrated(expansion)
    if state is not None:
        about["optimizer_state"] = {"source": str(state), "new_moments": new_moments}
    scratch = next(parent for parent in output.parents if parent.is_dir())
    expansion, calibrated = calibrate_router(expansion, text, scratch=scratch, progress=progress)
    tokens = sample_tokens(folder / "tokenizer.json", expansion.config)
    mode = resolve_mode(verify, streaming=True, total_bytes=expansion.total_bytes)

    def put_companions(staging: Path) -> list[str]:
        if state is not None:
            write_expanded_state(state, expansion, staging, new_moments)
        if measured is not None:
            write_importance(measured, staging / IMPORTANCE_FOLDER)
        return copy_companions(folder, staging)

    def prove_staged(staging: Path) -> Proof:
        return _prove_folder(expansion, folder, staging, mode, tokens, progress=progress)

    return write_output(
        expansion,
        output,
        source=describe_source(source, folder),
        companions=put_companions,
        prove=prove_staged,
        options=writing,
        # Rows that were given say nothing of themselves in the record.
        resumable=router_rows is None,
        about=describe_expansion(expansion) | about | calibrated,
    )


def verify_expansion(
    output: Path,
    source: Path,
    *,
    mode: str,
    progress: bool,
) -> Proof:
    """Prove an expanded folder again, by the plan and options of its record.

    Router rows that were fitted to calibration text are taken as they stand in the folder.

    Raises:
        UpcyclingError: a record or source that cannot be used.
        ProofError: the folder is not what its record says.
    """
    with reading_record(output) as record:
        options = make_expansion_options(**record["options"])
        plan = DuplicationPlan.from_json(record["plan"])
        digests = record["router_sha256"]
        biases_given = digests is not None and digests["biases"] is not None
    expansion = plan_expansion(CheckpointReader(source), read_config(source), options, plan=plan)
    if digests is not None:
        rows, biases = _routers_of(expansion, output)
        expansion = expansion.with_router(rows, biases if biases_given else None)
        if expansion.router_sha256 != digests:
            raise ProofError(f"The router of {output} is not the one that was made for it.")
    tokens = sample_tokens(source / "tokenizer.json", expansion.config)
    mode = resolve_mode(mode, streaming=True, total_bytes=expansion.total_bytes)
    return _prove_folder(expansion, source, output, mode, tokens, progress=progress)


def describe_expansion(expansion: Expansion) -> dict[str, Any]:
    """What the record of an expansion says beside and instead of that of an upcycling."""
    before, after = expansion.experts_per_token
    return {
        "method": EXPERT_UPCYCLING,
        "family": expansion.architecture.name,
        "num_experts": {"before": expansion.num_experts, "after": expansion.total_experts},
        "experts_per_token": {"before": before, "after": after},
        "router_sha256": expansion.router_sha256,
    }


def _plan_folder(
    folder: Path, importance: Importance | None, options: ExpansionOptions
) -> tuple[Expansion, dict[str, Any]]:
    """Plan the expansion of a local folder, reading its headers and config only."""
    wanted = importance is not None and options.needs_scores
    chosen, about = scores_for(options, importance, folder_identity(folder) if wanted else None)
    reader, config = CheckpointReader(folder), read_config(folder)
    return plan_expansion(reader, config, options, scores=chosen), about


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


def _prove_folder(
    expansion: Expansion,
    source: Path,
    result: Path,
    mode: str,
    tokens: Tokens,
    *,
    progress: bool,
) -> Proof:
    def models() -> "tuple[PreTrainedModel, PreTrainedModel]":
        dtype = expansion.dtype
        return (
            load_model(source, expansion.source_config, dtype, progress=progress),
            load_model(result, expansion.config, dtype, progress=progress, complete=True),
        )

    return prove_expansion(
        expansion,
        open_result(expansion, result),
        mode=mode,
        tokens=tokens,
        models=models,
        progress=progress,
    )
