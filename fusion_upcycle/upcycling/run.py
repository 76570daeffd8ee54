"""Sparse upcycling from folder to folder, streaming: neither model is ever in memory."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import (
    check_companions,
    copy_companions,
    locate,
    read_config,
)
from fusion_upcycle.checkpoint.writer import RECORD_FILE
from fusion_upcycle.conversion.conversion import Conversion
from fusion_upcycle.conversion.recorded import recorded_options
from fusion_upcycle.conversion.run import Converted, OutputOptions, write_output
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.progress import loading_bars
from fusion_upcycle.upcycling.options import UpcyclingOptions, make_options
from fusion_upcycle.upcycling.plan import plan_upcycling
from fusion_upcycle.upcycling.upcycling import Upcycling
from fusion_upcycle.verification import Proof, Tokens, prove, resolve_mode, sample_tokens
from fusion_upcycle.verification.names import check_written_config

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
    resolve_mode(verify, streaming=True, total_bytes=0)
    output, folder = Path(output).expanduser().resolve(), locate(source)
    writing = OutputOptions(overwrite, max_shard_size, progress)
    writing.check(output)
    if folder.resolve().is_relative_to(output):
        raise UpcyclingError(
            f"{output} is the source itself, or holds it ({folder}). Choose another output."
        )
    check_companions(folder)
    upcycling = plan_folder(folder, chosen)
    tokens = sample_tokens(folder / "tokenizer.json", upcycling.config)
    mode = resolve_mode(verify, streaming=True, total_bytes=upcycling.total_bytes)

    def prove_staged(staging: Path) -> Proof:
        return prove_folder(upcycling, folder, staging, mode, tokens, progress=progress)

    return write_output(
        upcycling,
        output,
        source=describe_source(source, folder),
        companions=partial(copy_companions, folder),
        prove=prove_staged,
        options=writing,
    )


@contextmanager
def reading_record(output: Path) -> Iterator[dict[str, Any]]:
    """The record of an output; what goes wrong in the block is put down to its being damaged.

    Raises:
        UpcyclingError: no record, a damaged one, or one of an older version that cannot be served.
    """
    path = output / RECORD_FILE
    if not path.is_file():
        raise UpcyclingError(f"{output} has no {RECORD_FILE}: it is not an output of ours.")
    with _reading(path):
        record = json.loads(path.read_bytes())
        if "sources" in record:
            raise TypeError("a merge of several models is proven when it is made, and only then")
        options = dict(record["options"])
    record["options"] = recorded_options(options)
    with _reading(path):
        yield record


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpcyclingError(
            f"{path} cannot be used: {error!r}. An output whose initialiser is a function of your "
            "own can only be proven when it is made."
        ) from error


def plan_folder(folder: Path, options: UpcyclingOptions) -> Upcycling:
    """Plan the conversion of a local folder, reading its headers and config only."""
    config = read_config(folder)
    return plan_upcycling(CheckpointReader(folder), config, options)


def prove_folder(
    upcycling: Upcycling,
    source: Path,
    result: Path,
    mode: str,
    tokens: Tokens,
    *,
    progress: bool,
) -> Proof:
    """Prove the folder `result` against the folder `source` that it was made from."""
    return prove(
        upcycling,
        open_result(upcycling, result),
        mode=mode,
        tokens=tokens,
        models=lambda: (
            load_model(source, upcycling.source_config, upcycling.dtype, progress=progress),
            load_model(result, upcycling.config, upcycling.dtype, progress=progress, complete=True),
        ),
        progress=progress,
    )


def open_result(conversion: Conversion, folder: Path) -> CheckpointReader:
    """The written tensors of `conversion`, once its config.json is known to say what was planned.

    Raises:
        ProofError: another config, or files that cannot be read.
    """
    check_written_config(folder, conversion.config)
    try:
        return CheckpointReader(folder, read_once=True)
    except UpcyclingError as error:
        raise ProofError(f"The output cannot be read: {error}") from error


def load_model(
    folder: Path,
    config: "PreTrainedConfig",
    dtype: torch.dtype,
    *,
    progress: bool,
    complete: bool = False,
) -> "PreTrainedModel":
    """Load a folder with transformers' own class for its config.

    Raises:
        ProofError: with `complete`, a tensor that transformers misses or does not expect.
    """
    with loading_bars(progress):
        model, info = getattr(transformers, class_name(config)).from_pretrained(
            folder,
            # A result must say itself what it is; a source may be read in another family's words.
            config=None if complete else copy.deepcopy(config),
            dtype=dtype,
            output_loading_info=True,
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if complete and info[problem]:
            raise ProofError(f"transformers loads {folder} with {problem}: {info[problem]}")
    return model


def describe_source(source: str | Path, folder: Path) -> dict[str, Any]:
    """Identity of the source for the record: enough to notice that it has changed."""
    files = CheckpointReader(folder).files
    return {
        "name": str(source),
        "from_hub": not Path(source).expanduser().exists(),
        "files": {file.name: file.stat().st_size for file in files},
        "modified": max(file.stat().st_mtime_ns for file in files),
    }
