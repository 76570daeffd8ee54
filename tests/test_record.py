"""Run records: what is in the file, that sections add up, and that nothing is lost."""

import json
import time
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.report import Measured, write_run_record


def read(folder: Path) -> dict:
    return json.loads((folder / "run_record.json").read_text())


def test_sections_are_merged_and_replaced(tmp_path: Path) -> None:
    path = write_run_record("method", {"seed": 1}, tmp_path / "new")
    assert path == tmp_path / "new" / "run_record.json"
    write_run_record("taskpool", {"loss_nats_per_token": 1.5}, str(tmp_path / "new"))
    write_run_record("method", {"seed": 2}, tmp_path / "new")
    record = read(tmp_path / "new")
    assert (record["method"], record["taskpool"]) == ({"seed": 2}, {"loss_nats_per_token": 1.5})
    assert [p.name for p in path.parent.iterdir()] == ["run_record.json"]  # no temporary file left


def test_header_says_what_ran_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fusion_bench", "method=dummy"])
    write_run_record("method", {}, tmp_path)
    record = read(tmp_path)
    assert record["schema"] == 1
    assert record["created"].endswith("+00:00")
    assert record["command"] == ["fusion_bench", "method=dummy"]
    assert record["versions"].keys() == {
        "python", "torch", "transformers", "fusion_bench", "lightning", "fusion_upcycle"
    }  # fmt: skip
    assert record["versions"]["fusion_bench"]
    assert record["machine"]["total_memory_bytes"] > 2**28
    assert record["machine"]["cpu_count"] >= 1


def test_no_folder_and_no_hydra_job_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    assert write_run_record("method", {"seed": 1}) is None
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_hydra_job_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path / "0")}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    assert write_run_record("method", {"seed": 1}) == tmp_path / "0" / "run_record.json"


@pytest.mark.parametrize("value", [Path("x"), float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(
    tmp_path: Path, value: object
) -> None:
    write_run_record("method", {"seed": 1}, tmp_path)
    with pytest.raises(UpcyclingError, match="'method' of the run record is not JSON"):
        write_run_record("method", {"value": value}, tmp_path)
    assert read(tmp_path)["method"] == {"seed": 1}


def test_a_section_cannot_take_a_name_of_the_header(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="'versions' of the run record is taken"):
        write_run_record("versions", {}, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}'])
def test_a_file_that_is_no_run_record_is_not_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "run_record.json").write_text(content)
    with pytest.raises(UpcyclingError, match="move it away"):
        write_run_record("method", {}, tmp_path)
    assert (tmp_path / "run_record.json").read_text() == content


def test_measured_tells_waiting_from_working_and_counts_memory_in_bytes() -> None:
    with Measured() as waiting:
        time.sleep(0.2)
    assert waiting.wall_seconds >= 0.2 > 2 * waiting.cpu_seconds
    with Measured() as working:
        block = bytearray(300 * 2**20)
        block[::4096] = b"x" * len(block[::4096])
        started = time.process_time()
        while time.process_time() < started + 0.1:
            pass
    assert working.wall_seconds > 0
    assert working.cpu_seconds >= 0.1
    assert 300 * 2**20 < working.peak_rss_bytes < 2**40
    assert working.as_record().keys() == {"wall_seconds", "cpu_seconds", "peak_rss_bytes"}


def test_measured_also_measures_a_block_that_fails() -> None:
    cost = Measured()
    with pytest.raises(KeyError), cost:
        {}["missing"]
    assert cost.wall_seconds > 0
