"""Documents from wherever they are, and what is said of those that cannot be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import dense_model
from tiny_training import TOKENIZER, run

from fusion_upcycle.analysis.data import read_texts
from fusion_upcycle.demo import domain_text
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.taskpool import CausalLMPerplexityTaskPool
from fusion_upcycle.texts.documents import load_documents, named_documents, open_documents
from fusion_upcycle.texts.tokens import check_vocabulary
from fusion_upcycle.texts.windows import calibration_sequences


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_documents_of_every_kind_come_back_exactly(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = ["line\n\n  indented 🙂\n", "second"]
    (tmp_path / "a.txt").write_text(texts[0])
    table = Dataset.from_dict({"text": texts, "other": ["x", "y"]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl")
    assert load_documents(str(tmp_path / "a.txt"), "t") == texts[:1]
    assert load_documents(str(tmp_path / "a.parquet"), "t") == texts
    both = load_documents([str(tmp_path / "a.jsonl"), str(tmp_path / "a.txt")], "t")
    assert both == [*texts, texts[0]]
    data_set = {"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train[1:]"}
    assert load_documents(data_set, "t") == texts[1:]
    assert load_documents({**data_set, "column": "other"}, "t") == ["y"]
    function = {"_target_": "fusion_upcycle.demo.domain_text", "domain": "prose", "split": "test"}
    assert load_documents(function, "t") == list(domain_text("prose", "test"))
    assert load_documents({"_target_": "textwrap.dedent", "text": " a"}, "t") == ["a"]


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("missing.txt", r"t: there is no file '/.*missing\.txt'\. Give the path"),
        ("org/data_set", r"t: there is no file or folder '/.*\{path: org/data_set, split: train\}"),
        (3, r"t is 3\. Give a file"),
        ([3], r"t is \[3\]\. Give a file"),
        ({"path": "text", "splitt": "train"}, "Did you mean 'split'"),
        ({"path": "org/text"}, "t needs `split`"),
        (
            {"path": "json", "split": "train", "data_files": "missing.jsonl"},
            r"t: 'missing\.jsonl' cannot be read: Unable to find",
        ),
        ({"_target_": "builtins.range", "_args_": [3]}, "t: document 0 is a int, not a string"),
        ({"_target_": "math.sqrt", "_args_": [4]}, r"t: math\.sqrt gives 2\.0\. Give a function"),
        ({"_target_": "nowhere.text"}, r"t: nowhere\.text gives no text: .*No module.* Give a"),
        ({"_target_": "textwrap.dedent"}, "dedent gives no text: .*missing 1 required"),
    ],
    ids=str,
)
def test_what_is_not_text_is_refused(specification: Any, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        load_documents(specification, "t")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl', line 2: no JSON"),
        ("a.jsonl", b"", "there is nothing in it"),
        ("a.jsonl", b'{"content": "x"}\n', "line 1: there is no column 'text' but content. Name"),
        ("a.txt", b"\n\ncaf\xe9", "line 3: no UTF-8"),
        ("a.parquet", b"text", "Parquet file size is 4 bytes"),
    ],
)
def test_files_that_are_not_what_they_seem(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UpcyclingError, match=f"^t: .*{message}"):
        load_documents(str(tmp_path / name), "t")


def test_a_stream_that_breaks_off_says_so(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    Path(files[0]).write_text('{"text": "x"}\n')
    Path(files[1]).write_text("{")
    stream = {"path": "json", "data_files": files, "split": "train", "streaming": True}
    texts = iter(open_documents(stream, "t").texts)
    assert next(texts) == "x"
    with pytest.raises(UpcyclingError, match=r"^t: .*b\.jsonl'\] cannot be read: JSON parse error"):
        next(texts)


def train_on(folder: Path, **texts: Any) -> Any:
    return run(dense_model(vocab_size=257), folder, **texts)


def score(path: str, folder: Path) -> Any:
    TOKENIZER.save_pretrained(folder)
    pool = CausalLMPerplexityTaskPool({"mine": path}, tokenizer=str(folder))
    return pool.evaluate(dense_model(vocab_size=257))


@pytest.mark.parametrize(
    ("read", "where"),
    [
        (lambda path, folder: train_on(folder, data={"mine": path}), "data"),
        (lambda path, folder: train_on(folder, validation={"mine": path}), "validation"),
        (score, r"taskpool\.texts"),
        (lambda path, _: named_documents({"mine": path}), "calibration"),
        (lambda path, _: read_texts([f"mine={path}"]), "--data"),
    ],
    ids=["data", "validation", "taskpool", "calibration", "analysis"],
)
def test_a_missing_file_is_said_alike_everywhere(
    read: Callable[[str, Path], Any], where: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=rf"^{where}[. ]mine: there is no file '.*\. Give the"):
        read(str(tmp_path / "missing.txt"), tmp_path)


# --- token ids ------------------------------------------------------------------------------------


def test_ids_that_the_model_has_no_embedding_for_are_refused() -> None:
    check_vocabulary(66, 67)
    sentence = "gives token id 67, but the model has 67 embeddings: use the tokenizer that belongs"
    with pytest.raises(UpcyclingError, match=f"^The tokenizer {sentence}"):
        check_vocabulary(67, 67)
    with pytest.raises(UpcyclingError, match=f"^data.mine: the tokenizer {sentence}"):
        check_vocabulary(67, 67, "data.mine: the tokenizer")


def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(UpcyclingError, match=r"tokenizer\.json is damaged .* Get it again"):
        calibration_sequences(
            {"a": ["text"]}, tmp_path / "tokenizer.json", tokens=4, context_length=2
        )


# --- sequences ------------------------------------------------------------------------------------


def sequences(text: str, folder: Path, **options: Any) -> list[str]:
    TOKENIZER.save_pretrained(folder)
    found = calibration_sequences({"a": [text]}, folder / "tokenizer.json", **options)
    return [TOKENIZER.decode(ids) for ids in found.ids["a"]]


def test_a_long_text_gives_the_beginnings_of_stretches_spread_over_it(tmp_path: Path) -> None:
    text = "".join(f"{n:04}" for n in range(160))  # ten stretches of 4 x 16 characters
    found = sequences(text, tmp_path, tokens=20, context_length=4)
    assert found == ["0000", "0032", "0064", "0096", "0128"]


def test_a_short_text_gives_all_its_sequences_the_second_ones_last(tmp_path: Path) -> None:
    text = "".join(f"{n:04}" for n in range(48)) + "end"  # a stretch of 128 characters and a half
    found = sequences(text, tmp_path, tokens=1000, context_length=8)
    assert found[:3] == ["00000001", "00320033", "00020003"]
    assert sorted(found) == [f"{n:04}{n + 1:04}" for n in range(0, 48, 2)]


def test_where_stretches_begin_can_be_chosen(tmp_path: Path) -> None:
    text = "".join(f"{n:04}" for n in range(160))
    options: dict[str, Any] = {"tokens": 8, "context_length": 4}
    found = sequences(text, tmp_path, **options, starts=lambda size, span, _: [4, size - span])
    assert found == ["0001", "0144"]
