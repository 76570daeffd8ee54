"""The tables of README and docs are what the committed run records say, to the letter."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.report.tables import read_run_record

ROOT = Path(__file__).resolve().parents[1]


def example(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "examples" / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = example("tables.py")
FOUND = [
    (page.relative_to(ROOT).as_posix(), found["name"], found["table"])
    for page in tables.PAGES
    for found in tables.MARKED.finditer(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "name", "table"), FOUND, ids=[f"{f[0]}-{f[1]}" for f in FOUND])
def test_table_is_that_of_the_record(page: str, name: str, table: str) -> None:
    assert table == tables.TABLES[name](), "python examples/tables.py writes it anew"


def test_every_record_has_its_table_on_a_page_and_at_most_once_there() -> None:
    assert {name for _, name, _ in FOUND} == tables.TABLES.keys()
    assert len({(page, name) for page, name, _ in FOUND}) == len(FOUND)


def test_the_families_of_the_record_are_families() -> None:
    record = read_run_record(ROOT / "examples" / "results" / "families")
    measured = {(row["target"], row["source"]) for row in record["families"]["pairs"]}
    assert measured <= {(name, dense) for name, a in ARCHITECTURES.items() for dense in a.dense}


def test_the_merging_settings_are_the_best_of_equally_many_trials() -> None:
    merging = example("merging.py")
    record = read_run_record(ROOT / "examples" / "results" / "merging")
    trials = record["tuning"]["trials"]
    ways = {way.name: way for way in merging.ways()}
    assert [*merging.POOL.values(), *ways] == list(record["merging"]["rows"])
    tried = {name: way for name, way in ways.items() if way.trials}
    assert record["tuning"]["chosen"] == {name: way.settings for name, way in tried.items()}
    for name, way in tried.items():
        mine = [trial for trial in trials if trial["method"] == name]
        assert [trial["settings"] for trial in mine] == way.all_settings()
        assert len(mine) == 12
        best = min(mine, key=lambda trial: trial["bits_per_byte"]["mean"])
        assert best["settings"] == way.settings == record["merging"]["rows"][name]["settings"]
    shared = tried["MoE, prototype router"].settings["shared"]
    assert ways["MoE, normal router"].method["shared"] == shared


def test_a_baseline_is_one_file(tmp_path: Path) -> None:
    merging = example("merging.py")
    (tmp_path / "half_way.yaml").write_text(
        """
method:
  _target_: fusion_bench.method.TaskArithmeticAlgorithm
  scaling_factor: 0.5
trials:
  scaling_factor: [0.25, 0.5]
"""
    )
    (way,) = merging.ways(tmp_path)
    assert (way.name, way.settings) == ("half_way", {"scaling_factor": 0.5})
    assert way.all_settings() == [{"scaling_factor": 0.25}, {"scaling_factor": 0.5}]
    assert way.with_settings(way.all_settings()[0]).method["scaling_factor"] == 0.25
