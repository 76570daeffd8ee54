"""Router inputs of each source model on its own texts, through transformers' own forward pass.

The models run streamed, as in a proof: from folders or from memory, the same bits, in the memory of
one FFN and of one D x D matrix per MoE layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fusion_upcycle.architectures.layout import takes_images
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.live.inputs import logits_of_last, positions_of
from fusion_upcycle.live.routers import hearing_inputs
from fusion_upcycle.merging.merging import Merging
from fusion_upcycle.merging.prototypes import Moments
from fusion_upcycle.merging.statistics import statistics_bytes
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.texts.reading import read
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.texts.windows import Sequences, calibration_sequences
from fusion_upcycle.upcycling.proof import streamed_dense

Made = TypeVar("Made", bound=Merging)

#: Tokens of one window, less where the model has fewer positions.
WINDOW_TOKENS = 256
#: Windows of one forward pass.
BATCH_WINDOWS = 4


def calibration_windows(
    texts: Mapping[str, Sequence[str]],
    merging: Merging,
    tokenizer_file: Path | None,
) -> Sequences:
    """Windows of `WINDOW_TOKENS` tokens, evenly spaced over each model's texts.

    A model reads them as `fusion_upcycle.texts.reading` says.

    Args:
        texts: model -> documents.
        merging: says which models need texts, and how many tokens of each.
        tokenizer_file: `tokenizer.json` of all models.

    Raises:
        UpcyclingError: models of images, a model without texts or with too little, a name that is
            no model's, or no tokenizer of these models.
    """
    if takes_images(merging.source_config):
        raise UpcyclingError(
            "router_init=prototype looks at texts, and "
            f"{merging.source_config.model_type} models are given images. Choose "
            f"{setting('router_init', 'normal')}, and train on."
        )
    for model in merging.calibrated:
        if model not in texts:
            raise UpcyclingError(
                f"router_init=prototype needs texts of every model that gives experts, and there "
                f"are none for {model} (calibration has {list(texts)}). Give each its own, "
                f"{setting('calibration', dict.fromkeys(merging.experts, 'FILE'))}, or choose "
                f"{setting('router_init', 'normal')}."
            )
    if unused := texts.keys() - set(merging.calibrated):
        raise UpcyclingError(
            f"calibration names {sorted(unused)}, which give no experts. The models that do: "
            f"{', '.join(merging.calibrated)}."
        )
    config = merging.source_config
    windows = calibration_sequences(
        {model: texts[model] for model in merging.calibrated},
        tokenizer_file,
        tokens=merging.asked.calibration_tokens * len(merging.calibrated),
        context_length=min(WINDOW_TOKENS, positions_of(config) or WINDOW_TOKENS),
        starts=_from_end_to_end,
    )
    check_vocabulary(windows.largest, config.vocab_size, str(tokenizer_file))
    return windows


def _from_end_to_end(characters: int, span: int, count: int) -> list[int]:
    """Starts of `count` stretches, the first and the last at the ends of the text.

    They overlap where the text is short. Other starts would give other routers than are published.
    """
    last = max(0, characters - span)
    return sorted({round(last * i / max(1, count - 1)) for i in range(count)})


@torch.inference_mode()
def router_moments(
    merging: Merging,
    windows: Sequences,
    *,
    known: Mapping[int, Moments] | None = None,
    progress: bool = False,
) -> dict[int, Moments]:
    """MoE layer -> what its router sees when each model runs on its own texts.

    Model i runs as the merge would if only its experts were chosen: shared weights with its FFNs.

    Args:
        known: what it sees of the models that are not run again, with room for those that are.
    """
    layers, size = merging.resolved.moe_layers, merging.resolved.hidden_size
    moments = dict(known or {x: Moments.empty(len(merging.experts), size) for x in layers})
    total = sum(len(ids_WT) for ids_WT in windows.ids.values())
    with progress_bar("Calibrating the router", total, progress, unit="window") as bar:
        for model in merging.calibrated:
            index = merging.experts.index(model)
            dense = streamed_dense(merging, merging.as_dense(model))
            blocks = merging.architecture.ffn_layers(dense)
            ffns = {layer: merging.architecture.ffn_entry(blocks[layer]) for layer in layers}
            ids_WT = windows.ids[model]
            for batch in ids_WT.split(BATCH_WINDOWS):
                share = len(batch) / len(ids_WT)
                with hearing_inputs(ffns, partial(_add, moments, index, share)):
                    # The output head is not looked at: one row of logits is the least it can make.
                    dense(**read(dense, batch), **logits_of_last(dense, 1))
                bar.update(len(batch))
    return moments


def _add(
    moments: Mapping[int, Moments], model: int, share: float, layer: int, inputs_ND: Tensor
) -> None:
    """Count what a layer's FFN is given of one batch, `share` of all that a model gives."""
    moments[layer].add(model, inputs_ND, share)


def route(
    merging: Made,
    texts: Mapping[str, Sequence[str]],
    tokenizer_file: Path | None,
    *,
    known: Mapping[int, Moments] | None = None,
    progress: bool = False,
) -> Made:
    """The merge with the router that its options call for; its details say of which texts.

    Args:
        known: as `router_moments` takes it.

    Raises:
        UpcyclingError: texts or tokenizer that are missing, too short, or not asked for.
    """
    if not merging.asked.prototype_router:
        if texts:
            raise UpcyclingError(
                "calibration is given, but router_init is not prototype: nothing would read it. "
                f"Choose {setting('router_init', 'prototype')}, or leave calibration out."
            )
        return merging
    windows = calibration_windows(texts, merging, tokenizer_file)
    assert callable(merging.asked.router_init)
    if merging.asked.statistics and progress:
        size = statistics_bytes(merging) / 1e6
        print(f"Router statistics, beside the model's weights: {size:,.1f} MB.", flush=True)
    moments = router_moments(merging, windows, known=known, progress=progress)
    rows = {layer: merging.asked.router_init(seen) for layer, seen in moments.items()}
    digest = sha256(b"".join(row.numpy().tobytes() for row in rows.values())).hexdigest()
    about = {
        model: {
            "windows": [text["sequences"], text["context_length"]],
            "sha256": text["sha256"],
        }
        for model, text in windows.to_json()["texts"].items()
    }
    details = {"calibration": about, "router_rows_sha256": digest}
    made = merging.with_router(rows, details)
    return made.with_statistics(moments) if merging.asked.statistics else made
