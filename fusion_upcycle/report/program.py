"""FusionBench's program, told what it cannot know by the methods and task pools that it runs."""

import os
from pathlib import Path
from typing import Any


def prepare(program: Any) -> None:
    """Before any work: a report without a folder goes here, where FusionBench fails in the end.

    Args:
        program: FusionBench's, or None outside of one.
    """
    path = getattr(program, "report_save_path", None)
    if path and not os.path.dirname(path):
        program.report_save_path = os.path.join(os.curdir, path)


def has_saved(program: Any, output: Path) -> None:
    """A method has saved its model: FusionBench would say that saving is skipped.

    Args:
        program: as of `prepare`.
        output: where it is.
    """
    if program is None or program.merged_model_save_path is not None:
        return
    program.save_merged_model = lambda model: print(f"The model is saved in {output}.", flush=True)
