"""Perplexity and bits per byte of a causal language model on held-out text.

Shapes: B windows in a batch, C tokens of input per window, S stride, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.inputs import logits_of_last, max_positions, num_embeddings
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.live.sharing import ALONE, Share
from fusion_upcycle.texts.bootstrap import block_bootstrap, spread
from fusion_upcycle.texts.tokens import check_vocabulary, packed, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LARGEST_LOSS = 700.0  # nats per token; exp() of more overflows


@torch.inference_mode()
def perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str],
    *,
    context_length: int,
    stride: int,
    batch_size: int = 8,
    progress: bool = False,
    share: Share = ALONE,
) -> dict[str, Any]:
    """Score every token of the documents once, in sliding windows over one packed stream.

    The stream is BOS (EOS where the tokenizer has no BOS), then the documents, with EOS between
    them. These added tokens are context only: their own loss, and they as tokens, do not count. A
    tokenizer with neither gives a stream without them, whose first token is context only too, and
    the bytes it decodes to are not counted.

    Windows have ``context_length`` input tokens and start every ``stride`` tokens, the last one
    earlier so that it is full: no padding. A window scores what the windows before it did not, so
    each token sees at least ``context_length - stride`` tokens before it, or all there are.

    ``model`` is a transformers causal LM on its own device; module modes are restored. ``share`` is
    of the batches, among processes that all call this with the same text: all get all numbers.

    Returns ``loss_nats_per_token``; ``perplexity``, its exponential; ``bits_per_byte``, the loss of
    all scored tokens in bits over the UTF-8 bytes of the documents, which compares models of
    different tokenizers; ``tokens`` scored; ``bytes``. How sure these are is beside them, by a
    block bootstrap over windows (see ``bootstrap``), where there are two windows or more: the
    standard errors ``loss_nats_per_token_stderr``, ``perplexity_stderr``, ``bits_per_byte_stderr``
    and the 95 % interval from ``bits_per_byte_low`` to ``bits_per_byte_high``. They are about other
    text of this kind, not about other seeds of a training.

    Raises:
        UpcyclingError: nothing to score, a stride or context length that does not fit, token ids
            outside the model's vocabulary, or a loss that is not finite.
    """
    _check_windows(model, context_length, stride, batch_size)
    ids_N, counted_N, byte_count = _pack(tokenizer, documents)
    check_vocabulary(int(ids_N.max()), num_embeddings(model))

    with evaluating(model):
        windows = _score(
            model, ids_N, counted_N, context_length, stride, batch_size, progress, share
        )

    nats = math.fsum(nats for nats, _ in windows)
    tokens = int(counted_N.sum())
    loss = nats / tokens
    if not loss < _LARGEST_LOSS:  # also true for NaN
        raise UpcyclingError(
            f"The model's loss is {loss} nats per token: its weights or logits are not usable "
            "numbers (uninitialised, overflowing in a short dtype, or merged wrongly). Load it in "
            "float32, or make it anew."
        )
    return {
        "loss_nats_per_token": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": nats / math.log(2) / byte_count,
        "tokens": tokens,
        "bytes": byte_count,
        **_uncertainty(windows, tokens / math.log(2) / byte_count),
    }


def _uncertainty(windows: Sequence[tuple[float, int]], bits_per_byte: float) -> dict[str, float]:
    """Standard errors and an interval.

    Args:
        windows: nats and counted tokens of each.
        bits_per_byte: of one nat per token.
    """
    means = block_bootstrap(*zip(*windows, strict=True))
    if means is None:
        return {}
    loss = spread(means)
    return {
        "loss_nats_per_token_stderr": loss.stderr,
        "perplexity_stderr": spread(np.exp(np.minimum(means, _LARGEST_LOSS))).stderr,
        "bits_per_byte_stderr": loss.stderr * bits_per_byte,
        "bits_per_byte_low": loss.low * bits_per_byte,
        "bits_per_byte_high": loss.high * bits_per_byte,
    }


def _check_windows(
    model: "PreTrainedModel", context_length: int, stride: int, batch_size: int
) -> None:
    for name, value in (
        ("context_length", context_length),
        ("stride", stride),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise UpcyclingError(f"{name}={value} must be 1 or more.")
    if stride > context_length:
        raise UpcyclingError(
            f"stride={stride} is longer than context_length={context_length}: tokens between the "
            "windows would not be scored. Lower the stride."
        )
    limit = max_positions(model)
    if limit is not None and context_length > limit:
        raise UpcyclingError(
            f"context_length={context_length} is longer than the model's {limit} positions "
            f"(max_position_embeddings): use at most {limit}."
        )


def _pack(
    tokenizer: "PreTrainedTokenizerBase", documents: Sequence[str]
) -> tuple[Tensor, Tensor, int]:
    """One stream of token ids, which of them count, and the bytes that these stand for."""
    if isinstance(documents, str):
        raise UpcyclingError("The text to score is one string: give a list of documents.")
    if not any(documents):
        raise UpcyclingError("There is no text to score: all documents are empty. Give some text.")
    start = start_token(tokenizer)
    ids: list[int] = []
    counted: list[bool] = []
    for before, tokens in packed(tokenizer, documents, start=start):
        ids += before + tokens
        counted += [False] * len(before) + [True] * len(tokens)
    byte_count = sum(len(document.encode()) for document in documents)
    if start is None and ids:
        counted[0] = False
        byte_count -= len(str(tokenizer.decode(ids[:1])).encode())
    if not any(counted):
        raise UpcyclingError("There is no token to score. Give more text.")
    return torch.tensor(ids), torch.tensor(counted), byte_count


def _score(
    model: "PreTrainedModel",
    ids_N: Tensor,
    counted_N: Tensor,
    context_length: int,
    stride: int,
    batch_size: int,
    progress: bool,
    share: Share,
) -> list[tuple[float, int]]:
    """Nats and counted tokens of each window."""
    inputs = len(ids_N) - 1  # the last token is only predicted
    length_C = min(context_length, inputs)
    starts = [*range(0, inputs - length_C, stride), inputs - length_C]
    ends = [start + length_C for start in starts]  # the last row of a window predicts this token
    # The first window scores all its tokens and the others at most the last `stride`, so that it
    # goes alone and the others need `stride` rows of logits only.
    every = range(len(starts))
    batches = [every[:1], *(every[i : i + batch_size] for i in every[1::batch_size])]
    device = next(model.parameters()).device
    found: dict[int, list[tuple[float, int]]] = {}
    mine = tqdm(
        share.of(len(batches)), desc="perplexity", unit="batch", disable=not progress, leave=False
    )
    for number in mine:
        batch = batches[number]
        chosen = [ids_N[starts[window] : ends[window]] for window in batch]
        keep = length_C if number == 0 else stride
        outputs = model(
            input_ids=torch.stack(chosen).to(device), use_cache=False, **logits_of_last(model, keep)
        )
        found[number] = []
        for window, logits_SV in zip(batch, outputs.logits[:, -keep:], strict=True):
            end = ends[window]
            new = end - (ends[window - 1] if window else 0)
            targets = ids_N[end - new + 1 : end + 1].to(logits_SV.device)
            # One window at a time: a batch of float32 copies for a large V would not fit.
            nats_S = cross_entropy(logits_SV[-new:].float(), targets, reduction="none")
            counted_S = counted_N[end - new + 1 : end + 1]
            nats = float(nats_S.double().cpu()[counted_S].sum())
            found[number].append((nats, int(counted_S.sum())))
    return [window for batch in share.gathered(found) for window in batch]
