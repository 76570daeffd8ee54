"""Which files of a folder hold its weights; where none can be read, what they are and what to do.

As transformers does: `model.safetensors` before an index of shards.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from fusion_upcycle.errors import UpcyclingError, plain_logger

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

log = plain_logger(__name__)

#: Pickles of training, which are no weights.
_OF_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)\w*\.\w+"
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ONE_OF_SEVERAL = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")


def stale_index(folder: Path, shards: set[str]) -> bool:
    """Whether the index beside a single file is left from another state, so that the file counts.

    Args:
        shards: that the index names.

    Raises:
        UpcyclingError: some of the shards are there, so that there are two sets of weights.
    """
    there = sorted(shard for shard in shards - {SINGLE_FILE} if (folder / shard).is_file())
    if there:
        raise UpcyclingError(
            f"{folder} has weights twice, in {SINGLE_FILE} and in {', '.join(there[:3])}, which "
            f"{INDEX_FILE} names; one of them is stale. Remove {SINGLE_FILE}, or these files and "
            "the index."
        )
    if shards != {SINGLE_FILE}:
        log.warning(
            "%s names files that are not there (%s): %s is read, as transformers does.",
            folder / INDEX_FILE,
            ", ".join(sorted(shards)[:3]),
            SINGLE_FILE,
        )
    return True


def no_weights(folder: Path) -> UpcyclingError:
    """The error for a folder without safetensors weights under their names: what it has instead."""
    if not folder.is_dir():
        return UpcyclingError(f"{folder} has no weights: there is no such folder.")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    why = next(_instead(folder, files), "")
    return UpcyclingError(
        why or f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there."
    )


def _instead(folder: Path, files: list[str]) -> Iterator[str]:
    single = shlex.quote(str(folder / SINGLE_FILE))
    safe = [file for file in files if file.endswith(".safetensors")]
    safe = [file for file in safe if not file.startswith("adapter_")]
    if (native := "consolidated.safetensors") in safe and _is_native(folder / native):
        yield (
            f"{folder} has only {native}, the weights in Mistral's own layout, which transformers "
            f"does not read. Download the files beside it that transformers reads ({SINGLE_FILE}, "
            f"or {INDEX_FILE} and its shards), or convert it with transformers' "
            "convert_mistral_weights_to_hf.py."
        )
    if len(safe) == 1:
        shard = _ONE_OF_SEVERAL.fullmatch(safe[0])
        if shard is None or int(shard[1]) == 1:
            yield (
                f"{folder} has its weights in {safe[0]}, a name that transformers does not look "
                f"for. Rename it: mv {shlex.quote(str(folder / safe[0]))} {single}"
            )
    if safe:
        yield (
            f"{folder} has {', '.join(safe[:3])}{', ...' if len(safe) > 3 else ''} and no "
            f"{INDEX_FILE}, which says what is in which file. Download the index, and the shards "
            "that are missing."
        )
    for gguf in (file for file in files if file.endswith(".gguf")):
        code = (
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T, GgufConfig; "
            f"f, g, o = {str(folder)!r}, {gguf!r}, {_beside(folder)!r}; M.from_pretrained(f, "
            "gguf_file=g, quantization_config=GgufConfig(dequantize=True)).save_pretrained(o); "
            "T.from_pretrained(f, gguf_file=g).save_pretrained(o)"
        )
        yield (
            f"{folder} has weights in {gguf}, a quantised format for inference. Take the model's "
            "safetensors; or dequantise it once, with what its quantisation has lost (pip install "
            f"gguf): python -c {shlex.quote(code)}"
        )
    if any(file.endswith(_PICKLED) and not _OF_TRAINING.fullmatch(file) for file in files):
        code = (
            "from transformers import AutoModelForCausalLM as A; "
            f"A.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({_beside(folder)!r})"
        )
        yield (
            f"{folder} holds pickled weights (.bin/.pt), which can run code when opened. If you "
            f"trust them, convert them once: python -c {shlex.quote(code)} and copy the tokenizer "
            "files over."
        )


def _beside(folder: Path) -> str:
    return str(folder).rstrip("/") + "-safetensors"


def _is_native(path: Path) -> bool:
    """Whether a safetensors file has Mistral's names; looked for in its first bytes, the header."""
    with path.open("rb") as handle:
        return b'"model.' not in handle.read(2**20)
