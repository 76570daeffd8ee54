"""Windows of running text as a model reads them: what it is given, and what it is to predict.

| model | is given | is to predict |
|---|---|---|
| causal LM | the window | each next token |
| masked LM (BERT) | the window, `MASKED_SHARE` of its tokens masked | the masked tokens |
| encoder-decoder (T5) | the first half; its decoder the second | the second half |

The last is prefix language modelling (arXiv 1910.10683, section 3.2), which needs no sentinels.
Windows have no special tokens of the tokenizer ([CLS], [SEP]).

Shapes: B windows, T tokens of one, V vocabulary.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import require_decoder_start
from fusion_upcycle.texts.tokens import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of a window for a masked LM, as BERT was trained.
MASKED_SHARE = 0.15
#: What tokenizers call the token that stands for a masked one.
_MASKS = ("[MASK]", "<mask>")


def is_masked_lm(name: str) -> bool:
    """Whether the class of this name predicts masked tokens."""
    return name.endswith("ForMaskedLM")


def read(model: "PreTrainedModel", ids_BT: Tensor) -> dict[str, Tensor | bool]:
    """Arguments of a forward pass over windows, with nothing masked.

    Raises:
        UpcyclingError: an encoder-decoder whose config names no start token.
    """
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids_BT, "use_cache": False}
    first, second = halves(ids_BT)
    return {
        "input_ids": first,
        "decoder_input_ids": decoder_inputs(model, second),
        "use_cache": False,
    }


def halves(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What an encoder is given of a window, and what its decoder is to go on with."""
    middle = (ids_BT.shape[1] + 1) // 2
    return ids_BT[:, :middle], ids_BT[:, middle:]


def decoder_inputs(model: "PreTrainedModel", targets_BT: Tensor) -> Tensor:
    """What a decoder is given that is to predict these: its start token, and all but the last."""
    start_B1 = torch.full_like(targets_BT[:, :1], start_of_decoder(model))
    return torch.cat([start_B1, targets_BT[:, :-1]], 1)


def start_of_decoder(model: "PreTrainedModel") -> int:
    """The token id that a decoder begins with.

    Raises:
        UpcyclingError: the config names none.
    """
    require_decoder_start(model)
    return int(model.config.decoder_start_token_id)


def window_loss(
    model: "PreTrainedModel", ids_T: Tensor, *, number: int, mask_token: int | None
) -> Tensor:
    """Mean cross-entropy, in nats, of what the model is to predict of one window.

    Args:
        model: with a head.
        number: of the window, which seeds what is masked.
        mask_token: id, for a masked LM.
    """
    ids_1T = ids_T[None].to(model.device)
    if mask_token is not None:
        masked_T = _masked(len(ids_T), number).to(model.device)
        given_1T = ids_1T.masked_fill(masked_T, mask_token)
        logits_1TV = model(**read(model, given_1T)).logits
        return cross_entropy(logits_1TV[0, masked_T].float(), ids_1T[0, masked_T])
    logits_1TV = model(**read(model, ids_1T)).logits
    if model.config.is_encoder_decoder:
        return cross_entropy(logits_1TV[0].float(), halves(ids_1T)[1][0])
    return cross_entropy(logits_1TV[0, :-1].float(), ids_1T[0, 1:])


def _masked(tokens: int, number: int) -> Tensor:
    """Which tokens of a window are masked, [T]: one at least."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(number))
    masked_T = torch.zeros(tokens, dtype=torch.bool)
    masked_T[order[: max(1, round(MASKED_SHARE * tokens))]] = True
    return masked_T


def mask_token(tokenizer_file: Path) -> int:
    """The id of the token that stands for a masked one.

    Raises:
        UpcyclingError: the tokenizer has none by the names that are known.
    """
    tokenizer = read_tokenizer(tokenizer_file)
    found = [tokenizer.token_to_id(name) for name in _MASKS]
    if (mask := next((token for token in found if token is not None), None)) is None:
        raise UpcyclingError(
            f"{tokenizer_file} has no token {' or '.join(_MASKS)}, which stands for a masked one. "
            "Use the tokenizer that the masked LM was trained with."
        )
    return mask
