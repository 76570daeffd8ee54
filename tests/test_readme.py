"""The tables of README and docs are what the committed run records say, to the letter."""

import importlib.util
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.report.tables import bits_per_byte_table, read_run_record

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "examples" / "results" / "study"
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def example(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "examples" / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_with_siblings(path: str) -> ModuleType:
    """A script that imports another one of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend((ROOT / "examples" / path).parent)
        return example(path)


def demo_table() -> str:
    folder = ROOT / "examples" / "results" / "demo"
    demo = example_with_siblings("demo.py")
    names = ("dense", "upcycled", "dense, trained on", "upcycled, trained on")
    records = {name: read_run_record(folder / demo.folder_name(name)) for name in names}
    return bits_per_byte_table("", records).to_markdown()


def exactness_table() -> str:
    record = read_run_record(ROOT / "examples" / "results")
    return str(example("exactness.py").table(record).to_markdown())


def families_table(kind: str) -> str:
    families = example("families.py")
    record = read_run_record(ROOT / "examples" / "results" / "families")
    return str(getattr(families, f"{kind}_table")(record).to_markdown())


def readers_table() -> str:
    record = read_run_record(ROOT / "examples" / "results" / "readers")
    return str(example("readers.py").table(record))


def recipes_table() -> str:
    record = read_run_record(ROOT / "examples" / "results" / "recipes")
    return str(example("recipes.py").table(record).to_markdown())


def merging_table() -> str:
    record = read_run_record(ROOT / "examples" / "results" / "merging")
    return str(example("merging.py").table(record).to_markdown())


def merge_table() -> str:
    record = json.loads((ROOT / "examples" / "benchmarks" / "results" / "merge.json").read_text())
    return str(example_with_siblings("benchmarks/merge.py").table(record["merge"]).to_markdown())


def convert_tables() -> str:
    record = json.loads((ROOT / "examples" / "benchmarks" / "results" / "convert.json").read_text())
    return str(example("benchmarks/convert.py").markdown(record))


def train_table() -> str:
    record = json.loads((ROOT / "examples" / "benchmarks" / "results" / "train.json").read_text())
    return str(
        example_with_siblings("benchmarks/train.py").table(record["train"], "main").to_markdown()
    )


def study_table() -> str:
    return str(example("study.py").table(read_run_record(STUDY)).to_markdown())


def importance_table() -> str:
    record = read_run_record(ROOT / "examples" / "results" / "importance")
    return str(example("importance.py").table(record).to_markdown())


def growing_tables(script: str, section: str) -> str:
    folder = ROOT / "examples" / "expert_upcycling" / "results" / script.removesuffix(".py")
    made = example_with_siblings(f"expert_upcycling/{script}")
    tables = made.tables(read_run_record(folder)[section])
    return "\n\n".join(f"{table.title}:\n\n{table.to_markdown()}" for table in tables)


#: Marker of a table -> what makes it.
TABLES: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "exactness": exactness_table,
    "convert": convert_tables,
    "recipes": recipes_table,
    "readers": readers_table,
    "merging": merging_table,
    "merge": merge_table,
    "train": train_table,
    "study": study_table,
    "importance": importance_table,
    "router": partial(growing_tables, "router.py", "router"),
    "growing": partial(growing_tables, "study.py", "expert_upcycling"),
    "pairs": partial(families_table, "pairs"),
    "shards": partial(families_table, "shards"),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_is_that_of_the_record(name: str) -> None:
    marked = re.compile(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", re.DOTALL)
    found = {page: marked.findall(text) for page, text in PAGES.items()}
    found = {page: tables for page, tables in found.items() if tables}
    assert found, f"neither README.md nor a page of docs/ has a table {name}"
    made = TABLES[name]()
    for page, tables in found.items():
        assert tables == [made], page


def test_every_marked_table_is_made_from_a_record() -> None:
    for page, text in PAGES.items():
        marked = re.findall(r"<!-- table: (.*) -->", text)
        assert set(marked) <= TABLES.keys(), page


def test_the_families_of_the_record_are_all_families() -> None:
    record = read_run_record(ROOT / "examples" / "results" / "families")
    measured = {(row["target"], row["source"]) for row in record["families"]["pairs"]}
    assert measured == {(name, dense) for name, a in ARCHITECTURES.items() for dense in a.dense}


def test_the_merging_settings_are_the_best_of_equally_many_trials() -> None:
    merging = example("merging.py")
    record = read_run_record(ROOT / "examples" / "results" / "merging")
    trials = record["tuning"]["trials"]
    assert record["tuning"]["chosen"] == merging.CHOSEN
    for method, settings in merging.CHOSEN.items():
        mine = [trial for trial in trials if trial["method"] == method]
        assert [trial["settings"] for trial in mine] == merging.TRIALS[method]
        assert len(mine) == 12
        best = min(mine, key=lambda trial: trial["bits_per_byte"]["mean"])
        assert best["settings"] == settings == record["merging"]["rows"][method]["settings"]


def test_the_study_s_settings_are_the_best_of_recorded_trials_at_equal_flops() -> None:
    study = example("study.py")
    trials = read_run_record(study.TUNING)["tuning"]["trials"]
    asked = [(vars(arm), given) for arm, settings in study.TRIALS.items() for given in settings]
    assert [(trial["arm"], trial["settings"]) for trial in trials] == asked
    counts = {kind: sum(arm["kind"] == kind for arm, _ in asked) for kind in ("dense", *study.MOES)}
    assert max(counts, key=lambda kind: counts[kind]) == "dense"
    flops = [trial["training_flops"] for trial in trials]
    assert max(flops) / min(flops) < 1.01
    arms = read_run_record(STUDY)["study"]["arms"]
    for name, arm in study.ARMS.items():
        assert arms[name]["settings"] == study.chosen(trials, arm)
        for trial in trials:
            if trial["arm"] == vars(arm):
                best = study.mean({"bits_per_byte": arms[name]["bits_per_byte"]}, "validation")
                assert best <= study.mean(trial, "validation")
