"""Prove an output folder again, whatever operation made it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion_upcycle.addition import run as addition
from fusion_upcycle.addition.addition import Addition
from fusion_upcycle.checkpoint.source import locate
from fusion_upcycle.checkpoint.staging import RECORD_FILE
from fusion_upcycle.conversion.run import prove_folder
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.expansion import run as expansion
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.merging.merging import Merging
from fusion_upcycle.upcycling import run as upcycling
from fusion_upcycle.upcycling.upcycling import Upcycling
from fusion_upcycle.verification.proof import Proof

#: The method of a record -> the module that plans its conversion again.
_OPERATIONS = {
    Upcycling.method: upcycling,
    Expansion.method: expansion,
    Addition.method: addition,
}


def verify(
    output: str | Path,
    source: str | Path | None = None,
    *,
    mode: str = "auto",
    progress: bool = True,
) -> Proof:
    """Prove an output folder again, against the source that its record names.

    Args:
        output: folder made by `upcycle`, `expand` or `add_expert`.
        source: where the source is now, if it has moved.
        mode: `layers`, `logits` or `auto`.
        progress: show progress bars.

    Raises:
        UpcyclingError: not an output of ours, its source is not there, or a merge, which is proven
            only when it is made.
        ProofError: the folder is not what its record says.
    """
    if mode == "none":
        raise UpcyclingError("verify needs a mode that verifies: layers, logits or auto.")
    output = Path(output).expanduser()
    path = output / RECORD_FILE
    if not path.is_file():
        raise UpcyclingError(f"{output} has no {RECORD_FILE}: it is not an output of ours.")
    with _reading(path):
        record = json.loads(path.read_bytes())
        name, method, options = record["source"]["name"], record["method"], dict(record["options"])
        if not isinstance(name, str):
            raise TypeError(f"source {name!r}")
        operation = _OPERATIONS.get(method)
    if method == Merging.method:
        raise UpcyclingError(
            f"{output} is a merge of several models, which is proven when it is made, and only "
            "then. To prove it again, merge again."
        )
    if operation is None:
        raise unknown(f"method in {path}:", str(method), _OPERATIONS)
    record["options"] = operation.recorded_options(options)  # refuses in its own words
    with _reading(path):
        plan = operation.replan(record)
    folder = locate(source or name)
    return prove_folder(plan(folder, output), folder, output, mode=mode, progress=progress)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong in the block is put down to the record's being damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpcyclingError(
            f"{path} cannot be used: {error!r}. An output whose initialiser is a function of your "
            "own can only be proven when it is made."
        ) from error
