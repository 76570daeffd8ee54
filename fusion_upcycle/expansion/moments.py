"""AdamW's moments of an MoE, expanded by the plan of its parameters: training goes on where it was.

Moments lie as the live model has its parameters: the experts of a layer packed along one axis.

Shape suffixes: E source experts, M experts of the result.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_upcycle import expert_init
from fusion_upcycle.architectures.layout import empty_model
from fusion_upcycle.checkpoint.moments import MOMENTS_FILE, moments_reader
from fusion_upcycle.checkpoint.tensors import TensorSpec
from fusion_upcycle.checkpoint.writer import Shard, write_shards
from fusion_upcycle.checks import bare_function
from fusion_upcycle.errors import UpcyclingError, setting, unknown
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.live.identity import describe, folder_identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from transformers import PreTrainedConfig

#: What new experts and router rows begin with.
NEW_MOMENTS = ("copy", "reset", "scale")


def check_state(folder: Path, config: "PreTrainedConfig", model: "Mapping[str, Any]") -> None:
    """Refuse moments that are not of this model, reading no more than the header of their file.

    Args:
        folder: of a trained model, with its moments.
        config: of the model that is expanded, with `architectures` set.
        model: its identity, as `fusion_upcycle.live.identity` has it.

    Raises:
        UpcyclingError: no moments there, or moments of another model.
    """
    shapes = {name: tuple(p.shape) for name, p in empty_model(config).named_parameters()}
    for key, spec in moments_reader(folder).specs.items():
        name = key.rpartition("/")[0]
        if name not in shapes or spec.shape not in (shapes[name], ()):
            raise UpcyclingError(
                f"optimizer_state={folder}: {name} {list(spec.shape)} is not a parameter of the "
                f"{config.model_type} source. The moments are of another model."
            )
    # A model trained otherwise has parameters of the same shapes.
    if (folder / "config.json").is_file():
        found = folder_identity(folder)
        if found["sha256"] != model["sha256"]:
            raise UpcyclingError(
                f"optimizer_state={folder} is of {describe(found)}, but the source is "
                f"{describe(model)}. Give the folder of the same model, or pass "
                f"{setting('optimizer_state', None)}."
            )


def write_expanded_state(
    folder: Path, expansion: Expansion, staging: Path, new: str = "copy"
) -> dict[str, str]:
    """Write the expanded moments into the folder of the result, one expert in memory at a time.

    Args:
        folder: of the source's moments, which `check_state` has seen.
        new: what the new copies begin with. `copy`: their source expert's moments. `reset`: zero;
            AdamW counts its steps per parameter, not per expert, so that their first steps are
            about three times as long (betas 0.9 and 0.999). `scale`: `exp_avg` / c and
            `exp_avg_sq` / c^2 for a source expert that now has c places, among which its tokens
            are shared; the length of the first step is that of `copy`.

    Returns:
        Name of their file -> its SHA-256.
    """
    reader = moments_reader(folder)
    layers = _expert_parameters(expansion)

    def plan_of(key: str) -> tuple[int, ...] | None:
        name, _, _ = key.rpartition("/")
        return layers.get(name) if reader.specs[key].shape else None

    def chunks(key: str) -> Iterator[Tensor]:
        if (plan := plan_of(key)) is None:
            yield from reader.chunks(key)
            return
        size = reader.specs[key].numel // expansion.num_experts
        kind = key.rpartition("/")[2]
        for expert, origin in enumerate(plan):
            for piece in reader.chunks(key, origin * size, (origin + 1) * size):
                yield _of_expert(piece, kind, plan, expert, expansion.num_experts, new)

    specs = {
        key: TensorSpec(spec.dtype, (len(plan), *spec.shape[1:]))
        if (plan := plan_of(key))
        else spec
        for key, spec in reader.specs.items()
    }
    path = staging / MOMENTS_FILE
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # of a killed run, and perhaps of other moments
    return write_shards(staging, [Shard(MOMENTS_FILE, specs)], chunks, lambda _: None)


def check_new_moments(options: ExpansionOptions, new: str, *, used: bool) -> None:
    """Check the choice of what new experts begin with, and, where it is used, that it makes sense.

    Raises:
        UpcyclingError: an unknown one, or one that their initialiser makes meaningless.
    """
    if new not in NEW_MOMENTS:
        raise unknown("new_moments", str(new), NEW_MOMENTS)
    permuted = bare_function(options.initialise_copy) is expert_init.permute
    if used and permuted and new != "reset":
        raise UpcyclingError(
            f"new_moments={new}: with expert_init=permute the neurons of a new expert are in "
            f"another order than their moments. Choose {setting('new_moments', 'reset')}, or "
            f"another {setting('expert_init')}."
        )


def _expert_parameters(expansion: Expansion) -> dict[str, tuple[int, ...]]:
    """Live names of the parameters that have one entry for each expert -> plan of their layer."""
    family = expansion.architecture
    return {
        family.live_prefix(expansion.config, layer) + name: plan
        for layer, plan in expansion.plan.source_experts.items()
        for name in (*family.packed_parameters, family.live_router_name)
    }


def _of_expert(
    old: Tensor, kind: str, plan: tuple[int, ...], expert: int, num_experts: int, new: str
) -> Tensor:
    """The moment of an expert of the result, from that of its source expert."""
    if expert < num_experts or new == "copy":
        return old
    if new == "reset":
        return torch.zeros_like(old)
    places = plan.count(plan[expert])
    return old * torch.tensor(1 / places ** (2 if kind == "exp_avg_sq" else 1), dtype=old.dtype)
