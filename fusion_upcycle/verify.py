"""Prove an output folder again, whatever operation made it."""

from pathlib import Path

from fusion_upcycle.checkpoint.source import locate
from fusion_upcycle.conversion.card import EXPERT_UPCYCLING
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_folder, prove_folder, reading_record
from fusion_upcycle.verification import Proof, resolve_mode, sample_tokens


def verify(
    output: str | Path,
    source: str | Path | None = None,
    *,
    mode: str = "auto",
    progress: bool = True,
) -> Proof:
    """Prove an output folder again, against the source that its record names.

    Args:
        output: folder made by `upcycle`.
        source: where the source is now, if it has moved.
        mode: `layers`, `logits` or `auto`.
        progress: show progress bars.

    Raises:
        UpcyclingError: not an output of ours, or its source is not there.
        ProofError: the folder is not what its record says.
    """
    if mode == "none":
        raise UpcyclingError("verify needs a mode that verifies: layers, logits or auto.")
    output = Path(output).expanduser()
    with reading_record(output) as record:
        source_name, expanded = record["source"]["name"], record["method"] == EXPERT_UPCYCLING
        if not isinstance(source_name, str):
            raise TypeError(f"source {source_name!r}")
        if not expanded:
            options = make_options(**{**record["options"], "dtype": record["dtype"]})
    folder = locate(source or source_name)
    if expanded:
        from fusion_upcycle.expansion.run import verify_expansion

        return verify_expansion(output, folder, mode=mode, progress=progress)
    upcycling = plan_folder(folder, options)
    tokens = sample_tokens(folder / "tokenizer.json", upcycling.config)
    mode = resolve_mode(mode, streaming=True, total_bytes=upcycling.total_bytes)
    return prove_folder(upcycling, folder, output, mode, tokens, progress=progress)
