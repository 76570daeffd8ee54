"""Perplexity against references that score one token at a time."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.texts.perplexity import perplexity

POSITIONS = 64
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.5,  # large, so that the loss depends strongly on the context
}
EOS = 256
DOCUMENTS = ["The first document.", "Zweites, größeres Dokument 🙂", "x"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(POSITIONS)


def stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[int]:
    ids: list[int] = []
    for document in documents:
        ids += [EOS, *tokenizer(document)["input_ids"]]
    return ids


@torch.no_grad()
def nats_of_last(model: nn.Module, ids: list[int]) -> float:
    """The model's own nats for the last token, given all the others."""
    logits = model(torch.tensor([ids[:-1]])).logits[0, -1].double()
    return -float(logits.log_softmax(-1)[ids[-1]])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_short_text_is_scored_one_token_at_a_time_on_full_context(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    documents = ["Grüße", "ab"]
    ids = stream(tokenizer, documents)
    # Everything but the two separators counts.
    expected = [nats_of_last(model, ids[: i + 1]) for i in range(len(ids)) if ids[i] != EOS]
    got = perplexity(
        model, tokenizer, documents, context_length=POSITIONS, stride=16, batch_size=batch_size
    )
    assert got["tokens"] == len(expected) == 7 + 2
    assert got["bytes"] == 9
    assert got["loss_nats_per_token"] == pytest.approx(sum(expected) / 9, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(sum(expected) / 9), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / 9, rel=1e-5)


# (context, stride): the last window moved back, windows without overlap, one window of context 1
@pytest.mark.parametrize(("context", "stride"), [(8, 3), (8, 8), (16, 5), (7, 1), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_long_text_is_scored_in_the_windows_that_the_docstring_tells(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    stride: int,
    batch_size: int,
) -> None:
    ids = stream(tokenizer, DOCUMENTS)
    expected: dict[int, float] = {}
    start = 0
    while len(expected) < len(ids) - 1:
        first = min(start, len(ids) - 1 - context)
        for target in range(first + 1, first + context + 1):
            if target not in expected:
                assert target - first >= min(context - stride, target)
                expected[target] = nats_of_last(model, ids[first : target + 1])
        start += stride
    counted = [nats for target, nats in expected.items() if ids[target] != EOS]
    got = perplexity(
        model, tokenizer, DOCUMENTS, context_length=context, stride=stride, batch_size=batch_size
    )
    assert got["tokens"] == len(counted) == got["bytes"] == sum(len(d.encode()) for d in DOCUMENTS)
    assert got["loss_nats_per_token"] == pytest.approx(sum(counted) / len(counted), rel=1e-5)


def test_hand_computed_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    """A stream of 10 tokens with context 4 and stride 2 is read in the windows 0, 2, 4 and 5."""
    seen: list[list[int]] = []

    class Recorder(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
            seen.extend(input_ids.tolist())
            return super().forward(input_ids=input_ids, **kwargs)

    torch.manual_seed(0)
    model = Recorder(LlamaConfig(**SHAPE))
    text = "abcdefghi"
    got = perplexity(model, tokenizer, [text], context_length=4, stride=2, batch_size=2)
    ids = stream(tokenizer, [text])
    assert seen == [ids[0:4], ids[2:6], ids[4:8], ids[5:9]]
    assert got["tokens"] == 9


def test_text_that_spells_the_special_token_is_scored_as_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "a<|endoftext|>b"
    got = perplexity(model, tokenizer, [text], context_length=POSITIONS, stride=8)
    assert got["tokens"] == got["bytes"] == len(text)


def test_a_tokenizer_without_special_tokens_leaves_the_first_token_out(
    model: LlamaForCausalLM,
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(POSITIONS).backend_tokenizer)
    assert bare.bos_token_id is None and bare.eos_token_id is None
    ids = bare("abc")["input_ids"]
    got = perplexity(model, bare, ["ab", "c"], context_length=POSITIONS, stride=8)
    expected = nats_of_last(model, ids[:2]) + nats_of_last(model, ids)
    assert (got["tokens"], got["bytes"]) == (2, 2)
    assert got["loss_nats_per_token"] == pytest.approx(expected / 2, rel=1e-5)


def test_bits_per_byte_counts_bytes_and_not_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that knows nothing costs log2(V) bits per token, whatever a token stands for."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    nn.init.zeros_(model.lm_head.weight)
    words = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer({"größe": 0, "zwei": 1, "<eos>": 2}), eos_token="<eos>"
    )
    got = perplexity(model, words, ["größe zwei"], context_length=8, stride=4)
    assert (got["tokens"], got["bytes"]) == (2, 12)
    assert got["bits_per_byte"] == pytest.approx(2 * math.log2(257) / 12)
    assert got["perplexity"] == pytest.approx(257, rel=1e-5)


def _word_tokenizer(vocabulary: dict[str, int]):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_modes_are_restored_and_dropout_is_off(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)).train()
    model.model.layers[0].eval()
    results = [
        perplexity(model, tokenizer, DOCUMENTS, context_length=16, stride=8) for _ in range(2)
    ]
    assert results[0] == results[1]
    assert model.training and not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_mixture_of_experts_is_scored_too(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)).eval()
    ids = stream(tokenizer, ["abc"])
    expected = sum(nats_of_last(model, ids[: i + 1]) for i in (1, 2, 3)) / 3
    got = perplexity(model, tokenizer, ["abc"], context_length=POSITIONS, stride=8)
    assert got["loss_nats_per_token"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        ([], {}, "no text to score"),
        (["", ""], {}, "no text to score"),
        ("text", {}, "list of documents"),
        (["text"], {"context_length": 65}, "longer than the model's 64 positions"),
        (["text"], {"stride": 17}, "longer than context_length=16"),
        (["text"], {"stride": 0}, "stride=0 must be 1 or more"),
        (["text"], {"batch_size": 0}, "batch_size=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    arguments: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(UpcyclingError, match=message):
        perplexity(model, tokenizer, documents, **{"context_length": 16, "stride": 8, **arguments})


def test_a_tokenizer_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 256}))
    with pytest.raises(UpcyclingError, match="gives token id 256, but the model has 256 embed"):
        perplexity(model, tokenizer, ["text"], context_length=16, stride=8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_broken_model_is_an_error_and_not_a_number(
    tokenizer: PreTrainedTokenizerFast, value: float
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    model.lm_head.weight.data[5:] *= value
    with pytest.raises(UpcyclingError, match="not usable numbers"):
        perplexity(model, tokenizer, ["text"], context_length=16, stride=8)
    assert model.training
