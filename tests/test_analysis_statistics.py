"""Statistics of routing against known answers: no model here."""

import math

import pytest
import torch
from torch import Tensor

from fusion_upcycle.analysis.information import (
    domain_information,
    holm,
    information_gain,
    mutual_information_bits,
)
from fusion_upcycle.analysis.routing import RoutingCounts, entropy_bits, top1_margin
from fusion_upcycle.analysis.token_classes import TOKEN_CLASSES, TokenClasses, token_class
from fusion_upcycle.analysis.windows import UNITS, DomainWindows, domain_windows
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError

# --- load, entropy, margin ------------------------------------------------------------------------


def counted(probabilities: list[list[float]], chosen: list[list[int]], experts: int = 4) -> dict:
    """Statistics of one layer, one domain, all tokens words."""
    counts = RoutingCounts.empty([7], ["text"], num_experts=experts, units=UNITS)
    zeros = torch.zeros(len(chosen), dtype=torch.int64)
    sent = torch.nn.functional.one_hot(torch.tensor(chosen), experts).sum(1)
    # In two parts: what is counted must not depend on batches.
    for part in (slice(0, 1), slice(1, None)):
        probability = torch.tensor(probabilities)[part]
        counts.add(0, 0, probability, sent[part], zeros[part], zeros[part])
        counts.add_classes(0, zeros[part])
    assert counts.class_tokens() == {"word": len(chosen)}
    return counts.to_json()["7"]


def test_uniform_routing() -> None:
    found = counted([[0.25] * 4] * 4, [[0, 1], [2, 3], [1, 0], [3, 2]])
    assert found["load"] == [0.25] * 4
    assert (found["load_cv"], found["dead_experts"]) == (0, 0)
    assert found["smallest_share"] == 0.25
    assert found["limit_broken"] is None
    assert found["router_entropy_bits"] == found["token_entropy_bits"] == 2
    assert found["top1_margin"] == 0
    assert found["by_domain"]["text"]["load"] == found["by_class"]["word"]["load"] == [0.25] * 4


def test_collapsed_routing() -> None:
    found = counted([[1.0, 0, 0, 0]] * 3, [[0]] * 3)
    assert found["load"] == [1, 0, 0, 0]
    assert found["load_cv"] == pytest.approx(math.sqrt(3))  # std of (1,0,0,0) over its mean 1/4
    assert found["dead_experts"] == 3
    assert "CV" in found["limit_broken"]
    assert found["router_entropy_bits"] == found["token_entropy_bits"] == 0
    assert found["top1_margin"] == 1


def test_decided_tokens_of_an_even_router() -> None:
    """Every token is certain, the text as a whole is even: the two entropies tell them apart."""
    found = counted(
        [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]], [[0], [1], [2], [3]]
    )
    assert found["router_entropy_bits"] == 2
    assert found["token_entropy_bits"] == 0


def test_entropy_and_margin_of_one_distribution() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert float(entropy_bits(p)) == pytest.approx(1.75)
    assert float(top1_margin(p)) == pytest.approx(0.25)


# --- token classes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the", "word"), (" ing", "word"), ("x1", "word"), ("文", "word"), ("self_", "word"),
        ("The", "capitalised"), (" Éa", "capitalised"), ("_Name", "capitalised"),
        ("12", "number"), (" 3.14", "number"), ("½", "number"), ("3)", "number"),
        ("+", "operator"), (" ==", "operator"), ("!=", "operator"), ("\u00d7", "operator"),
        ("->", "operator"), ("≤", "operator"),
        ("(", "bracket"), ("]]", "bracket"), (" {", "bracket"),
        ("!", "punctuation"), ('"', "punctuation"), (").", "punctuation"), ("€", "punctuation"),
        (" ", "whitespace"), ("\n\t", "whitespace"), ("", "whitespace"),
        ("\ufffd", "other"), ("\x00", "other"),
    ],
)  # fmt: skip
def test_token_class(text: str, expected: str) -> None:
    assert token_class(text) == expected


def test_classes_of_a_byte_level_tokenizer() -> None:
    tokenizer = byte_tokenizer(64)
    ids = torch.tensor(tokenizer("Ab 1+(\n.é")["input_ids"] + [tokenizer.eos_token_id])
    names = [TOKEN_CLASSES[index] for index in TokenClasses(tokenizer)(ids)]
    assert names == [
        "capitalised", "word", "whitespace", "number", "operator", "bracket", "whitespace",
        "punctuation", "other", "other",  # the two bytes of é
        "other",  # end of text
    ]  # fmt: skip


def test_classes_of_a_tokenizer_with_word_marks() -> None:
    """SentencePiece's way: a mark for the space before a word, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["▁The", "▁", "▁12", "ing", "<0x0A>", "(", "<s>"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    names = [TOKEN_CLASSES[index] for index in TokenClasses(fast)(torch.arange(len(words)))]
    assert names == [
        "capitalised",
        "whitespace",
        "number",
        "word",
        "whitespace",
        "bracket",
        "other",
    ]


# --- windows --------------------------------------------------------------------------------------


def windows_of(texts: dict[str, list[str]], **options: int) -> DomainWindows:
    return domain_windows(byte_tokenizer(64), texts, **{"tokens": 100, "length": 8} | options)


def test_windows_hold_each_token_once_and_no_separator_counts() -> None:
    found = windows_of({"a": ["x" * 20, "", "y" * 3], "b": ["z" * 7]})
    assert [(w.document, len(w.ids), w.context) for w in found.windows["a"]] == [
        (0, 8, 1), (2, 4, 1), (0, 8, 0), (0, 5, 0),
    ]  # fmt: skip
    assert (found.documents("a"), found.tokens("a"), found.tokens("b")) == (2, 23, 7)
    tokenizer = byte_tokenizer(64)
    seen: dict[int, str] = {0: "", 1: ""}
    for batch in found.batches(3):
        seen[batch.domain] += tokenizer.decode(batch.ids_BT[batch.counted_BT])
        assert batch.ids_BT.shape == batch.counted_BT.shape == batch.units_BT.shape
    assert (sorted(seen[0]), seen[1]) == (["x"] * 20 + ["y"] * 3, "z" * 7)


def test_tokens_are_spread_over_documents() -> None:
    found = windows_of({"a": ["x" * 1000] * 6}, tokens=45)
    assert found.tokens("a") == 45
    assert found.documents("a") == 6
    assert found.unit == "document"


def test_few_documents_make_windows_the_unit() -> None:
    found = windows_of({"a": ["x" * 60], "b": ["y" * 60] * 6})
    assert found.unit == "window"
    units = [batch.units_BT[:, 0] for batch in found.batches(8) if batch.domain == 0]
    assert torch.cat(units).unique().numel() == 8


@pytest.mark.parametrize(
    ("texts", "tokens", "match"),
    [
        ({}, 9, "no text"),
        ({"a": [""]}, 9, "text of a has no tokens"),
        ({"a": "text"}, 9, "one string"),
        ({"a": ["text"]}, 0, "tokens=0"),
    ],
)
def test_texts_that_cannot_be_used(texts: dict, tokens: int, match: str) -> None:
    with pytest.raises(UpcyclingError, match=match):
        windows_of(texts, tokens=tokens)


# --- mutual information ---------------------------------------------------------------------------


def test_mutual_information_of_known_tables() -> None:
    assert float(mutual_information_bits(torch.tensor([[5, 0], [0, 5]]))) == pytest.approx(1)
    assert float(mutual_information_bits(torch.tensor([[4, 8], [1, 2]]))) == pytest.approx(0)
    # Written out: H(D) + H(E) - H(D, E).
    table = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    joint = 2 * (3 / 8 * math.log2(8 / 3) + 1 / 8 * 3)
    assert float(mutual_information_bits(table)) == pytest.approx(2 - joint)


def documents(rates_LDUE: Tensor, sizes_DU: Tensor, seed: int) -> Tensor:
    """Counts of documents whose tokens go to experts at a rate of each document's own."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(rates_LDUE.shape, dtype=torch.int64)
    for d, u in torch.cartesian_prod(*map(torch.arange, sizes_DU.shape)).tolist():
        size = int(sizes_DU[d, u])
        chosen = torch.multinomial(rates_LDUE[:, d, u], size, replacement=True, generator=generator)
        counts[:, d, u] = torch.nn.functional.one_hot(chosen, rates_LDUE.shape[-1]).sum(1)
    return counts


def random_rates(layers: int, units: int, seed: int) -> Tensor:
    """Documents differ much from each other, and domains not at all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers, 2, units, 4, generator=generator) ** 3 + 0.01


def test_two_domains_perfectly_separated_are_one_bit() -> None:
    units = torch.zeros(1, 2, 8, 2, dtype=torch.int64)
    units[0, 0, :, 0] = units[0, 1, :, 1] = 50
    found = domain_information(units, [3], permutations=999, seed=0)
    assert found is not None
    layer = found["layers"]["3"]
    assert layer["bits"] == pytest.approx(1) == found["domain_entropy_bits"]
    assert layer["depends_on_domain"]
    assert layer["p_value"] == pytest.approx(1 / 1000, abs=2e-3)
    assert layer["baseline_95_bits"] < 0.5
    assert found["units"] == [8, 8]


def test_permutation_test_is_wrong_as_often_as_it_says() -> None:
    """Documents of unlike length whose tokens depend on each other: still about 5 %."""
    sizes = torch.stack([torch.arange(20, 140, 10), torch.arange(60, 72)])
    units = documents(random_rates(600, 12, seed=1), sizes, seed=2)
    found = domain_information(units, list(range(600)), permutations=199, seed=0)
    assert found is not None
    layers = found["layers"].values()
    rate = sum(layer["p_value"] <= 0.05 for layer in layers) / 600
    assert 0.02 < rate < 0.085  # 0.05 with a standard error of 0.009
    assert not any(layer["depends_on_domain"] for layer in layers)  # adjusted for 600 layers
    # The plug-in estimate itself is far from 0, which the baseline shows.
    bits, base = (
        sum(layer[key] for layer in layers) / 600 for key in ("bits", "baseline_mean_bits")
    )
    assert bits > 0.01
    assert bits == pytest.approx(base, rel=0.1)


def test_one_domain_has_no_information() -> None:
    units = torch.ones(2, 1, 8, 4, dtype=torch.int64)
    assert domain_information(units, [0, 1], permutations=9, seed=0) is None
    assert information_gain(units, units, [0, 1], permutations=9, seed=0) is None


def test_gain_is_found_where_there_is_one_and_not_elsewhere() -> None:
    rates = random_rates(3, 12, seed=3)
    sizes = torch.full((2, 12), 200)
    before = documents(rates, sizes, seed=4)
    rates[1, 0, :, 0] += 3  # layer 1 learns to send the first domain to expert 0
    after = documents(rates, sizes, seed=5)
    after[2] = before[2]
    found = information_gain(before, after, [0, 1, 2], permutations=499, seed=0)
    assert found is not None
    assert [layer["specialised"] for layer in found.values()] == [False, True, False]
    assert found["1"]["gain_bits"] == pytest.approx(
        found["1"]["after_bits"] - found["1"]["before_bits"]
    )
    assert found["2"]["gain_bits"] == 0
    assert found["2"]["p_value"] == 1
    by_hand = mutual_information_bits(after[1].sum(1))
    assert found["1"]["after_bits"] == pytest.approx(float(by_hand))


def test_gain_test_is_wrong_as_often_as_it_says() -> None:
    rates, sizes = random_rates(600, 10, seed=6), torch.full((2, 10), 60)
    before, after = (documents(rates, sizes, seed=seed) for seed in (7, 8))
    found = information_gain(before, after, list(range(600)), permutations=199, seed=0)
    assert found is not None
    rate = sum(layer["p_value"] <= 0.05 for layer in found.values()) / 600
    assert 0.02 < rate < 0.085


def test_a_router_that_only_renames_its_experts_has_not_specialised() -> None:
    """Every assignment changes, and nothing is learnt."""
    rates, sizes = random_rates(300, 10, seed=6), torch.full((2, 10), 60)
    rates[:, 0, :, 0] += 0.5
    before, after = documents(rates, sizes, seed=7), documents(rates.roll(1, -1), sizes, seed=8)
    found = information_gain(before, after, list(range(300)), permutations=199, seed=0)
    assert found is not None
    assert sum(layer["p_value"] <= 0.05 for layer in found.values()) / 300 <= 0.05


def test_permutations_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_upcycle.analysis import information

    units = documents(random_rates(2, 6, seed=1), torch.full((2, 6), 30), seed=2)
    whole = domain_information(units, [0, 1], permutations=50, seed=3)
    monkeypatch.setattr(information, "_CHUNK", 200)
    assert domain_information(units, [0, 1], permutations=50, seed=3) == whole
    assert domain_information(units, [0, 1], permutations=50, seed=4) != whole


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
