"""What an analysis leaves: figures, page, record; and the command that makes them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_analysis_models import TOKENIZER, analysis_of, moe_model

from fusion_upcycle.analysis import analyze, figures, write_analysis
from fusion_upcycle.analysis.data import read_texts
from fusion_upcycle.analysis.report import write_page
from fusion_upcycle.analysis.run import compare
from fusion_upcycle.cli import main
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.report.drawing import save


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return analysis_of(moe_model()).record


def texts_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def panels(figure: Any) -> list[Any]:
    """Axes that are not colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def colour_bar(figure: Any) -> str:
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    return bar.get_ylabel()


def test_load_map_says_every_number(record: dict[str, Any]) -> None:
    figure = figures.load_map(record)
    (axes,) = panels(figure)
    loads = [share for layer in record["layers"].values() for share in layer["load"]]
    assert texts_of(axes) == [f"{100 * share:.0f}" for share in loads]
    assert "expert" in axes.get_xlabel()
    assert "even: 25 %" in axes.get_title()
    assert colour_bar(figure) == "load / %"
    marked = [label.get_text().endswith("!") for label in axes.get_yticklabels()]
    assert marked == [bool(layer["limit_broken"]) for layer in record["layers"].values()]


@pytest.mark.parametrize("by", ["by_domain", "by_class"])
def test_share_map_has_a_panel_for_each_layer(record: dict[str, Any], by: str) -> None:
    figure = figures.share_map(record, by)
    assert "%" in colour_bar(figure)
    for axes, (index, layer) in zip(panels(figure), record["layers"].items(), strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == list(layer[by])
        assert axes.get_title().startswith(f"layer {index}")
        assert ("bits, p =" in axes.get_title()) == (by == "by_domain")
        shares = [share for found in layer[by].values() for share in found["load"]]
        assert texts_of(axes) == [f"{100 * share:.0f}" for share in shares]


def test_information_chart_shows_measurement_and_baseline(record: dict[str, Any]) -> None:
    figure = figures.information_chart(record)
    (axes,) = panels(figure)
    assert axes.get_ylabel() == "mutual information / bits"
    assert "permutations over" in axes.get_title()
    layers = record["information"]["layers"].values()
    stars = [layer for layer in layers if layer["depends_on_domain"]]
    assert texts_of(axes) == ["*"] * len(stars)
    (legend,) = figure.legends
    assert "measured" in str([text.get_text() for text in legend.get_texts()])


@pytest.mark.parametrize("measure", ["weight_cosine", "output_cka"])
def test_similarity_map_says_every_number(record: dict[str, Any], measure: str) -> None:
    figure = figures.similarity_map(record, measure)
    for axes, layer in zip(panels(figure), record["layers"].values(), strict=True):
        values = [value for row in layer[measure]["matrix"] for value in row]
        assert texts_of(axes) == [f"{value:.2f}" for value in values]
        assert axes.get_xlabel() == axes.get_ylabel() == "expert"


def markers_of(axes: Any) -> list[str]:
    return [line.get_marker() for line in axes.lines]


def test_lines_differ_by_more_than_colour(record: dict[str, Any], tmp_path: Path) -> None:
    analysis = analysis_of(moe_model())
    (axes,) = figures.comparison_chart(compare(analysis, analysis)).axes
    assert len(set(markers_of(axes))) == 4
    assert "similarity" in axes.get_ylabel()


def test_figures_are_the_same_bytes_each_time(record: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(figures.load_map(record), tmp_path / folder, "load")
    for name in ("load.png", "load.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "load / %" in (tmp_path / "a" / "load.svg").read_text()  # text stays text


def test_wide_models_have_maps_without_numbers(record: dict[str, Any]) -> None:
    wide = json.loads(json.dumps(record))
    wide["model"]["num_experts"] = 64
    for layer in wide["layers"].values():
        layer["load"] = [1 / 64] * 64
    (axes,) = panels(figures.load_map(wide))
    assert texts_of(axes) == []
    assert len(axes.get_xticks()) == 16


def test_the_folder_is_made_from_the_record(tmp_path: Path) -> None:
    before, after = (analysis_of(moe_model(expert_init=init)) for init in ("copy", "drop"))
    page = write_analysis(after, tmp_path / "out", before=before)
    content = page.read_text()
    pictures = re.findall(r"!\[[^\]]+\]\((\w+)\.png\)", content)
    assert pictures == [
        "load", "information", "domains", "classes", "weight_cosine", "output_cka", "comparison",
    ]  # fmt: skip
    for name in pictures:
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert min(image.size) > 250
            assert len(image.convert("L").getcolors()) > 5
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text()
    record = json.loads((tmp_path / "out" / "run_record.json").read_text())
    assert record["analysis"] == after.record
    assert "300 tokens of 5 documents" in content


@pytest.mark.usefixtures("no_files")
def test_the_page_can_be_made_again_from_the_record(tmp_path: Path) -> None:
    page = write_analysis(analysis_of(moe_model()), tmp_path)
    content = page.read_text()
    page.unlink()
    assert write_page(tmp_path) == page
    assert page.read_text() == content


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures, but do not spend seconds on their files."""
    monkeypatch.setattr("fusion_upcycle.analysis.report.save", lambda *_: None)


@pytest.mark.usefixtures("no_files")
def test_nothing_of_an_earlier_comparison_stays(tmp_path: Path) -> None:
    analysis = analysis_of(moe_model())
    write_analysis(analysis, tmp_path, before=analysis)
    page = write_analysis(analysis, tmp_path)
    assert "Before and after" not in page.read_text()


@pytest.mark.usefixtures("no_files")
def test_page_of_one_domain_and_of_many_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_upcycle.analysis.similarity.LARGEST_MATRIX", 3)
    analysis = analyze(moe_model(), TOKENIZER, {"a": ["Some text."]}, sample=5)
    content = write_analysis(analysis, tmp_path).read_text()
    assert "Give two or more" in content
    assert "cosine" in content
    assert not (tmp_path / "weight_cosine.png").exists()


@pytest.mark.usefixtures("no_files")
def test_windows_as_units_are_said(tmp_path: Path) -> None:
    texts = {"a": ["Some text. " * 40], "b": ["1 + 1 = 2 " * 40]}
    analysis = analyze(moe_model(), TOKENIZER, texts, sample=5, permutations=20)
    content = write_analysis(analysis, tmp_path).read_text()
    assert "fewer than 5 documents, so windows were permuted" in content


# --- command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "moe"
    moe_model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def test_command_with_files_and_folders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prose").mkdir()
    for index in range(6):
        (tmp_path / "prose" / f"{index}.txt").write_text(f"Text number {index}. " * 10)
    (tmp_path / "prose" / ".hidden").write_text("x")
    lines = [json.dumps({"text": f"{index} + 1 = {index + 1}"}) for index in range(7)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    data = [f"--data=prose={tmp_path / 'prose'}", f"--data=sums={tmp_path / 'sums.jsonl'}"]
    options = ["--tokens", "400", "--output", str(tmp_path / "out"), "--quiet"]
    main(["analyze", str(folder), *data, *options, "--before", str(folder)])
    captured = capsys.readouterr()
    assert f"Output: {tmp_path / 'out' / 'index.md'}" in captured.out
    assert "Where tokens go" in captured.out
    assert "%|" not in captured.err
    content = json.loads((tmp_path / "out" / "run_record.json").read_text())
    domains = content["analysis"]["domains"]
    assert domains == {
        "prose": {"documents": 6, "tokens": 400},
        "sums": {"documents": 7, "tokens": 63},
    }
    assert content["analysis_comparison"]["information"]["0"]["gain_bits"] == 0


@pytest.mark.usefixtures("no_files")
def test_command_on_the_demo_texts(folder: Path, tmp_path: Path) -> None:
    output = ["--tokens", "100", "--output", str(tmp_path), "--quiet"]
    main(["analyze", str(folder), "--demo", *output])
    content = json.loads((tmp_path / "run_record.json").read_text())
    assert list(content["analysis"]["domains"]) == ["prose", "source", "arithmetic"]


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["--demo", "--data", "a=b"], 2, "not allowed with"),
        ([], 2, "required"),
        (["--data", "words"], 2, "--data words must be NAME=FILE_OR_FOLDER"),
        (["--data", "a=./nowhere.txt"], 2, "--data a: there is no file"),
        (["--data", "a=./nowhere.doc"], 2, "--data a: there is no file '/"),
        (["--demo", "--tokens", "0"], 2, "tokens=0"),
    ],
)
def test_wrong_input_is_an_error(
    folder: Path,
    arguments: list[str],
    status: int,
    match: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["analyze", str(folder), *arguments, "--quiet", "--output", str(tmp_path / "out")])
    assert exit_.value.code == status
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_analysed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import dense_folder

    dense = dense_folder(tmp_path / "dense", vocab_size=257)
    (tmp_path / "empty").mkdir()
    for model, match in (
        (dense, "has no tokenizer that can be read"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(SystemExit):
            main(["analyze", str(model), "--demo", "--quiet", "--output", str(tmp_path / "out")])
        assert match in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["analyze", str(folder), "--demo", "--quiet", "--output", str(tmp_path / "file")])
    assert "must be a folder, and" in capsys.readouterr().err
    TOKENIZER.save_pretrained(dense)
    with pytest.raises(SystemExit):
        main(["analyze", str(dense), "--demo", "--quiet", "--output", str(tmp_path / "out")])
    assert "llama model is dense" in capsys.readouterr().err


def test_text_that_is_named_twice_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UpcyclingError, match="given twice"):
        read_texts([f"a={tmp_path / 'a.txt'}"] * 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpcyclingError, match="has no files"):
        read_texts([f"a={tmp_path / 'empty'}"])


def test_matplotlib_is_asked_for_before_long_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusion_upcycle.report.drawing.find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        main(["analyze", str(folder), "--demo"])
    assert "fusion-upcycle[plots]" in capsys.readouterr().err


def test_help_says_the_true_default() -> None:
    from fusion_upcycle.analysis.run import TOKENS
    from fusion_upcycle.cli import _parser

    parsed = _parser().parse_args(["analyze", "x", "--demo"])
    assert parsed.tokens == TOKENS
