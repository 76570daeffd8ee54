"""Sparse upcycling from folder to folder, streaming: neither model is ever in memory."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import copy_companions, locate, read_config
from fusion_upcycle.checkpoint.writer import RECORD_FILE
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.options import UpcyclingOptions, make_options
from fusion_upcycle.output import Converted, OutputOptions, write_output
from fusion_upcycle.planning import plan_upcycling
from fusion_upcycle.upcycling import Upcycling
from fusion_upcycle.verification import Proof, prove, resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def upcycle(
    source: str | Path,
    output: str | Path,
    *,
    verify: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    **options: Any,
) -> Converted:
    """Turn a dense checkpoint folder into a Mixture-of-Experts folder.

    Each FFN is copied into `num_experts` experts and a router is added, so that the result
    computes the dense function at step 0 (Komatsuzaki et al., "Sparse Upcycling",
    arXiv 2212.05055; with routers whose top-k weights sum to 1, exactly).

    Args:
        source: local folder or Hugging Face Hub id of a dense model (safetensors).
        output: folder to make. It appears only when complete and proven.
        verify: `layers` compares each FFN with its MoE block and both models' outputs, streaming,
            in float32; `logits` loads both models; `none` leaves the result unproven; `auto` is
            `logits` below 2 GiB, else `layers`.
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
        options: fields of `UpcyclingOptions`: num_experts, experts_per_token, expert_init,
            router_init, dtype, seed, ignore_config_fields.

    Returns:
        What was made and proven.

    Raises:
        UpcyclingError: source, option or output that cannot be used; nothing is left behind.
        ProofError: the result is not what it claims to be; nothing is left behind.
    """
    chosen = make_options(**options)
    output, folder = Path(output).expanduser(), locate(source)
    writing = OutputOptions(overwrite, max_shard_size, progress)
    writing.check(output)
    resolve_mode(verify, streaming=True, total_bytes=0)
    if output.resolve() == folder.resolve():
        raise UpcyclingError(f"{output} is the source itself. Choose another output.")
    upcycling = plan_folder(folder, chosen)
    return write_output(
        upcycling,
        output,
        source=describe_source(source, folder),
        companions=partial(copy_companions, folder),
        prove=partial(
            prove_folder,
            upcycling,
            folder,
            resolve_mode(verify, streaming=True, total_bytes=upcycling.total_bytes),
            progress,
        ),
        options=writing,
    )


def verify(
    output: Path, source: str | Path | None = None, *, mode: str = "auto", progress: bool = True
) -> Proof:
    """Prove an output folder again, against the source that its record names.

    Args:
        output: folder made by `upcycle`.
        source: where the source is now, if it has moved.
        mode: `layers`, `logits` or `auto`.

    Raises:
        ProofError: the folder is not what its record says.
    """
    path = output / RECORD_FILE
    if not path.is_file():
        raise UpcyclingError(f"{output} has no {RECORD_FILE}: it is not an output of ours.")
    record = json.loads(path.read_text(encoding="utf-8"))
    if mode == "none":
        raise UpcyclingError("verify needs a mode that verifies: layers, logits or auto.")
    folder = locate(source or record["source"].get("folder") or record["source"]["name"])
    upcycling = plan_folder(folder, make_options(**record["options"] | {"dtype": record["dtype"]}))
    mode = resolve_mode(mode, streaming=True, total_bytes=upcycling.total_bytes)
    return prove_folder(upcycling, folder, mode, progress, output)


def plan_folder(folder: Path, options: UpcyclingOptions) -> Upcycling:
    """Plan the conversion of a local folder, reading its headers and config only."""
    config = read_config(folder)
    return plan_upcycling(CheckpointReader(folder), config, options)


def prove_folder(
    upcycling: Upcycling,
    source: Path,
    mode: str,
    progress: bool,
    result: Path,
) -> Proof:
    """Prove the folder `result` against the folder `source` that it was made from."""
    return prove(
        upcycling,
        CheckpointReader(result, read_once=True),
        mode=mode,
        tokenizer_file=source / "tokenizer.json",
        models=lambda: (
            load_model(source, upcycling.source_config, upcycling.dtype),
            load_model(result, upcycling.config, upcycling.dtype, complete=True),
        ),
        progress=progress,
    )


def load_model(
    folder: Path, config: "PreTrainedConfig", dtype: torch.dtype, *, complete: bool = False
) -> "PreTrainedModel":
    """Load a folder with transformers' own class for its config.

    Raises:
        ProofError: with `complete`, a tensor that transformers misses or does not expect.
    """
    model, info = getattr(transformers, class_name(config)).from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if complete and info[problem]:
            raise ProofError(f"transformers loads {folder} with {problem}: {info[problem]}")
    return model


def describe_source(source: str | Path, folder: Path) -> dict[str, Any]:
    """Identity of the source for the record: enough to notice that it has changed."""
    files = sorted(folder.glob("model*.safetensors"))
    return {
        "name": str(source),
        "from_hub": not Path(source).expanduser().exists(),
        "folder": str(folder.resolve()),
        "files": {file.name: file.stat().st_size for file in files},
        "modified": max(file.stat().st_mtime_ns for file in files),
    }
