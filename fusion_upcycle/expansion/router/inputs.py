"""What each router of an MoE sees on calibration text, and the rule it routes by.

From a live model by hooks, or from a folder with one expert in memory at a time: transformers' own
forward pass either way. What the routers see is written to nameless temporary files, 4 x N x D
bytes a layer, and mapped: memory is taken by the layer that is looked at only, up to three times as
many bytes while rows are fitted. Nothing is left on the disk whatever happens.

Shapes: N tokens, D hidden size, E experts, W sequences of T tokens.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.routing import RoutingRule, routing_rule
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import logits_of_last, num_embeddings
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.live.routers import find_routers, hearing_inputs
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.texts.reading import read
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.texts.windows import Sequences
from fusion_upcycle.verification.streamed_model import streamed_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Sequences of one forward pass.
_BATCH = 4
#: Of a layer's inputs, while rows are fitted to them.
_COPIES = 3


@dataclass(frozen=True)
class RouterInputs:
    """One layer.

    Attributes:
        weight_ED: router rows, as they are in the model.
        inputs_ND: what the router sees, float32.
        rule: how it routes.
    """

    weight_ED: Tensor
    inputs_ND: Tensor
    rule: RoutingRule


def live_router_inputs(
    model: "PreTrainedModel", sequences: Sequences, *, progress: bool = False
) -> dict[int, RouterInputs]:
    """MoE layer -> what its router sees, of a model on its own device; the result is on the CPU.

    Raises:
        UpcyclingError: a family that is not known, token ids outside the vocabulary, or more tokens
            than there is room for.
    """
    device = next(model.parameters()).device
    return _inputs(model, sequences, device, Path(tempfile.gettempdir()), progress)


def folder_router_inputs(
    config: "PreTrainedConfig",
    source: TensorSource,
    sequences: Sequences,
    *,
    scratch: Path | None = None,
    progress: bool = False,
) -> dict[int, RouterInputs]:
    """The same without loading the model, in float32: one FFN is in memory.

    Args:
        config: of the MoE, with `architectures` set.
        source: its weights in the file layout.
        scratch: folder for the temporary files; None is the system's.

    Raises:
        UpcyclingError: a family that is not known, token ids outside the vocabulary, or more tokens
            than there is room for.
    """
    model = streamed_model(config, source, moe_family(config), None, torch.float32)
    scratch = scratch or Path(tempfile.gettempdir())
    return _inputs(model, sequences, torch.device("cpu"), scratch, progress)


@torch.inference_mode()
def _inputs(
    model: "PreTrainedModel",
    sequences: Sequences,
    device: torch.device,
    scratch: Path,
    progress: bool,
) -> dict[int, RouterInputs]:
    check_vocabulary(sequences.largest, num_embeddings(model))
    routers = find_routers(model)
    seen: dict[int, IO[bytes]] = {}
    held: dict[int, tuple[Tensor, Tensor | None]] = {}

    def keep(layer: int, hidden_ND: Tensor) -> None:
        inputs_ND = hidden_ND.float().cpu().contiguous()
        seen[layer].write(inputs_ND.numpy().data.cast("B"))
        if layer not in held:  # here, as weights that are streamed are there only now
            bias = dict(zip(routers.modules, routers.selection_biases(), strict=False)).get(layer)
            # ERNIE 4.5 has it as [1, E].
            bias_E = None if bias is None else bias.detach().cpu().reshape(-1).clone()
            held[layer] = routers.weight(layer).detach().cpu().clone(), bias_E

    total = sum(len(ids) for ids in sequences.ids.values())
    hidden = model.config.get_text_config().hidden_size
    with (
        _disk_errors(scratch),
        ExitStack() as hooks,
        evaluating(model),
        progress_bar("Reading router inputs", total, progress, unit="sequence") as bar,
    ):
        hooks.callback(routers.close)
        _check_room(sequences.tokens, hidden, len(routers.modules), scratch)
        for layer in routers.modules:
            seen[layer] = hooks.enter_context(tempfile.TemporaryFile(dir=scratch))
        hooks.enter_context(hearing_inputs(routers.modules, keep))
        for ids_BT in _batches(sequences):
            # The output head is not looked at: one row of logits is the least it can make.
            model(**read(model, ids_BT.to(device)), **logits_of_last(model, 1))
            bar.update(len(ids_BT))
        return {
            layer: RouterInputs(
                weight_ED, _mapped(seen[layer], hidden), routing_rule(model.config, bias_E)
            )
            for layer, (weight_ED, bias_E) in held.items()
        }


@contextmanager
def _disk_errors(scratch: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UpcyclingError(
            f"Router inputs cannot be kept in {scratch}: {error}. Make room there, or take fewer "
            "tokens (calibration_tokens)."
        ) from error


def _mapped(file: IO[bytes], hidden: int) -> Tensor:
    """[N, D] float32 of a file, which may be closed: it goes when the tensor goes."""
    file.flush()
    # Copy-on-write: torch has no tensors that are read only.
    return torch.from_numpy(np.memmap(file, np.float32, "c").reshape(-1, hidden))


def _check_room(tokens: int, hidden: int, layers: int, scratch: Path) -> None:
    """Refuse what would end in a full disk or in swapping."""
    layer = 4 * tokens * hidden
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(scratch).free
    for what, needed, there in (
        (f"of the disk of {scratch}", layer * layers, free),
        ("of memory", layer * _COPIES, memory),
    ):
        if needed > there:
            raise UpcyclingError(
                f"Router inputs of {tokens:,} calibration tokens need {needed / 1e9:.3g} GB "
                f"{what}, and there are {there / 1e9:.3g} GB. Take fewer tokens "
                "(calibration_tokens)."
            )


def _batches(sequences: Sequences) -> Iterator[Tensor]:
    for ids_WT in sequences.ids.values():
        yield from ids_WT.split(_BATCH)
