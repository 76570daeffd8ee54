"""Sparse upcycling from folder to folder and from model to model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.tensors import StateDictSource
from fusion_upcycle.conversion.adapted import open_model
from fusion_upcycle.conversion.live import live_config, require_folder_for_part
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.recorded import without_gone
from fusion_upcycle.conversion.run import SOURCE, open_folders, to_folder
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.upcycling.options import UpcyclingOptions, make_options
from fusion_upcycle.upcycling.plan import plan_upcycling
from fusion_upcycle.upcycling.upcycling import Upcycling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def upcycle(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    verify: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    push_to_hub: str | None = None,
    **options: Any,
) -> Converted:
    """Turn a dense checkpoint folder into a Mixture-of-Experts folder.

    Each FFN is copied into `num_experts` experts and a router is added, so that the result
    computes the dense function at step 0 (Komatsuzaki et al., "Sparse Upcycling",
    arXiv 2212.05055; with routers whose top-k weights sum to 1, exactly).

    Args:
        source: local folder or Hugging Face Hub id of a dense model (safetensors), or of a LoRA
            adapter (PEFT), which is put on its base model.
        output: folder to make. It appears only when complete and proven.
        base: folder or Hub id of the model that an adapter is put on; None is the one that its
            `adapter_config.json` names.
        verify: `layers` compares each FFN with its MoE block and both models' outputs, streaming,
            in float32; `logits` loads both models; `none` leaves the result unproven; `auto` is
            `layers`.
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload the finished folder to; made
            private if it is not there. Name and token are checked before any work.
        options: fields of `UpcyclingOptions`: num_experts, experts_per_token, expert_init,
            router_init, dtype, seed, ignore_config_fields.

    Returns:
        What was made and proven.

    Raises:
        UpcyclingError: source, option or output that cannot be used; nothing is left behind.
        ProofError: the result is not what it claims to be; nothing is left behind.
    """
    chosen = make_options(**options)
    folders = open_folders(
        {SOURCE: source},
        output,
        bases={} if base is None else {SOURCE: base},
        verify=verify,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
        push_to_hub=push_to_hub,
    )
    check_base(folders.at(SOURCE), base)
    return to_folder(plan_folder(folders.at(SOURCE), chosen), folders)


def plan_folder(source: Located | Path, options: UpcyclingOptions) -> Upcycling:
    """Plan the conversion of a local model, reading its headers and config only."""
    at = Located(source) if isinstance(source, Path) else source
    config, tensors = open_model(at, options.part)
    return plan_upcycling(tensors, config, options)


def check_base(at: Located, base: str | Path | None) -> None:
    """Refuse a base for what is no adapter.

    Raises:
        UpcyclingError: it would be put on nothing.
    """
    if base is not None and at.adapter is None:
        raise UpcyclingError(
            f"{setting('base', str(base))} is given, and {at.folder} is no adapter (it has weights "
            f"of its own). Leave out {setting('base')}."
        )


def plan_model(dense: "PreTrainedModel", options: UpcyclingOptions) -> Upcycling:
    """Plan the conversion of a live model, for `fusion_upcycle.conversion.run.to_model`."""
    config = live_config(dense)
    require_folder_for_part(config, options.part)
    return plan_upcycling(StateDictSource(dense.state_dict()), config, options)


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record, also of an older version's.

    Raises:
        UpcyclingError: one that is gone changed the result.
    """
    return without_gone(options, {"scaling": "exact"})


def replan(record: Mapping[str, Any]) -> Callable[[Located, Path], Upcycling]:
    """From a record, a function (source, output folder) that plans its upcycling again."""
    options = make_options(**{**record["options"], "dtype": record["dtype"]})
    return lambda source, _: plan_folder(source, options)
