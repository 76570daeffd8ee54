"""Speed, MFU and memory of a run: against what is counted and measured by other means."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import CONTEXT, moe_model, run
from torch.utils.flop_counter import FlopCounterMode

from fusion_upcycle.live.cost import TRAINING_PASSES, forward_flops
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.seen import PEAK_TFLOPS, peak_tflops

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")


def test_mfu_is_counted_flops_over_the_given_peak(tmp_path: Path) -> None:
    model = moe_model()
    flops = TRAINING_PASSES * forward_flops(model, CONTEXT)
    options: dict[str, Any] = {
        "peak_tflops": 0.5,
        "checkpoint_every": 2,
        "output": tmp_path / "out",
    }
    record = run(model, tmp_path, 4, **options).record
    rows = read_metrics(tmp_path / "log")
    assert len(rows) == 4
    for row in rows:
        assert row["tokens_per_second_per_device"] == row["tokens_per_second"]
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 0.5e12)
        assert row["peak_memory_gb"] > 0.1  # a process that has loaded torch
    assert record["final"]["mfu"] == rows[-1]["mfu"]
    cost = record["cost"]
    assert cost["mfu"] == pytest.approx(cost["tokens_per_second"] * flops / 0.5e12)
    assert cost["peak_memory_bytes"] == pytest.approx(1e9 * rows[-1]["peak_memory_gb"])
    waited = [row["save_seconds"] for row in rows]
    assert waited[1] < waited[2] / 2 <= waited[3] / 2 < cost["save_seconds"] / 2
    assert cost["export_seconds"] > 0
    events = EventAccumulator(str(next((tmp_path / "log" / "tensorboard").iterdir()))).Reload()
    assert {"mfu", "save_seconds", "peak_memory_gb", "export_seconds"} <= set(
        events.Tags()["scalars"]
    )
    assert cost["tokens_per_second"] < 4 * 64 / sum(64 / row["tokens_per_second"] for row in rows)


def test_without_a_known_peak_no_share_is_claimed(tmp_path: Path) -> None:
    record = run(moe_model(), tmp_path, 2).record
    assert "mfu" not in record["cost"] and "mfu" not in record["final"]
    assert record["cost"]["tokens_per_second_per_device"] > 0


def test_flops_of_a_live_model_are_those_that_pytorch_counts() -> None:
    model = moe_model().eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(CONTEXT)[None], use_cache=False)
    config = model.config
    scores = 2 * config.hidden_size * 2 * config.num_hidden_layers * CONTEXT  # of all positions
    seen = scores * (CONTEXT + 1) / (2 * CONTEXT)  # of those that a token attends to
    vectors = 2 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    counted = counter.get_total_flops() / CONTEXT
    assert forward_flops(model, CONTEXT) - seen - vectors == pytest.approx(counted - scores)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GB200", None),  # whose chip is faster than a B200
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_go_by_the_name_of_the_device(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak
    assert peak_tflops(torch.device("cpu")) is None
    assert peak is None or peak in PEAK_TFLOPS.values()
