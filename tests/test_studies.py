"""The studies: their records are whole, their pages are of them, and one run of each kind works."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fusion_upcycle.demo.texts import domain_text
from fusion_upcycle.report.tables import read_run_record

STUDIES = Path(__file__).resolve().parents[1] / "examples" / "studies"
NAMES = ("lever", "budget", "tokens", "scratch", "initialisers", "growing", "merged", "vision")


@pytest.fixture(scope="module")
def lab() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("lab")
        for name in ("lab", "work", "figures", "fashion", *NAMES):
            sys.modules.pop(name, None)


def study(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_record_holds_what_the_study_says_it_runs(lab: ModuleType, name: str) -> None:
    rows = read_run_record(STUDIES / "results" / name)[name]["runs"]
    runs = study(name).runs(False)
    assert len({run.key for run in runs}) == len(runs), "a run is there twice"
    assert [lab.of_row(row).key for row in rows] == [run.key for run in runs]
    assert [row["arm"] for row in rows] == [run.arm for run in runs]


def test_the_short_study_is_a_part_of_the_long_one(lab: ModuleType) -> None:
    budget = study("budget")
    short = {run.key for run in budget.runs(True)}
    assert len(short) == 12
    assert short < {run.key for run in budget.runs(False)}


def test_both_arms_take_the_rate_that_was_the_best_of_equally_many_trials(lab: ModuleType) -> None:
    rows = read_run_record(STUDIES / "results" / "lever")["lever"]["runs"]
    lever = study("lever")
    for arm in ("dense", "8 top-1"):
        for share in (0.1, 0.5):
            tried = {
                row["learning_rate"]: lab.mean(row, "validation")
                for row in lab.select(rows, start="trunk", arm=arm, share=share)
                if arm == "dense" or lever.is_main(row)
            }
            assert len(tried) == 4
            assert min(tried, key=lambda rate: tried[rate]) == lab.LEARNING_RATE


def test_budgets_are_equal_in_flops(lab: ModuleType) -> None:
    rows = read_run_record(STUDIES / "results" / "budget")["budget"]["runs"]
    of_base = {row["share"]: row["flops"] for row in rows if row["arm"] == "dense"}
    for row in rows:
        assert row["flops"] == pytest.approx(of_base[row["share"]], rel=0.01), row["arm"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of a study keep what they share: packed texts, models they start from."""
    return tmp_path_factory.mktemp("study")


@pytest.mark.filterwarnings("ignore:Routers out of balance")
@pytest.mark.parametrize(
    "run",
    [
        {"start": "base", "make": {}},
        {"start": "base", "make": {"do": "upcycle", "num_experts": 4, "experts_per_token": 1}},
        {
            "start": "base",
            "make": {
                "do": "merge",
                "experts_per_token": 1,
                "shared": "base",
                "router_init": "prototype",
            },
        },
        {
            "start": "moe",
            "make": {"do": "expand", "num_experts": 20, "selection": "control", "max_copies": 2},
            "options": {"optimizer_state": "carried", "warmup_steps": 0},
        },
        {"start": "moe", "make": {"do": "fresh", "num_local_experts": 8}, "base": "trunk"},
    ],
    ids=["dense", "upcycled", "merged", "grown", "fresh"],
)
def test_a_run_is_trained_and_scored(
    lab: ModuleType,
    run: dict[str, Any],
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def some(domain: str, split: str) -> tuple[str, ...]:
        return domain_text(domain, split)[:10]

    monkeypatch.setattr("fusion_upcycle.demo.models.domain_text", some)  # what it is scored on
    one = lab.Run(arm="x", share=0.001, seed=1, **run)
    row = asdict(one) | importlib.import_module("work").train_run(one, shared, tmp_path)
    assert lab.of_row(row) == one
    assert 0 < row["bits_per_byte"]["test"]["prose"] < 8.1  # log2(257) = 8.006 untrained
    assert row["tokens"] == row["final"]["tokens"]
    assert row["flops"] > 0


def test_a_study_goes_on_where_it_was_stopped(
    lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lab.Run("x", "base", 0.001, 1)
    folder = tmp_path / lab.shipped_identity()
    folder.mkdir()
    (folder / f"{run.key}.json").write_text('{"flops": 1}')
    monkeypatch.setattr(lab, "ProcessPoolExecutor", None)  # there is nothing to run
    assert lab.run_all([run], tmp_path, 2) == [asdict(run) | {"flops": 1}]


def test_the_figure_of_growing_leaves_out_what_was_trained_on_one_domain(
    lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(
        study("figures"), "lines_over_budget", lambda rows, *others: drawn.extend(rows)
    )
    rows = read_run_record(STUDIES / "results" / "growing")["growing"]["runs"]
    study("growing").draw(rows, tmp_path)
    assert 0 < len(drawn) < len(rows)
    assert not any("domain" in row["options"] for row in drawn)


def test_what_inspect_knows_is_of_the_records(lab: ModuleType) -> None:
    measured = study("measured")
    assert measured.FILE.read_text(encoding="utf-8") == measured.text()
