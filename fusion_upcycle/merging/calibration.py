"""Router inputs of each source model on its own texts, through transformers' own forward pass.

The models run streamed, as in a proof: from folders or from memory, the same bits, in the memory of
one FFN and of one D x D matrix per MoE layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_upcycle.architectures.layout import class_name
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.merging.plan import Merging
from fusion_upcycle.merging.prototypes import Moments
from fusion_upcycle.progress import progress_bar
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.verification.function import ffn_of, layers_of, streamed_dense

#: Tokens of one window, less where the model has fewer positions.
WINDOW_TOKENS = 256
#: Windows of one forward pass.
BATCH_WINDOWS = 4
#: Characters that surely hold a window's tokens; what is too much is cut off.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Calibration:
    """Texts of each model that gives experts, as tokens.

    Attributes:
        windows: model -> token ids [W, T].
        identity: model -> hash of its windows, for the record.
    """

    windows: Mapping[str, Tensor]
    identity: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            model: {"windows": list(ids.shape), "sha256": self.identity[model]}
            for model, ids in self.windows.items()
        }


def calibration_windows(
    texts: Mapping[str, Sequence[str]],
    merging: Merging,
    tokenizer_file: Path | None,
) -> Calibration:
    """Windows of `WINDOW_TOKENS` tokens, evenly spaced over each model's texts.

    Args:
        texts: model -> documents.
        merging: says which models need texts, and how many tokens.
        tokenizer_file: `tokenizer.json` of all models.

    Raises:
        UpcyclingError: a model without texts or with too little, a name that is no model's, or no
            tokenizer.
    """
    for model in merging.experts:
        if model not in texts:
            raise UpcyclingError(
                f"router_init=prototype needs texts of every model that gives experts, and there "
                f"are none for {model} (calibration has {list(texts)}). Give calibration.{model}, "
                "or choose router_init=normal."
            )
    if unused := texts.keys() - set(merging.experts):
        raise UpcyclingError(
            f"calibration names {sorted(unused)}, which give no experts. The models that do: "
            f"{', '.join(merging.experts)}."
        )
    if tokenizer_file is None or not tokenizer_file.is_file():
        raise UpcyclingError(
            "router_init=prototype needs the models' tokenizer.json, and there is none"
            + (f" at {tokenizer_file}" if tokenizer_file else "")
            + ". Put it into the models' folders, or choose router_init=normal."
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    config = merging.upcycling.source_config
    length = min(WINDOW_TOKENS, config.max_position_embeddings)
    count = -(-merging.options.calibration_tokens // length)
    windows = {
        model: _windows(tokenizer, "\n\n".join(texts[model]), count, length, model)
        for model in merging.experts
    }
    largest = max(int(ids.max()) for ids in windows.values())
    check_vocabulary(largest, config.vocab_size, str(tokenizer_file))
    hashes = {model: sha256(ids.numpy().tobytes()).hexdigest() for model, ids in windows.items()}
    return Calibration(windows, hashes)


def _windows(tokenizer: Any, text: str, count: int, length: int, model: str) -> Tensor:
    """[W, T]: `count` windows that start evenly spaced, fewer where the text is short."""
    span = length * _CHARACTERS_PER_TOKEN
    last = max(0, len(text) - span)
    starts = sorted({round(last * i / max(1, count - 1)) for i in range(count)})
    found = []
    for start in starts:
        ids = tokenizer.encode(text[start : start + span], add_special_tokens=False).ids[:length]
        if len(ids) == length:
            found.append(ids)
    if not found:
        raise UpcyclingError(
            f"The calibration texts of {model} have fewer than {length} tokens. Give more text."
        )
    return torch.tensor(found)


@torch.inference_mode()
def router_moments(
    merging: Merging, calibration: Calibration, *, progress: bool = False
) -> dict[int, Moments]:
    """MoE layer -> what its router sees when each model runs on its own texts.

    Model i runs as the merge would if only its experts were chosen: shared weights with its FFNs.
    """
    upcycling = merging.upcycling
    layers, size = upcycling.resolved.moe_layers, upcycling.config.hidden_size
    # The output head is not looked at: one row of logits is the least it can make.
    unneeded = {"logits_to_keep": 1} if class_name(upcycling.config).endswith("ForCausalLM") else {}
    moments = {layer: Moments.empty(len(merging.experts), size) for layer in layers}
    total = sum(len(ids) for ids in calibration.windows.values())
    with progress_bar("Calibrating the router", total, progress, unit="window") as bar:
        for index, model in enumerate(merging.experts):
            dense = streamed_dense(upcycling, merging.as_dense(model))
            windows = calibration.windows[model]
            for batch in windows.split(BATCH_WINDOWS):
                share = len(batch) / len(windows)
                hooks = [
                    ffn_of(upcycling, layers_of(dense)[layer]).register_forward_pre_hook(
                        _adding(moments[layer], index, share)
                    )
                    for layer in layers
                ]
                dense(input_ids=batch, use_cache=False, **unneeded)
                for hook in hooks:
                    hook.remove()
                bar.update(len(batch))
    return moments


def route(
    merging: Merging,
    texts: Mapping[str, Sequence[str]],
    tokenizer_file: Path | None,
    *,
    progress: bool = False,
) -> tuple[Merging, dict[str, Any]]:
    """The merge with the router that its options call for, and what the record says of the texts.

    Raises:
        UpcyclingError: texts or tokenizer that are missing, too short, or not asked for.
    """
    if not merging.options.prototype_router:
        if texts:
            raise UpcyclingError(
                "calibration is given, but router_init is not prototype: nothing would read it. "
                "Choose router_init=prototype, or leave calibration out."
            )
        return merging, {}
    calibration = calibration_windows(texts, merging, tokenizer_file)
    assert callable(merging.options.router_init)
    rows = {
        layer: merging.options.router_init(moments)
        for layer, moments in router_moments(merging, calibration, progress=progress).items()
    }
    digest = sha256(b"".join(row.numpy().tobytes() for row in rows.values())).hexdigest()
    about = {"calibration": calibration.to_json(), "router_rows_sha256": digest}
    return merging.with_router(rows), about


def _adding(moments: Moments, model: int, share: float) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(model, inputs[0].flatten(0, -2), share)

    return add
