"""Tokenizers of fine-tunes, by what they mean: equal ones merge however written, others do not."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import merge
from test_merging import folders, pool
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fusion_upcycle import MoEMergingAlgorithm
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.merging.tokenizers import compare_tokenizers
from fusion_upcycle.merging.vocabularies import _characters, read_formats

LETTERS = "abcdefghijklmnopqrstuvwxyz "
MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the"), ("e", "r")]


def bpe(**fields: Any) -> dict[str, Any]:
    """A byte-level BPE as `tokenizer.json`, with `<s>` as an added token."""
    tokens = [*_characters().values(), *("".join(merge) for merge in MERGES)]
    vocab = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=MERGES)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<s>"])
    return json.loads(tokenizer.to_str()) | fields


def pieces(extra: list[tuple[str, float, int]] | None = None, **trainer: int) -> bytes:
    """A SentencePiece model of letters, written field by field."""
    found = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(letter.replace(" ", "▁"), -float(i), 1) for i, letter in enumerate(LETTERS)]
    data = b""
    for piece, score, kind in [*found, *(extra or [])]:
        inner = b"\x0a" + bytes([len(piece.encode())]) + piece.encode()
        inner += b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        data += b"\x0a" + bytes([len(inner)]) + inner
    spec = b"\x18" + bytes([trainer.get("model_type", 2)])
    return data + b"\x12" + bytes([len(spec)]) + spec


def tekken(special: list[str], tokens: list[bytes], pattern: str = r"\w+") -> str:
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
        for i, t in enumerate(tokens)
    ]
    config = {
        "pattern": pattern,
        "default_vocab_size": len(tokens) + len(special),
        "default_num_special_tokens": len(special),
    }
    names = [{"rank": i, "token_str": token} for i, token in enumerate(special)]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": names})


def tiktoken(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))


BYTES = [bytes([b]) for b in range(97, 123)]
VOCAB = {token: number for number, token in enumerate([*"the an", "th", "the"])}


def write(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def compare(tmp_path: Path, *files: dict[str, Any]) -> list[str]:
    """What is said of models with these files, the first of which is main."""
    places = {}
    for number, content in enumerate(files):
        places[f"m{number}"] = tmp_path / f"m{number}"
        write(places[f"m{number}"], content)
    return compare_tokenizers(places, "m0").in_words("m0")


def changed(edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    said = bpe()
    edit(said)
    return said


def old_spelling(said: dict[str, Any]) -> None:
    """As transformers 4.40 and its `tokenizers` wrote it."""
    said["model"]["merges"] = [" ".join(merge) for merge in said["model"]["merges"]]
    for field in ("ignore_merges", "byte_fallback", "fuse_unk"):
        del said["model"][field]
    del said["truncation"], said["padding"]


# --- the same, written otherwise --------------------------------------------------------------

SAME: dict[str, dict[str, Any]] = {
    "merges as text, absent fields": changed(old_spelling),
    "the last call's state": bpe(truncation=None, padding={
        "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    }),
    "a decoder": bpe(decoder=None),
    "a dropout of training": changed(lambda said: said["model"].update(dropout=0.1)),
    "a special token's flag": changed(lambda said: said["added_tokens"][0].update(special=False)),
    "a sequence of one": bpe(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_the_same_tokenizer_may_be_written_otherwise(what: str, tmp_path: Path) -> None:
    assert compare(tmp_path, {"tokenizer.json": bpe()}, {"tokenizer.json": SAME[what]}) == []


def test_what_is_built_otherwise_is_asked_for_ids(tmp_path: Path) -> None:
    """A normaliser that does nothing more than the first one."""
    twice = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFC"}]}
    (said,) = compare(
        tmp_path, {"tokenizer.json": bpe()}, {"tokenizer.json": bpe(normalizer=twice)}
    )
    assert "tokenizer of m1: writes normalizer otherwise than m0" in said
    assert "texts give the same ids; m0's is kept" in said


def test_tokens_that_were_added_are_dropped_by_name(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(bpe()))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (said,) = compare(tmp_path, {"tokenizer.json": bpe()}, {"tokenizer.json": tokenizer.to_str()})
    assert said == (
        "tokens dropped, as m0's tokenizer lacks them: '<|im_start|>', '<|im_end|>' of m1"
    )


def test_a_spare_token_may_be_renamed(tmp_path: Path) -> None:
    said = {}
    for name, token in {"m0": "<|reserved_special_token_0|>", "m1": "<|tool|>"}.items():
        tokenizer = Tokenizer.from_str(json.dumps(bpe()))
        tokenizer.add_special_tokens([token])
        said[name] = {"tokenizer.json": tokenizer.to_str()}
    assert "'<|tool|>' of m1" in compare(tmp_path, said["m0"], said["m1"])[0]


def test_what_stands_around_a_text_is_mains_and_said(tmp_path: Path) -> None:
    framed = Tokenizer.from_str(json.dumps(bpe()))
    framed.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 261)])
    (said,) = compare(tmp_path, {"tokenizer.json": bpe()}, {"tokenizer.json": framed.to_str()})
    assert "puts other tokens around a text (post_processor); m0's is kept" in said


def test_settings_are_mains_and_said(tmp_path: Path) -> None:
    one, two = ({"tokenizer_config.json": {"padding_side": side}} for side in ("left", "right"))
    said = compare(tmp_path, {"tokenizer.json": bpe()} | one, {"tokenizer.json": bpe()} | two)
    assert said == [
        "tokenizer of m1: differs in padding_side (tokenizer_config.json); m0's is kept"
    ]


def test_fewer_formats_than_the_base_has_are_enough(tmp_path: Path) -> None:
    base = {"tokenizer.json": bpe(), "tokenizer.model": pieces()}
    assert compare(tmp_path, base, {"tokenizer.json": bpe()}, {"tokenizer.model": pieces()}) == []
    assert compare(tmp_path, {"tokenizer.json": bpe()}, base) == []


def test_one_tokenizer_in_two_formats_is_recognised(tmp_path: Path) -> None:
    said = bpe()
    vocab = said["model"]["vocab"] | {"<s>": 261}
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in said["model"]["merges"])
    files = {"vocab.json": vocab, "merges.txt": merges}
    (found,) = compare(
        tmp_path, {"tokenizer.json": said}, files | {"added_tokens.json": {"<s>": 261}}
    )
    assert "has the vocabulary and the merges of tokenizer.json of m0" in found
    tokens = ["<unk>", "<s>", "</s>", *LETTERS.replace(" ", "▁")]
    letters = {token: number for number, token in enumerate(tokens)}
    unigram = {"type": "WordLevel", "vocab": letters, "unk_token": "<unk>"}
    (found,) = compare(
        tmp_path / "b",
        {"tokenizer.json": {"version": "1.0", "added_tokens": [], "model": unigram}},
        {"tokenizer.model": pieces()},
    )
    assert "by which alone the two formats were compared" in found


# --- different ones ---------------------------------------------------------------------------


def swapped(said: dict[str, Any]) -> None:
    vocab = said["model"]["vocab"]
    vocab["th"], vocab["an"] = vocab["an"], vocab["th"]


JSON_FILE, SP = "tokenizer.json", "tokenizer.model"
SPACED = [("▁▁", -3.0, 1)]
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ids": ({JSON_FILE: bpe()}, {JSON_FILE: changed(swapped)}, r"'th' has id 258, not 256.*json"),
    "merges": (
        {JSON_FILE: bpe()},
        {JSON_FILE: changed(lambda s: s["model"].update(merges=MERGES[::-1]))},
        r"merges differ: at place 0 is .*tokenizer\.json",
    ),
    "normaliser": (
        {JSON_FILE: bpe()},
        {JSON_FILE: bpe(normalizer={"type": "NFD"})},
        "normalizer differs: the text",
    ),
    "lower case": (
        {JSON_FILE: bpe()},
        {JSON_FILE: bpe(normalizer={"type": "Lowercase"})},
        "normalizer differs: the text",
    ),
    "how words are cut": (
        {JSON_FILE: bpe()},
        {JSON_FILE: changed(lambda s: s["pre_tokenizer"].update(add_prefix_space=True))},
        "pre_tokenizer differs: the text",
    ),
    "a rule": (
        {JSON_FILE: bpe()},
        {JSON_FILE: changed(lambda s: s["model"].update(ignore_merges=True))},
        r"model\.ignore_merges differs: True, not False",
    ),
    "an added token's name": (
        {JSON_FILE: bpe()},
        {JSON_FILE: changed(lambda s: s["added_tokens"][0].update(content="<bos>"))},
        "id 261 is '<bos>', not '<s>'",
    ),
    "words of the vocabulary": (
        {JSON_FILE: bpe(added_tokens=[])},
        {JSON_FILE: changed(lambda s: s["model"]["vocab"].update(xx=261)) | {"added_tokens": []}},
        "'xx' more",
    ),
    "scores": ({SP: pieces(SPACED)}, {SP: pieces([("▁▁", -4.0, 1)])}, r"scores .*tokenizer\.model"),
    "pieces": ({SP: pieces()}, {SP: pieces(SPACED)}, r"'▁▁' more \(tokenizer\.model\)"),
    "kind of pieces": ({SP: pieces()}, {SP: pieces(model_type=1)}, "model_type differs: 1, not 2"),
    "spiece": ({"spiece.model": pieces()}, {"spiece.model": pieces(SPACED)}, r"\(spiece\.model\)"),
    "tiktoken": ({SP: tiktoken(BYTES)}, {SP: tiktoken(BYTES[::-1])}, "'a' has id 25, not 0"),
    "vocab.json": (
        {"vocab.json": VOCAB, "merges.txt": "t h\nth e\n"},
        {"vocab.json": VOCAB | {"the": 8, "x": 7}, "merges.txt": "t h\nth e\n"},
        r"'the' has id 8, not 7 \(vocab\.json and merges\.txt\)",
    ),
    "merges.txt": (
        {"vocab.json": VOCAB, "merges.txt": "t h\nth e\n"},
        {"vocab.json": VOCAB, "merges.txt": "t h\n"},
        r"merges differ: there are 1, not 2",
    ),
    "vocab.txt": ({"vocab.txt": "a\nb\nc\n"}, {"vocab.txt": "a\nc\nb\n"}, r"\(vocab\.txt\)"),
    "case of vocab.txt": (
        {"vocab.txt": "a\nb\n"},
        {"vocab.txt": "a\nb\n", "tokenizer_config.json": {"do_lower_case": False}},
        "do_lower_case differs: False, not True",
    ),
    "tekken.json": (
        {"tekken.json": tekken(["<s>"], BYTES)},
        {"tekken.json": tekken(["<s>"], BYTES[::-1])},
        r"'a' has id 26, not 1 \(tekken\.json\)",
    ),
    "pattern of tekken.json": (
        {"tekken.json": tekken(["<s>"], BYTES)},
        {"tekken.json": tekken(["<s>"], BYTES, r"\S+")},
        "pattern differs",
    ),
    "formats of different tokenizers": (
        {JSON_FILE: bpe()},
        {SP: pieces()},
        r"\(tokenizer\.model beside tokenizer\.json of m0\)",
    ),
    "damaged": ({SP: pieces()}, {SP: pieces()[:40]}, r"tokenizer\.model cannot be read as"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_tokenizer_is_refused_with_file_and_difference(what: str, tmp_path: Path) -> None:
    main, other, match = DIFFERENT[what]
    with pytest.raises(UpcyclingError, match=match):
        compare(tmp_path, main, other)


def test_two_fine_tunes_are_compared_where_the_base_has_another_format(tmp_path: Path) -> None:
    spm = {"tokenizer.model": pieces()}
    one, two = {"spiece.model": pieces()}, {"spiece.model": pieces(model_type=1)}
    with pytest.raises(UpcyclingError, match="Model m2 has another tokenizer than model m1"):
        compare(tmp_path, spm, one, two)


def test_sentencepiece_is_read_as_its_format_says(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer.model": pieces([("<pad>", 0.0, 4)])})
    found = read_formats(tmp_path)["tokenizer.model"]()
    assert (found.ids["a"], found.ids["▁"], found.added["<pad>"]) == (3, 29, 30)
    assert found.rules["scores"]["b"] == -1.0


# --- in a merge -------------------------------------------------------------------------------


def test_a_merge_and_a_pool_in_memory_refuse_other_files(tmp_path: Path) -> None:
    found = folders(tmp_path, BASE, "one", "two", vocab_size=262)
    for folder in found.values():
        write(folder, {"tekken.json": tekken(["<s>"], BYTES)})
    write(found["two"], {"tekken.json": tekken(["<s>"], BYTES[::-1])})
    match = rf"Model two has another tokenizer than model {BASE}: .*\(tekken\.json\)"
    with pytest.raises(UpcyclingError, match=match):
        merge(found, tmp_path / "moe")
    with pytest.raises(UpcyclingError, match=match):
        MoEMergingAlgorithm(2).run(pool(found))


def test_a_merge_takes_old_spellings(tmp_path: Path) -> None:
    found = folders(tmp_path, BASE, "one", "two", vocab_size=262)
    for name, folder in found.items():
        write(folder, {"tokenizer.json": changed(old_spelling) if name == "one" else bpe()})
    made = merge(found, tmp_path / "moe")
    assert made.record["differences"]["notes"] == []
