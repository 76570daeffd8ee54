"""Upcycling and merging in memory: from live dense models to a live Mixture-of-Experts model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.initialization import no_init_weights

from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.tensors import StateDictSource, aligned
from fusion_upcycle.conversion.conversion import Conversion
from fusion_upcycle.conversion.run import Converted, OutputOptions, write_output
from fusion_upcycle.live.tensors import LiveTensors
from fusion_upcycle.merging.calibration import route
from fusion_upcycle.merging.options import MergingOptions
from fusion_upcycle.merging.plan import DenseModel, Merging, plan_merging
from fusion_upcycle.merging.proof import prove_merging
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.upcycling.plan import plan_upcycling
from fusion_upcycle.upcycling.upcycling import Upcycling
from fusion_upcycle.verification import Proof, prove, resolve_mode, sample_tokens
from fusion_upcycle.verification.names import check_written_config
from fusion_upcycle.verification.tensors import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_live(dense: "PreTrainedModel", options: UpcyclingOptions) -> Upcycling:
    """Plan the conversion of a live model; its tensors' dtype counts, not that of its config."""
    model = _dense_model(dense)
    return plan_upcycling(model.source, model.config, options)


def _dense_model(dense: "PreTrainedModel") -> DenseModel:
    config = copy.deepcopy(dense.config)
    config.architectures = [type(dense).__name__]
    config.dtype = None
    return DenseModel(config, StateDictSource(dense.state_dict()))


def build_live(
    upcycling: Upcycling, dense: "PreTrainedModel", *, mode: str, tokenizer_file: Path | None = None
) -> tuple["PreTrainedModel", Proof]:
    """Fill transformers' own class with the planned tensors, and prove the result.

    Args:
        upcycling: made by `plan_live(dense, ...)`.
        dense: the source; the result gets its device, mode and generation config.
        mode: of the proof.
        tokenizer_file: `tokenizer.json` for the proof's tokens.
    """
    tokens = sample_tokens(tokenizer_file, upcycling.config)
    moe, live = fill_live(upcycling, dense)
    proof = prove(
        upcycling,
        live,
        mode=mode,
        tokens=tokens,
        models=lambda: (dense, moe),
    )
    return moe, proof


def merge_live(
    models: Mapping[str, "PreTrainedModel"],
    options: MergingOptions,
    *,
    texts: Mapping[str, Sequence[str]],
    mode: str,
    tokenizer_file: Path | None = None,
) -> tuple[Merging, "PreTrainedModel", Proof, dict[str, Any]]:
    """Merge live models into a live MoE, and prove it.

    Args:
        models: name -> model; the result gets device, mode and generation config of the first.
        texts: for `router_init=prototype`, model -> documents.
        mode: of the proof, `auto` included.
        tokenizer_file: `tokenizer.json` for calibration and for the proof's tokens.

    Returns:
        The plan, the MoE, the proof, and what the record says of the texts.
    """
    merging = plan_merging({name: _dense_model(model) for name, model in models.items()}, options)
    merging, calibrated = route(merging, texts, tokenizer_file)
    tokens = sample_tokens(tokenizer_file, merging.upcycling.config)
    mode = resolve_mode(mode, streaming=False, total_bytes=merging.upcycling.total_bytes)
    moe, live = fill_live(merging.upcycling, next(iter(models.values())))
    proof = prove_merging(merging, live, mode=mode, tokens=tokens, moe=lambda: moe)
    return merging, moe, proof, calibrated


def fill_live(
    conversion: Conversion, source: "PreTrainedModel"
) -> tuple["PreTrainedModel", LiveTensors]:
    """transformers' own class with the planned tensors; device, mode and the like from `source`."""
    model_class = getattr(transformers, class_name(conversion.config))
    config = copy.deepcopy(conversion.config)
    with no_init_weights(), source.device:
        moe = model_class._from_config(
            config, dtype=conversion.dtype, attn_implementation=source.config._attn_implementation
        )
    architecture, state = conversion.architecture, moe.state_dict()
    for name, spec in conversion.specs.items():  # some are kept in another dtype than the rest
        live_name, _ = architecture.live_slot(name, 1)
        module, _, attribute = live_name.rpartition(".")
        getattr(moe.get_submodule(module), attribute).data = state[live_name].to(spec.dtype)
    moe.tie_weights()  # skipped together with the initialisation
    live = LiveTensors(moe, architecture, conversion.specs)
    # Nothing is initialised: what is not filled below would be uninitialised memory.
    whole = {t.data_ptr(): t.numel() for t in moe.state_dict().values()}  # tied tensors once
    assert sum(s.numel for s in live.specs.values()) == sum(whole.values())
    with torch.no_grad():
        for name in conversion.specs:
            for made, place in aligned(conversion.chunks(name), live.chunks(name)):
                place.copy_(made)
    if source.can_generate():
        moe.generation_config = copy.deepcopy(source.generation_config)
    moe.train(source.training)
    return moe, live


def save_live(
    conversion: Conversion,
    proof: Proof,
    output: Path,
    *,
    source: dict[str, Any],
    companions: Callable[[Path], list[str]],
    options: OutputOptions,
    about: Mapping[str, Any] | None = None,
) -> Converted:
    """Write the folder of a live conversion, through the same writer as a streamed one.

    Args:
        proof: of the live model; every tensor of the folder is compared with it again.
        companions: writes tokenizer and generation files into the folder, returns their names.
        about: what the record says beside and instead of the usual.
    """

    def prove_written(folder: Path) -> Proof:
        check_written_config(folder, conversion.config)
        if proof.mode != "none":
            check_tensors(
                conversion, CheckpointReader(folder, read_once=True), progress=options.progress
            )
        return proof

    return write_output(
        conversion,
        output,
        source=source,
        companions=companions,
        prove=prove_written,
        options=options,
        resumable=False,  # nothing tells one live model from another
        about=about,
    )
