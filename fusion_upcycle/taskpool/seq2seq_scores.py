"""Likelihood and greedy answers of a sequence-to-sequence model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fusion_upcycle.tables.pairs import Pairs, target_ids
from fusion_upcycle.taskpool.scores import with_error
from fusion_upcycle.texts.bootstrap import block_bootstrap, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("accuracy", "exact_match", "loss_nats_per_token", "examples", "truncated_inputs")
_IGNORED = -100  # of labels, by transformers


@torch.inference_mode()
def score_pairs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Pairs,
    *,
    batch_size: int,
    max_input_tokens: int | None,
) -> dict[str, float]:
    """What `Seq2SeqTaskPool` reports of a task.

    Raises:
        UpcyclingError: a target that the tokenizer cannot write.
    """
    targets = [target_ids(tokenizer, target, pairs.where) for target in pairs.targets]
    labels = [target_ids(tokenizer, label, pairs.where) for label in pairs.labels]
    longest = max(map(len, targets))  # an answer that goes on is another one
    nats: list[float] = []
    same: list[float] = []
    right: list[float] = []
    cut = 0
    starts = range(0, len(targets), batch_size)
    for start in tqdm(starts, desc=pairs.where.rpartition(".")[2], leave=False):
        chosen = slice(start, start + batch_size)
        inputs, too_long = _inputs(model, tokenizer, pairs.inputs[chosen], max_input_tokens)
        cut += too_long
        found, states = _nats(model, inputs, targets[chosen])
        nats += found
        answers = _greedy(model, inputs, longest)
        same += [
            float(_text(tokenizer, answer) == _text(tokenizer, target))
            for answer, target in zip(answers, targets[chosen], strict=True)
        ]
        if labels:
            given = {"encoder_outputs": (states,), "attention_mask": inputs["attention_mask"]}
            each = [_nats(model, given, [label] * len(found))[0] for label in labels]
            best = torch.tensor(each).argmin(0).tolist()
            right += [
                float(pairs.labels[place] == target)
                for place, target in zip(best, pairs.targets[chosen], strict=True)
            ]
    tokens = [len(target) for target in targets]
    scores = {**with_error("accuracy", right)} if labels else {}
    scores |= with_error("exact_match", same)
    scores["loss_nats_per_token"] = sum(nats) / sum(tokens)
    means = block_bootstrap(nats, tokens)
    if means is not None:
        scores["loss_nats_per_token_stderr"] = spread(means).stderr
    return scores | {"examples": len(targets), "truncated_inputs": cut}


def _inputs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    limit: int | None,
) -> tuple[dict[str, Tensor], int]:
    """A padded batch, and how many of its texts were cut."""
    long = 0
    if limit is not None:
        whole = tokenizer(list(texts), verbose=False)["input_ids"]
        long = sum(len(ids) > limit for ids in whole)
    batch = tokenizer(
        list(texts),
        padding=True,
        truncation=limit is not None,
        max_length=limit,
        return_tensors="pt",
    )
    names = ("input_ids", "attention_mask")  # some tokenizers give more than models take
    return {name: batch[name].to(model.device) for name in names}, long


def _nats(
    model: "PreTrainedModel", inputs: dict[str, Any], targets: Sequence[Sequence[int]]
) -> tuple[list[float], Tensor]:
    """Loss of each target, summed over its tokens, and the encoder's states."""
    length = max(map(len, targets))
    labels_BT = torch.full((len(targets), length), _IGNORED, device=model.device)
    for row, target in enumerate(targets):
        labels_BT[row, : len(target)] = torch.tensor(target)
    outputs = model(**inputs, labels=labels_BT, use_cache=False)
    logits_BVT = outputs.logits.float().transpose(1, 2)
    losses_BT = F.cross_entropy(logits_BVT, labels_BT, ignore_index=_IGNORED, reduction="none")
    return losses_BT.sum(1).tolist(), outputs.encoder_last_hidden_state


def _greedy(model: Any, inputs: dict[str, Tensor], tokens: int) -> list[list[int]]:
    found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
    return found.tolist()


def _text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
