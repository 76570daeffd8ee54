"""Reports: what is read, what the tables say, how they are written."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from records import TASKS, experiment, of, record

from fusion_upcycle.comparison import write_report
from fusion_upcycle.comparison.figures import make_pictures, neighbours, pareto_front
from fusion_upcycle.comparison.formats import to_csv, to_latex, to_markdown
from fusion_upcycle.comparison.metrics import lower_is_better, primary_metric, written
from fusion_upcycle.comparison.results import read_results
from fusion_upcycle.comparison.rows import find_tasks, make_rows
from fusion_upcycle.comparison.tables import Cell, Line, Table, make_tables
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.report.drawing import save


def tables_of(*places: Path) -> dict[str, Table]:
    results = read_results(places)
    tasks = find_tasks([result for result in results if result.error is None])
    return {table.key: table for table in make_tables(make_rows(results, tasks), tasks)}


def texts(table: Table) -> dict[str, list[str]]:
    return {line.label: [cell.text for cell in line.cells] for line in table.lines}


def marks(table: Table, column: str) -> dict[str, str]:
    place = list(table.headers).index(column)
    return {line.label: line.cells[place].mark for line in table.lines if line.cells[place].mark}


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Table]:
    return tables_of(experiment(tmp_path / "runs"))


def test_rows_are_grouped_ordered_and_labelled_by_their_setting(tables: dict[str, Table]) -> None:
    table = tables["scores"]
    assert [(line.group, line.label) for line in table.lines] == [
        ("Reference Results", "Pre-trained"),
        *(("Reference Results", f"Fine-tuned ({task})") for task in TASKS),
        ("Model Merging", "Simple Average"),
        ("Model Merging", "Task Arithmetic (scaling_factor=0.3)"),
        ("Model Merging", "SLERP (prose+arithmetic)"),
        ("Model Merging", "SLERP (prose+source)"),
        ("Model Mixing", "MoE"),
    ]
    assert list(table.headers) == [*TASKS, "Average", "settings tried"]


def test_scores_are_means_over_seeds_with_their_spread(tables: dict[str, Table]) -> None:
    shown = texts(tables["scores"])
    assert shown["Simple Average"] == ["2.4500", "2.2500", "1.4500", "2.0500", "-"]
    # Seeds 0 and 0.02 apart: standard deviation 0.02 / sqrt(2), also of the averages.
    assert shown["MoE"][0] == "2.3100 ± 0.0141" and shown["MoE"][3] == "1.8433 ± 0.0141"
    assert shown["Task Arithmetic (scaling_factor=0.3)"][-1] == "12"
    assert "standard deviation over seeds" in tables["scores"].note


def test_best_and_second_are_marked_and_references_do_not_compete(
    tables: dict[str, Table],
) -> None:
    assert marks(tables["scores"], "prose") == {"MoE": "best", "SLERP (prose+source)": "second"}
    assert marks(tables["scores"], "arithmetic") == {
        "MoE": "best",
        "Task Arithmetic (scaling_factor=0.3)": "second",
    }


def test_equals_as_written_share_a_mark(tmp_path: Path) -> None:
    for name, value in (("a", 0.50001), ("b", 0.50002), ("c", 0.4), ("d", 0.3)):
        scores = {"t": value}
        record(tmp_path / name, name, scores, metric="accuracy", better=None)
    assert marks(tables_of(tmp_path)["scores"], "t") == {"a": "best", "b": "best", "c": "second"}


def test_bounds_among_the_references_do_not_compete(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.6)):
        record(tmp_path / name, name, {"t": value})
    record(tmp_path / "bound", "bound", {"t": 0.1}, group="Reference Results")
    assert marks(tables_of(tmp_path)["scores"], "t") == {"a": "best", "b": "second"}


def test_relative_scores_turn_round_where_lower_is_better(tables: dict[str, Table]) -> None:
    shown = texts(tables["normalised"])
    assert shown["Fine-tuned (source)"][1] == "1.000"
    assert shown["Simple Average"][0] == f"{2.4 / 2.45:.3f}"
    mean = (2.4 / 2.45 + 2.1 / 2.25 + 1.3 / 1.45) / 3
    assert shown["Simple Average"][3] == f"{mean:.3f}"
    assert marks(tables["normalised"], "Average")["MoE"] == "best"


def test_without_a_fine_tune_of_its_name_the_best_one_counts(tmp_path: Path) -> None:
    for name, value in (("x", 0.6), ("y", 0.8)):
        tuned = {"reference": "finetuned", "models": [name]}
        record(tmp_path / name, name, {"exam": value}, metric="acc", better="higher", **tuned)
    record(tmp_path / "m", "merged", {"exam": 0.4}, metric="acc", better="higher")
    assert texts(tables_of(tmp_path)["normalised"])["merged"] == ["0.500", "0.500"]


def test_tasks_of_models_left_out_and_those_said_are_unseen(
    tables: dict[str, Table], tmp_path: Path
) -> None:
    # Averages over other tasks in each row: none is the best.
    assert not marks(tables["generalisation"], "unseen")
    assert "no row is marked" in tables["generalisation"].note
    shown = texts(tables["generalisation"])
    assert shown["SLERP (prose+source)"] == [f"{(2.42 + 2.15) / 2:.4f}", "1.5500"]
    assert "Simple Average" not in shown
    record(tmp_path / "u" / "a", "A", of(1.0, 2.0, 4.0), unseen=("arithmetic",))
    record(tmp_path / "u" / "b", "B", of(1.0, 1.0, 5.0), unseen=("arithmetic",))
    table = tables_of(tmp_path / "u")["generalisation"]
    assert texts(table)["A"] == ["1.5000", "4.0000"]
    assert marks(table, "seen") == {"B": "best", "A": "second"}
    assert marks(table, "unseen") == {"A": "best", "B": "second"}


def test_subsets_say_how_often_merging_pays(tables: dict[str, Table]) -> None:
    (line,) = tables["subsets"].lines
    base, pairs = (2.5 + 2.2 + 1.4) / 3, ((2.42 + 2.15 + 1.55) / 3, (2.6 + 2.4 + 1.6) / 3)
    best = {"prose": (2.4 + 2.3 + 1.5) / 3, "source": (2.6 + 2.1 + 1.6) / 3}
    gains = [min(best.values()) - pairs[0], best["prose"] - pairs[1]]
    share = sum(pair < base for pair in pairs) / 2
    assert [cell.text for cell in line.cells] == ["2", f"{share:.3f}", f"{sum(gains) / 2:+.4f}"]


def test_cost_and_routing_have_columns_of_their_own(tables: dict[str, Table]) -> None:
    cost = texts(tables["cost"])
    assert cost["MoE"] == ["400k", "150k", "300k", "-", "2.0"]
    assert list(tables["routing"].headers)[:2] == ["load CV", "dead experts"]
    assert texts(tables["routing"]) == {"MoE": ["0.100", "1", "8", "1.500"]}


def test_fine_tunes_by_task_mark_the_diagonal(tables: dict[str, Table]) -> None:
    assert marks(tables["cross"], "source") == {"Fine-tuned (source)": "best"}


def test_runs_of_an_earlier_form_of_the_experiment_are_left_out(tmp_path: Path) -> None:
    for name in ("now", "before"):
        record(tmp_path / "out" / name, name, of(1.0, 1.0, 1.0))
    (tmp_path / "out" / "experiment.json").write_text(json.dumps({"runs": ["now"]}))
    assert list(texts(tables_of(tmp_path)["scores"])) == ["now"]


def test_two_experiments_keep_their_rows_apart(tmp_path: Path) -> None:
    record(tmp_path / "a", "Row", of(1.0, 1.0, 1.0))
    record(tmp_path / "b", "Row", of(2.0, 2.0, 2.0), experiment="other")
    assert list(texts(tables_of(tmp_path)["scores"])) == ["made_up: Row", "other: Row"]


def test_experiments_are_measured_by_their_own_models(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 1.0)):
        one = {"experiment": name}
        for task, values in zip(TASKS, ((1, 3, 3), (3, 1, 3), (3, 3, 1)), strict=True):
            tuned = {"reference": "finetuned", "models": [task], **one}
            record(tmp_path / name / task, task, of(*(v + shift for v in values)), **tuned)
        base = {"reference": "pretrained", "models": [], **one}
        record(tmp_path / name / "base", "base", of(*[2 + shift] * 3), **base)
        part = {"models": ["prose", "source"], "subset": True, **one}
        record(tmp_path / name / "pair", "Pair", of(*[2 + 0.9 * shift] * 3), **part)
    found = tables_of(tmp_path)
    relative = texts(found["normalised"])
    assert relative["a: prose"][0] == relative["b: prose"][0] == "1.000"
    assert relative["b: Pair (prose+source)"][0] == f"{2 / 2.9:.3f}"
    assert {label: cells[1] for label, cells in texts(found["subsets"]).items()} == {
        "a: Pair": "0.000",
        "b: Pair": "1.000",
    }


def test_rows_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = []
    for number in (1, 2):
        files.append(tmp_path / f"results_{number}.json")
        content = {"results": {f"t{number}": {"acc,none": 0.5}}, "model_name": "m"}
        files[-1].write_text(json.dumps(content))
    assert list(texts(tables_of(tmp_path)["scores"])) == [f"m ({file})" for file in files]


def test_spread_is_called_what_it_is(tables: dict[str, Table], tmp_path: Path) -> None:
    record(tmp_path / "u" / "single", "A", of(1, 1, 1), stderr=0.1)
    assert "± is the standard error." in tables_of(tmp_path / "u")["scores"].note
    for seed in (0, 1):
        record(tmp_path / "u" / str(seed), "B", of(1, 1, seed), seed=seed)
    note = "± is the standard deviation over seeds; of a single run, its standard error."
    assert note in tables_of(tmp_path / "u")["scores"].note
    assert "± is the standard deviation over seeds. " in tables["scores"].note


def test_failures_alone_are_a_report_too(tmp_path: Path) -> None:
    record(tmp_path / "runs" / "broken", "Broken", None)
    page = write_report([tmp_path / "runs"], tmp_path / "out")
    assert "RuntimeError: it broke" in page.read_text()
    assert "RuntimeError: it broke" in (page.parent / "report.md").read_text()
    (failed,) = json.loads((page.parent / "report.json").read_text())["failed"]
    assert failed["method"] == "Broken" and failed["record"].endswith("run_record.json")


def test_others_reports_are_read(tmp_path: Path) -> None:
    run = tmp_path / "ties" / "program_report.json"
    run.parent.mkdir()
    accuracies = {"mnist": {"accuracy": 0.9, "loss": 0.3}, "dtd": {"accuracy": 0.5, "loss": 1.0}}
    run.write_text(json.dumps({"model_info": {"all_params": 3}, **accuracies, "average": {}}))
    many = tmp_path / "many.json"
    many.write_text(json.dumps({"dare": {"mnist": {"accuracy": 0.8}, "dtd": {"accuracy": 0.6}}}))
    shown = texts(tables_of(run.parent, many)["scores"])
    assert shown == {"ties": ["90.0", "50.0", "70.0"], "dare": ["80.0", "60.0", "70.0"]}


def test_lm_evals_results_are_read(tmp_path: Path) -> None:
    results = {
        "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.3},
        "gsm": {"exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"},
    }
    (tmp_path / "results_2026.json").write_text(
        json.dumps({"results": results, "model_name": "org/model"})
    )
    assert texts(tables_of(tmp_path)["scores"]) == {"org/model": ["30.0", "50.0", "40.0"]}


def test_a_group_stands_for_its_tasks(tmp_path: Path) -> None:
    scores = {"mmlu": 0.5, "law": 0.4, "maths": 0.6, "arc": 0.1, "exam": 0.3}
    groups = {"mmlu": ["law", "maths"], "without_a_number": ["exam"], "arc": []}
    results = {task: {"acc,none": value} for task, value in scores.items()}
    content = {"results": results, "group_subtasks": groups, "model_name": "m"}
    (tmp_path / "results_1.json").write_text(json.dumps(content))
    table = tables_of(tmp_path)["scores"]
    assert list(table.headers) == ["mmlu", "arc", "exam", "Average"]
    assert texts(table) == {"m": ["50.0", "10.0", "30.0", "30.0"]}
    report = {task: {"acc": value} for task, value in scores.items()} | {"groups": groups}
    record(tmp_path / "ours", "m", of(1, 1, 1), report={"tasks": report})
    assert list(tables_of(tmp_path / "ours")["scores"].headers) == list(table.headers)


def test_numbers_that_do_not_add_up_have_no_average(tmp_path: Path) -> None:
    results = {"arc": {"acc,none": 0.25}, "wiki": {"bits_per_byte,none": 1.1}}
    (tmp_path / "results_1.json").write_text(json.dumps({"results": results}))
    table = tables_of(tmp_path)["scores"]
    assert list(table.headers) == ["arc", "wiki"]
    assert [cell.text for cell in table.lines[0].cells] == ["25.0", "1.1000"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run_record.json", "{", "is damaged"),
        ("results_1.json", "{}", "holds no results of lm-eval"),
        ("other.json", "{}", "There is no result in"),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UpcyclingError, match=message):
        read_results([tmp_path])
    with pytest.raises(UpcyclingError, match="does not exist"):
        read_results([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("task", "wanted", "metric", "lower"),
    [
        ({"loss": 1.0, "accuracy": 0.5}, None, "accuracy", False),
        ({"loss": 1.0, "accuracy": 0.5}, "loss", "loss", True),
        ({"perplexity": 2.0, "bits_per_byte": 1.0}, "missing", "bits_per_byte", True),
        ({"acc_stderr": 0.1, "mystery": 1.0}, None, "mystery", False),
        ({"exact_match,strict": 0.1}, None, "exact_match,strict", False),
        ({"word_perplexity": 9.0}, None, "word_perplexity", True),
    ],
)
def test_the_metric_of_a_task(
    task: dict[str, float], wanted: str | None, metric: str, lower: bool
) -> None:
    assert primary_metric(task, wanted) == metric
    assert lower_is_better(metric, None) is lower
    assert lower_is_better(metric, "lower") and not lower_is_better(metric, "higher")


def test_numbers_as_they_are_written() -> None:
    forms = {"percent": 0.876, "digits": 2.05947, "count": 49376.0, "gain": 0.01, "whole": 3.0}
    assert [written(value, form) for form, value in forms.items()] == [
        "87.6",
        "2.0595",
        "49.4k",
        "+0.0100",
        "3",
    ]
    assert written(None, "percent") == "-" and written(5e10, "count") == "50B"


def odd_table(label: str) -> Table:
    cells = [Cell(1.5, "1.5 ± 0.1", "best"), Cell(None, "-", "second")]
    return Table(
        "odd", "A_b & c", "50 % of $x^2$ #1", ["x|y", "z_1"], [Line(label, "G", cells, None)]
    )


def test_names_cannot_break_the_formats() -> None:
    label = "a|b\\c_d {e} <i> 100% 蜂 =1"
    table = odd_table(label)
    lines = to_markdown(table).splitlines()
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)
    assert "**1.5 ± 0.1**" in lines[-1] and "<u>-</u>" in lines[-1]
    latex = to_latex(table)
    assert r"a\textbar{}b\textbackslash{}c\_d \{e\} \textless{}i\textgreater{} 100\%" in latex
    assert r"\textbf{1.5 $\pm$ 0.1}" in latex and r"\underline{-}" in latex
    assert "蜂" not in latex and "{[}U+8702]" in latex
    (_, row) = csv.reader(to_csv(odd_table("=cmd()")).splitlines())
    assert row == ["G", "'=cmd()", "1.5", ""]


def test_the_pareto_front_and_labels_that_share_a_place() -> None:
    points = [(1.0, 5.0), (2.0, 6.0), (2.0, 4.0), (3.0, 4.0), (4.0, 1.0)]
    assert pareto_front(points, lower=True) == [(1.0, 5.0), (2.0, 4.0), (4.0, 1.0)]
    assert pareto_front(points, lower=False) == [(1.0, 5.0), (2.0, 6.0)]
    assert neighbours([(0.0, 0.0), (0.001, 0.01), (1.0, 1.0)]) == [[1, 2], [3]]


def pictures_of(*places: Path) -> dict[str, Any]:
    results = read_results(places)
    tasks = find_tasks(results)
    return {picture.key: picture for picture in make_pictures(make_rows(results, tasks), tasks)}


def test_names_stand_beside_the_picture_and_inside_the_file(tmp_path: Path) -> None:
    for place in range(4):
        cost = {"total_parameters": 1e5 + place}
        record(tmp_path / str(place), f"{place} {'long ' * 12}", of(1, 1, place), cost=cost)
    figure = pictures_of(tmp_path)["parameters"].draw()
    save(figure, tmp_path, "parameters")
    for resolution in (72, 150):  # SVG, PNG
        figure.set_dpi(resolution)
        (axes,) = figure.axes
        names = axes.get_legend().get_window_extent()
        assert axes.get_window_extent().x1 < names.x0 and names.x1 <= figure.bbox.x1


def test_bars_are_gains_where_all_rows_have_the_same_base(tmp_path: Path) -> None:
    base = {"reference": "pretrained", "models": []}
    record(tmp_path / "a" / "base", "base", of(1, 1, 1), **base)
    record(tmp_path / "a" / "row", "row", of(2, 2, 2))
    record(tmp_path / "b", "row", of(9, 9, 9), experiment="other")
    assert pictures_of(tmp_path / "a")["tasks"].title.startswith("Gains over")
    assert pictures_of(tmp_path)["tasks"].title.startswith("Scores")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    return write_report([experiment(root / "runs")], root / "out", title="Made <up> & so")


def test_every_form_is_written_and_every_cell_can_be_traced(report: Path) -> None:
    names = {path.name for path in report.parent.iterdir()}
    assert {"index.html", "report.md", "report.tex", "report.json", "scores.csv"} <= names
    assert {"tasks.png", "tasks.svg", "parameters.png", "flops.svg"} <= names
    content = json.loads((report.parent / "report.json").read_text())
    moe = next(line for line in content["scores"]["lines"] if line["method"] == "MoE")
    assert moe["cells"]["prose"]["value"] == pytest.approx(2.31)
    assert [run["seed"] for run in moe["runs"]] == [0, 1]
    assert all(Path(run["record"]).is_file() for run in moe["runs"])
    assert moe["runs"][0]["proof"] == "holds; largest logit difference 1.0e-06"
    page = report.read_text()
    assert "fusion_bench method=dummy &#39;modelpool.models={a: &#39;" in page
    assert "RuntimeError: it broke" in page and "Broken &lt;b&gt;&amp;" in page
    assert "<b>&" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_the_same_runs_give_the_same_files(report: Path, tmp_path: Path) -> None:
    runs = report.parent.parent / "runs"
    again = write_report([runs], tmp_path / "out", title="Made <up> & so")
    for path in report.parent.glob("[a-z]*.*"):
        if path.suffix in (".md", ".tex", ".csv", ".json", ".svg", ".html"):
            assert (again.parent / path.name).read_bytes() == path.read_bytes(), path.name


def needs(program: str, packages: str) -> None:
    """Skip where a program is missing, and say how to get it; in CI it must be there."""
    if shutil.which(program) is None:
        message = f"{program} is missing: apt-get install {packages}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def test_the_latex_compiles(report: Path, tmp_path: Path) -> None:
    needs("pdflatex", "texlive-latex-base texlive-latex-recommended")
    folder = tmp_path / "latex"
    shutil.copytree(report.parent, folder)
    every = "".join(map(chr, range(1, 0x180))) + "蜂\u2014\u2019"
    (folder / "scores.tex").write_text(to_latex(odd_table(every)))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert (folder / "report.pdf").stat().st_size > 10_000


@pytest.fixture(scope="module")
def browser() -> Any:
    needs("chromedriver", "chromium chromium-driver")
    needs("chromium", "chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def names(browser: Any, key: str) -> list[str]:
    rows = browser.find_elements("css selector", f"section[aria-labelledby={key}] tr[data-row]")
    return [row.get_attribute("data-row") for row in rows if row.is_displayed()]


def test_the_page_sorts_filters_and_leads_to_the_runs(report: Path, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(report.as_uri())
    header = browser.find_element("xpath", "//section[1]//th[.='prose']")
    before = names(browser, "scores")
    header.send_keys(Keys.ENTER)  # by keyboard
    wait = WebDriverWait(browser, 5)
    wait.until(lambda _: names(browser, "scores") != before)
    assert header.get_attribute("aria-sort") == "descending"
    assert names(browser, "scores")[:4] == [
        "Fine-tuned (arithmetic)",
        "Fine-tuned (source)",
        "Pre-trained",
        "Fine-tuned (prose)",
    ]  # by value, within the group
    browser.find_element("xpath", "//section[1]//th[.='prose']").click()
    wait.until(lambda _: names(browser, "scores")[0] == "Fine-tuned (prose)")

    field = browser.find_element("id", "filter")
    field.send_keys("task arith")
    assert names(browser, "scores") == ["Task Arithmetic (scaling_factor=0.3)"]
    assert "rows" in browser.find_element("id", "shown").text
    field.clear()
    field.send_keys("x", Keys.BACKSPACE)
    assert len(names(browser, "scores")) == len(before)

    browser.find_element("link text", "MoE").click()
    opened = browser.find_element("css selector", "details:target")
    assert opened.get_attribute("open") and "seed" in opened.text and "holds" in opened.text
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_text_can_be_read(
    report: Path, browser: Any, width: int, scheme: str
) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(report.as_uri())
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 50 and min(contrasts) >= 4.5  # WCAG AA


CONTRASTS = """
const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
const light = rgb => { const [r, g, b] = rgb.slice(0, 3).map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = e => { for (; e; e = e.parentElement) {
  const c = parse(getComputedStyle(e).backgroundColor);
  if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
const all = document.querySelectorAll("td, th, p, a, h1, h2, label, summary, dd, dt, li, pre");
return [...all].map(e => {
  const a = light(parse(getComputedStyle(e).color)), b = light(ground(e));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
"""


def test_pools_of_images_and_of_answers_are_read_by_what_they_measure(tmp_path: Path) -> None:
    """As our task pools report them: accuracy, else exact match, else the loss."""
    scores = {"accuracy": 0.5, "accuracy_stderr": 0.1, "loss": 1.2, "examples": 12}
    answers = {"exact_match": 0.25, "loss_nats_per_token": 2.0, "truncated_inputs": 0}
    info = {"average": {}, "model_info": {"all_params": 3}}
    for name, better in (("a", 0.0), ("b", 0.25)):
        report = {
            "vision": {"pets": {**scores, "accuracy": 0.5 + better}, **info},
            "words": {"rte": {**answers, "exact_match": 0.25 + better}, **info},
            "losses": {"rte": {"loss_nats_per_token": 2 - better, "examples": 3}, **info},
        }
        record(tmp_path / name, name, {}, error=None, report=report, tasks={})
    table = tables_of(tmp_path)["scores"]
    shown = texts(table)
    assert [shown["a"][0], shown["b"][0]] == ["50.0 ± 10.0", "75.0 ± 10.0"]
    assert [shown["a"][1], shown["b"][1]] == ["25.0", "50.0"]
    assert [shown["a"][2], shown["b"][2]] == ["2.0000", "1.7500"]
    best = {line.label: [cell.mark for cell in line.cells[:3]] for line in table.lines}
    assert best["b"] == ["best"] * 3
