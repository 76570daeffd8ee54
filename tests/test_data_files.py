"""Data on the disk: names are literal, folders are read whole, errors name file and line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tiny import dense_model
from tiny_training import TOKENIZER, run

from fusion_upcycle.analysis.data import read_images, read_texts
from fusion_upcycle.cli.merge_flags import data_pairs
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.method.pool import named_texts
from fusion_upcycle.tables.images import load_images
from fusion_upcycle.tables.pairs import load_pairs
from fusion_upcycle.taskpool import CausalLMPerplexityTaskPool
from fusion_upcycle.taskpool.pool import named
from fusion_upcycle.texts.documents import load_documents, named_documents, open_documents

#: Each beside a name that it would match as a pattern, or that it would be expanded to.
NAMES = {
    "notes [2]": "notes 2",
    "a*b": "axxb",
    "a?b": "acb",
    "{x}": "x",
    "~": "home",
    "ü ñ 🙂": "u n",
    "50%41": "50A",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder whose own name is a pattern."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    work = tmp_path / "work [1]"
    work.mkdir()
    monkeypatch.chdir(work)


def write(path: str | Path, *rows: Any) -> str:
    """A file of a `.txt`'s text, or of rows."""
    file = Path(path)
    file.parent.mkdir(exist_ok=True, parents=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(rows[0])
    return str(path)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_name_is_no_pattern_of_another(name: str, suffix: str) -> None:
    for each, text in ((name, "asked"), (NAMES[name], "another")):
        row = text if suffix == ".txt" else {"text": text, "input": text, "target": text}
        write(f"{each}{suffix}", row)
        write(f"in {each}/part{suffix}", row)
    for path in (f"{name}{suffix}", str(Path(f"{name}{suffix}").absolute()), f"in {name}"):
        assert load_documents(path, "t") == ["asked"]
        assert load_documents({"path": path}, "t") == ["asked"]
        if suffix != ".txt":
            assert load_pairs(path, "t", splits=["test"]).inputs == ["asked"]
    if suffix != ".txt":
        given = {"path": suffix[1:].removesuffix("l"), "split": "train"}
        for file in (f"{name}{suffix}", [f"{name}{suffix}"]):
            assert load_documents({**given, "data_files": file}, "t") == ["asked"]
            assert load_pairs({**given, "data_files": file}, "t", splits=()).inputs == ["asked"]


@pytest.mark.parametrize("name", ["a::b", "$HOME"])
def test_names_that_datasets_cannot_be_given_are_read_as_texts_and_refused_as_tables(
    name: str,
) -> None:
    write(f"{name}.jsonl", {"text": "asked", "input": "i", "target": "t"})
    write(f"{name}/a.jsonl", {"text": "asked", "input": "i", "target": "t"})
    for path in (f"{name}.jsonl", name):
        assert load_documents(path, "t") == ["asked"]
        with pytest.raises(UpcyclingError, match="cannot be read with '::' or "):
            load_pairs(path, "t", splits=())


@pytest.mark.parametrize("name", ["pets [2]", "a*b", "{x}", "~"])
def test_images_are_those_of_the_folder_that_was_named(name: str) -> None:
    for each, colours in ((name, (0, 1)), (NAMES.get(name, "pets 2"), (8, 9))):
        for label, colour in zip(("cat [1]", "do*g"), colours, strict=True):
            file = Path(each, label, "i [3].png")
            file.parent.mkdir(parents=True)
            Image.new("L", (1, 1), colour).save(file)
    images = load_images(f"./{name}", "t", splits=["train"])
    assert images.classnames == ["cat [1]", "do*g"]
    assert [images.item(index)[0].getpixel((0, 0)) for index in range(len(images))] == [0, 1]
    (files,) = read_images([f"d=./{name}"]).values()
    assert [image.getpixel((0, 0)) for image in files] == [0, 1]


def test_an_image_that_cannot_be_read_is_named() -> None:
    for label in ("a", "b"):
        Path("pets", label).mkdir(parents=True)
        Image.new("L", (1, 1)).save(Path("pets", label, "good.png"))
    Path("pets/b/good.png").write_bytes(b"no image")
    images = load_images("pets", "data.pets", splits=["train"])
    assert images.item(0)[1] == 0
    with pytest.raises(UpcyclingError, match=r"^data\.pets: image 1 cannot be read: .*pets/b/good"):
        images.item(1)


def test_home_is_taken_where_there_is_no_such_path_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "at home")
    assert load_documents("~/a.txt", "t") == ["at home"]
    write("~/a.txt", "here")
    with pytest.raises(UpcyclingError, match=r"^t: '~/a\.txt' is here and in the home folder"):
        load_documents("~/a.txt", "t")
    assert load_documents("./~/a.txt", "t") == ["here"]
    write("~root.txt", "nobody's home")
    assert load_documents("~root.txt", "t") == ["nobody's home"]


# --- folders --------------------------------------------------------------------------------------


def folder_of_three() -> str:
    write("f/b.jsonl", {"text": "second"}, {"text": "third"})
    write("f/a.txt", "first")
    write("f/c/d.PARQUET".lower(), {"text": "fourth"})
    write("f/.hidden.txt", "hidden")
    write("f/.git/e.txt", "hidden too")
    return "f"


def trained_on(path: str, tmp_path: Path) -> int:
    return int(
        run(dense_model(vocab_size=257), tmp_path, 1, data={"mine": path}).record["data"]["mine"][
            "documents"
        ]
    )


def scored(path: str, tmp_path: Path) -> int:
    """How many bytes."""
    TOKENIZER.save_pretrained(tmp_path)
    pool = CausalLMPerplexityTaskPool({"mine": path}, tokenizer=str(tmp_path))
    return int(pool.evaluate(dense_model(vocab_size=257))["mine"]["bytes"])


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda path, _: load_documents(path, "t"), ["first", "second", "third", "fourth"]),
        (lambda path, _: named_documents({"m": path})["m"][1:], ["second", "third", "fourth"]),
        (lambda path, _: read_texts([f"m={path}"])["m"][:1], ["first"]),
        (trained_on, 4),
        (scored, len("firstsecondthirdfourth")),
    ],
    ids=["documents", "calibration", "analysis", "training", "scoring"],
)
def test_a_folder_is_all_files_below_it_sorted(
    read: Callable[[str, Path], Any], found: Any, tmp_path: Path
) -> None:
    assert read(folder_of_three(), tmp_path) == found


def test_what_is_wrong_with_a_folder_is_said() -> None:
    Path("empty").mkdir()
    write("empty/.hidden.txt", "x")
    with pytest.raises(UpcyclingError, match=r"^t: the folder '/.*/empty' has no files\. Give one"):
        load_documents("empty", "t")
    write(f"{folder_of_three()}/README.md", "x")
    sentence = (
        r"^t: the format of 'f/README\.md' is not known\. .*Move it out of the folder 'f', or"
    )
    with pytest.raises(UpcyclingError, match=sentence):
        load_documents("f", "t")


# --- what is not there ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["missing", "./missing", "missing.jsonl", "here/missing", "a b/c", "a/b/c", "[x]/y"]
)
@pytest.mark.parametrize(
    "read",
    [
        lambda given: load_documents(given, "t"),
        lambda given: load_documents({"path": given}, "t"),
        lambda given: load_pairs(given, "t", splits=["test"]),
        lambda given: load_images({"path": given}, "t", splits=["test"]),
    ],
    ids=["text", "{text}", "pairs", "images"],
)
def test_the_hub_is_not_asked_for_what_is_meant_to_be_here(
    read: Callable[[str], Any], given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("datasets.load_dataset", asked)
    Path("here").mkdir()
    with pytest.raises(UpcyclingError, match=r"^t: there is no file.* '/.*/work \[1\]/"):
        read(given)


def test_what_may_be_on_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda path, **_: 1 / 0)
    for read in (
        lambda: load_documents({"path": "org/set", "split": "train"}, "t"),
        lambda: load_documents({"path": "wikitext", "split": "train"}, "t"),
        lambda: load_pairs("org/set", "t", splits=["test"]),
        lambda: load_pairs({"path": "glue", "name": "cola"}, "t", splits=["test"]),
    ):
        with pytest.raises(UpcyclingError, match="division by zero"):
            read()


# --- contents -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"text": "x"}\n\n{"text": \n', 3, "no JSON"),
        (b'{"text": "x"}\n{"text": "caf\xe9"}\n', 2, "no UTF-8"),
        (b'[{"text": "x"}]\n', 1, "a list, not an object"),
        (b'{"text": "x"}\n{"text": null}\n', 2, "'text' is a NoneType, not a string"),
        (b'{"text": "\\ud800"}\n', 1, "half of a surrogate pair"),
        (b'{"text": "x"}\n{"body": "y"}\n', 2, "no column 'text' but body"),
        (b"[" * 100_000, 1, "no JSON"),
    ],
    ids=["json", "encoding", "list", "null", "surrogate", "column", "deep"],
)
def test_a_bad_line_is_named(content: bytes, line: int, message: str) -> None:
    Path("good").mkdir()
    write("good/a.jsonl", {"text": "x"})
    Path("good/b.jsonl").write_bytes(content)
    for path in ("good", "good/b.jsonl"):
        with pytest.raises(UpcyclingError, match=rf"^t: '.*b\.jsonl', line {line}: .*{message}"):
            load_documents(path, "t")


def test_a_bad_line_of_pairs_is_named() -> None:
    Path("p").mkdir()
    write("p/a.jsonl", {"input": "a", "target": "b"})
    Path("p/b.jsonl").write_bytes(b'{"input": "a", "target": "b"}\n{"input"\n')
    for path in ("p/b.jsonl", "p"):
        with pytest.raises(UpcyclingError, match=r"^t: 'p/b\.jsonl', line 2: no JSON"):
            load_pairs(path, "t", splits=["test"])
    write("q.parquet", {"input": "a", "target": "b"})
    Path("q.parquet").write_bytes(Path("q.parquet").read_bytes()[:50])
    with pytest.raises(UpcyclingError, match=r"^t: 'q\.parquet' cannot be read: Parquet magic"):
        load_pairs("q.parquet", "t", splits=["test"])


def test_a_byte_order_mark_and_windows_line_ends_are_no_text() -> None:
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n')
    assert load_documents(["a.txt", "a.jsonl"], "t") == ["one\ntwo\n", "one\r\n"]


def test_a_file_that_changes_is_another_one() -> None:
    write("a.txt", "one")
    before = open_documents("a.txt", "t").fingerprint
    assert before == open_documents("./a.txt", "t").fingerprint
    write("a.txt", "two")
    assert open_documents("a.txt", "t").fingerprint != before


# --- remedies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["col.jsonl", "c [1] {x}.parquet"])
def test_the_remedy_for_a_missing_column_works_where_it_is_pasted(name: str) -> None:
    write(name, {"id": 1, "my body": "asked"})
    with pytest.raises(UpcyclingError, match="no column 'text' but id, my body") as error:
        load_documents(name, "data.web")
    (remedy,) = re.findall(r"with (\{.*\}) in place of the file", str(error.value))
    # On our command line, in a YAML, and as an override of Hydra.
    assert named_documents(data_pairs("--data", [f"web={remedy}"])) == {"web": ["asked"]}
    assert read_texts([f"web={remedy}"]) == {"web": ["asked"]}
    assert load_documents(yaml.safe_load(remedy), "t") == ["asked"]
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in (f"method.data={{web: {remedy}}}", f"method.data={remedy}"):
        (parsed,) = OverridesParser.create().parse_overrides([override])
        texts = named_texts(parsed.value(), "continued", "method.data")
        assert list(named_documents(texts).values()) == [["asked"]]


def test_what_a_file_has_not_is_refused_with_what_works() -> None:
    write("a.jsonl", {"body": "asked"})
    with pytest.raises(UpcyclingError, match="is a file, which has no split") as error:
        load_documents({"path": "a.jsonl", "split": "train", "column": "body"}, "t")
    (remedy,) = re.findall(r"\{.*\}", str(error.value))
    assert load_documents(yaml.safe_load(remedy), "t") == ["asked"]


def test_a_path_in_place_of_a_mapping_goes_by_its_name() -> None:
    write("t.jsonl", {"text": "x"})
    assert CausalLMPerplexityTaskPool("t.jsonl").texts == {"t": "t.jsonl"}  # type: ignore[arg-type]
    assert named("./v1.5", "tasks", "task") == {"v1": "./v1.5"}
    Path("v1.5").mkdir()
    assert named("./v1.5", "tasks", "task") == {"v1.5": "./v1.5"}
    assert named_texts("./t.jsonl", "continued", "data") == {"t": "./t.jsonl"}
    with pytest.raises(
        UpcyclingError, match=r"taskpool\.texts is \['t\.jsonl'\], which has no nam"
    ):
        CausalLMPerplexityTaskPool(["t.jsonl"])  # type: ignore[arg-type]


def test_braces_on_a_command_line_are_a_path_where_there_is_one() -> None:
    write("{x}", "x")
    assert data_pairs("--data", ["a={x}", "b={path: y}"]) == {"a": "{x}", "b": {"path": "y"}}
    with pytest.raises(UpcyclingError, match="neither a path that is here nor"):
        data_pairs("--data", ["a={x: [}"])
